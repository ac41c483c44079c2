"""Whose fault a failure is: requests that fail must cost nobody else anything, and servers that fail must be found out.

Every way to fail is tried twice: as what one client's requests do to servers that are well, and as what one server does
to everybody's requests beside one that is well.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.base import EmbeddingRequest, EngineError, EngineOverloaded, EngineUnavailable, InvalidRequest
from engine.remote.engine import RemoteEngine
from engine.remote.event_stream import Frames
from engine.remote.pool import RULES, AttemptFailed, Outcome
from engine.remote.wire import refuse, retry_after_s
from gateway.components import build_engines
from gateway.outbound.resolver import Resolver
from gateway.settings.config import parse_config
from tests.support.app import Start
from tests.support.dns_server import AAAA, A, Zone, run_name_server
from tests.support.remote_engine import DEAD, Answer, generate, hello, refusing, remote, request, saying, sending
from tests.support.upstream_server import (
    SECRET_WORDS,
    Connection,
    UpstreamServer,
    chunk,
    error,
    run_upstream,
    summary,
)
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

NEVER = frozenset({A, AAAA})
POISON = [{"role": "user", "content": "poison"}]


def streaming(*pieces: bytes, cut: bool) -> Answer:
    """Return an answer: these pieces of a stream, and the end of the connection, or silence."""

    async def answer(connection: Connection) -> None:
        await connection.begin()
        await connection.send(*pieces)
        if cut:
            connection.cut()
        else:
            await connection.left()

    return answer


TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"Hel"}}]}\n\n'
ERRORS: list[Any] = [
    {"error": {"message": SECRET_WORDS, "code": 400}},
    {"error": {"message": SECRET_WORDS, "code": "400"}},
    {"error": {"message": SECRET_WORDS, "type": "invalid_request_error", "param": "seed"}},
    {"error": {"message": SECRET_WORDS, "code": "content_filter"}},
    {"error": {"code": 400}},
    {"object": "error", "message": SECRET_WORDS, "type": "BadRequestError", "code": 400},
    {"error": SECRET_WORDS, "error_type": "validation"},
    [{"error": {"message": SECRET_WORDS, "status": "INVALID_ARGUMENT"}}],
]
"""What says in a body, or a frame, that the request is at fault, without a status that says so."""
UNCLEAR_ERRORS: list[Any] = [
    {"error": {"message": SECRET_WORDS, "code": 500}},
    {"error": SECRET_WORDS},
    {"error": True},
    {"detail": SECRET_WORDS},
    {"error": {"message": SECRET_WORDS, "code": 401}},
    {"error": {"message": SECRET_WORDS, "type": "not_found_error"}},
    {"error": {"message": SECRET_WORDS, "code": 429}},
    {"error": {"message": SECRET_WORDS, "type": "overloaded_error"}},
]
WAYS: dict[str, Answer] = {
    **{f"status {status}": refusing(status, error()) for status in [301, 307, *range(400, 432), 451, 498]},
    **{f"status {status}": refusing(status, error()) for status in (500, 501, 502, 503, 504, 520, 529, 599)},
    **{f"bare {status}": refusing(status, b"") for status in (200, 204, 400, 401, 404, 429, 500, 502, 503)},
    **{f"body {number}": refusing(200, body) for number, body in enumerate(ERRORS + UNCLEAR_ERRORS)},
    **{f"frame {number}": saying(body) for number, body in enumerate(ERRORS + UNCLEAR_ERRORS)},
    **{f"late frame {number}": saying(chunk("Hel"), body) for number, body in enumerate(ERRORS + UNCLEAR_ERRORS)},
    "html": refusing(200, b"<html><body>Welcome</body></html>"),
    "text": refusing(200, b"Welcome"),
    "number": refusing(200, 7),
    "null": refusing(200, None),
    "empty choices": refusing(200, {"choices": []}),
    "odd choices": refusing(200, {"choices": "none"}),
    "bad frame": streaming(b"data: {not json}\n\n", cut=False),
    "error event": streaming(b'event: error\ndata: {"code": 500, "msg": "x"}\n\n', cut=False),
    "late error event": streaming(TOKEN, b'event: error\ndata: {"msg": "x"}\n\n', cut=False),
    "error event in words": streaming(b"event: error\ndata: no room\n\n", cut=False),
    "late bad frame": streaming(TOKEN, b"data: {not json}\n\n", cut=False),
    "odd frame": saying({"choices": [{"index": 7, "delta": {}}]}),
    "aborted": saying(chunk("", "abort")),
    "only [DONE]": saying(),
    "closed": sending(),
    "no HTTP": sending(b"SSH-2.0-OpenSSH\r\n\r\n"),
    "half a head": sending(b"HTTP/1.1 200 OK\r\ncontent-"),
    "half a body": sending(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"),
    "bad chunk": sending(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"),
    "bad gzip": sending(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nnono"),
    "upgrade": sending(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"),
    "cut": streaming(cut=True),
    "late cut": streaming(TOKEN, cut=True),
    "silence": sending(cut=False),
    "silence in a head": sending(b"HTTP/1.1 200 OK\r\n", cut=False),
    "silence in a refusal": sending(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 100\r\n\r\n{", cut=False),
    "silence in a stream": streaming(cut=False),
    "late silence": streaming(TOKEN, cut=False),
}
CLIENTS_FAULT = [f"status {status}" for status in (400, 406, 411, 413, 415, 418, 422, 431, 451)]
CLIENTS_FAULT += [f"{where} {number}" for where in ("body", "frame") for number in range(len(ERRORS))]
BUSY = ["status 429", "status 529", "status 503", "bare 429", "body 14", "body 15", "frame 14", "frame 15"]
QUICK: dict[str, Any] = {"first_token_timeout_s": 0.05, "idle_timeout_s": 0.05, "queue_timeout_s": 0.05}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for the bodies of refusals only as long as for everything else."""
    monkeypatch.setattr("engine.remote.upstream._REFUSAL_TIMEOUT_S", 0.05)


