"""A remote engine whose /tokenize fails: no request fails for it, no breaker moves, and it is not asked for ever."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from engine.base import EmbeddingRequest, EngineUnavailable, InvalidRequest, Usage
from tests.support.remote_engine import generate, hello, refusing, remote, request, sending, stuck
from tests.support.upstream_server import TOKENIZE, Connection, UpstreamServer, error, run_upstream
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

Answer = Callable[[Connection], Awaitable[None]]


def tokens(count: Any, *, listed: Any = None) -> Answer:
    return refusing(200, {"count": count, "tokens": [1] * 7 if listed is None else listed, "max_model_len": 1000})


async def flood(connection: Connection) -> None:
    """Answer without end."""
    await connection.begin("application/json")
    while True:
        await connection.send(b"[" * 65_536)


WAYS: dict[str, Answer] = {
    **{f"status {status}": refusing(status, error()) for status in (301, 400, 401, 403, 404, 405, 409, 413, 422, 429)},
    **{f"status {status}": refusing(status, error()) for status in (500, 501, 502, 503, 504, 529)},
    "html": refusing(200, b"<html>"),
    "list": refusing(200, [1, 2, 3]),
    "llama.cpp": refusing(200, {"tokens": [1, 2, 3]}),
    "error": refusing(200, error()),
    "wrong count": tokens(9),
    "negative": tokens(-1),
    "none": tokens(0, listed=[]),
    "no number": tokens("7"),
    "texts": tokens(7, listed=["a"] * 7),
    "too many": tokens(200_000, listed=[1] * 200_000),
    "closed": sending(),
    "no HTTP": sending(b"SSH-2.0-OpenSSH\r\n\r\n"),
    "cut": sending(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"),
    "silence": stuck,
    "without end": flood,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.remote.tokenizer._TIMEOUT_S", 0.05)
    monkeypatch.setattr("engine.remote.upstream.MAX_ANSWER_BYTES", 2**20)


def asked(server: UpstreamServer) -> int:
    return sum(received.path == TOKENIZE for received in server.received)


@pytest.mark.parametrize("way", WAYS)
async def test_request_is_served_and_tokenizer_not_asked_for_ever(way: str) -> None:
    async with run_upstream(hello, routes={TOKENIZE: WAYS[way]}) as server, remote(server) as engine:
        for _ in range(20):
            prepared, deltas = await generate(engine)
            assert "".join(delta.text for delta in deltas) == "Hello there"
            assert (prepared.prompt_tokens, prepared.usage) == (11, Usage(7, 3))
        await engine.prepare(EmbeddingRequest(request_id="r1", inputs=["one", "two"]))

        breaker = engine.replicas[0].breaker
        assert (breaker.state, breaker.suspected, engine.replicas[0].weight) == ("closed", False, 1.0)
        assert asked(server) <= 2 * 3 + 1 or way in ("status 400", "status 413", "status 422")


async def test_requests_at_once_do_not_check_it_each(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with run_upstream(hello, routes={TOKENIZE: stuck}) as server, remote(server) as engine:
        await asyncio.gather(*(generate(engine) for _ in range(50)))
        first = asked(server)
        await asyncio.gather(*(generate(engine) for _ in range(50)))

        assert asked(server) == first
    assert caplog.text.count("its prompts are estimated") == 1


async def test_tokenizer_that_answers_again_counts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.remote.tokenizer._PAUSE_S", 0.01)
    async with run_upstream(hello, routes={TOKENIZE: stuck}) as server, remote(server) as engine:
        assert (await engine.prepare(request())).usage.estimated
        assert (await engine.prepare(request())).usage.estimated

        del server.routes[TOKENIZE]
        await until(lambda: engine.replicas[0].tokenizer == "answers")

        assert not (await engine.prepare(request())).usage.estimated


async def test_prompt_that_breaks_the_tokenizer_costs_others_nothing() -> None:
    async def choosy(connection: Connection) -> None:
        broken = "poison" in json.dumps(connection.request.body)
        await (refusing(500, error()) if broken else tokens(7))(connection)

    async with run_upstream(hello, routes={TOKENIZE: choosy}) as server, remote(server) as engine:
        for _ in range(5):
            poison = await engine.prepare(request(messages=[{"role": "user", "content": "poison"}]))
            assert poison.usage.estimated
            await until(lambda: engine.replicas[0].tokenizer == "answers")

            assert not (await engine.prepare(request())).usage.estimated


async def test_another_replica_counts_where_one_does_not() -> None:
    async with (
        run_upstream(hello, routes={TOKENIZE: refusing(404)}) as one,
        run_upstream(hello) as other,
        remote(one, other) as engine,
    ):
        while not asked(one):
            await engine.prepare(request())

        assert not any([(await engine.prepare(request())).usage.estimated for _ in range(10)])


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        ("status 500", EngineUnavailable),
        ("silence", EngineUnavailable),
        ("closed", EngineUnavailable),
        ("status 404", InvalidRequest),
        ("llama.cpp", InvalidRequest),
        ("status 400", InvalidRequest),
    ],
)
async def test_client_that_asks_for_tokens_is_told_why_there_are_none(way: str, kind: type[Exception]) -> None:
    routes = {TOKENIZE: WAYS[way], "/detokenize": WAYS[way]}
    async with run_upstream(hello, routes=routes) as server, remote(server) as engine:
        for _ in range(8):
            with pytest.raises(kind):
                await engine.tokenize(request())
        for _ in range(8):
            with pytest.raises(kind):
                await engine.detokenize([1])

        breaker = engine.replicas[0].breaker
        assert (breaker.state, breaker.suspected) == ("closed", False)
        await generate(engine)


async def test_client_that_asks_for_tokens_gets_another_replicas() -> None:
    async with (
        run_upstream(hello, routes={TOKENIZE: refusing(500)}) as one,
        run_upstream(hello) as other,
        remote(one, other) as engine,
    ):
        for _ in range(10):
            assert await engine.tokenize(request()) == list(range(7))


async def test_closing_ends_the_checks() -> None:
    async with run_upstream(hello, routes={TOKENIZE: refusing(404)}) as server, remote(server) as engine:
        await engine.prepare(request())
        before = asyncio.all_tasks()
    assert len(asyncio.all_tasks()) < len(before)
