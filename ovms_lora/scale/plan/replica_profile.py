"""ReplicaProfile: what one replica of a model costs, as measured, and its JSON form.

`python -m bench.replica_profile` writes such a file; `docs/planning.md` explains its keys. Interpolating between the
measured points is `step_costs`' business.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from ovms_lora.core.errors import PlanError
from ovms_lora.core.strict_model import StrictModel

_MEASURE = "python -m bench.replica_profile --model DIR --out FILE measures one"

Count = Annotated[int, Field(ge=0, le=2**40)]
Positive = Annotated[int, Field(ge=1, le=2**40)]
Seconds = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class StepPoint(StrictModel):
    """The time of one step in which `rows` sequences decode, with so many different adapters among them."""

    rows: Positive
    adapters: Count
    seconds: Annotated[Seconds, Field(gt=0)]


class PrefillPoint(StrictModel):
    """The time of one step that computes `tokens` tokens of one prompt, with an adapter, and nothing else."""

    tokens: Positive
    seconds: Annotated[Seconds, Field(gt=0)]


class ReplicaProfile(StrictModel):
    """Times in seconds, sizes in bytes. Adapters were measured at rank `rank`; others cost in proportion to theirs."""

    model: str
    rank: Positive
    max_num_batched_tokens: Positive = 256
    steps: tuple[StepPoint, ...] = Field(min_length=1)
    prefill: tuple[PrefillPoint, ...] = Field(min_length=2)
    bring_in_seconds: Seconds
    load_seconds: Seconds
    overhead_seconds: Seconds = 0.0
    base_bytes: Count = 0
    kv_bytes_per_token: Count = 0
    resident_bytes_per_rank: Count
    host_bytes_per_adapter: Count
    machine: dict[str, Any] = Field(default_factory=dict)

    @field_validator("steps")
    @classmethod
    def _check_steps(cls, points: tuple[StepPoint, ...]) -> tuple[StepPoint, ...]:
        places = [(point.adapters, point.rows) for point in points]
        if len(set(places)) != len(places):
            raise ValueError("two points have the same rows and adapters")
        if any(point.adapters > point.rows for point in points):
            raise ValueError("a step has at most as many adapters as rows")
        if not any(point.adapters == 0 for point in points):
            raise ValueError("there is no point without adapters")
        return points

    @field_validator("prefill")
    @classmethod
    def _check_prefill(cls, points: tuple[PrefillPoint, ...]) -> tuple[PrefillPoint, ...]:
        if len({point.tokens for point in points}) != len(points):
            raise ValueError("two points have the same number of tokens")
        return points

    @property
    def max_rows(self) -> int:
        """The most rows that were measured."""
        return max(point.rows for point in self.steps)

    @property
    def max_adapters(self) -> int:
        """The most adapters in one step that were measured."""
        return max(point.adapters for point in self.steps)


def read_profile(path: Path) -> ReplicaProfile:
    """Read a profile. Raises PlanError when there is none, or when it is not one."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise PlanError(f"the profile {path} cannot be read: {error.strerror}", hint=_MEASURE) from error
    try:
        return ReplicaProfile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise PlanError(f"the profile {path} cannot be used: {place}: {first['msg']}", hint=_MEASURE) from error
