"""Traces over HTTP: each request is a span below its client's, its generations below that, on every way out."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan

from engine.base import EngineDied
from engine.mock import Fault, MockEngine
from engine.remote.engine import RemoteEngine
from gateway.tools.base import Toolbox
from tests.support.app import HELLO, KEY, KEY_ID, Gateway, Start
from tests.support.gateway_process import serve as serve_process
from tests.support.gateway_process import wait_until
from tests.support.otlp_receiver import run_receiver
from tests.support.scripted_model import FakeFetch, FakeSearch, ScriptedModel
from tests.support.spans import Spans
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
TRACED = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
CHAT = "POST /v1/chat/completions"


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.fixture
def spans() -> Spans:
    return Spans()


async def tree(spans: Spans, gateway: Gateway) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """Return the only chat request's span and those below it, once nothing runs."""
    if gateway.server is not None:
        await until(lambda: gateway.requests_in_progress() == 0)
    await until(lambda: spans.open == 0)
    (root,) = spans.named(CHAT)
    return root, spans.below(root)


async def test_path_of_a_span_shows_no_key(serve: Start, spans: Spans) -> None:
    gateway = await serve(tracing=spans.tracing)
    await gateway.client.get(f"/{KEY}/v1/models")
    await gateway.client.get(f"/v1/models/{KEY}")
    await until(lambda: spans.open == 0)

    paths = {
        attributes(span)["url.path"]
        for name in ("GET unmatched", "GET /v1/models/{model:path}")
        for span in spans.named(name)
    }
    assert paths == {"/[...]/v1/models", "/v1/models/[...]"}


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_is_one_generation_below_its_request(serve: Start, spans: Spans, stream: bool) -> None:
    gateway = await serve(tracing=spans.tracing)
    response = await gateway.client.post(
        "/v1/chat/completions?key=hidden",
        json={"messages": HELLO, "stream": stream, "temperature": 0.5},
        headers=TRACED | {"X-Request-ID": "r1", "X-Session-ID": "s1"},
    )

    root, (generation,) = await tree(spans, gateway)
    assert root.parent is not None
    assert root.context is not None
    assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, CALLER)
    assert attributes(root) == {
        "http.request.method": "POST",
        "url.scheme": "http",
        "url.path": "/v1/chat/completions",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "shannon.request_id": "r1",
        "shannon.key_id": KEY_ID,
    }
    told = attributes(generation)
    assert generation.name == "chat shannon-chat"
    assert told["gen_ai.conversation.id"] == "s1"
    assert told["gen_ai.request.temperature"] == 0.5
    assert told["gen_ai.request.stream"] == stream
    assert told["gen_ai.response.finish_reasons"] == ("stop",)
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (3, 4)
    assert told["gen_ai.response.id"] in response.text
    assert ("gen_ai.response.time_to_first_chunk" in told) == stream


async def test_span_of_a_stream_lasts_as_long_as_the_stream(serve: Start, spans: Spans) -> None:
    gateway = await serve(mock=lambda: MockEngine(token_s=0.002), tracing=spans.tracing)
    async with gateway.stream() as response:
        pieces = response.aiter_raw()
        await anext(pieces)
        assert spans.finished() == []
        assert [piece async for piece in pieces][-1].endswith(b"[DONE]\n\n")

    root, (generation,) = await tree(spans, gateway)
    assert root.start_time is not None
    assert generation.end_time is not None
    assert root.start_time <= (generation.start_time or 0) <= generation.end_time <= (root.end_time or 0)


async def test_refusal_has_no_generation(serve: Start, spans: Spans) -> None:
    models = {"shannon-chat": {"description": "a", "limits": {"requests_per_minute": 1}}}
    gateway = await serve(config={"models": models}, tracing=spans.tracing)
    await gateway.chat()
    assert (await gateway.chat()).status_code == 429
    await until(lambda: spans.open == 0)

    _, refused = spans.named(CHAT)
    assert attributes(refused)["http.response.status_code"] == 429
    assert attributes(refused)["error.type"] == "rate_limit_exceeded"
    assert refused.status.is_ok, "the server did as it should"
    assert spans.below(refused) == []


