"""The linear layers of an exported base, by PyTorch module path: what a runtime adapter is checked against.

Owns: reading them from the names and shapes of an IR. Does not know: adapters.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ovms_lora.adapters.adapter import BaseLinears, LinearShape

_LINEAR: Final = re.compile(r"__module\.(?P<path>[^/]+)/.+/MatMul(_\d+)?")


def read_base_linears(folder: Path) -> BaseLinears:
    """Read the layers of a model folder's IR: MatMuls that keep a module's name and have a weight of fixed size."""
    import openvino

    shapes = {}
    for op in openvino.Core().read_model(folder / "openvino_model.xml").get_ordered_ops():
        match = _LINEAR.fullmatch(op.get_friendly_name())
        if op.get_type_name() != "MatMul" or match is None:
            continue
        weight = op.input_value(1).get_partial_shape()
        if weight.is_static and len(weight) == 2:
            rows, columns = (dimension.get_length() for dimension in weight)
            if not op.get_attributes()["transpose_b"]:
                rows, columns = columns, rows
            shapes[match["path"]] = LinearShape(out_features=rows, in_features=columns)
    return BaseLinears(shapes, output_head="lm_head" if "lm_head" in shapes else None)
