"""The graph that the runner compiles: an exported IR as paged attention, with logits only where they are asked.

After `read_paged_model` the model takes, for T tokens of S sequences in one step:

    input_ids, position_ids      int64 [T]      the sequences' tokens one after another
    past_lens                    int32 [S]      tokens of each sequence that are in the cache already
    subsequence_begins           int32 [S+1]    where each sequence's tokens begin in T
    block_indices                int32 [B]      the block tables one after another
    block_indices_begins         int32 [S+1]    where each sequence's table begins in B
    max_context_len              int32 []       longest past + new tokens
    key_cache.i, value_cache.i   [blocks, ...]  laid out as the device decides when it compiles
    sampled                      int64 [L]      the rows of T whose logits are wanted

and gives `logits` f32 [L, 1, vocabulary].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino._offline_transformations import paged_attention_transformation

from ovms_lora.core.errors import ModelFolderError

IR_NAME = "openvino_model.xml"

# What may stand between the last linear layer and the logits: Gemma's soft cap, a scale, a change of type.
_ELEMENTWISE = frozenset({"Convert", "Multiply", "Divide", "Tanh", "Add", "Subtract", "Reshape", "Result"})


def find_ir(folder: Path) -> Path:
    """Return the path of a folder's IR, whose weights lie beside it. Raises ModelFolderError when one is missing."""
    path = folder / IR_NAME
    for file in (path, path.with_suffix(".bin")):
        if not file.is_file():
            hint = "export one with export_model.py text_generation"
            raise ModelFolderError(f"{folder} holds no {file.name}", hint=hint)
    return path


def read_paged_model(core: ov.Core, folder: Path) -> ov.Model:
    """Read the IR of a folder and turn it into the graph described above.

    Raises ModelFolderError when there is no IR, or when it is not a causal language model with a KV cache.
    """
    path = find_ir(folder)
    try:
        model = core.read_model(path)
        paged_attention_transformation(model)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ModelFolderError(f"{path} cannot be served: {reason}", hint="export the model again") from error
    _gather_sampled(model, path)
    return model


def head_of(model: ov.Model) -> ov.Node:
    """Return the last linear layer, the one that makes logits; raises ModelFolderError when there is none."""
    node = next(result for result in model.get_results() if "logits" in result.input_value(0).get_names())
    while node.get_type_name() in _ELEMENTWISE:
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul":
        raise ModelFolderError(
            f"the logits come from {node.get_type_name()} {node.get_friendly_name()}, not from a MatMul"
        )
    return node


def _gather_sampled(model: ov.Model, path: Path) -> None:
    if not any("logits" in result.input_value(0).get_names() for result in model.get_results()):
        raise ModelFolderError(f"{path} has no output named logits", hint="serve a causal language model")
    head = head_of(model)
    sampled = ops.parameter([-1], np.int64, name="sampled")
    sampled.output(0).set_names({"sampled"})
    rows = ops.gather(head.input_value(0), sampled, ops.constant(np.int64(0)))
    head.input(0).replace_source_output(rows.output(0))
    model.add_parameters([sampled])
    model.validate_nodes_and_infer_types()
