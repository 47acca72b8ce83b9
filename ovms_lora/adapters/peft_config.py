"""adapter_config.json: which of PEFT's fields this server takes, and what they mean.

An allow-list. A field either has a meaning here, or matters to training only, or must be at rest (null, false or
empty); the third kind with another value, and an unknown field that is not at rest, would change the answer and is
refused by name. Nothing is imported or instantiated from what the file says. Owns the file's meaning; which modules it
selects is decided in `targets`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from ovms_lora.adapters.adapter_folder import AdapterFile
from ovms_lora.adapters.quoting import quoted
from ovms_lora.adapters.strict_json import parse_object
from ovms_lora.core.errors import AdapterError, AdapterErrorCode

CONFIG_NAME = "adapter_config.json"
ALL_LINEAR = "all-linear"

_LARGEST_FILE = 1 << 20
_MOST_CONTAINERS = 10_000
_MOST_VALUES = 50_000
_DEEPEST = 8
# More than any model has linear layers of different names; bounds modules times keys.
_MOST_ENTRIES = 2048
_MOST_LAYER_PATTERNS = 16
_LARGEST_SCALE = 1e30

# These choose how A and B start before training; the trained A and B then mean the same to everyone.
_PLAIN_INITS = frozenset({"gaussian", "orthogonal", "eva", "mica"})

# No influence on what a trained adapter computes.
_TRAINING_ONLY = frozenset(
    {
        "auto_mapping",
        "corda_config",  # read by PEFT only with init_lora_weights "corda", which is refused
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",  # read by PEFT only with use_qalora, which is refused
        "revision",
        "runtime_config",
        "task_type",
    }
)

# PEFT's meaning differs with these; known ones are listed so that a newcomer is seen to be missing by the tests.
_AT_REST = frozenset(
    {
        "alora_invocation_tokens",
        "arrow_config",
        "ensure_weight_tying",
        "kasa_config",
        "layer_replication",
        "lora_bias",
        "megatron_config",
        "modules_to_save",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "velora_config",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """What a LoRA's adapter_config.json says, as far as it changes the answer. Defaults are PEFT's.

    `target_modules` is a tuple of names (matched as PEFT matches a list), a regular expression, or "all-linear".
    `fan_in_fan_out` says that PEFT transposes the *product* for a base that stores its weight [in, out]; A and B are
    [r, in] and [out, r] either way.
    """

    target_modules: tuple[str, ...] | str
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    exclude_modules: tuple[str, ...] | str = ()
    rank_pattern: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    alpha_pattern: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    base_model_name_or_path: str | None = None


class _Document(BaseModel):
    """The types of the fields that have a meaning; null stands for PEFT's default."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    peft_type: StrictStr
    target_modules: StrictStr | list[StrictStr]
    r: StrictInt = 8
    lora_alpha: StrictInt | StrictFloat = 8
    use_rslora: StrictBool = False
    exclude_modules: StrictStr | list[StrictStr] | None = None
    rank_pattern: dict[str, StrictInt] | None = None
    alpha_pattern: dict[str, StrictInt | StrictFloat] | None = None
    layers_to_transform: StrictInt | list[StrictInt] | None = None
    layers_pattern: StrictStr | list[StrictStr] | None = None
    fan_in_fan_out: StrictBool = False
    bias: StrictStr = "none"
    init_lora_weights: StrictBool | StrictStr = True
    base_model_name_or_path: StrictStr | None = None


def read_peft_config(file: AdapterFile) -> tuple[PeftConfig, bytes]:
    """Return the parsed configuration and its bytes. Raises AdapterError as `parse_peft_config` does."""
    if file.size > _LARGEST_FILE:
        raise _invalid(f"{CONFIG_NAME} has {file.size} bytes, more than {_LARGEST_FILE}")
    data = file.read(0, file.size)
    return parse_peft_config(data), data


def parse_peft_config(data: bytes) -> PeftConfig:
    """Parse the bytes of an adapter_config.json.

    Raises AdapterError: CONFIG_INVALID for what is malformed, UNSUPPORTED with the field's name for what this server
    does not do, RANK for a rank below 1.
    """
    document = parse_object(
        data,
        what=CONFIG_NAME,
        code=AdapterErrorCode.CONFIG_INVALID,
        max_containers=_MOST_CONTAINERS,
        max_values=_MOST_VALUES,
        max_depth=_DEEPEST,
    )
    _check_peft_type(document)
    for name, value in document.items():
        if name not in _Document.model_fields and name not in _TRAINING_ONLY and not _at_rest(value):
            raise _unsupported(name, value)
    # A null where PEFT has no null means its default; pydantic would call it a wrong type.
    given = {name: value for name, value in document.items() if value is not None or name == "target_modules"}
    try:
        fields = _Document.model_validate(given)
    except ValidationError as error:
        raise _wrong_type(error) from error
    _check_values(fields)
    return _config(fields)


