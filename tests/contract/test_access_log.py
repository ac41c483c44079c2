"""The access log: one line per request, written when it has ended, however it did, with everything but what was said.

Token counts must be those of the engine, and nothing that a client or a model said may be in any line of any logger.
"""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.base import EngineDied, EngineOverloaded
from engine.mock import Fault, MockEngine
from gateway.tools.base import Toolbox
from tests.support.app import AUTHORIZATION, HELLO, KEY_ID, Gateway, Start
from tests.support.gateway_process import serve as serve_process
from tests.support.scripted_model import FakeFetch, FakeSearch, ScriptedModel
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

CANARY = "Zarathustra"
"""A word that clients and models say, and nobody else."""


class AccessLog:
    """The lines so far."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def lines(self) -> list[dict[str, Any]]:
        return [record.__dict__["fields"] for record in self._caplog.records if record.name == "shannon.access"]

    def said(self) -> list[str]:
        return [record.getMessage() for record in self._caplog.records if record.name == "shannon.access"]

    async def last(self, count: int = 1) -> dict[str, Any]:
        """Return the last line, once there are `count` of them."""
        await until(lambda: len(self.lines()) >= count)
        assert len(self.lines()) == count
        return self.lines()[-1]


@pytest.fixture
def access_log(caplog: pytest.LogCaptureFixture) -> AccessLog:
    caplog.set_level(logging.INFO)
    return AccessLog(caplog)


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    times = {name: line.pop(name) for name in list(line) if name.endswith("_ms")}
    assert all(isinstance(value, float) and value >= 0 for value in times.values())
    assert set(times) <= {"duration_ms", "queue_ms", "time_to_first_token_ms"}
    return line | {"times": sorted(times)}


async def test_line_of_a_whole_completion(gateway: Gateway, access_log: AccessLog) -> None:
    response = await gateway.chat()

    assert access_log.said() == ["POST /v1/chat/completions 200"]
    assert without_times(await access_log.last()) == {
        "request_id": response.headers["x-request-id"],
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "key_id": KEY_ID,
        "tenant": "default",
        "streamed": False,
        "model": "shannon-chat",
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "completion_tokens": 4,
        "finish_reason": "stop",
        "times": ["duration_ms", "queue_ms"],
    }


async def test_line_of_a_stream_is_written_at_its_end(serve: Start, access_log: AccessLog) -> None:
    gateway = await serve(mock=lambda: MockEngine(first_token_s=0.02))
    async with gateway.stream(max_tokens=2) as response:
        assert access_log.lines() == [], "it has begun"
        await response.aread()

    line = await access_log.last()
    assert (line["streamed"], line["completion_tokens"], line["finish_reason"]) == (True, 2, "length")
    assert 20 <= line["time_to_first_token_ms"] <= line["duration_ms"]


async def test_line_of_a_request_that_waited_tells_how_long(serve: Start, access_log: AccessLog) -> None:
    from engine.queue.admission import QueuedEngine

    gateway = await serve(mock=lambda: QueuedEngine(MockEngine(token_s=0.005), max_in_flight=1))  # type: ignore[arg-type, return-value]
    await asyncio.gather(*(gateway.chat(ignore_eos=True, max_tokens=10) for _ in range(2)))

    await access_log.last(2)
    first, second = sorted(line["queue_ms"] for line in access_log.lines())
    assert first == 0
    assert second >= 40


async def test_line_of_a_client_that_left_has_the_tokens_up_to_then(serve: Start, access_log: AccessLog) -> None:
    gateway = await serve(mock=lambda: MockEngine(token_s=0.002, max_model_len=4096))
    async with gateway.stream(ignore_eos=True, max_tokens=1000) as response:
        await anext(response.aiter_raw())

    line = await access_log.last()
    spent = gateway.spent()
    assert (line["error"], line["status"]) == ("client_disconnected", 200)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (spent.prompt_tokens, spent.completion_tokens)
    assert "finish_reason" not in line


async def test_line_of_a_client_that_left_before_its_answer(serve: Start, access_log: AccessLog) -> None:
    gateway = await serve()
    gateway.mock.faults.append(Fault())  # hangs
    request = asyncio.create_task(gateway.chat())
    await until(lambda: gateway.mock.unfinished_requests == 1)

    request.cancel()

    line = await access_log.last()
    assert (line["error"], line["status"], line["completion_tokens"]) == ("client_disconnected", 499, 0)


async def test_line_of_a_client_that_left_during_the_upload(serve: Start, access_log: AccessLog) -> None:
    gateway = await serve()
    _, writer = await gateway.post_by_hand(b'{"messages": [', announced_bytes=1000)
    await until(lambda: gateway.requests_in_progress() == 1)

    writer.close()

    assert (await access_log.last())["error"] == "client_disconnected"


async def test_line_of_a_stream_that_failed_behind_its_status(serve: Start, access_log: AccessLog) -> None:
    gateway = await serve(max_engine_restarts=9)
    gateway.mock.faults.append(Fault(at_token=2, error=EngineDied("gone")))
    await gateway.chat(stream=True)

    line = await access_log.last()
    assert (line["status"], line["error"], line["completion_tokens"]) == (200, "engine_unavailable", 2)


async def test_line_of_a_stream_that_a_shutdown_cut(serve: Start, access_log: AccessLog) -> None:
    gateway = await serve(mock=lambda: MockEngine(token_s=0.005, max_model_len=4096))
    async with gateway.stream(ignore_eos=True, max_tokens=1000) as response:
        await anext(response.aiter_raw())
        assert await gateway.services.drain.run(0) == 1

    line = await access_log.last()
    assert (line["status"], line["error"]) == (200, "engine_unavailable")
    assert line["completion_tokens"] == gateway.spent().completion_tokens


async def test_line_of_a_refusal_has_its_code(serve: Start, access_log: AccessLog) -> None:
    limits = {"requests_per_minute": 1}
    models = {"shannon-chat": {"description": "a", "limits": limits}, "other": {"description": "b"}}
    gateway = await serve(config={"models": models})
    await gateway.chat()
    await gateway.chat()
    await gateway.chat(model="other", temperature=9)
    await gateway.chat(model="gpt-5")
    gateway.mock.faults.append(Fault(error=EngineOverloaded("full")))
    await gateway.chat(model="other")
    await gateway.client.post("/v1/messages", json={"messages": HELLO})
    await gateway.client.get("/v1/models", headers={"Authorization": "Bearer wrong"})

    told = [(line["status"], line.get("error"), line.get("key_id"), line.get("model")) for line in access_log.lines()]
    assert told == [
        (200, None, KEY_ID, "shannon-chat"),
        (429, "rate_limit_exceeded", KEY_ID, "shannon-chat"),
        (400, "invalid_request", KEY_ID, None),
        (404, "model_not_found", KEY_ID, None),
        (503, "server_overloaded", KEY_ID, "other"),
        (400, "invalid_request", KEY_ID, None),
        (401, "invalid_api_key", None, None),
    ]


async def test_path_is_the_routes_template(gateway: Gateway, access_log: AccessLog) -> None:
    await gateway.client.get("/v1/models/shannon-chat?api_key=hidden")
    await gateway.client.get("/v1/sessions/private?x=hidden")
    await gateway.client.get("/v1/v1/models?x=hidden")

    assert [line["path"] for line in access_log.lines()] == [
        "/v1/models/{model:path}",
        "/v1/sessions/{session_id:path}",
        "unmatched",
    ]
    assert access_log.said()[-1] == "GET /v1/v1/models 404", "where it helps, it says what was asked for"
    assert "hidden" not in str(access_log.lines()) + str(access_log.said())


async def test_line_of_agents_has_the_sum_of_their_generations(serve: Start, access_log: AccessLog) -> None:
    spec = {"description": "The one under test", "workflow": "standard_research"}
    gateway = await serve(
        mock=lambda: MockEngine(reply=ScriptedModel(), max_model_len=16_384), config={"models": {"shannon-chat": spec}}
    )
    object.__setattr__(gateway.services, "tools", Toolbox((FakeSearch(), FakeFetch()), backoff_s=0.0))
    await gateway.chat(stream=True)

    line = await access_log.last()
    spent = gateway.spent()
    assert len(gateway.mock.requests) > 5
    assert (line["prompt_tokens"], line["completion_tokens"]) == (spent.prompt_tokens, spent.completion_tokens)
    assert line["finish_reason"] == "stop"


async def test_line_of_a_request_that_costs_no_tokens(gateway: Gateway, access_log: AccessLog) -> None:
    await gateway.client.post("/tokenize", json={"model": "shannon-chat", "messages": HELLO})

    line = await access_log.last()
    assert (line["model"], line["prompt_tokens"], line["completion_tokens"]) == ("shannon-chat", 0, 0)


async def test_nothing_that_was_said_is_logged(serve: Start, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("httpx", "httpcore"):  # the test's own client
        caplog.set_level(logging.WARNING, name)
    caplog.set_level(logging.DEBUG)
    gateway = await serve(mock=lambda: MockEngine(reply=f"You said {CANARY}", max_model_len=64), max_engine_restarts=9)
    said = [{"role": "system", "content": f"Be {CANARY}"}, {"role": "user", "content": f"I am {CANARY}"}]

    await gateway.chat(messages=said)
    await gateway.chat(messages=said, stream=True)
    await gateway.chat(messages=[{"role": "user", "content": f"{CANARY} " * 100}])
    await gateway.chat(messages=[{"role": CANARY, "content": CANARY}])
    await gateway.chat(messages=said, model=CANARY)
    await gateway.chat(messages=said, stop=[CANARY], response_format={"type": CANARY})
    await gateway.chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": CANARY}}]}])
    await gateway.client.post("/v1/responses", json={"input": CANARY, "instructions": CANARY})
    await gateway.client.post("/v1/messages", json={"messages": said, "max_tokens": 4, "model": "shannon-chat"})
    await gateway.client.post("/v1/completions", json={"prompt": CANARY, "model": "shannon-chat", "n": CANARY})
    await gateway.client.post("/v1/chat/completions", content=f'{{"messages": "{CANARY}')
    gateway.mock.faults.append(Fault(at_token=1, error=EngineDied("gone")))
    await gateway.chat(messages=said, stream=True)
    await until(lambda: gateway.requests_in_progress() == 0)

    assert len([record for record in caplog.records if record.name == "shannon.access"]) == 12
    fields = [record.__dict__.get("fields") for record in caplog.records]
    assert CANARY not in caplog.text + str(fields)


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"Zarathustra\r\n\r\n", 400, "invalid_http"),
        (b"GET /Zarathustra HTTP/1.1\r\nZarathustra: Zarathustra\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nExpect: Zarathustra\r\n\r\n", 417, "expectation_failed"),
        (b"GET /" + b"Zarathustra" * 10_000, 431, "headers_too_large"),
        (b"\x16\x03\x01Zarathustra", 400, "invalid_http"),
    ],
)
async def test_line_of_what_is_no_request(
    serve: Start, access_log: AccessLog, caplog: pytest.LogCaptureFixture, raw: bytes, status: int, code: str
) -> None:
    gateway = await serve()
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(raw)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()

    line = await access_log.last()
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"x-request-id: %b\r\n" % line.pop("request_id").encode() in answer
    assert line == {"path": "unmatched", "status": status, "error": code, "client": "127.0.0.1"}
    assert CANARY not in caplog.text
    assert (await gateway.samples("shannon_requests_total"))["unmatched", str(status)] == 1


def test_every_line_of_a_gateway_is_json(tmp_path: Path) -> None:
    """A real process, from its first line to its last, whatever the logger; a key is in none of them."""
    tree = {"engines": {"main": {"kind": "mock"}}}
    with serve_process(tmp_path, tree, SHANNON_LOG_FORMAT="json") as gateway:
        gateway.wait_until_ready()
        body = {"messages": [{"role": "user", "content": f"I am {CANARY}"}], "stream": True}
        headers = gateway.authorization | {"X-Request-ID": "r1"}
        httpx.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers).raise_for_status()
        httpx.post(f"{gateway.url}/v1/chat/completions", json=body | {"n": 0}, headers=AUTHORIZATION)

    text = gateway.log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert all({"timestamp", "level", "logger", "message"} <= line.keys() for line in lines)
    assert {"shannon", "shannon.access", "gateway.serving.server", "uvicorn.error"} <= {
        line["logger"] for line in lines
    }
    (line,) = [line for line in lines if line.get("request_id") == "r1"]
    assert line["path"] == "/v1/chat/completions"
    assert (line["prompt_tokens"], line["completion_tokens"], line["streamed"]) == (4, 5, True)
    assert CANARY not in text
    assert gateway.key.rpartition("-")[2] not in text
