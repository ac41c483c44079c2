"""Request bodies for OpenAI-compatible servers, and the meaning of their errors. No I/O.

A server's 4xx becomes an InvalidRequest with our own message. Only a field name and an error code are copied from the
server, and only if they look like identifiers. Every other answer becomes an AttemptFailed, for whose outcome
`engine.remote.pool` has rules. An error is read in the same way in the body of a refusal, in a body with status 200,
and in a frame of a stream.
"""

from __future__ import annotations

import dataclasses
import email.utils
import logging
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import orjson

from engine.base import EmbeddingRequest, GenerationRequest, InvalidRequest, PoolingRequest, Request, not_offered
from engine.messages import images_of, texts_of
from engine.remote.pool import AttemptFailed, Outcome

log = logging.getLogger(__name__)

CONTINUOUS_USAGE = "continuous_usage_stats"
STREAM_OPTIONS = "stream_options"
MAX_TOKENS = "max_tokens"
RESPONSE_FORMAT = "response_format"

BYTES_PER_TOKEN = 4  # English prose and code; other scripts differ by half in either direction
_MESSAGE_TOKENS = 4  # the role and the marks around a message
_IMAGE_TOKENS = 1024  # an image of ordinary size
_ADDED_TOKENS = 64  # begin, end, and an instruction that a server may put before an input
_MILLISECONDS = re.compile(r"[0-9]{1,9}")
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,9})?")
_ERROR_STATUS = re.compile(r"[45][0-9]{2}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\[\]-]{0,63}")
_CODE = re.compile(r"[a-z]{1,24}(_[a-z]{1,24}){0,7}")
_FIELDS = {field.name for field in dataclasses.fields(GenerationRequest)}
_FIELDS -= {"request_id", "cache_salt", "flow", "priority", "affinity"}  # the gateway's own
_FIELDS |= {"model", "max_completion_tokens", "input", "dimensions"}
"""What a client can have sent."""
_TOO_LONG = re.compile(r"(context|model) length|max_model_len|longer than the maximum", re.IGNORECASE)
_NAMED: dict[int, set[str]] = {
    400: {
        "invalid_request_error",
        "badrequesterror",
        "unprocessableentityerror",
        "invalid_request",
        "bad_request",
        "validation",  # TGI's
        "validation_error",
        "invalid_argument",
        "context_length_exceeded",
    },
    401: {"authentication_error", "authenticationerror", "invalid_api_key", "unauthenticated", "unauthorized"},
    403: {"permission_error", "permissiondeniederror", "permission_denied", "forbidden"},
    404: {"not_found_error", "notfounderror", "model_not_found", "not_found"},
    413: {"request_too_large"},
    429: {
        "rate_limit_error",
        "ratelimiterror",
        "rate_limit_exceeded",
        "too_many_requests",
        "insufficient_quota",
        "resource_exhausted",
        "overloaded",  # TGI's
        "overloaded_error",
        "server_overloaded",
        "engine_overloaded",
    },
}
"""Names of errors without a status, in lower case, in `type`, `code` or `status`."""
_FILTERED = {"content_filter", "content_policy_violation", "responsibleaipolicyviolation", "moderation_blocked"}
_DECLINED = {401, 402, 403, 404, 405, 407, 409, 410, 424, 425, 501}
"""Statuses that may be about this gateway's key, URL or model; any other below 500 is about the request."""
_UNREACHABLE = {502, 503, 504, 520, 521, 522, 523, 524}
"""Statuses of a proxy about the server behind it; those from 520 are Cloudflare's."""


@dataclass(slots=True)
class PreparedCall:
    """The payload of a Prepared."""

    request: Request
    body: dict[str, Any]
    estimated: bool
    """The prompt's tokens were estimated."""


def generation_body(request: GenerationRequest, model: str, max_tokens: int | None) -> dict[str, Any]:
    """Return the body of a chat completion, or of a completion if the request has a bare prompt.

    Fields that were not given are omitted: servers reject unknown fields, and have their own defaults.
    """
    body: dict[str, Any] = {"model": model, "stream": True}
    if request.prompt is None:
        body["messages"] = request.messages
    else:
        body["prompt"] = request.prompt
    given: dict[str, Any] = {
        MAX_TOKENS: max_tokens,
        "reasoning_effort": request.reasoning_effort,
        **_constraints(request),
        **request.given(),
    }
    if request.tools:  # the other two are refused without
        given["tools"] = request.tools
        given["tool_choice"] = request.tool_choice
        given["parallel_tool_calls"] = request.parallel_tool_calls
    if request.logprobs and request.prompt is None:
        given["logprobs"] = True
        given["top_logprobs"] = request.top_logprobs or None
    elif request.logprobs:
        given["logprobs"] = request.top_logprobs
    return body | {name: value for name, value in given.items() if value is not None}