def poisoned(answer: Answer) -> Answer:
    """Return an answer to everybody, but for those who send POISON, which get `answer`."""

    async def chat(connection: Connection) -> None:
        await (answer if connection.request.body["messages"] == POISON else hello)(connection)

    return chat


@contextlib.asynccontextmanager
async def pair(one: Answer, other: Answer, **settings: Any) -> AsyncIterator[tuple[list[UpstreamServer], RemoteEngine]]:
    async with (
        run_upstream(one) as first,
        run_upstream(other) as second,
        remote(first, second, **(QUICK | settings)) as engine,
    ):
        yield [first, second], engine


async def fail(engine: RemoteEngine, **fields: Any) -> EngineError:
    """Send the poison, and return what its client gets."""
    prepared = await engine.prepare(request(messages=POISON, **fields))
    with pytest.raises(EngineError) as caught:
        _ = [delta async for delta in engine.generate(prepared)]
    assert SECRET_WORDS not in str(caught.value)
    return caught.value


async def serve_everybody(engine: RemoteEngine) -> None:
    """Check that everybody else is served, at once."""
    for _ in range(4):
        _, deltas = await generate(engine)
        assert "".join(delta.text for delta in deltas) == "Hello there"


def states(engine: RemoteEngine) -> list[str]:
    return [replica.breaker.state for replica in engine.replicas]


@pytest.mark.parametrize("way", WAYS)
async def test_one_clients_requests_shut_no_server_off(way: str) -> None:
    async with pair(poisoned(WAYS[way]), poisoned(WAYS[way])) as (_, engine):
        for number in range(8):
            failure = await fail(engine, stream=number % 2 == 0)
            if way in CLIENTS_FAULT:
                assert isinstance(failure, InvalidRequest)
            if way in BUSY:
                assert isinstance(failure, EngineOverloaded)
            if number > 5:
                await serve_everybody(engine)
        await until(lambda: not any(replica.breaker.suspected for replica in engine.replicas))

        assert states(engine) == ["closed", "closed"]
        assert engine.unfinished_requests == 0
        assert [replica.in_flight for replica in engine.replicas] == [0, 0]


