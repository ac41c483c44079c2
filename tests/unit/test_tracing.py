"""Traces: what turns them on, what spans are called, who is whose parent, and that none of it gets in the way."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind

from engine.base import EngineDied, GenerationRequest
from engine.mock import Fault, MockEngine
from gateway.settings.config import ConfigError
from gateway.telemetry import tracing
from gateway.telemetry.tracing import Tracing, build_tracing, traces_endpoint, vllm_environment
from gateway.workflows.research import research
from gateway.workflows.run import Workflow, conduct
from tests.support.app import HELLO
from tests.support.metered import metered
from tests.support.scripted_model import FakeFetch, FakeSearch, ScriptedModel, make_run, outcome_of, sub_questions
from tests.support.spans import Spans, conventional_names

pytestmark = pytest.mark.anyio

BASE = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
COLLECTOR = "http://collector:4318"
W3C = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

# What turns them on


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({}, None),
        ({BASE: ""}, None),
        ({BASE: COLLECTOR}, "http://collector:4318/v1/traces"),
        ({BASE: f"{COLLECTOR}/otlp/"}, "http://collector:4318/otlp/v1/traces"),
        ({TRACES: f"{COLLECTOR}/mine"}, "http://collector:4318/mine"),
        ({BASE: "http://other", TRACES: f"{COLLECTOR}/mine"}, "http://collector:4318/mine"),
        ({BASE: COLLECTOR, "OTEL_SDK_DISABLED": "TRUE"}, None),
        ({BASE: COLLECTOR, "OTEL_TRACES_EXPORTER": "none"}, None),
        ({BASE: COLLECTOR, "OTEL_TRACES_EXPORTER": "otlp"}, "http://collector:4318/v1/traces"),
        ({BASE: COLLECTOR, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "http://collector:4318/v1/traces"),
    ],
)
def test_endpoint_is_what_opentelemetrys_variables_say(environment: dict[str, str], endpoint: str | None) -> None:
    assert traces_endpoint(environment) == endpoint


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({BASE: "collector:4318"}, f"{BASE}: must be an http or https URL, as http://collector:4318, not "),
        ({TRACES: "grpc://collector"}, f"{TRACES}: must be an http or https URL"),
        ({BASE: COLLECTOR, "OTEL_TRACES_EXPORTER": "console"}, "OTEL_TRACES_EXPORTER: must be otlp or none, not 'cons"),
        (
            {BASE: COLLECTOR, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL: must be http/protobuf, not 'grpc'; collectors take it on 4318",
        ),
    ],
)
def test_variable_that_can_not_be_obeyed_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        traces_endpoint(environment)

    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("environment", "named"),
    [({}, {"OTEL_SERVICE_NAME": "shannon-gateway"}), ({"OTEL_RESOURCE_ATTRIBUTES": "a=b,service.name=mine"}, {})],
)
def test_vllm_sends_its_spans_the_same_way(environment: dict[str, str], named: dict[str, str]) -> None:
    protocol = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}

    assert vllm_environment(environment) == {}
    assert vllm_environment(environment | {BASE: COLLECTOR}) == protocol | named


def test_nothing_of_opentelemetry_is_imported_while_it_is_off() -> None:
    script = """
import sys
from engine.base import Prepared
from gateway.telemetry.tracing import build_tracing
tracing = build_tracing({})
with tracing.request("GET", "http", "/", {}) as span, tracing.agent("a", "b"), tracing.tool("t", 1):
    with tracing.generation(Prepared(request_id="r", prompt_tokens=1, max_tokens=1), "m") as generation:
        generation.fail("x")
    span.answered("GET", "/", 200, None)
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    subprocess.run([sys.executable, "-c", script], check=True)


async def test_service_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=mine,deployment.environment.name=test")
    built = build_tracing({BASE: "http://127.0.0.1:9"})
    assert built._provider is not None
    attributes = built._provider.resource.attributes
    await built.close()

    assert (attributes["service.name"], attributes["deployment.environment.name"]) == ("mine", "test")
    assert attributes["service.version"]


# Spans


@pytest.fixture
def spans() -> Spans:
    return Spans()


async def generate(engine: MockEngine, spans: Spans, **fields: Any) -> GenerationRequest:
    meter = (await metered(engine)).meter
    meter.tracing = spans.tracing
    asked: dict[str, Any] = {"messages": HELLO, "stream": True} | fields
    request = GenerationRequest(request_id="chatcmpl-1", **asked)
    prepared = await meter.prepare(request)
    async for _ in meter.generate(prepared):
        pass
    return request


