"""Looking into a model: events of each step, the whole matrix, and the errors of both, with keys and without.

Around an inspector that weighs tokens and attention by a fixed rule; the real one is in tests/engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.base import EngineDied, EngineOverloaded, InvalidRequest
from engine.inspector.base import InspectedToken, InspectionRequest, Reply, Shape
from engine.mock import MockEngine
from engine.supervisor import SupervisedEngine
from gateway.app import create_app
from gateway.components import build_authenticator, build_inspector, build_store
from gateway.serving.server import Server
from gateway.settings.config import load_config, parse_config
from tests.support.app import AUTHORIZATION, HELLO, KEY, NOW, ROOT, Gateway, Start
from tests.support.waiting import FakeClock, until

pytestmark = pytest.mark.anyio

LAYERS, HEADS, LENGTH = 2, 3, 32
CHAT: dict[str, Any] = {"messages": HELLO, "trace_layer": 1, "max_new_tokens": 4}
MATRIX: dict[str, Any] = {"messages": HELLO, "trace_layer": 1, "head": 2}


class FakeInspector:
    """Draws token n at step n, out of twelve, and attends evenly to all before it."""

    def __init__(self) -> None:
        self.requests: list[InspectionRequest] = []
        self.running = 0
        self.gate = asyncio.Event()
        """Cleared, a trace stops after its second step."""
        self.gate.set()
        self.failure: Exception | None = None
        self.fails_at = 0
        self.closed = False

    def shape(self, engine: str) -> Shape:
        if engine != "main":
            raise InvalidRequest("This model can't be inspected.", "model", "model_not_supported")
        return Shape("", LAYERS, HEADS, LENGTH)

    async def trace(self, engine: str, request: InspectionRequest) -> AsyncGenerator[InspectedToken | Reply, None]:
        self.requests.append(request)
        self.running += 1
        try:
            for number in range(request.max_new_tokens):
                if self.failure is not None and number == self.fails_at:
                    raise self.failure
                if number == 2:
                    await self.gate.wait()
                yield self._step(number)
            yield Reply("the reply")
        finally:
            self.running -= 1

    def _step(self, number: int) -> InspectedToken:
        logits = [-abs(token - number) for token in range(12)]
        total = sum(map(math.exp, logits))
        probs = sorted(((math.exp(logit) / total, token) for token, logit in enumerate(logits)), reverse=True)
        token = {"step": number, "token_id": number, "token_text": f"<{number}>"}
        trace = {
            "step": number,
            "entropy": -sum(prob * math.log(prob) for prob, _ in probs),
            "topk": [{"token_id": token, "token_text": f"<{token}>", "prob": prob} for prob, token in probs[:10]],
            "attn": [[1 / (number + 3)] * (number + 3) for _ in range(HEADS)],
        }
        return InspectedToken(json.dumps(token).encode(), json.dumps(trace).encode())

    async def attention(self, engine: str, request: InspectionRequest) -> bytes:
        self.requests.append(request)
        if self.failure is not None:
            raise self.failure
        attn = [[1 / (row + 1) if column <= row else 0.0 for column in range(3)] for row in range(3)]
        document = {"layer": request.trace_layer, "head": request.head, "tokens": ["a", "b", "c"], "attn": attn}
        return json.dumps(document).encode()

    async def close(self) -> None:
        self.closed = True


class Inspected:
    """A gateway on a socket, around a FakeInspector."""

    def __init__(self, client: httpx.AsyncClient, inspector: FakeInspector, clock: FakeClock) -> None:
        self.client = client
        self.inspector = inspector
        self.clock = clock

    async def post(self, path: str, body: dict[str, Any], **more: Any) -> httpx.Response:
        return await self.client.post(path, json=body, **more)


@contextlib.asynccontextmanager
async def run(
    store_url: str,
    folder: Path,
    *,
    limits: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
    **inspector: Any,
) -> AsyncIterator[Inspected]:
    config = parse_config(
        {
            "engines": {"main": {"kind": "mock"}, "other": {"kind": "mock"}},
            "models": {
                "shannon-chat": {"description": "General chat completion", "limits": limits or {}},
                "elsewhere": {"description": "Not in this process", "engine": "other"},
            },
            "store": {"data_dir": str(folder / "data"), "command_timeout_ms": 2000},
            "server": {"port": 0} | (server or {}),
            "inspector": {"enabled": True, "burst": 100, **inspector},
        }
    )
    variables = {"SHANNON_BOOTSTRAP_KEY": KEY, "SHANNON_REDIS_URL": store_url}
    store = build_store(config, variables)
    clock, fake = FakeClock(NOW), FakeInspector()
    engines = {name: SupervisedEngine(name, MockEngine) for name in config.engines}
    authenticator = build_authenticator(config, store, variables)
    app = create_app(config, engines, store, authenticator, clock=clock, inspector=fake)
    ready: list[str] = []
    gateway = Server(app, host="127.0.0.1", port=0, on_ready=ready.append)
    serving = asyncio.create_task(gateway.serve())
    try:
        await until(lambda: bool(ready))
        async with httpx.AsyncClient(base_url=gateway.url, headers=AUTHORIZATION, timeout=10) as client:
            yield Inspected(client, fake, clock)
    finally:
        gateway.should_exit = True
        await serving
    assert fake.closed


@pytest.fixture
async def inspected(store_url: str, tmp_path: Path) -> AsyncIterator[Inspected]:
    async with run(store_url, tmp_path) as inspected:
        yield inspected


@pytest.fixture
async def public(store_url: str, tmp_path: Path) -> AsyncIterator[Inspected]:
    """As the plain routes were first described: no keys, three requests at once, ten a minute."""
    async with run(store_url, tmp_path, public=True, burst=3) as inspected:
        del inspected.client.headers["Authorization"]
        yield inspected


def events(raw: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the events of a complete stream; every frame has two lines."""
    assert raw.endswith(b"\n\n")
    for frame in raw[:-2].split(b"\n\n"):
        name, data = frame.split(b"\n")
        assert name.startswith(b"event: ")
        assert data.startswith(b"data: ")
        yield name.removeprefix(b"event: ").decode(), json.loads(data.removeprefix(b"data: "))