def _config(fields: _Document) -> PeftConfig:
    return PeftConfig(
        target_modules=_names(fields.target_modules),
        r=fields.r,
        lora_alpha=fields.lora_alpha,
        use_rslora=fields.use_rslora,
        exclude_modules=_names(fields.exclude_modules or ()),
        rank_pattern=MappingProxyType(dict(fields.rank_pattern or {})),
        alpha_pattern=MappingProxyType(dict(fields.alpha_pattern or {})),
        layers_to_transform=_layers(fields.layers_to_transform),
        layers_pattern=_layers_pattern(fields.layers_pattern),
        fan_in_fan_out=fields.fan_in_fan_out,
        base_model_name_or_path=fields.base_model_name_or_path,
    )


def _names(value: str | list[str] | tuple[()]) -> tuple[str, ...] | str:
    if not isinstance(value, str):
        return tuple(value)
    return ALL_LINEAR if value.lower() == ALL_LINEAR else value


def _layers(value: int | list[int] | None) -> tuple[int, ...] | None:
    if isinstance(value, int):
        return (value,)
    return tuple(value) if value else None  # PEFT takes an empty list for "no layers named"


def _layers_pattern(value: str | list[str] | None) -> tuple[str, ...]:
    return () if not value else (value,) if isinstance(value, str) else tuple(value)


def _at_rest(value: Any) -> bool:
    return value is None or value is False or value in ([], {}, "")


def _check_peft_type(document: dict[str, Any]) -> None:
    peft_type = document.get("peft_type")
    if isinstance(peft_type, str) and peft_type.upper() != "LORA":
        raise AdapterError(
            AdapterErrorCode.UNSUPPORTED,
            f"peft_type {quoted(peft_type)} is not supported",
            hint="only LORA adapters can be served",
        )


def _check_values(fields: _Document) -> None:
    if fields.bias != "none":
        raise _unsupported("bias", fields.bias)
    init = fields.init_lora_weights
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base's weights too, unless the adapter was converted.
        raise _unsupported("init_lora_weights", init, hint="save it with path_initial_model_for_weight_conversion")
    for name, entries in _sized(fields):
        if len(entries) > _MOST_ENTRIES:
            raise _invalid(f"{name} has {len(entries)} entries, more than {_MOST_ENTRIES}")
    _check_layers(fields)
    _check_each("r", {"": fields.r}, _is_rank, AdapterErrorCode.RANK)
    _check_each("rank_pattern", fields.rank_pattern or {}, _is_rank, AdapterErrorCode.RANK)
    _check_each("lora_alpha", {"": fields.lora_alpha}, _is_scale, AdapterErrorCode.CONFIG_INVALID)
    _check_each("alpha_pattern", fields.alpha_pattern or {}, _is_scale, AdapterErrorCode.CONFIG_INVALID)


def _sized(fields: _Document) -> tuple[tuple[str, list[Any] | dict[str, Any]], ...]:
    values = ((name, getattr(fields, name)) for name in _Document.model_fields)
    return tuple((name, value) for name, value in values if isinstance(value, (list, dict)))


def _check_layers(fields: _Document) -> None:
    """Refuse the combinations that PEFT refuses."""
    if not fields.target_modules:
        raise _invalid("target_modules is empty")
    if isinstance(fields.target_modules, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(fields, name) is not None:
                raise _invalid(f"{name} cannot be used when target_modules is a string")
    if isinstance(fields.layers_pattern, list) and len(fields.layers_pattern) > _MOST_LAYER_PATTERNS:
        raise _invalid(f"layers_pattern has more than {_MOST_LAYER_PATTERNS} entries")
    if fields.layers_pattern and fields.layers_to_transform is None:
        raise _invalid("layers_pattern needs layers_to_transform")


def _check_each(name: str, values: Mapping[str, float], good: Callable[[float], bool], code: AdapterErrorCode) -> None:
    for key, value in values.items():
        if not good(value):
            where = f"{name}[{quoted(key)}]" if key else name
            raise AdapterError(code, f"{where} is {quoted(value)}, which is out of range")


def _is_rank(value: float) -> bool:
    return value >= 1


def _is_scale(value: float) -> bool:
    return isfinite(value) and abs(value) <= _LARGEST_SCALE


def _wrong_type(error: ValidationError) -> AdapterError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = str(first["loc"][0])
    return _invalid(f"{name} is missing or has a wrong type: {first['msg']}")


def _invalid(message: str) -> AdapterError:
    return AdapterError(AdapterErrorCode.CONFIG_INVALID, message)


def _unsupported(name: str, value: Any, *, hint: str | None = None) -> AdapterError:
    return AdapterError(
        AdapterErrorCode.UNSUPPORTED, f"{quoted(name)[1:-1]} = {quoted(value)} is not supported", hint=hint
    )
