"""LinearStack: the linears of some decoder blocks, of a given model's shape, one behind the other, without attention.

    x ─► q, k, v ─► · ─► o ─► + ─► gate, up ─► · ─► down ─► + ─► …

What stands between the linears is as cheap as it can be. `after` is called for each linear and may add to its output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as ops

from ovms_lora.adapters.adapter import BaseLinears

FloatArray = npt.NDArray[np.float32]
After = Callable[[str, ov.Node, ov.Node], ov.Node]  # path, input and output of a linear → what is read as its output

_OF_BLOCK = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_STRENGTH = 0.5  # of what a block adds, so that values stay near 1


class LinearStack:
    """Random weights for `blocks` blocks, or all that there are; `shapes` are (out, in) by module path."""

    def __init__(self, base: BaseLinears, blocks: int) -> None:
        rng = np.random.default_rng(0)
        blocks = min(blocks, sum(path.endswith(_OF_BLOCK[0]) for path in base.shapes))
        self.paths = [f"model.layers.{block}.{name}" for block in range(blocks) for name in _OF_BLOCK]
        self.shapes = {path: (base.shapes[path].out_features, base.shapes[path].in_features) for path in self.paths}
        self._weights: dict[str, FloatArray] = {
            path: rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[1]))
            for path, shape in self.shapes.items()
        }
        self._blocks = blocks

    @property
    def width(self) -> int:
        """The features of the input."""
        return self.shapes[self.paths[0]][1]

    def model(self, after: After, parameters: Mapping[str, ov.Node]) -> ov.Model:
        """Return a model of input "x" [rows, 1, width], with what `after` adds; `parameters` are what that reads."""
        x = ops.parameter([-1, 1, self.width], np.float32)
        x.output(0).set_names({"x"})
        for name, parameter in parameters.items():
            parameter.output(0).set_names({name})
        state: Any = x
        for block in range(self._blocks):
            state = self._block(f"model.layers.{block}", state, after)
        return ov.Model([ops.result(state)], [x, *parameters.values()])

    def _block(self, prefix: str, x: ov.Node, after: After) -> ov.Node:
        def linear(name: str, source: ov.Node) -> ov.Node:
            path = f"{prefix}.{name}"
            node = ops.matmul(source, ops.constant(self._weights[path]), False, True)
            node.set_friendly_name(f"__module.{path}/aten::linear/MatMul")
            return after(path, source, node)

        q, k, v = (linear(f"self_attn.{name}_proj", x) for name in "qkv")
        mixed = ops.multiply(_squashed(q), ops.add(_mean(k), _mean(v)))
        x = ops.add(x, _part(linear("self_attn.o_proj", mixed)))
        gate, up = (linear(f"mlp.{name}_proj", x) for name in ("gate", "up"))
        return ops.add(x, _part(linear("mlp.down_proj", ops.multiply(_squashed(gate), up))))


def _squashed(node: ov.Node) -> ov.Node:
    return ops.tanh(node)


def _mean(node: ov.Node) -> ov.Node:
    return ops.reduce_mean(node, ops.constant(np.int64(2)), keep_dims=True)


def _part(node: ov.Node) -> ov.Node:
    return ops.multiply(node, ops.constant(np.float32(_STRENGTH)))
