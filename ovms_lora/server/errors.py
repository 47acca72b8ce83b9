"""One error tree to two dialects: which status and which body every error has.

Owns the table below and the two shapes; the messages come with the errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ovms_lora.core import errors


@dataclass(frozen=True, slots=True)
class ErrorRule:
    """One class of errors: its status on `/v3` and on `/v1`, and the name of its type on `/v1`."""

    error: type[Exception]
    v3: int
    v1: int
    type: str


# The first rule that fits counts.
ERROR_RULES = (
    ErrorRule(errors.MalformedBodyError, 412, 400, "BadRequestError"),
    ErrorRule(errors.InvalidFieldError, 400, 400, "BadRequestError"),
    ErrorRule(errors.ModelNotFoundError, 404, 404, "NotFoundError"),
    ErrorRule(errors.ForbiddenError, 403, 403, "PermissionDeniedError"),
    ErrorRule(errors.AdapterUnavailableError, 400, 422, "UnprocessableEntityError"),
    ErrorRule(errors.QueueFullError, 429, 429, "RateLimitError"),
    ErrorRule(errors.UnavailableError, 503, 503, "ServiceUnavailableError"),
    ErrorRule(errors.DeadlineExceededError, 504, 504, "TimeoutError"),
    ErrorRule(errors.AdapterError, 400, 422, "UnprocessableEntityError"),
    ErrorRule(errors.AdapterNotFoundError, 404, 404, "NotFoundError"),
    ErrorRule(errors.ConfigError, 412, 400, "BadRequestError"),
    ErrorRule(errors.ModelFolderError, 412, 400, "BadRequestError"),
    ErrorRule(errors.NoMemoryError, 503, 503, "ServiceUnavailableError"),
    ErrorRule(Exception, 500, 500, "InternalServerError"),
)

_OPENAI_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "TimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
}

# OVMS answers these two with statuses and words of its own.
_OVMS_HTTP = {404: (400, "Invalid request URL"), 405: (406, "Unsupported method")}

OVMS_PREFIX = (
    "Mediapipe execution failed. MP status - INVALID_ARGUMENT: CalculatorGraph::Run() failed: \n"
    'Calculator::Process() for node "LLMExecutor" failed: '
)
OVMS_NOT_FOUND = "Mediapipe graph definition with requested name is not found"
INTERNAL = "Internal server error"


def rule_of(error: Exception) -> ErrorRule:
    """Return the rule for an error."""
    return next(rule for rule in ERROR_RULES if isinstance(error, rule.error))


class ErrorStyle(Protocol):
    """How one dialect tells of errors."""

    def response(self, error: Exception) -> JSONResponse:
        """Return the whole response to an error."""

    def body(self, error: Exception) -> dict[str, Any]:
        """Return the body for an error, as it also stands in a stream."""

    def http(self, error: HTTPException) -> JSONResponse:
        """Return the response to a refusal on the level of HTTP: no such URL, too large, not authorised."""


class OvmsErrors:
    """`{"error": "<string>"}`."""

    def response(self, error: Exception) -> JSONResponse:
        """Return the whole response to an error."""
        return JSONResponse(self.body(error), rule_of(error).v3, headers=_retry_after(error))

    def body(self, error: Exception) -> dict[str, Any]:
        """Return the body for an error."""
        match error:
            case errors.MalformedBodyError():
                return {"error": f"The file is not valid json - {error.message}"}
            case errors.ModelNotFoundError():
                return {"error": OVMS_NOT_FOUND}
            case errors.InvalidFieldError() | errors.AdapterUnavailableError():
                return {"error": OVMS_PREFIX + error.message}
        return {"error": _message(error)}

    def http(self, error: HTTPException) -> JSONResponse:
        """Return the response to a refusal on the level of HTTP."""
        status, message = _OVMS_HTTP.get(error.status_code, (error.status_code, error.detail))
        return JSONResponse({"error": message}, status, headers=error.headers)


class OpenAIErrors:
    """`{"error": {"message", "type", "param", "code"}}`, with vLLM's type names."""

    def response(self, error: Exception) -> JSONResponse:
        """Return the whole response to an error."""
        return JSONResponse(self.body(error), rule_of(error).v1, headers=_retry_after(error))

    def body(self, error: Exception) -> dict[str, Any]:
        """Return the body for an error."""
        rule = rule_of(error)
        param = "model" if isinstance(error, errors.ModelNotFoundError) else getattr(error, "param", None)
        code = getattr(error, "code", rule.v1)
        return {"error": {"message": _message(error), "type": rule.type, "param": param, "code": code}}

    def http(self, error: HTTPException) -> JSONResponse:
        """Return the response to a refusal on the level of HTTP."""
        status = error.status_code
        kind = _OPENAI_TYPES.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
        body = {"error": {"message": error.detail, "type": kind, "param": None, "code": status}}
        return JSONResponse(body, status, headers=error.headers)


OVMS_ERRORS: ErrorStyle = OvmsErrors()
OPENAI_ERRORS: ErrorStyle = OpenAIErrors()


def error_style(path: str) -> ErrorStyle:
    """Return how errors look under a path: `/v1` is OpenAI's but for OVMS's `/v1/config`."""
    of_openai = path.startswith("/v1/") and path not in ("/v1/config", "/v1/config/reload")
    return OPENAI_ERRORS if of_openai else OVMS_ERRORS


def _message(error: Exception) -> str:
    if isinstance(error, errors.OvmsLoraError):
        return error.message
    return INTERNAL


def _retry_after(error: Exception) -> dict[str, str] | None:
    seconds = getattr(error, "retry_after", None)
    return None if seconds is None else {"Retry-After": str(seconds)}