async def test_generation_is_described_as_the_conventions_say(spans: Spans) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 7, "n": 2, "max_tokens": 3}
    await generate(MockEngine(), spans, affinity="session-1", **sampling)

    (span,) = spans.finished()
    attributes = dict(span.attributes or {})
    assert attributes.pop("gen_ai.response.time_to_first_chunk") >= 0  # type: ignore[operator]
    assert (span.name, span.kind) == ("chat shannon-chat", SpanKind.CLIENT)
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "shannon",
        "gen_ai.conversation.id": "session-1",
        "gen_ai.request.model": "shannon-chat",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 5,
        "gen_ai.request.seed": 7,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": True,
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.model": "shannon-chat",
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 6,
        "shannon.queue_s": 0.0,
    }


async def test_bare_prompt_is_a_text_completion(spans: Spans) -> None:
    await generate(MockEngine(), spans, messages=[], prompt="a b", stream=False)

    (span,) = spans.finished()
    assert span.name == "text_completion shannon-chat"
    assert "gen_ai.response.time_to_first_chunk" not in (span.attributes or {}), "there are no chunks"


async def test_failed_generation_names_its_error_and_says_no_more(spans: Spans) -> None:
    engine = MockEngine()
    engine.faults.append(Fault(at_token=1, error=EngineDied("quotes a prompt")))
    with pytest.raises(Exception, match="quotes a prompt"):
        await generate(engine, spans)

    (span,) = spans.finished()
    assert (span.attributes or {})["error.type"] == "engine_unavailable"
    assert (span.attributes or {})["gen_ai.usage.output_tokens"] == 1
    assert not span.status.is_ok
    assert "quotes" not in span.to_json()


async def test_engine_gets_the_context_of_its_generation(spans: Spans) -> None:
    meter = (await metered(MockEngine())).meter
    meter.tracing = spans.tracing
    prepared = await meter.prepare(GenerationRequest(request_id="r", messages=HELLO))
    async for _ in meter.generate(prepared):
        pass

    (span,) = spans.finished()
    assert span.context is not None
    assert prepared.trace_headers is not None
    _, trace_id, span_id, _ = prepared.trace_headers["traceparent"].split("-")
    assert (int(trace_id, 16), int(span_id, 16)) == (span.context.trace_id, span.context.span_id)


@pytest.mark.parametrize(("headers", "depth"), [({"traceparent": W3C}, 1), ({}, 0), ({"traceparent": "nonsense"}, 0)])
async def test_request_goes_on_with_the_trace_of_its_client(spans: Spans, headers: dict[str, str], depth: int) -> None:
    with spans.tracing.request("GET", "http", "/v1/models", headers) as span:
        assert span.trace_id is not None
        assert (span.trace_id == "0af7651916cd43dd8448eb211c80319c") == bool(depth)
        span.answered("GET", "/v1/models", 200, None)

    (finished,) = spans.finished()
    assert (finished.parent is not None) == bool(depth)


async def test_client_that_does_not_sample_is_obeyed(spans: Spans) -> None:
    with spans.tracing.request("GET", "http", "/", {"traceparent": W3C[:-1] + "0"}) as span:
        span.answered("GET", "/", 200, None)

    assert spans.finished() == []


@pytest.mark.parametrize(
    ("status", "error", "ok"),
    [
        (200, None, True),
        (200, "engine_unavailable", False),
        (200, "client_disconnected", True),
        (None, "client_disconnected", True),
        (429, "rate_limit_exceeded", True),
        (503, "server_overloaded", False),
        (500, None, False),
    ],
)
async def test_request_fails_where_the_server_did(spans: Spans, status: int | None, error: str, ok: bool) -> None:
    with spans.tracing.request("POST", "http", "/v1/x", {}) as span:
        span.answered("POST", "/v1/{y}", status, error)

    (finished,) = spans.finished()
    attributes = finished.attributes or {}
    assert (finished.name, finished.kind) == ("POST /v1/{y}", SpanKind.SERVER)
    assert finished.status.is_ok == ok
    assert attributes.get("error.type") == (error or (None if ok else "500"))
    assert attributes.get("http.response.status_code") == status


# Agents


async def traced_run(workflow: Workflow, spans: Spans, search: FakeSearch, fetch: FakeFetch, **scripts: Any) -> None:
    engine = MockEngine(reply=ScriptedModel(**scripts), max_model_len=16_384, token_s=0.0005)
    over = await metered(engine)
    over.meter.tracing = spans.tracing
    await outcome_of(workflow, make_run(over.meter, search, fetch))
    assert engine.unfinished_requests == 0


