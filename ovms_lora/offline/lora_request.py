"""LoRARequest: which adapter a prompt is to be answered with. Names and errors are vLLM's. Reads nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ovms_lora.core.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """A name and a number of the caller's choice for the adapter in the folder `lora_path`.

    Name and number each stand for one folder as long as an `LLM` lives. Raises ArgumentError, a ValueError, for a
    number below 1 or an empty path.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str | os.PathLike[str]

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ArgumentError(f"id must be > 0, got {self.lora_int_id}")
        if not os.fspath(self.lora_path):
            raise ArgumentError("lora_path cannot be empty")

    @property
    def adapter_id(self) -> int:
        """The number, `lora_int_id`."""
        return self.lora_int_id

    @property
    def name(self) -> str:
        """The name, `lora_name`."""
        return self.lora_name

    @property
    def path(self) -> str:
        """The folder, `lora_path`, as a string."""
        return os.fspath(self.lora_path)