def openai_error(response: httpx.Response) -> tuple[int, str, str, str | None]:
    """Return status, type, code and param of an error in OpenAI's shape."""
    error = response.json()["error"]
    return response.status_code, error["type"], error["code"], error["param"]


def plain_error(response: httpx.Response) -> tuple[int, str]:
    """Return status and code of a plain error."""
    body = response.json()
    assert body.keys() == {"error", "code"}
    assert isinstance(body["error"], str)
    assert body["error"]
    return response.status_code, body["code"]


# Streams


@pytest.mark.parametrize("path", ["/chat/stream", "/v1/inspect"])
async def test_stream_has_a_token_and_a_trace_per_step_and_done_at_the_end(inspected: Inspected, path: str) -> None:
    response = await inspected.post(path, CHAT)

    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *steps, done = events(response.content)
    assert [name for name, _ in steps] == ["token", "trace"] * 4
    assert done == ("done", {"reply": "the reply"})
    for number, ((_, token), (_, trace)) in enumerate(zip(steps[::2], steps[1::2], strict=True)):
        assert token == {"step": number, "token_id": number, "token_text": f"<{number}>"}
        assert trace.keys() == {"step", "entropy", "topk", "attn"}
        assert trace["step"] == number
        assert len(trace["topk"]) == 10
        assert all(entry.keys() == {"token_id", "token_text", "prob"} for entry in trace["topk"])
        assert [len(row) for row in trace["attn"]] == [number + 3] * HEADS


async def test_frames_are_sent_as_the_steps_are_made(inspected: Inspected) -> None:
    inspected.inspector.gate.clear()
    async with inspected.client.stream("POST", "/v1/inspect", json=CHAT) as response:
        raw = b""
        async for piece in response.aiter_raw():
            raw += piece
            if raw.count(b"event: trace") == 2:
                break
        assert inspected.inspector.running == 1
        inspected.inspector.gate.set()


@pytest.mark.parametrize("path", ["/chat/stream", "/v1/inspect"])
async def test_leaving_ends_the_inspection(inspected: Inspected, path: str) -> None:
    inspected.inspector.gate.clear()
    async with inspected.client.stream("POST", path, json=CHAT) as response:
        await anext(response.aiter_raw())
        assert inspected.inspector.running == 1

    await until(lambda: inspected.inspector.running == 0)