@pytest.mark.parametrize("way", WAYS)
async def test_server_that_fails_for_everybody_is_left_alone_after_as_many_failures_whatever_they_are(way: str) -> None:
    async with pair(WAYS[way], hello, breaker_failures=3) as ((bad, _), engine):
        served = 0
        for _ in range(40):
            with contextlib.suppress(EngineError):
                await generate(engine, stream=False)
                served += 1
        await until(lambda: not any(replica.breaker.suspected for replica in engine.replicas))

        if way in CLIENTS_FAULT or way in BUSY or way == "silence in a refusal":
            assert states(engine) == ["closed", "closed"]
        elif way.startswith("late frame"):
            pass  # some are refusals
        elif way in ("silence", "silence in a head", "silence in a stream"):
            assert states(engine) == ["closed", "closed"], "slow is not dead"
            assert engine.replicas[0].weight > 1
        elif way == "status 408":
            assert states(engine) == ["closed", "closed"]
        elif served == 40 and len(bad.generations) >= 3:
            assert states(engine) == ["open", "closed"]
            # An attempt may be two requests: the first on a connection that the server may have closed before it.
            assert 3 <= len(bad.generations) <= 6
        assert states(engine)[1] == "closed"


async def test_key_that_is_refused_for_everything_opens_the_breaker() -> None:
    locked = refusing(401, error(code="invalid_api_key"))
    async with pair(locked, locked) as (servers, engine):
        for server in servers:
            server.routes["/v1/models"] = locked
        for _ in range(6):
            with contextlib.suppress(EngineUnavailable):
                await generate(engine)

        await until(lambda: states(engine) == ["open", "open"])


async def test_embeddings_at_a_server_that_only_chats_are_the_requests_fault() -> None:
    async with pair(hello, hello) as (servers, engine):
        for status, body in (
            (404, {"detail": "Not Found"}),
            (404, b"<html>"),
            (405, error("Method Not Allowed")),
            (501, b""),
        ):
            for server in servers:
                server.routes["/v1/embeddings"] = refusing(status, body)
            for _ in range(6):
                prepared = await engine.prepare(EmbeddingRequest(request_id="r1", inputs=["one"]))
                with pytest.raises(InvalidRequest, match="does not make embeddings"):
                    await engine.pool(prepared)
                await serve_everybody(engine)
        assert states(engine) == ["closed", "closed"]


async def test_bare_prompts_at_a_server_that_only_chats_are_the_requests_fault() -> None:
    async def only_chats(connection: Connection) -> None:
        missing = refusing(404, {"detail": "Not Found"})
        await (hello if "messages" in connection.request.body else missing)(connection)

    async with pair(only_chats, only_chats) as (_, engine):
        for _ in range(6):
            with pytest.raises(InvalidRequest, match="takes no bare prompts"):
                await generate(engine, prompt="Once")
        await serve_everybody(engine)


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 503])
async def test_embeddings_that_fail_shut_no_chat_off(status: int) -> None:
    async with pair(hello, hello) as (servers, engine):
        for server in servers:
            server.routes["/v1/embeddings"] = refusing(status, error("The model has no embeddings"))
        for _ in range(8):
            prepared = await engine.prepare(EmbeddingRequest(request_id="r1", inputs=["one"]))
            with pytest.raises(EngineError):
                await engine.pool(prepared)
            await serve_everybody(engine)


