"""What is said to an OpenAI-compatible server, and what its refusals mean. No I/O.

What a server says of a request's fault reaches the client as an InvalidRequest in our own words: at most the name of
a field and an error code, if they look like names, are the server's. Everything else that it may answer is an
AttemptFailed, for the log and the breaker.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import orjson

from engine.base import EmbeddingRequest, GenerationRequest, InvalidRequest
from engine.pool import AttemptFailed

log = logging.getLogger(__name__)

CONTINUOUS_USAGE = "continuous_usage_stats"
STREAM_OPTIONS = "stream_options"
MAX_TOKENS = "max_tokens"
RESPONSE_FORMAT = "response_format"

_BYTES_PER_TOKEN = 4  # English prose and code; other scripts differ by half in either direction
_MESSAGE_TOKENS = 4  # the role and the marks around a message
_PART_TOKENS = 1024  # an image of ordinary size
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\[\]-]{0,63}")
_TOO_LONG = re.compile(r"(context|model) length|max_model_len|longer than the maximum", re.IGNORECASE)
_INVALID_TYPES = {"invalid_request_error", "BadRequestError", "UnprocessableEntityError"}


@dataclass(slots=True)
class Call:
    """The payload of a Prepared."""

    request: GenerationRequest | EmbeddingRequest
    body: dict[str, Any]
    estimated: bool
    """The prompt's tokens were estimated."""