async def test_agents_side_by_side_are_the_parents_of_their_own_work(spans: Spans) -> None:
    fetch = FakeFetch()
    fetch.failing.add("https://query-2.example/page")
    plan = {"plan": lambda request: sub_questions(request, 3)}
    with spans.tracing.request("POST", "http", "/", {}):
        await traced_run(research("standard"), spans, FakeSearch(), fetch, **plan)

    (root,) = spans.named("POST")
    (run,) = spans.below(root)
    assert run.name == "invoke_workflow chat", "the name is the model's setting"
    agents = spans.below(run)
    names = [str((agent.attributes or {})["gen_ai.agent.name"]) for agent in agents]
    assert [agent.name for agent in agents] == [f"invoke_agent {name}" for name in names]
    assert names[0] == "planner"
    assert {"synthesis"} < set(names)
    researchers = [agent for agent in agents if (agent.attributes or {})["gen_ai.agent.description"] == "researcher"]
    assert len(researchers) == 3
    assert overlap(researchers), "they were at work at the same time"
    for agent in researchers:
        did = [span.name for span in spans.below(agent)]
        assert {"execute_tool web_search", "execute_tool web_fetch", "chat shannon-chat"} == set(did)
    everything = [span for agent in agents for span in spans.below(agent)]
    assert len(spans.finished()) == 2 + len(agents) + len(everything), "nothing is an orphan"

    failed = [span for span in everything if "error.type" in (span.attributes or {})]
    assert [span.name for span in failed] == ["execute_tool web_fetch"]
    assert (failed[0].attributes or {})["error.type"] == "tool_error"


async def test_tokens_of_agents_add_up_to_those_of_the_run(spans: Spans) -> None:
    await traced_run(research("quick"), spans, FakeSearch(), FakeFetch())

    def tokens(span: ReadableSpan) -> tuple[int, int]:
        attributes: Any = span.attributes
        return attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"]

    (run,) = spans.named("invoke_workflow chat")
    for parents in ([run], spans.below(run)):
        below = [span for parent in parents for span in spans.below(parent) if "execute_tool" not in span.name]
        sums = [sum(column) for column in zip(*map(tokens, below), strict=True)]
        assert sums == [sum(column) for column in zip(*map(tokens, parents), strict=True)]


async def test_departure_ends_every_span(spans: Spans, caplog: pytest.LogCaptureFixture) -> None:
    engine = MockEngine(reply=ScriptedModel(), max_model_len=16_384, token_s=0.001)
    over = await metered(engine)
    over.meter.tracing = spans.tracing
    run = make_run(over.meter, FakeSearch(), FakeFetch())
    events = conduct(research("standard"), run)
    async for event in events:
        if getattr(event, "type", None) == "TOOL_INVOKED":
            break
    await events.aclose()

    (whole,) = spans.named("invoke_workflow chat")
    assert (whole.attributes or {})["error.type"] == "cancelled"
    assert whole.status.is_ok, "nobody failed"
    assert spans.open == 0
    assert caplog.text == "", "each was left in the task that had entered it"


async def test_names_are_those_of_the_installed_conventions(spans: Spans) -> None:
    with spans.tracing.request("POST", "http", "/", {}) as span:
        await traced_run(research("standard"), spans, FakeSearch(), FakeFetch())
        span.answered("POST", "/", 500, "internal_error")
    await generate(MockEngine(), spans, affinity="s", temperature=1, top_p=1, top_k=1, seed=1, n=2, max_tokens=2)
    used = {name for span in spans.finished() for name in span.attributes or ()}

    assert used - conventional_names() == {"shannon.queue_s"}
    assert len(used) > 25


async def test_nothing_that_was_said_is_recorded(spans: Spans) -> None:
    said = {kind: f"Zarathustra said {kind}." for kind in ("answer", "notes", "chat")}
    with spans.tracing.request("POST", "http", "/", {}):
        await traced_run(research("standard"), spans, FakeSearch(), FakeFetch(), **said)
    recorded = "".join(span.to_json() for span in spans.finished())

    assert len(recorded) > 1000
    for word in ("Zarathustra", "What is it", "query", "Part 1", "example/page", "snippet"):
        assert word not in recorded


def overlap(several: Sequence[ReadableSpan]) -> bool:
    starts, ends = [span.start_time or 0 for span in several], [span.end_time or 0 for span in several]
    return max(starts) < min(ends)


# Out of the way


class _Stuck(SpanExporter):
    """An endpoint that takes connections and never answers."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.released = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        self.released.wait(60)
        raise RuntimeError("no such endpoint")


async def test_close_does_not_wait_for_an_endpoint_that_is_stuck(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing, "_CLOSE_S", 0.05)
    stuck = _Stuck()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(stuck, schedule_delay_millis=1))
    made = Tracing(provider)
    with made.request("GET", "http", "/", {}):
        pass
    await asyncio.to_thread(stuck.asked.wait, 10)
    with made.request("GET", "http", "/", {}) as span:  # nor does anybody else
        span.answered("GET", "/", 200, None)

    await made.close()

    assert not stuck.released.is_set()
    assert "the last traces could not be sent within 0.05 s" in caplog.text
    stuck.released.set()


async def test_close_sends_what_is_left(spans: Spans) -> None:
    with spans.tracing.request("GET", "http", "/", {}):
        pass
    await spans.tracing.close()
    await spans.tracing.close()

    assert len(spans.finished()) == 1
    await Tracing().close()
