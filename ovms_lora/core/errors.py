"""The one error tree: everything that a client, a file or an operator can cause.

OvmsLoraError                    a one-line cause, and perhaps a hint what to do
├── UsageError                   the command line is wrong (exit code 2)
├── ArgumentError                the Python API got something that it cannot use; a ValueError too
├── ConfigError                  config.json is not usable
│   └── ConfigUnreadableError    there is no such file, or it cannot be read
├── ModelFolderError             a folder is not a model that can be served
├── ExportError                  an export cannot be done, or failed
├── PlanError                    a capacity plan cannot be made of these measurements
├── AdapterError                 an adapter is bad in itself; `code` says how (contract section 5)
├── AdapterNotFoundError         there is no adapter folder at a path
│   └── UnknownAliasError        no adapter is loaded under an alias
├── AdapterExistsError           the alias has an adapter already
├── EngineError                  the engine cannot go on: a step failed, or it has stopped
│   └── NoMemoryError            there is no memory for the step; later there may be
└── RequestError                 one request cannot be served
    ├── MalformedBodyError       the body is not a JSON object with a model name
    ├── InvalidFieldError        one field is missing, of a wrong type, out of range or unsupported
    ├── ModelNotFoundError       no model, adapter or composite has that name
    ├── ForbiddenError           the client's key does not open that model, adapter or composite
    ├── AdapterUnavailableError  the adapter that the request names cannot be loaded
    ├── QueueFullError           too many requests wait
    ├── UnavailableError         starting, draining or stopped, or what is needed cannot be had now
    └── DeadlineExceededError    the request took longer than it may

The server maps each class once to a status and to the shape of its dialect; the command line prints the message and
a `hint:` line. Nothing here knows HTTP.
"""

from __future__ import annotations

from enum import StrEnum


class OvmsLoraError(Exception):
    """Base of all errors that have a cause outside of this program.

    `message` is one line and safe to show to a client; `hint` says what to do about it.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(OvmsLoraError):
    """The command line names something that does not exist or does not fit."""


class ArgumentError(OvmsLoraError, ValueError):
    """The Python API got an argument that it cannot use. Also a ValueError, which is what vLLM raises."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        if hint:
            self.add_note(f"hint: {hint}")


class ConfigError(OvmsLoraError):
    """config.json cannot be read or names something unusable."""


class ConfigUnreadableError(ConfigError):
    """config.json is not there, is no file or cannot be read."""


class ModelFolderError(OvmsLoraError):
    """A folder is not a model that can be served."""


class ExportError(OvmsLoraError):
    """An export cannot be done, or failed."""


class PlanError(OvmsLoraError):
    """A file of measurements or rates cannot be used, or nothing can be planned with it."""


class AdapterErrorCode(StrEnum):
    """Why an adapter is refused (contract section 5)."""

    CONFIG_MISSING = "adapter_config_missing"
    CONFIG_INVALID = "adapter_config_invalid"
    UNSUPPORTED = "adapter_unsupported"
    FORMAT = "adapter_format"
    TRUNCATED = "adapter_truncated"
    HEADER = "adapter_header"
    DTYPE = "adapter_dtype"
    SHAPE = "adapter_shape"
    RANK = "adapter_rank"
    MODULE = "adapter_module"
    INCOMPLETE = "adapter_incomplete"
    NONFINITE = "adapter_nonfinite"
    BASE_MISMATCH = "adapter_base_mismatch"


_SAVE_AGAIN = "save the adapter again with PEFT's save_pretrained"
_COPY_AGAIN = "copy the adapter again, whole"
# What helps where no better word is known at the place of the error.
_ADAPTER_HINTS = {
    AdapterErrorCode.CONFIG_MISSING: _COPY_AGAIN,
    AdapterErrorCode.CONFIG_INVALID: _SAVE_AGAIN,
    AdapterErrorCode.UNSUPPORTED: "train without it, or merge the adapter with export_model.py --adapter",
    AdapterErrorCode.FORMAT: "save it with PEFT's save_pretrained, which writes safetensors",
    AdapterErrorCode.TRUNCATED: _COPY_AGAIN,
    AdapterErrorCode.HEADER: _SAVE_AGAIN,
    AdapterErrorCode.DTYPE: "save its tensors as float32, float16 or bfloat16",
    AdapterErrorCode.INCOMPLETE: _COPY_AGAIN,
    AdapterErrorCode.NONFINITE: "train again: its weights have overflowed",
    AdapterErrorCode.BASE_MISMATCH: "use the base that it was trained on",
}


class AdapterError(OvmsLoraError):
    """An adapter is bad in itself: it is refused at load, never applied in part."""

    def __init__(self, code: AdapterErrorCode, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint or _ADAPTER_HINTS.get(code))
        self.code = code


class AdapterNotFoundError(OvmsLoraError):
    """There is no adapter folder at the path that an operator or a client gave."""

    def __init__(self, path: str) -> None:
        super().__init__(f"No adapter found for {path}", hint="give the folder that holds adapter_config.json")
        self.path = path


class UnknownAliasError(AdapterNotFoundError):
    """No adapter is loaded under the alias."""

    def __init__(self, alias: str) -> None:
        OvmsLoraError.__init__(self, f"The lora adapter '{alias}' cannot be found.")
        self.path = alias


class AdapterExistsError(OvmsLoraError):
    """The alias has an adapter already."""


class EngineError(OvmsLoraError):
    """The engine cannot go on with a request: its step failed, or the engine has stopped."""


class NoMemoryError(EngineError):
    """There is no memory for the step of a request; `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestError(OvmsLoraError):
    """One request cannot be served."""


class MalformedBodyError(RequestError):
    """The body is not a JSON object with a usable `model` and `stream`."""


class InvalidFieldError(RequestError):
    """A field of the request is missing, of a wrong type, out of range or unsupported; `param` names it."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFoundError(RequestError):
    """No model, adapter or composite has that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"The model `{name}` does not exist.")
        self.name = name


class ForbiddenError(RequestError):
    """The client's key does not open the model, adapter or composite; whether there is one is not said."""

    def __init__(self, name: str) -> None:
        super().__init__(f"The key may not use the model `{name}`.")
        self.param = "model"


class AdapterUnavailableError(RequestError):
    """The adapter that the request names exists but cannot be loaded; the cause is an `AdapterError`."""

    def __init__(self, cause: AdapterError) -> None:
        super().__init__(cause.message, hint=cause.hint)
        self.code = cause.code


class QueueFullError(RequestError):
    """Too many requests wait; `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(RequestError):
    """The server starts, drains or has stopped, or a bucket cannot be read; `retry_after` is in seconds."""

    def __init__(self, message: str, *, hint: str | None = None, retry_after: int = 5) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class DeadlineExceededError(RequestError):
    """The request took longer than it may."""