def generation_body(request: GenerationRequest, model: str, max_tokens: int | None) -> dict[str, Any]:
    """Return the body of a chat completion, or of a completion where the request has a bare prompt.

    What was not given is left out: servers refuse fields that they don't know, and have defaults of their own.
    """
    body: dict[str, Any] = {"model": model, "stream": True}
    if request.prompt is None:
        body["messages"] = request.messages
    else:
        body["prompt"] = request.prompt
    given: dict[str, Any] = {
        MAX_TOKENS: max_tokens,
        "reasoning_effort": request.reasoning_effort,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty,
        "seed": request.seed,
        "logit_bias": request.logit_bias,
        **_bounds(request),
        "stop": request.stop or None,
        "stop_token_ids": request.stop_token_ids or None,
        "ignore_eos": request.ignore_eos or None,
        "min_tokens": request.min_tokens or None,
        "n": request.n if request.n > 1 else None,
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


def _bounds(request: GenerationRequest) -> dict[str, Any]:
    """Return what holds the answer to a form: a JSON schema in OpenAI's words, which others know as well as vLLM."""
    bound = request.structured_outputs
    if bound is not None and bound.keys() == {"json"} and isinstance(bound["json"], dict):
        return {RESPONSE_FORMAT: {"type": "json_schema", "json_schema": {"name": "answer", "schema": bound["json"]}}}
    return {"structured_outputs": bound, RESPONSE_FORMAT: request.response_format}


def tokenize_body(request: GenerationRequest, model: str) -> dict[str, Any]:
    """Return the body of vLLM's /tokenize for the prompt that a generation would have."""
    if request.prompt is not None:
        return {"model": model, "prompt": request.prompt}
    body: dict[str, Any] = {"model": model, "messages": request.messages, "add_generation_prompt": True}
    if request.tools:
        body["tools"] = request.tools
    return body


def embedding_body(request: EmbeddingRequest, model: str) -> dict[str, Any]:
    """Return the body of an embedding request. Base64 is a third of the size of decimals, and loses nothing."""
    body: dict[str, Any] = {"model": model, "input": request.inputs, "encoding_format": "base64"}
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    return body


def estimate_prompt_tokens(request: GenerationRequest) -> int:
    """Return about how many tokens the prompt has, where nobody counts them."""
    if isinstance(request.prompt, list):
        return len(request.prompt)
    if request.prompt is not None:
        return estimate_tokens(request.prompt)
    tokens = _MESSAGE_TOKENS  # the generation prompt
    for message in request.messages:
        tokens += _MESSAGE_TOKENS
        content = message.get("content") or ""
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            tokens += estimate_tokens(part.get("text") or "") if part.get("type") == "text" else _PART_TOKENS
        if message.get("tool_calls"):
            tokens += math.ceil(len(orjson.dumps(message["tool_calls"])) / _BYTES_PER_TOKEN)
    if request.tools:
        tokens += math.ceil(len(orjson.dumps(request.tools)) / _BYTES_PER_TOKEN)
    return tokens


def estimate_tokens(text: str | list[int]) -> int:
    """Return about how many tokens a text has; ids are counted."""
    return len(text) if isinstance(text, list) else math.ceil(len(text.encode()) / _BYTES_PER_TOKEN)


def refused_option(status: int, answer: Any) -> str | None:
    """Return which optional field of ours a server does not know, if that is what its refusal says."""
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


def refuse(status: int, answer: Any, request: GenerationRequest | EmbeddingRequest, retry_after: str = "") -> NoReturn:
    """Raise what a refusal means: InvalidRequest if the request is at fault, else AttemptFailed.

    `answer` is the parsed body, or the frame in a stream, where `status` is 500 unless the error tells another.
    """
    error = error_fields(answer)
    kind, code = str(error.get("type")), error.get("code")
    if isinstance(code, int) and 400 <= code < 600 and status == 500:
        status = code
    if status in (400, 413, 422) or (status == 500 and kind in _INVALID_TYPES):
        log.debug("refused with %d: %.300r", status, error)  # may hold a client's words
        raise _invalid(status, error, request)
    known = code if isinstance(code, str) and _NAME.fullmatch(code) else kind if _NAME.fullmatch(kind) else "no code"
    reason = f"answered {status} ({known})"
    if status in (401, 403, 404, 405) or status < 400:
        reason += "; check its url, the model's name and the key"
        raise AttemptFailed(reason, misconfigured=True)
    # A server that refuses in OpenAI's words lives; a proxy before a dead one, or a gateway that says so, does not.
    overloaded = (
        status == 429 or code == "server_overloaded" or (status == 503 and error and code != "engine_unavailable")
    )
    if overloaded:
        raise AttemptFailed(reason, overloaded=True, retry_after_s=_seconds(retry_after))
    raise AttemptFailed(reason, suspicious=status == 500, again=status != 500)


def error_fields(answer: Any) -> dict[str, Any]:
    """Return the error object of an answer, or an empty one. Older vLLM has its fields at the top."""
    error = answer.get("error", answer) if isinstance(answer, dict) else None
    return error if isinstance(error, dict) and "message" in error else {}


def _invalid(status: int, error: dict[str, Any], request: GenerationRequest | EmbeddingRequest) -> InvalidRequest:
    code, param, message = error.get("code"), error.get("param"), str(error.get("message"))
    prompt = "messages"
    if isinstance(request, EmbeddingRequest):
        prompt = "input"
    elif request.prompt is not None:
        prompt = "prompt"
    if code == "context_length_exceeded" or param in ("input_tokens", "input_text") or _TOO_LONG.search(message):
        words = f"The request does not fit the model's context length. Shorten the {prompt} or ask for fewer tokens."
        return InvalidRequest(words, prompt, "context_length_exceeded")
    if status == 413:
        return InvalidRequest("The request is too large for the model's server.", code="request_too_large")
    code = code if isinstance(code, str) and _NAME.fullmatch(code) else None
    if param is None and RESPONSE_FORMAT in message:  # DeepSeek's word on schemas, for one
        param = RESPONSE_FORMAT
    if not isinstance(param, str) or not _NAME.fullmatch(param):
        return InvalidRequest("The model's server refuses the request as invalid. Check its parameters.", code=code)
    if param in (MAX_TOKENS, "max_completion_tokens") and isinstance(request, GenerationRequest):
        param = request.max_tokens_param
    return InvalidRequest(f"Invalid value for {param!r}: the model's server does not take it.", param, code)


def _seconds(retry_after: str) -> float | None:
    return float(retry_after) if re.fullmatch(r"\d{1,6}(\.\d+)?", retry_after) else None