async def test_client_that_leaves_cancels_its_generation(serve: Start, spans: Spans) -> None:
    gateway = await serve(mock=lambda: MockEngine(token_s=0.002, max_model_len=4096), tracing=spans.tracing)
    async with gateway.stream(ignore_eos=True, max_tokens=1000) as response:
        await anext(response.aiter_raw())

    root, (generation,) = await tree(spans, gateway)
    assert attributes(root)["error.type"] == "client_disconnected"
    assert attributes(generation)["error.type"] == "cancelled"
    assert attributes(generation)["gen_ai.usage.output_tokens"] == gateway.spent().completion_tokens
    assert root.status.is_ok
    assert generation.status.is_ok


async def test_stream_that_fails_behind_its_status_is_a_failure(serve: Start, spans: Spans) -> None:
    gateway = await serve(tracing=spans.tracing, max_engine_restarts=9)
    gateway.mock.faults.append(Fault(at_token=2, error=EngineDied("gone")))
    await gateway.chat(stream=True)

    root, (generation,) = await tree(spans, gateway)
    for span in (root, generation):
        assert attributes(span)["error.type"] == "engine_unavailable"
        assert not span.status.is_ok


async def test_agents_of_many_requests_stay_in_their_own_traces(serve: Start, spans: Spans) -> None:
    spec = {"description": "The one under test", "workflow": "standard_research"}
    gateway = await serve(
        mock=lambda: MockEngine(reply=ScriptedModel(), max_model_len=16_384, token_s=0.0002),
        config={"models": {"shannon-chat": spec}},
        tracing=spans.tracing,
    )
    object.__setattr__(gateway.services, "tools", Toolbox((FakeSearch(), FakeFetch()), backoff_s=0.0))
    await asyncio.gather(*(gateway.chat(stream=bool(number % 2)) for number in range(4)))
    await until(lambda: spans.open == 0)

    for root in spans.named(CHAT):
        (run,) = spans.below(root)
        assert run.name == "invoke_workflow standard_research"
        agents = spans.below(run)
        assert len(agents) > 3
        below = [run, *agents, *(span for agent in agents for span in spans.below(agent))]
        assert root.context is not None
        assert {span.context.trace_id for span in below if span.context} == {root.context.trace_id}
    assert len(spans.named(CHAT)) == 4
    assert len([span for span in spans.finished() if span.parent is None]) == 4, "nothing is an orphan"