async def test_request_reaches_the_inspector_as_it_was_sent(inspected: Inspected) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    fields = {
        "messages": messages,
        "max_new_tokens": 7,
        "temperature": 0.0,
        "top_k": None,
        "seed": -1,
        "trace_layer": 0,
    }
    await inspected.post("/chat/stream", fields)
    await inspected.post("/chat/stream", {"messages": HELLO, "trace_layer": 1})
    await inspected.post("/inspect/full_attn", MATRIX)

    full, default, matrix = inspected.inspector.requests
    assert full == InspectionRequest(**fields)  # type: ignore[arg-type]
    assert default == InspectionRequest(
        messages=HELLO, trace_layer=1, max_new_tokens=256, temperature=0.9, top_k=50, seed=42
    )
    assert (matrix.head, matrix.max_new_tokens, matrix.seed) == (2, 0, 42)


async def test_default_length_is_no_more_than_the_servers_maximum(store_url: str, tmp_path: Path) -> None:
    async with run(store_url, tmp_path, max_new_tokens=2) as inspected:
        response = await inspected.post("/v1/inspect", {"messages": HELLO, "trace_layer": 0})
        assert len(list(events(response.content))) == 5

        refused = await inspected.post("/v1/inspect", CHAT)
        assert openai_error(refused) == (400, "invalid_request_error", "invalid_request", "max_new_tokens")


# The matrix


@pytest.mark.parametrize("path", ["/inspect/full_attn", "/v1/inspect/attention"])
async def test_matrix_covers_the_prompt(inspected: Inspected, path: str) -> None:
    response = await inspected.post(path, MATRIX)

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"layer", "head", "tokens", "attn"}
    assert (body["layer"], body["head"]) == (1, 2)
    size = len(body["tokens"])
    assert len(body["attn"]) == size
    assert all(len(row) == size for row in body["attn"])
    assert all(sum(row) == pytest.approx(1) for row in body["attn"])


# Models


async def test_list_holds_what_can_be_inspected(inspected: Inspected) -> None:
    body = (await inspected.client.get("/v1/inspect")).json()

    assert body == {"models": [{"id": "shannon-chat", "layers": LAYERS, "heads": HEADS, "max_model_len": LENGTH}]}


@pytest.mark.parametrize("path", ["/v1/inspect", "/v1/inspect/attention"])
async def test_model_must_exist_and_be_in_this_process(inspected: Inspected, path: str) -> None:
    unknown = await inspected.post(path, CHAT | MATRIX | {"model": "gpt-5"})
    elsewhere = await inspected.post(path, CHAT | MATRIX | {"model": "elsewhere"})

    assert openai_error(unknown) == (404, "invalid_request_error", "model_not_found", "model")
    assert openai_error(elsewhere) == (400, "invalid_request_error", "model_not_supported", "model")


async def test_inspection_is_off_unless_it_is_turned_on(start: Start) -> None:
    gateway: Gateway = await start()
    for path in ("/v1/inspect", "/v1/inspect/attention"):
        response = await gateway.client.post(path, json=CHAT | MATRIX)
        assert openai_error(response) == (404, "invalid_request_error", "not_found", None)
        assert "turned off" in response.json()["error"]["message"]
    for path in ("/chat/stream", "/inspect/full_attn"):
        assert plain_error(await gateway.client.post(path, json=CHAT | MATRIX)) == (404, "not_found")
    assert (await gateway.client.get("/v1/inspect")).status_code == 404


def test_shipped_deployments_say_whether_it_is_on() -> None:
    deployments = [path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "models"]

    assert [path.stem for path in deployments if load_config(path, {}).inspector.enabled] == ["demo"]


async def test_origins_that_may_call_are_configured(store_url: str, tmp_path: Path) -> None:
    origin = "https://app.example.com"
    async with run(store_url, tmp_path, server={"cors_origins": [origin]}) as inspected:
        for asking, allowed in ((origin, origin), ("https://evil.example", None)):
            answers = [
                await inspected.post("/chat/stream", CHAT, headers={"Origin": asking}),
                await inspected.post("/inspect/full_attn", {}, headers={"Origin": asking}),
            ]
            assert [answer.status_code for answer in answers] == [200, 422]
            assert {answer.headers.get("access-control-allow-origin") for answer in answers} == {allowed}


