"""One exception tree for all errors of clients, rendered in OpenAI's format.

    GatewayError
    +- BadRequest (400)
    |  +- RequestTooLarge (413)
    |  +- Unprocessable (422)
    +- InvalidApiKey (401)
    +- ModelNotAllowed (403)
    +- AdminOnly (403)
    +- MetricsNotAllowed (403)
    +- NotFound (404)
    |  +- ModelNotFound
    +- MethodNotAllowed (405)
    +- RequestTimeout (408)
    +- Conflict (409)
    +- Cancelled (409)
    +- RateLimitExceeded (429)
    +- InternalError (500)
    +- Unavailable (503)
       +- Overloaded

Status, type, code, whether to retry and how loudly to log are class attributes: one place for each fact. An
`EngineError` becomes one of these in `from_engine`. Nothing here is ever built from a traceback.
"""

from __future__ import annotations

import logging
import math
import re
from typing import Any, ClassVar

import orjson
from pydantic import ValidationError

from engine.base import EngineError, EngineOverloaded, EngineUnavailable, InvalidRequest

CLIENT_DISCONNECTED = "client_disconnected"
"""Code in logs and traces of a request whose client disconnected before the response was complete."""


class StoreError(Exception):
    """The store can't be used as configured. The message is one line, for the operator."""


class StoreUnavailable(Exception):
    """The store does not answer. Every caller can continue without it."""

    def __init__(self, message: str = "", *, sent: bool = False) -> None:
        super().__init__(message)
        self.sent = sent
        """Whether the command may have reached the store, which may run it at any time."""


class StoreRefused(StoreUnavailable):
    """The store refuses this command: a value of another type under the key, or a missing permission."""


class WritesRefused(StoreUnavailable):
    """The store answers reads and takes no writes. `reason` is `full`, `disk` or `replicas`."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class GatewayError(Exception):
    """Base class. `param` names the invalid request field, if any."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"
    should_retry: ClassVar[bool] = False
    """Sent as x-should-retry, which takes precedence over the OpenAI SDKs' own rules."""
    log_level: ClassVar[int] = logging.INFO
    retry_after_s: float | None = None
    """When a retry is likely to succeed; sent as Retry-After (whole seconds, rounded up) and retry-after-ms."""

    default_message: ClassVar[str] = ""

    def __init__(
        self,
        message: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(self.default_message if message is None else message)
        self.param = param
        self.extra_headers: dict[str, str] = {}
        if code is not None:
            self.code = code
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        """Return the response headers that go with this error."""
        headers = {"x-should-retry": "true" if self.should_retry else "false", **self.extra_headers}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
            headers["retry-after-ms"] = str(max(1, math.ceil(self.retry_after_s * 1000)))
        return headers

    def body(self) -> bytes:
        """Return OpenAI's error object as JSON."""
        fields = {"message": str(self), "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": fields})


class BadRequest(GatewayError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class RequestTooLarge(BadRequest):
    status = 413
    code = "request_too_large"


class Unprocessable(BadRequest):
    """BadRequest on the routes that answer invalid fields with FastAPI's 422."""

    status = 422


class InvalidApiKey(GatewayError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class ModelNotAllowed(GatewayError):
    status = 403
    type = "permission_error"
    code = "model_not_allowed"


class AdminOnly(GatewayError):
    status = 403
    type = "permission_error"
    code = "admin_only"


class MetricsNotAllowed(GatewayError):
    status = 403
    type = "permission_error"
    code = "metrics_not_allowed"


class NotFound(GatewayError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(GatewayError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTimeout(GatewayError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"
    should_retry = True


class Conflict(GatewayError):
    """The request conflicts with the current state of the resource."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class Cancelled(GatewayError):
    """Another request, by a caller who may do so, ended the generation."""

    status = 409
    type = "invalid_request_error"
    code = "response_cancelled"


class RateLimitExceeded(GatewayError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    should_retry = True


class InternalError(GatewayError):
    default_message = "The server had an error while processing your request."
    log_level = logging.ERROR


class Unavailable(GatewayError):
    """The engine is starting, restarting, dead, or the server is draining."""

    status = 503
    code = "engine_unavailable"
    default_message = "The server shut down before the response was complete."
    should_retry = True
    log_level = logging.WARNING
    retry_after_s = 5.0


class Overloaded(Unavailable):
    """The server has no room, whichever key asks."""

    code = "server_overloaded"
    retry_after_s = 1.0


def from_engine(error: EngineError) -> GatewayError:
    """Return the client's view of an engine error."""
    if isinstance(error, InvalidRequest):
        return BadRequest(str(error), error.param, error.code)
    if isinstance(error, EngineOverloaded):
        after_s = error.retry_after_s
        return Overloaded(
            "The server is overloaded. Try again shortly.",
            # The SDKs wait at most two minutes, and obey no longer value.
            retry_after_s=None if after_s is None else min(max(after_s, 1.0), 120.0),
        )
    if isinstance(error, EngineUnavailable):
        return Unavailable(str(error))
    return InternalError()


def from_store(error: StoreUnavailable, what: str = "The store does not answer at the moment.") -> Unavailable:
    """Convert a store's error. `what` is the message if the store does not answer."""
    if isinstance(error, WritesRefused):
        code = "store_full" if error.reason == "full" else "store_read_only"
        return Unavailable(f"{error} Ask the operator of this server.", code=code, retry_after_s=30.0)
    return Unavailable(f"{what} Try again shortly.", code="store_unavailable", retry_after_s=1.0)


_UNKNOWN_ARGUMENT = re.compile(r"unexpected keyword argument '(\w+)'")
_CONTAINER_SHOULD = re.compile("^(Dictionary|List) should")
_WORDS = {
    "missing": "is required",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "dict_type": "must be an object",
    "list_type": "must be an array",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
}


def from_validation(error: ValidationError, data: Any) -> BadRequest:
    """Return a 400 that names the first field at fault in `data`, in OpenAI's notation: messages[0].role.

    Where a field may be one of several things, pydantic reports each; the deepest report is the one that tried most.
    """
    reports = [(_path(report, data), report) for report in error.errors(include_url=False, include_input=False)]
    first = reports[0][0]
    param = max((path for path, _ in reports if path.startswith(first)), key=len)
    texts = dict.fromkeys(_text(report) for path, report in reports if path == param)
    message = " or ".join(texts)
    if not param:
        return BadRequest(message[0].upper() + message[1:] + ".")
    return BadRequest(f"Invalid value for '{param}': {message}.", param)


def _path(report: Any, data: Any) -> str:
    """Return the path of a report without the type names that pydantic inserts."""
    path = ""
    last = len(report["loc"]) - 1
    for number, part in enumerate(report["loc"]):
        if isinstance(part, int) and isinstance(data, list):
            path += f"[{part}]"
            data = data[part] if part < len(data) else None
        elif isinstance(data, dict) and (part in data or (report["type"] == "missing" and number == last)):
            path += f".{part:.64}" if path else f"{part:.64}"
            data = data.get(part)
    return path


def _text(report: Any) -> str:
    text = _WORDS.get(report["type"]) or str(report["msg"]).removeprefix("Value error, ")
    text = text.replace("Input should be", "must be").replace("String should", "must").rstrip(".")
    text = _CONTAINER_SHOULD.sub("must", text).replace(" after validation", "")
    return text[:1].lower() + text[1:]


def unknown_argument(error: TypeError) -> str | None:
    """Return the argument that a constructor does not accept, or None for another error."""
    found = _UNKNOWN_ARGUMENT.search(str(error))
    return found[1] if found else None