async def test_others_are_served_while_poison_is_poured_in() -> None:
    patient = dict.fromkeys(QUICK, 10.0)  # two hundred at once take a while on a busy machine
    async with pair(poisoned(WAYS["status 500"]), poisoned(WAYS["cut"]), **patient) as (_, engine):
        poison = [asyncio.create_task(fail(engine)) for _ in range(100)]
        answers = await asyncio.gather(*(generate(engine) for _ in range(100)))
        await asyncio.gather(*poison)

        assert {"".join(delta.text for delta in deltas) for _, deltas in answers} == {"Hello there"}
        assert states(engine) == ["closed", "closed"]


async def test_probe_that_fails_by_itself_does_not_end_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair(hello, hello) as (_, engine):
        calls = 0

        async def probe(replica: object) -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise RuntimeError("a defect")

        monkeypatch.setattr(engine._upstream, "probe", probe)
        monkeypatch.setattr("engine.remote.engine._AFTER_DEFECT_S", 0.01)
        for _ in range(3):
            engine.replicas[0].breaker.doubt()

        await until(lambda: calls > 1)
        await until(lambda: not engine.replicas[0].breaker.suspected)


async def test_dead_server_is_found_by_its_probe_when_there_is_no_other() -> None:
    async with run_upstream(hello) as server, remote(server, **QUICK, retries=0) as engine:
        await generate(engine)
        await server.stop()
        for _ in range(3):
            with pytest.raises(EngineUnavailable):
                await generate(engine)

        await until(lambda: states(engine) == ["open"])
        with pytest.raises(EngineUnavailable):
            await engine.prepare(request())


async def test_overload_is_passed_on_with_the_time_that_the_server_asks_for(start: Start) -> None:
    full: list[Answer] = [
        refusing(429, error(), retry_after="7"),
        refusing(503, error(code="server_overloaded"), retry_after_ms="1500"),
        refusing(503, b"", retry_after="7"),
        refusing(429, error(), retry_after=email.utils.formatdate(time.time() + 60, usegmt=True)),
    ]
    waits_s: list[float] = []
    async with run_upstream(lambda connection: full[len(waits_s)](connection)) as server:
        mock: Any = lambda: RemoteEngine([server.url], "demo")  # noqa: E731
        gateway = await start(mock=mock)
        for _ in full:
            response = await gateway.chat()
            assert (response.status_code, response.json()["error"]["code"]) == (503, "server_overloaded")
            waits_s.append(int(response.headers["retry-after-ms"]) / 1000)

    assert waits_s[:3] == [7.0, 1.5, 7.0]
    assert 30 < waits_s[3] <= 60


@pytest.mark.parametrize("told", [(10**9, 3), (7, 10**15), (2**63, 2**62), (-7, 3)])
async def test_usage_that_cannot_be_true_costs_no_key_its_limit(start: Start, told: tuple[int, int]) -> None:
    lying = saying(chunk("Hi", usage=told), chunk(None, "stop", usage=told), summary(*told))
    async with run_upstream(lying) as server:
        mock: Any = lambda: RemoteEngine([server.url], "demo")  # noqa: E731
        gateway = await start(mock=mock)
        for stream in (False, True, False):
            response = await asyncio.wait_for(gateway.chat(stream=stream), 10)
            assert response.status_code == 200
        spent = await gateway.metered()
        assert (spent.prompt_tokens, spent.completion_tokens) == (3 * 7, 3)


async def test_unreachable_server_is_not_overloaded(start: Start) -> None:
    async with run_upstream(hello) as server:
        mock: Any = lambda: RemoteEngine([DEAD, server.url], "demo", max_model_len=1000)  # noqa: E731
        gateway = await start(mock=mock)
        await server.stop()
        response = await gateway.chat()

    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")