async def test_client_that_leaves_cancels_its_agents(
    serve: Start, spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    spec = {"description": "The one under test", "workflow": "standard_research"}
    gateway = await serve(
        mock=lambda: MockEngine(reply=ScriptedModel(), max_model_len=16_384, token_s=0.005),
        config={"models": {"shannon-chat": spec}},
        tracing=spans.tracing,
    )
    object.__setattr__(gateway.services, "tools", Toolbox((FakeSearch(), FakeFetch()), backoff_s=0.0))
    async with gateway.stream() as response:
        async for piece in response.aiter_raw():
            if b"TOOL_OBSERVATION" in piece:
                break

    root, (run,) = await tree(spans, gateway)
    assert attributes(root)["error.type"] == "client_disconnected"
    assert attributes(run)["error.type"] == "cancelled"
    cut = [span for agent in spans.below(run) for span in (agent, *spans.below(agent))]
    assert {attributes(span).get("error.type") for span in cut} == {None, "cancelled"}
    assert "detach" not in caplog.text, "each span was left in the task that had entered it"


async def test_embedding_is_a_generation_of_its_own_kind(serve: Start, spans: Spans) -> None:
    gateway = await serve(tracing=spans.tracing)
    await gateway.client.post("/v1/embeddings", json={"model": "shannon-chat", "input": "a b"})
    await until(lambda: spans.open == 0)

    (span,) = spans.named("embeddings shannon-chat")
    assert attributes(span)["gen_ai.operation.name"] == "embeddings"
    assert attributes(span)["gen_ai.usage.input_tokens"] == 2


async def test_job_begins_a_trace_of_its_own(serve: Start, spans: Spans) -> None:
    gateway = await serve(tracing=spans.tracing)
    async with gateway.client.stream("GET", "/api/v1/chat/stream/c1", headers=TRACED) as response:
        lines = response.aiter_lines()
        assert await anext(lines)
        await gateway.client.post("/api/v1/chat/submit", json={"client_id": "c1", "prompt": "hello"}, headers=TRACED)
        async with asyncio.timeout(10):
            async for line in lines:
                if line == "event: done":
                    break
    await until(lambda: spans.open == 0)

    (generation,) = spans.named("chat shannon-chat")
    assert generation.parent is None, "it is no part of the request that opened the stream, nor ends with it"


async def test_probes_and_scrapes_leave_no_spans(serve: Start, spans: Spans) -> None:
    gateway = await serve(tracing=spans.tracing)
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        await gateway.client.get(path)

    assert [span.name for span in spans.finished()] == ["GET /v1/models"]


async def test_trace_goes_on_at_a_server_elsewhere(serve: Start, spans: Spans) -> None:
    """Two gateways, the first in front of the second."""
    behind = Spans()
    second = await serve(tracing=behind.tracing)
    first = await serve(
        mock=lambda: cast(Any, RemoteEngine([f"{second.url}/v1"], "shannon-chat", api_key=KEY)), tracing=spans.tracing
    )
    assert (await first.chat()).status_code == 200

    _, (generation,) = await tree(spans, first)
    root, _ = await tree(behind, second)
    assert root.parent is not None
    assert generation.context is not None
    assert (root.parent.trace_id, root.parent.span_id) == (generation.context.trace_id, generation.context.span_id)


async def test_log_names_the_trace(serve: Start, spans: Spans, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    gateway = await serve(tracing=spans.tracing)
    await gateway.client.get("/v1/models", headers=TRACED)

    (line,) = [record.__dict__["fields"] for record in caplog.records if record.name == "shannon.access"]
    assert line["trace_id"] == TRACE


# A real process and a real receiver


def test_process_sends_its_traces_and_flushes_them_at_its_end(tmp_path: Path) -> None:
    with run_receiver() as receiver:
        # Nothing is sent before the end but by force.
        often = {"OTEL_BSP_SCHEDULE_DELAY": "600000", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test"}
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url} | often
        with serve_process(tmp_path, {"engines": {"main": {"kind": "mock"}}}, **environment) as gateway:
            gateway.wait_until_ready()
            body = {"messages": HELLO, "stream": True}
            headers = gateway.authorization | TRACED
            httpx.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers).raise_for_status()
            assert receiver.spans() == []
        assert gateway.process.returncode == 0

        assert receiver.paths == {"/v1/traces"}
        ((root,), (generation,)) = receiver.named(CHAT), receiver.named("chat shannon-chat")
        assert (root["trace_id"], root["parent_id"], root["kind"]) == (TRACE, CALLER, "SERVER")
        assert (generation["parent_id"], generation["kind"]) == (root["span_id"], "CLIENT")
        assert (root["service"], generation["gen_ai.usage.output_tokens"]) == ("shannon-gateway", 4)


def test_endpoint_that_fails_disturbs_nobody(tmp_path: Path) -> None:
    with run_receiver() as receiver:
        receiver.status = 500
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_BSP_SCHEDULE_DELAY": "1"}
        with serve_process(tmp_path, {"engines": {"main": {"kind": "mock"}}}, **environment) as gateway:
            gateway.wait_until_ready()
            for _ in range(3):
                assert gateway.chat(messages=HELLO).status_code == 200
            wait_until(lambda: "/v1/traces" in receiver.paths, "nothing was sent")
        assert gateway.process.returncode == 0