def _constraints(request: GenerationRequest) -> dict[str, Any]:
    """Return the constraints on the text. A JSON schema is sent as `response_format`, which most servers accept."""
    outputs = request.structured_outputs
    if outputs is not None and outputs.keys() == {"json"} and isinstance(outputs["json"], dict):
        return {RESPONSE_FORMAT: {"type": "json_schema", "json_schema": {"name": "answer", "schema": outputs["json"]}}}
    return {"structured_outputs": outputs, RESPONSE_FORMAT: request.response_format}


def tokenize_body(request: GenerationRequest, model: str) -> dict[str, Any]:
    """Return the body of vLLM's /tokenize for the prompt of a generation."""
    if request.prompt is not None:
        return {"model": model, "prompt": request.prompt}
    body: dict[str, Any] = {"model": model, "messages": request.messages, "add_generation_prompt": True}
    if request.tools:
        body["tools"] = request.tools
    return body


def embedding_body(request: EmbeddingRequest, model: str) -> dict[str, Any]:
    """Return the body of an embedding request, for base64, which is a third of the size of decimals and exact."""
    body: dict[str, Any] = {"model": model, "input": request.inputs, "encoding_format": "base64"}
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    return body


def estimate_prompt_tokens(request: GenerationRequest) -> int:
    """Estimate of the prompt's tokens, for servers that don't count them."""
    if isinstance(request.prompt, list):
        return len(request.prompt)
    if request.prompt is not None:
        return estimate_tokens(request.prompt)
    tokens = _MESSAGE_TOKENS  # the generation prompt
    tokens += _IMAGE_TOKENS * sum(1 for _ in images_of(request.messages))
    for message in request.messages:
        tokens += _MESSAGE_TOKENS
        tokens += sum(map(estimate_tokens, texts_of(message)))
        if message.get("tool_calls"):
            tokens += math.ceil(len(orjson.dumps(message["tool_calls"])) / BYTES_PER_TOKEN)
    if request.tools:
        tokens += math.ceil(len(orjson.dumps(request.tools)) / BYTES_PER_TOKEN)
    return tokens


def estimate_tokens(text: str | list[int]) -> int:
    """Estimate the tokens of a text; token ids are counted."""
    return len(text) if isinstance(text, list) else math.ceil(len(text.encode()) / BYTES_PER_TOKEN)


def most_tokens(inputs: list[str | list[int]]) -> int:
    """Return an upper bound on the tokens of embedding inputs: one per byte, and a constant for each input."""
    return sum(
        _ADDED_TOKENS + len(text if isinstance(text, list) else text.encode(errors="surrogatepass")) for text in inputs
    )


def refused_option(status: int, answer: Any) -> str | None:
    """Return the optional field that a server rejects as unknown, None for any other error."""
    error = error_fields(answer)
    said = f"{error.get('param')} {error.get('message')}"
    if status not in (400, 422):
        return None
    if CONTINUOUS_USAGE in said:
        return CONTINUOUS_USAGE
    if STREAM_OPTIONS in said:
        return STREAM_OPTIONS
    # OpenAI's reasoning models take max_completion_tokens only, and say so with this code.
    return MAX_TOKENS if error.get("param") == MAX_TOKENS and error.get("code") == "unsupported_parameter" else None


def refuse(status: int, answer: Any, request: Request, retry_after_s: float | None = None) -> NoReturn:
    """Raise what a refusal means: InvalidRequest if the request is at fault, else AttemptFailed.

    `answer` is the parsed body, or the frame of a stream. Of the statuses 200 and 500 the error may know better.
    """
    error = error_fields(answer)
    code = error.get("code")
    if status in (200, 500):
        status = _told_status(error) or 500
    if _FILTERED & _words(error):
        what = "The model's server refuses the content of the request."
        raise InvalidRequest(what, _prompt_param(request), "content_filter")
    outcome: Outcome
    if status in (429, 529) or code == "server_overloaded":
        outcome = "overloaded"
    elif status < 400 or status in _DECLINED:
        outcome = "declined"
    elif status == 408:
        outcome = "slow"
    elif status < 500:
        log.debug("refused with %d: %.300r", status, error)  # may hold a client's words
        raise _invalid(status, error, request)
    elif status == 503 and code != "engine_unavailable" and (error or retry_after_s is not None):
        # It refuses in an API's words; a proxy before a dead server, or a gateway that says so, does not.
        outcome = "overloaded"
    else:
        outcome = "unreachable" if status in _UNREACHABLE else "failed"
    names = [name for name in (code, error.get("type")) if isinstance(name, str) and _NAME.fullmatch(name)]
    known = names[0] if names else "no code"
    reason = f"answered {status} ({known})"
    if outcome == "declined":
        reason += "; check its url, the model's name and the key"
    failure = _no_such_route(status, error, request) if outcome == "declined" else None
    raise AttemptFailed(outcome, reason, error=failure, retry_after_s=retry_after_s)


