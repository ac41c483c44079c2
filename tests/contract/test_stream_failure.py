"""A stream that fails: its real status while nothing has been sent, one error frame and the end afterwards."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from engine.base import EngineDied, EngineError, EngineOverloaded
from engine.mock import Fault, MockEngine
from tests.support.app import HELLO, Gateway, Start
from tests.support.frames import data_lines
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def gateway(serve: Start) -> Gateway:
    """A gateway on a socket whose every reply is four tokens."""
    return await serve(mock=lambda: MockEngine(reply="one two three four"))


async def test_failure_before_the_first_token_has_its_real_status(gateway: Gateway) -> None:
    gateway.mock.faults.append(Fault(error=EngineOverloaded("full")))
    async with gateway.stream() as response:
        body = json.loads(await response.aread())

    assert response.status_code == 503
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-should-retry"] == "true"
    assert body["error"]["code"] == "server_overloaded"


async def test_failure_after_a_token_is_one_error_frame_and_the_end(gateway: Gateway) -> None:
    gateway.mock.faults.append(Fault(at_token=2, error=EngineDied()))
    async with gateway.stream() as response:
        raw = await response.aread()  # a body cut short would raise RemoteProtocolError

    assert response.status_code == 200
    *frames, last = data_lines(raw)
    assert json.loads(last) == {
        "error": {
            "message": "The engine failed during generation.",
            "type": "server_error",
            "param": None,
            "code": "engine_unavailable",
        }
    }
    assert [json.loads(frame)["choices"][0]["delta"].get("content") for frame in frames] == ["", "one", " two"]
    assert all(json.loads(frame)["choices"][0]["finish_reason"] is None for frame in frames)
    assert b"[DONE]" not in raw


async def test_unknown_failure_after_a_token_tells_nothing_of_its_cause(gateway: Gateway) -> None:
    gateway.mock.faults.append(Fault(at_token=2, error=EngineError("CUDA error at 0x7f")))
    async with gateway.stream() as response:
        raw = await response.aread()

    assert b"CUDA" not in raw
    assert json.loads(data_lines(raw)[-1])["error"] == {
        "message": "The server had an error while processing your request.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }


async def test_failure_of_a_whole_body_has_its_real_status_however_late(gateway: Gateway) -> None:
    gateway.mock.faults.append(Fault(at_token=3, error=EngineDied()))
    response = await gateway.chat()

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_unavailable"
    assert response.headers["retry-after"] == "5"


async def test_connection_serves_on_after_a_failed_stream(gateway: Gateway) -> None:
    gateway.mock.faults.append(Fault(at_token=2, error=EngineError("boom")))
    async with httpx.AsyncClient(base_url=gateway.url, headers=gateway.client.headers) as client:
        for _ in range(2):
            body = {"messages": HELLO, "stream": True}
            raw = (await client.post("/v1/chat/completions", json=body)).content

    assert raw.endswith(b"data: [DONE]\n\n")


async def test_openai_sdk_raises_on_the_error_frame(gateway: Gateway) -> None:
    gateway.mock.faults.append(Fault(at_token=2, error=EngineDied()))
    seen: list[str | None] = []
    async with openai.AsyncOpenAI(api_key=gateway.key, base_url=f"{gateway.url}/v1", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="shannon-chat", messages=[{"role": "user", "content": "hi"}], stream=True
        )

        async def read() -> None:
            async for chunk in stream:
                seen.append(chunk.choices[0].delta.content)

        with pytest.raises(openai.APIError) as caught:
            await read()

    assert seen == ["", "one", " two"]
    assert caught.value.message == "The engine failed during generation."
    assert caught.value.code == "engine_unavailable"
    assert caught.value.type == "server_error"


async def test_failed_stream_is_metered_at_what_it_spent(gateway: Gateway) -> None:
    gateway.mock.faults.append(Fault(at_token=2, error=EngineDied("boom")))
    async with gateway.stream() as response:
        await response.aread()

    await until(lambda: gateway.requests_in_progress() == 0)
    metered = await gateway.metered()
    assert metered == gateway.spent()
    assert (metered.prompt_tokens, metered.completion_tokens) == (3, 2)
    assert gateway.mock.unfinished_requests == 0
    assert await gateway.samples("shannon_streams_open") == {(): 0.0}