# What a refusal means


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (401, error(), "declined"),
        (402, b"", "declined"),
        (403, error(), "declined"),
        (404, error(code="model_not_found"), "declined"),
        (307, None, "declined"),
        (501, None, "declined"),
        (500, error(code=401), "declined"),
        (200, {"error": {"message": "x", "type": "authentication_error"}}, "declined"),
        (429, None, "overloaded"),
        (529, None, "overloaded"),
        (503, error(), "overloaded"),
        (500, error(type="overloaded_error"), "overloaded"),
        (200, {"error": {"message": "x", "code": "rate_limit_exceeded"}}, "overloaded"),
        (503, error(code="engine_unavailable"), "unreachable"),
        (503, None, "unreachable"),
        (502, error(), "unreachable"),
        (504, None, "unreachable"),
        (522, None, "unreachable"),
        (408, None, "slow"),
        (500, error(), "failed"),
        (599, None, "failed"),
        (200, None, "failed"),
        (200, {"error": "broken"}, "failed"),
    ],
)
def test_refusal_has_one_outcome(status: int, body: Any, outcome: Outcome) -> None:
    assert outcome in RULES
    with pytest.raises(AttemptFailed) as caught:
        refuse(status, body, request())

    assert caught.value.outcome == outcome


@pytest.mark.parametrize("status", [status for status in range(400, 500) if status not in (408, 429)])
def test_no_status_of_clients_is_the_servers_failure(status: int) -> None:
    with pytest.raises((InvalidRequest, AttemptFailed)) as caught:
        refuse(status, error(), request())

    assert isinstance(caught.value, InvalidRequest) or getattr(caught.value, "outcome", None) == "declined"


@pytest.mark.parametrize("status", [200, 400, 403, 500])
def test_content_filter_is_named(status: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        refuse(status, error(code="content_filter"), request())

    assert (caught.value.param, caught.value.code) == ("messages", "content_filter")


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize(
    "name", ["vllm-7f.pod.internal", "sk-proj-Zq3Zq3", "sk_live_Zq3", "Traceback", "vllm0", "a" * 64, "_x"]
)
def test_names_of_a_refusal_that_are_no_clients_are_not_shown(status: int, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        refuse(status, error(param=name, code=name), request())

    assert name not in f"{caught.value} {caught.value.param} {caught.value.code}"


def test_event_called_an_error_says_whose_fault_it_is() -> None:
    frames, failure = Frames().read(b'event: error\ndata: {"code": 400, "msg": "x"}\n\n')

    assert failure is None
    with pytest.raises(InvalidRequest):
        refuse(200, frames[0], request())


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "7", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "9" * 400}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers) == seconds


async def test_names_that_nobody_answers_for_delay_no_other_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own lookups share a few threads, each of which such a name would hold for many seconds."""
    async with run_name_server() as names, run_upstream(hello) as server:
        names.zones |= {f"dead-{number}.test": Zone(silent=NEVER) for number in range(8)}
        names.zones["well.test"] = Zone(["127.0.0.1"])
        monkeypatch.setattr("gateway.components.Resolver", lambda: Resolver(servers=[names.address]))
        urls = {name: f"http://{name}:{server.port}/v1" for name in names.zones}
        remote_engine = {"kind": "remote", "model": "demo", "max_model_len": 1000}
        tree: dict[str, Any] = {
            "engines": {name.removesuffix(".test"): remote_engine | {"urls": [url]} for name, url in urls.items()},
            "models": {"shannon-chat": {"engine": "well", "description": "The one that is well"}},
        }
        engines = build_engines(parse_config(tree), {})
        starts = [asyncio.create_task(engine.start()) for name, engine in engines.items() if name != "well"]
        await until(lambda: names.names >= {f"dead-{number}.test" for number in range(8)})

        await engines["well"].start()
        prepared = await engines["well"].prepare(request())
        assert [delta.finish_reason for delta in [d async for d in engines["well"].generate(prepared)]][-1] == "stop"
        assert not any(start.done() for start in starts)
        for start in starts:
            start.cancel()
        await asyncio.gather(*starts, return_exceptions=True)
        await asyncio.gather(*(engine.close() for engine in engines.values()))