def is_error(frame: Any) -> bool:
    """Whether a frame, or a body with status 200, is an error."""
    if isinstance(frame, list) and len(frame) == 1:
        frame = frame[0]
    if not isinstance(frame, dict):
        return False
    if frame.get("error") or frame.get("object") == "error":
        return True
    return not frame.keys() & {"choices", "data"} and bool(frame.keys() & {"message", "detail"})


def error_fields(answer: Any) -> dict[str, Any]:
    """Return the error object of a response, or an empty one.

    Older vLLM has its fields at the top level, TGI a text in `error` and `error_type` beside it, Gemini a list around
    everything, FastAPI a list of locations or an object in `detail`.
    """
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, dict) and not answer.keys() & {"error", "message"}:
        answer = _detailed(answer.get("detail"))
    error = answer.get("error", answer) if isinstance(answer, dict) else None
    if isinstance(error, str):
        return {"message": error, "type": answer.get("error_type"), "code": answer.get("code")}
    return error if isinstance(error, dict) and (error is not answer or "message" in error) else {}


def _detailed(detail: Any) -> Any:
    """Return FastAPI's `detail` in OpenAI's format."""
    if not isinstance(detail, list):
        return detail
    places = [place.get("loc") for place in detail if isinstance(place, dict)]
    param = ""
    for part in places[0][1:] if places and isinstance(places[0], list) else ():  # behind "body"
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else str(part)
    return {"message": str(detail), "param": param or None}


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The seconds that a server asks to wait, from a number of seconds or milliseconds or a date."""
    if _MILLISECONDS.fullmatch(headers.get("retry-after-ms", "")):
        return int(headers["retry-after-ms"]) / 1000
    told = headers.get("retry-after", "")
    if _SECONDS.fullmatch(told):
        return float(told)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _words(error: dict[str, Any]) -> set[str]:
    """The names of an error, in lower case."""
    return {str(error[name]).lower() for name in ("type", "code", "status") if error.get(name)}


def _told_status(error: dict[str, Any]) -> int | None:
    """The status that an error has as a number or a name."""
    for name in ("code", "status", "status_code", "http_code"):
        told = str(error.get(name))
        if _ERROR_STATUS.fullmatch(told):
            return int(told)
    words = _words(error)
    return next((status for status, names in _NAMED.items() if names & words), None)


def _no_such_route(status: int, error: dict[str, Any], request: Request) -> InvalidRequest | None:
    """The client's error for a server without an optional route, None for any other answer."""
    said = f"{error.get('message')} {error.get('param')} {error.get('code')}".lower()
    if status not in (404, 405, 501) or "model" in said:
        return None
    if isinstance(request, PoolingRequest):
        return not_offered(request.task)
    if request.prompt is not None:
        what = "The server of this model takes no bare prompts. Send messages to /v1/chat/completions."
        return InvalidRequest(what, "prompt", "model_not_supported")
    return None


def _invalid(status: int, error: dict[str, Any], request: Request) -> InvalidRequest:
    code, param, message = error.get("code"), error.get("param"), str(error.get("message"))
    prompt = _prompt_param(request)
    if code == "context_length_exceeded" or param in ("input_tokens", "input_text") or _TOO_LONG.search(message):
        words = f"The request does not fit the model's context length. Shorten the {prompt} or ask for fewer tokens."
        return InvalidRequest(words, prompt, "context_length_exceeded")
    if status == 413:
        return InvalidRequest("The request is too large for the model's server.", code="request_too_large")
    code = code if isinstance(code, str) and _CODE.fullmatch(code) else None
    if param is None and RESPONSE_FORMAT in message:  # DeepSeek's word on schemas, for one
        param = RESPONSE_FORMAT
    if (
        not isinstance(param, str)
        or not _NAME.fullmatch(param)
        or param.partition(".")[0].partition("[")[0] not in _FIELDS
    ):
        return InvalidRequest("The model's server refuses the request as invalid. Check its parameters.", code=code)
    if param in (MAX_TOKENS, "max_completion_tokens") and isinstance(request, GenerationRequest):
        param = request.max_tokens_param
    return InvalidRequest(f"Invalid value for {param!r}: the model's server does not take it.", param, code)


def _prompt_param(request: Request) -> str:
    return "input" if isinstance(request, PoolingRequest) else request.prompt_param