async def test_inspector_is_built_of_the_engines_in_this_process() -> None:
    tree = {
        "engines": {"main": {"kind": "embedded", "args": {"max_model_len": 128}}, "other": {"kind": "mock"}},
        "models": {"shannon-chat": {"description": "x"}},
    }
    assert build_inspector(parse_config(tree)) is None

    inspector = build_inspector(parse_config(tree | {"inspector": {"enabled": True}}))

    assert inspector is not None
    shape = inspector.shape("main")
    assert (shape.layers, shape.heads, shape.max_model_len) == (4, 4, 128)
    with pytest.raises(InvalidRequest):
        inspector.shape("other")


# Refusals


BAD: list[tuple[dict[str, Any], str]] = [
    ({"trace_layer": LAYERS}, "trace_layer"),
    ({"trace_layer": -1}, "trace_layer"),
    ({"trace_layer": "0"}, "trace_layer"),
    ({"trace_layer": None}, "trace_layer"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"max_new_tokens": -1}, "max_new_tokens"),
    ({"max_new_tokens": 513}, "max_new_tokens"),
    ({"seed": 2**63}, "seed"),
]
BAD_CHAT = [
    *BAD,
    ({"temperature": -0.1}, "temperature"),
    ({"top_k": 0}, "top_k"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
]
BAD_MATRIX = [*BAD, ({"head": HEADS}, "head"), ({"head": -1}, "head"), ({"head": None}, "head")]


@pytest.mark.parametrize(
    ("plain", "strict", "fields", "param"),
    [
        *(("/chat/stream", "/v1/inspect", CHAT | fields, param) for fields, param in BAD_CHAT),
        *(("/inspect/full_attn", "/v1/inspect/attention", MATRIX | fields, param) for fields, param in BAD_MATRIX),
    ],
)
async def test_bad_field_is_named(
    inspected: Inspected, plain: str, strict: str, fields: dict[str, Any], param: str
) -> None:
    response = await inspected.post(plain, fields)
    assert plain_error(response) == (422, "invalid_request")
    assert f"'{param}'" in response.json()["error"]

    assert openai_error(await inspected.post(strict, fields)) == (
        400,
        "invalid_request_error",
        "invalid_request",
        param,
    )
    assert inspected.inspector.requests == []


@pytest.mark.parametrize("field", ["messages", "trace_layer", "head"])
async def test_missing_field_is_named(inspected: Inspected, field: str) -> None:
    body = {name: value for name, value in MATRIX.items() if name != field}

    response = await inspected.post("/inspect/full_attn", body)

    assert plain_error(response) == (422, "invalid_request")
    assert f"'{field}': is required" in response.json()["error"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
async def test_body_that_is_no_object_is_refused(inspected: Inspected, content: bytes) -> None:
    assert plain_error(await inspected.client.post("/chat/stream", content=content)) == (422, "invalid_request")


@pytest.mark.parametrize(
    ("plain", "strict"), [("/chat/stream", "/v1/inspect"), ("/inspect/full_attn", "/v1/inspect/attention")]
)
async def test_prompt_over_the_bound_is_too_large(inspected: Inspected, plain: str, strict: str) -> None:
    def body(text: str) -> dict[str, Any]:
        return CHAT | MATRIX | {"messages": [{"role": "user", "content": text}]}

    two_bytes_each = "é" * 8193
    assert plain_error(await inspected.post(plain, body(two_bytes_each))) == (413, "prompt_too_large")
    too_large = (413, "invalid_request_error", "prompt_too_large", "messages")
    assert openai_error(await inspected.post(strict, body(two_bytes_each))) == too_large
    assert (await inspected.post(plain, body("é" * 8192))).status_code == 200


async def test_prompt_that_the_template_made_too_large_is_too_large(inspected: Inspected) -> None:
    inspected.inspector.failure = InvalidRequest("The prompt is 16390 bytes long.", "messages", "prompt_too_large")

    assert plain_error(await inspected.post("/chat/stream", CHAT)) == (413, "prompt_too_large")
    assert plain_error(await inspected.post("/inspect/full_attn", MATRIX)) == (413, "prompt_too_large")
    response = await inspected.post("/v1/inspect", CHAT)
    assert openai_error(response) == (413, "invalid_request_error", "prompt_too_large", "messages")


async def test_messages_that_the_template_refuses_are_unprocessable(inspected: Inspected) -> None:
    inspected.inspector.failure = InvalidRequest("Roles must alternate.", "messages")

    assert plain_error(await inspected.post("/chat/stream", CHAT)) == (422, "invalid_request")
    assert openai_error(await inspected.post("/v1/inspect", CHAT))[0] == 400


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (EngineOverloaded("full", reason="inspector"), "server_overloaded"),
        (EngineDied("It failed."), "engine_unavailable"),
    ],
)
async def test_inspector_without_room_or_life_is_503(inspected: Inspected, failure: Exception, code: str) -> None:
    inspected.inspector.failure = failure

    plain = await inspected.post("/chat/stream", CHAT)
    assert plain_error(plain) == (503, code)
    assert int(plain.headers["retry-after"]) >= 1
    assert openai_error(await inspected.post("/v1/inspect/attention", MATRIX)) == (503, "server_error", code, None)


