"""The exception tree: what each kind of failure reports to a client, and nothing more."""

from __future__ import annotations

import json
import re

import pytest
from pydantic import BaseModel, ValidationError

from engine.base import EngineDied, EngineError, EngineOverloaded, EngineUnavailable, InvalidRequest
from gateway.errors import (
    BadRequest,
    GatewayError,
    InternalError,
    InvalidApiKey,
    MethodNotAllowed,
    ModelNotAllowed,
    ModelNotFound,
    NotFound,
    Overloaded,
    RateLimitExceeded,
    RequestTimeout,
    RequestTooLarge,
    Unavailable,
    from_engine,
    from_validation,
)
from tests.support.app import ROOT


@pytest.mark.parametrize(
    ("kind", "status", "error_type", "code", "should_retry"),
    [
        (BadRequest, 400, "invalid_request_error", "invalid_request", "false"),
        (InvalidApiKey, 401, "authentication_error", "invalid_api_key", "false"),
        (ModelNotAllowed, 403, "permission_error", "model_not_allowed", "false"),
        (NotFound, 404, "invalid_request_error", "not_found", "false"),
        (ModelNotFound, 404, "invalid_request_error", "model_not_found", "false"),
        (MethodNotAllowed, 405, "invalid_request_error", "method_not_allowed", "false"),
        (RequestTimeout, 408, "invalid_request_error", "request_timeout", "true"),
        (RequestTooLarge, 413, "invalid_request_error", "request_too_large", "false"),
        (RateLimitExceeded, 429, "rate_limit_error", "rate_limit_exceeded", "true"),
        (InternalError, 500, "server_error", "internal_error", "false"),
        (Unavailable, 503, "server_error", "engine_unavailable", "true"),
        (Overloaded, 503, "server_error", "server_overloaded", "true"),
    ],
)
def test_error_has_the_documented_status_type_and_code(
    kind: type[GatewayError], status: int, error_type: str, code: str, should_retry: str
) -> None:
    error = kind("No.", "stop")

    assert error.status == status
    assert json.loads(error.body()) == {
        "error": {"message": "No.", "type": error_type, "param": "stop", "code": code},
    }
    assert error.headers()["x-should-retry"] == should_retry


def test_readme_names_every_error() -> None:
    readme = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| (\d{3}) \| `([a-z_]+)` \| `([a-z_]+)` \|", readme, re.M)
    kinds = _below(GatewayError)

    assert sorted(told) == sorted({(str(kind.status), kind.type, kind.code) for kind in kinds})


def _below(kind: type[GatewayError]) -> list[type[GatewayError]]:
    return [one for child in kind.__subclasses__() for one in (child, *_below(child))]


def test_param_is_null_when_no_field_is_at_fault() -> None:
    assert json.loads(BadRequest("No.").body())["error"]["param"] is None


def test_only_an_authentication_error_challenges() -> None:
    assert InvalidApiKey("No.").headers()["WWW-Authenticate"] == "Bearer"
    assert "WWW-Authenticate" not in BadRequest("No.").headers()


@pytest.mark.parametrize(
    ("retry_after_s", "seconds", "milliseconds"),
    [
        (0.0, "1", "1"),
        (0.0004, "1", "1"),
        (0.25, "1", "250"),
        (1.0, "1", "1000"),
        (1.001, "2", "1001"),
        (59, "59", "59000"),
    ],
)
def test_retry_after_is_rounded_up(retry_after_s: float, seconds: str, milliseconds: str) -> None:
    headers = RateLimitExceeded("Slow down.", retry_after_s=retry_after_s).headers()

    assert headers["Retry-After"] == seconds
    assert headers["retry-after-ms"] == milliseconds


@pytest.mark.parametrize("kind", [Unavailable, Overloaded])
def test_503_says_when_to_come_back(kind: type[Unavailable]) -> None:
    headers = kind("Later.").headers()

    assert 1 <= int(headers["Retry-After"]) <= 120
    assert int(headers["retry-after-ms"]) == 1000 * int(headers["Retry-After"])


def test_400_does_not_say_when_to_come_back() -> None:
    assert not {"Retry-After", "retry-after-ms"} & BadRequest("No.").headers().keys()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (InvalidRequest("Too long.", "messages"), BadRequest, "Too long."),
        (EngineOverloaded("queue 9 of 8"), Overloaded, "The server is overloaded. Try again shortly."),
        (EngineUnavailable("Still starting."), Unavailable, "Still starting."),
        (EngineDied("Failed."), Unavailable, "Failed."),
        (EngineError("CUDA error at 0x7f"), InternalError, "The server had an error while processing your request."),
    ],
)
def test_engine_error_becomes_the_clients_view_of_it(
    error: EngineError, kind: type[GatewayError], message: str
) -> None:
    seen = from_engine(error)

    assert type(seen) is kind
    assert str(seen) == message


def test_engine_error_keeps_its_param_and_code() -> None:
    seen = from_engine(InvalidRequest("Too long.", "messages", "context_length_exceeded"))

    assert (seen.param, seen.code) == ("messages", "context_length_exceeded")


def test_engine_error_without_a_code_is_an_invalid_request() -> None:
    assert from_engine(InvalidRequest("Too long.", "messages")).code == "invalid_request"


class _Inner(BaseModel):
    size: int


class _Outer(BaseModel):
    items: list[_Inner]
    name: str = ""


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({}, "items"),
        ({"items": 1}, "items"),
        ({"items": [{"size": 1}, {"size": "big"}]}, "items[1].size"),
        ({"items": [{}]}, "items[0].size"),
        ({"items": [], "name": 5}, "name"),
    ],
)
def test_validation_error_names_the_field_by_its_path(data: object, param: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _Outer.model_validate(data)

    error = from_validation(caught.value, data)

    assert error.param == param
    assert str(error).startswith(f"Invalid value for '{param}': ")
    assert str(error).endswith(".")
    assert "pydantic" not in str(error)
