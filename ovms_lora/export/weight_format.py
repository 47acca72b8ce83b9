"""How weights are stored in an IR."""

from __future__ import annotations

from enum import StrEnum


class WeightFormat(StrEnum):
    """The value of `--weight-format`; int8 and int4 are nncf's."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def bits(self) -> int:
        """Bits of one stored weight."""
        return {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4}[self]

    @property
    def compressed(self) -> bool:
        """Whether nncf compresses the weights after conversion."""
        return self in (WeightFormat.INT8, WeightFormat.INT4)