async def test_failure_in_mid_stream_is_an_error_event_and_the_end(inspected: Inspected) -> None:
    inspected.inspector.failure, inspected.inspector.fails_at = EngineDied("The inspector failed. Try again."), 1

    *steps, last = events((await inspected.post("/chat/stream", CHAT)).content)
    assert [name for name, _ in steps] == ["token", "trace"]
    assert last == ("error", {"error": "The inspector failed. Try again.", "code": "engine_unavailable"})

    *_, (name, body) = events((await inspected.post("/v1/inspect", CHAT)).content)
    assert name == "error"
    assert body["error"]["code"] == "engine_unavailable"


# Keys and limits


@pytest.mark.parametrize("path", ["/chat/stream", "/inspect/full_attn"])
async def test_plain_routes_need_a_key_unless_they_are_public(inspected: Inspected, path: str) -> None:
    del inspected.client.headers["Authorization"]

    assert plain_error(await inspected.post(path, CHAT | MATRIX)) == (401, "invalid_api_key")


@pytest.mark.parametrize("path", ["/chat/stream", "/inspect/full_attn"])
async def test_public_routes_need_no_key(public: Inspected, path: str) -> None:
    response = await public.post(path, CHAT | MATRIX)

    assert response.status_code == 200
    assert "x-ratelimit-limit-requests" not in response.headers
    assert openai_error(await public.post("/v1/inspect", CHAT))[:3] == (401, "authentication_error", "invalid_api_key")


async def test_address_may_make_three_requests_at_once_and_ten_a_minute(public: Inspected) -> None:
    responses = [await public.post("/chat/stream", CHAT) for _ in range(2)]
    responses += [await public.post("/inspect/full_attn", MATRIX) for _ in range(2)]

    assert [response.status_code for response in responses] == [200, 200, 200, 429], "one bucket for both"
    refused = responses[-1]
    assert plain_error(refused) == (429, "rate_limited")
    assert refused.headers["retry-after"] == "6"
    assert len(public.inspector.requests) == 3
    public.clock.advance(6.1)
    assert [(await public.post("/chat/stream", CHAT)).status_code for _ in range(2)] == [200, 429]


async def test_refused_bodies_count_for_the_address(public: Inspected) -> None:
    statuses = [(await public.post("/chat/stream", {})).status_code for _ in range(4)]

    assert statuses == [422, 422, 422, 429]


async def test_keys_do_not_spare_the_address_its_limit(store_url: str, tmp_path: Path) -> None:
    async with run(store_url, tmp_path, burst=1) as inspected:
        statuses = [(await inspected.post("/chat/stream", CHAT)).status_code for _ in range(2)]
        assert statuses == [200, 429]
        assert (await inspected.post("/v1/inspect", CHAT)).status_code == 200, "which goes by the key alone"


@pytest.mark.parametrize(("path", "code"), [("/v1/inspect", "rate_limit_exceeded"), ("/chat/stream", "rate_limited")])
async def test_inspection_counts_as_a_request_and_costs_no_tokens(
    store_url: str, tmp_path: Path, path: str, code: str
) -> None:
    async with run(store_url, tmp_path, limits={"requests_per_minute": 2}) as inspected:
        first = await inspected.post(path, CHAT)
        second = await inspected.post("/v1/inspect/attention", MATRIX)
        third = await inspected.post(path, CHAT)

        assert [response.status_code for response in (first, second, third)] == [200, 200, 429]
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert code in third.text
        (row,) = (await inspected.client.get("/v1/usage")).json()["data"]
        assert row["requests"] == 3
        assert row["prompt_tokens"] == row["completion_tokens"] == 0
        remaining = first.headers["x-ratelimit-remaining-tokens"]
        assert remaining == first.headers["x-ratelimit-limit-tokens"]
