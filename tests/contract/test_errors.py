"""Every error is OpenAI's error object, whoever raises it, with the headers that tell a client whether to retry."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from engine.base import EngineError, EngineOverloaded, EngineUnavailable, GenerationRequest
from engine.mock import Fault, MockEngine
from tests.support.app import HELLO, Gateway, Start

pytestmark = pytest.mark.anyio


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error object, having checked what all errors share."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["content-length"] == str(len(response.content))
    assert response.headers["x-should-retry"] in ("true", "false")
    assert response.headers["x-request-id"]
    assert int(response.headers["openai-processing-ms"]) >= 0
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


async def test_bad_request_is_400(gateway: Gateway) -> None:
    response = await gateway.chat(temperature=3)

    assert response.status_code == 400
    assert error_of(response) == {
        "message": "Invalid value for 'temperature': must be less than or equal to 2.",
        "type": "invalid_request_error",
        "param": "temperature",
        "code": "invalid_request",
    }
    assert response.headers["x-should-retry"] == "false"


async def test_wrong_key_is_401(gateway: Gateway) -> None:
    response = await gateway.client.get("/v1/models", headers={"Authorization": "Bearer sk-shannon-wrong"})

    assert response.status_code == 401
    assert error_of(response) == {
        "message": "Incorrect API key provided.",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-should-retry"] == "false"


async def test_model_beyond_the_key_is_403(start: Start) -> None:
    key = "limited-key-limited-key"
    gateway = await start(
        config={"keys": [{"name": "ci", "key_env": "CI_KEY", "models": ["shannon-complex"]}]},
        environment={"CI_KEY": key},
    )

    response = await gateway.client.post(
        "/v1/chat/completions",
        json={"model": "shannon-chat", "messages": HELLO},
        headers={"Authorization": f"Bearer {key}"},
    )

    assert response.status_code == 403
    assert error_of(response) == {
        "message": "This API key may not use the model 'shannon-chat'.",
        "type": "permission_error",
        "param": "model",
        "code": "model_not_allowed",
    }


async def test_unknown_model_is_404(gateway: Gateway) -> None:
    response = await gateway.chat(model="gpt-5")

    assert response.status_code == 404
    error = error_of(response)
    assert "'gpt-5' does not exist" in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", "model_not_found")


@pytest.mark.parametrize("path", ["/v1/moderations", "/v1", "/v1/chat/completions/", "/nowhere", "/docs"])
async def test_unknown_url_is_404(gateway: Gateway, path: str) -> None:
    response = await gateway.client.post(path, json={})

    assert response.status_code == 404
    error = error_of(response)
    assert error["message"] == f"Unknown request URL: POST {path}. Check the URL for typos."
    assert (error["type"], error["param"]) == ("invalid_request_error", None)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("PUT", "/v1/models/shannon-chat", "GET"),
    ],
)
async def test_wrong_method_is_405_and_names_the_right_one(
    gateway: Gateway, method: str, path: str, allowed: str
) -> None:
    response = await gateway.client.request(method, path)

    assert response.status_code == 405
    assert response.headers["allow"] == allowed
    error = error_of(response)
    assert error["message"] == f"Not allowed to {method} {path}. Check the HTTP method."
    assert (error["type"], error["code"]) == ("invalid_request_error", "method_not_allowed")


async def test_frameworks_own_validation_error_is_400_and_names_the_parameter(gateway: Gateway) -> None:
    @gateway.app.get("/v1/numbers/{number}")
    async def get_number(number: int) -> int:
        return number

    response = await gateway.client.get("/v1/numbers/many")

    assert response.status_code == 400
    error = error_of(response)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "number", "invalid_request")
    assert "'number'" in error["message"]


async def test_body_over_the_cap_is_413(start: Start) -> None:
    gateway = await start(server={"max_body_bytes": 2048})
    response = await gateway.chat(user="x" * 2048)

    assert response.status_code == 413
    assert error_of(response) == {
        "message": "The request body is larger than the limit of 2048 bytes.",
        "type": "invalid_request_error",
        "param": None,
        "code": "request_too_large",
    }
    assert response.headers["connection"] == "close"


@pytest.mark.parametrize("stream", [False, True])
async def test_broken_server_is_500_without_a_word_of_why(start: Start, stream: bool) -> None:
    def broken(request: GenerationRequest) -> str:
        raise RuntimeError("secret detail")

    gateway = await start(mock=lambda: MockEngine(reply=broken))
    response = await gateway.chat(stream=stream)

    assert response.status_code == 500
    assert error_of(response) == {
        "message": "The server had an error while processing your request.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_engine_that_fails_in_an_unknown_way_is_500(gateway: Gateway, stream: bool) -> None:
    gateway.mock.faults.append(Fault(error=EngineError("CUDA error at 0x7f")))
    response = await gateway.chat(stream=stream)

    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert b"CUDA" not in response.content


@pytest.mark.parametrize("stream", [False, True])
async def test_engine_that_is_away_is_503_and_says_when_to_come_back(gateway: Gateway, stream: bool) -> None:
    gateway.mock.faults.append(Fault(error=EngineUnavailable()))
    response = await gateway.chat(stream=stream)

    assert response.status_code == 503
    assert error_of(response) == {
        "message": "The engine is not running.",
        "type": "server_error",
        "param": None,
        "code": "engine_unavailable",
    }
    assert response.headers["x-should-retry"] == "true"
    assert 1 <= int(response.headers["retry-after"]) <= 120
    assert int(response.headers["retry-after-ms"]) == 1000 * int(response.headers["retry-after"])


@pytest.mark.parametrize("stream", [False, True])
async def test_full_engine_is_503_and_not_the_keys_fault(gateway: Gateway, stream: bool) -> None:
    gateway.mock.faults.append(Fault(error=EngineOverloaded("9 requests are queued")))
    response = await gateway.chat(stream=stream)

    assert response.status_code == 503
    error = error_of(response)
    assert (error["type"], error["code"]) == ("server_error", "server_overloaded")
    assert response.headers["x-should-retry"] == "true"
    assert 1 <= int(response.headers["retry-after"]) <= 120


async def test_engine_that_is_starting_is_503(start: Start) -> None:
    gateway = await start(ready=False)
    response = await gateway.chat()

    assert response.status_code == 503
    assert error_of(response)["message"] == "The engine is still starting. Try again shortly."
    assert response.headers["x-should-retry"] == "true"
