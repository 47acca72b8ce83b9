"""What `--extra_quantization_params` asks for: optimum-cli's flags for compressing weights, which OVMS passes on.

Owns: the flags, their grammar, and which of them go together and with which weight format.
Does not know: nncf, or how a dataset is used.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

from ovms_lora.core.errors import UsageError
from ovms_lora.core.flags import FlagParser
from ovms_lora.export.weight_format import WeightFormat

_FLAG: Final = "--extra_quantization_params"
_WITHOUT_DATA: Final = "weight_quantization_error"
_METRICS: Final = (
    _WITHOUT_DATA,
    "hessian_input_activation",
    "mean_activation_variance",
    "max_activation_variance",
    "mean_activation_magnitude",
)
# What int8 leaves to choose: one scale for each row of weights is all there is.
_INT8_VALUES: Final[dict[str, tuple[Any, ...]]] = {"sym": (True,), "group_size": (-1,), "ratio": (1.0,)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """How nncf compresses weights; None leaves a choice to it. Names and meanings are optimum-cli's.

    `dataset` is a text file with one sample for calibration on each line.
    """

    sym: bool = False
    group_size: int | None = None
    group_size_fallback: Literal["error", "ignore", "adjust"] | None = None
    ratio: float | None = None
    all_layers: bool = False
    backup_precision: Literal["none", "int8_sym", "int8_asym"] | None = None
    sensitivity_metric: str | None = None
    awq: bool = False
    scale_estimation: bool = False
    gptq: bool = False
    dataset: Path | None = None
    num_samples: int | None = None

    @property
    def chosen(self) -> dict[str, Any]:
        """What differs from the defaults."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None and value is not False}

    def check(self, weight_format: WeightFormat) -> None:
        """Raise UsageError for what does not go together, or not with the weight format."""
        for name, value in self.chosen.items():
            flag = _flag(name) if value is True else f"{_flag(name)} {value}"
            if not weight_format.compressed:
                raise _error(f"{flag}: {weight_format} weights are not compressed", "add --weight-format int4")
            if weight_format is WeightFormat.INT8 and value not in _INT8_VALUES.get(name, ()):
                raise _error(f"{flag} is not for int8 weights", "it goes with --weight-format int4")
        mixed = self.ratio is not None and self.ratio < 1
        if self.sensitivity_metric is not None and not mixed:
            raise _error("--sensitivity-metric is used by nothing", "add a --ratio below 1")
        self._check_dataset(mixed=mixed)

    def _check_dataset(self, *, mixed: bool) -> None:
        by_data = self.sensitivity_metric not in (None, _WITHOUT_DATA)
        needs = [name for name in ("scale_estimation", "gptq", "num_samples") if getattr(self, name)]
        needs += ["sensitivity_metric"] if by_data else []
        if needs and self.dataset is None:
            raise _error(f"{_flag(needs[0])} needs --dataset", "give a text file with one sample on each line")
        used = self.awq or self.scale_estimation or self.gptq or (mixed and self.sensitivity_metric != _WITHOUT_DATA)
        if self.dataset is not None and not used:
            raise _error("--dataset is used by nothing", "add --awq, --scale-estimation, --gptq or a --ratio below 1")


def default_format(device: str) -> WeightFormat:
    """Return the weight format where none is given."""
    return WeightFormat.INT4 if device.startswith("NPU") else WeightFormat.INT8


def default_compression(device: str) -> Compression:
    """Return the compression where none is given: an NPU takes one scale for each channel only, as in OVMS."""
    return Compression(sym=True, ratio=1.0, group_size=-1) if device.startswith("NPU") else Compression()


def parse_compression(text: str) -> Compression:
    """Parse the value of `--extra_quantization_params`. Raises UsageError naming what is wrong."""
    try:
        values = _parser().parse_all(shlex.split(text))
    except ValueError as error:
        raise _error(f"{text!r}: {error}", "quote it as for a shell") from error
    except UsageError as error:
        raise _error(error.message, error.hint or "") from error
    return Compression(**vars(values))


def _parser() -> FlagParser:
    parser = FlagParser(prog=_FLAG, add_help=False)
    for name in ("sym", "all_layers", "awq", "scale_estimation", "gptq"):
        parser.add(name.replace("_", "-"), action="store_true")
    parser.add("group-size", type=_group_size)
    parser.add("group-size-fallback", choices=("error", "ignore", "adjust"))
    parser.add("ratio", type=_ratio)
    parser.add("backup-precision", choices=("none", "int8_sym", "int8_asym"))
    parser.add("sensitivity-metric", choices=_METRICS)
    parser.add("dataset", type=_dataset)
    parser.add("num-samples", type=_positive)
    return parser


def _group_size(text: str) -> int:
    return -1 if text == "-1" else _positive(text)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def _dataset(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a file: datasets are not fetched, a text file with one sample on each line is read"
        )
    return Path(text)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _error(message: str, hint: str) -> UsageError:
    flags = " ".join(_flag(field.name) for field in fields(Compression))
    return UsageError(f"{_FLAG}: {message}", hint=f"known are {flags}" if "--help" in hint else hint)
