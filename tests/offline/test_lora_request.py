"""LoRARequest has vLLM's names and errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from ovms_lora import LoRARequest


def test_name_number_and_path_stand_in_vllms_order() -> None:
    request = LoRARequest("sql", 1, "loras/sql")
    assert (request.lora_name, request.lora_int_id, request.lora_path) == ("sql", 1, "loras/sql")
    assert (request.name, request.adapter_id, request.path) == ("sql", 1, "loras/sql")
    assert request == LoRARequest(lora_name="sql", lora_int_id=1, lora_path="loras/sql")


@pytest.mark.parametrize("number", [0, -3])
def test_a_number_below_one_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"^id must be > 0, got {number}$"):
        LoRARequest("sql", number, "loras/sql")


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^lora_path cannot be empty$"):
        LoRARequest("sql", 1, "")


def test_a_path_may_be_a_path() -> None:
    assert LoRARequest("sql", 1, Path("loras") / "sql").path == "loras/sql"
