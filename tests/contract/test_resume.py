"""A chat stream that was cut is taken up where it was, on any gateway, with every token exactly once."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from typing import Any

import httpx
import pytest

from engine.base import EngineError
from engine.mock import Fault, MockEngine
from gateway.durable import event_log
from gateway.durable.resumable import ResumableStreams
from gateway.errors import StoreUnavailable
from tests.support.app import HELLO, KEY_ID, Gateway, Start
from tests.support.store_server import StoreServer
from tests.support.taken import Taken
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

OTHER_KEY = "a-key-of-another-tenant"
TENANTS: dict[str, Any] = {
    "config": {"keys": [{"name": "theirs", "key_env": "THEIRS", "tenant": "theirs"}], "limits": {"enabled": False}},
    "environment": {"THEIRS": OTHER_KEY},
}
UNLIMITED: dict[str, Any] = {"config": {"limits": {"enabled": False}}}


def counting(tokens: int = 60, token_s: float = 0.002) -> MockEngine:
    """Return an engine whose answer counts: 0 1 2 3 and so on."""
    return MockEngine(reply=" ".join(map(str, range(tokens))), token_s=token_s, max_model_len=8192)


def path_of(response: httpx.Response) -> str:
    return response.headers["X-Shannon-Resume"]


def resume(gateway: Gateway, path: str, after: int | None = None, **headers: str) -> Any:
    params = {} if after is None else {"starting_after": after}
    return gateway.client.stream("GET", path, params=params, headers=headers)


async def resumed(gateway: Gateway, path: str, after: int | None = None, **headers: str) -> Taken:
    """Read a stream from `after` to its end."""
    taken = Taken()
    taken.last = after or 0
    async with resume(gateway, path, after, **headers) as response:
        assert response.status_code == 200, await response.aread()
        await taken.take(response)
    return taken


async def refused(gateway: Gateway, path: str, **params: Any) -> tuple[int, str]:
    response = await gateway.client.get(path, params=params)
    return response.status_code, response.json()["error"]["code"]


async def test_whole_stream_is_that_of_plain_chat_with_numbers(serve: Start) -> None:
    gateway = await serve(mock=lambda: counting(5))
    plain, taken = Taken(), Taken()
    async with gateway.stream() as response:
        assert "X-Shannon-Resume" not in response.headers
        lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
        plain.events = {number: line.removeprefix("data: ") for number, line in enumerate(lines, 1)}
    async with gateway.stream(resumable=True) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["X-RateLimit-Limit-Requests"] == "60"
        await taken.take(response)
        assert {frame["id"] for frame in taken.frames} == {path_of(response).split("/")[-2]}

    def bare(frames: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [frame | {"id": ""} for frame in frames]

    assert bare(taken.frames) == bare(plain.frames)
    assert list(taken.events) == list(range(1, len(lines) + 1))


@pytest.mark.parametrize("replica", ["same", "other"])
@pytest.mark.parametrize("how", ["starting_after", "Last-Event-ID"])
async def test_cut_stream_is_taken_up_with_every_token_once(serve: Start, replica: str, how: str) -> None:
    gateway = await serve(mock=counting)
    other = gateway if replica == "same" else await serve(mock=counting)
    taken = Taken()
    async with gateway.stream(resumable=True) as response:
        await taken.take(response, 7)
    while True:
        after = taken.last if how == "starting_after" else 1  # the header wins
        headers = {} if how == "starting_after" else {"Last-Event-ID": str(taken.last)}
        async with resume(other, path_of(response), after, **headers) as rest:
            assert rest.status_code == 200
            await taken.take(rest, 9)
        if taken.events[taken.last] == "[DONE]":
            break

    assert taken.text.split() == [str(number) for number in range(60)]
    assert taken.frames[-1]["usage"]["completion_tokens"] == 60
    assert (await resumed(other, path_of(response), taken.last)).events == {}
    await until(lambda: gateway.mock.unfinished_requests == 0)
    assert await gateway.metered() == gateway.spent()
    assert gateway.spent().completion_tokens == 60
    assert other is gateway or other.mock.requests == []


async def test_streams_cut_at_random_lose_and_repeat_nothing(serve: Start) -> None:
    chosen = random.Random(7)
    gateways = [await serve(mock=lambda: counting(120, 0.001), **UNLIMITED) for _ in range(2)]

    async def follow(number: int) -> None:
        taken, opened = Taken(), gateways[number % 2]
        async with opened.stream(resumable=True) as response:
            await taken.take(response, chosen.randint(1, 40))
        while taken.events[taken.last] != "[DONE]":
            await asyncio.sleep(chosen.random() * 0.05)
            async with resume(chosen.choice(gateways), path_of(response), taken.last) as rest:
                await taken.take(rest, chosen.randint(1, 60))
        assert taken.text.split() == [str(number) for number in range(120)]

    await asyncio.gather(*(follow(number) for number in range(16)))

    await until(lambda: all(gateway.mock.unfinished_requests == 0 for gateway in gateways))
    for gateway in gateways:
        assert await gateway.metered() == gateway.spent()
    assert sum(gateway.spent().completion_tokens for gateway in gateways) == 16 * 120


async def test_completion_goes_on_while_the_client_is_away(serve: Start) -> None:
    gateway, other = await serve(mock=counting), await serve()
    async with gateway.stream(resumable=True) as response:
        await Taken().take(response, 1)
    await until(lambda: gateway.mock.unfinished_requests == 0)

    assert gateway.spent().completion_tokens == 60
    for replica in (gateway, other):
        assert (await resumed(replica, path_of(response))).text.split() == [str(number) for number in range(60)]


async def test_leaving_before_the_id_is_known_ends_the_completion(serve: Start) -> None:
    gateway = await serve(mock=counting)
    gateway.mock.faults.append(Fault())  # hangs
    request = asyncio.create_task(gateway.chat(stream=True, resumable=True))
    await until(lambda: gateway.mock.unfinished_requests == 1)

    request.cancel()

    await until(lambda: gateway.mock.unfinished_requests == 0)
    await until(lambda: gateway.requests_in_progress() == 0)


async def test_completion_that_nobody_reads_is_ended(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.durable.resumable.RENEW_S", 0.05)
    monkeypatch.setattr("gateway.durable.event_log.PRESENT_S", 0.05)
    config = {"resume": {"ttl_s": 0.1}}
    gateway = await serve(mock=lambda: counting(5000), config=config)
    other = await serve(config=config)
    taken = Taken()
    async with gateway.stream(resumable=True) as response:
        await taken.take(response, 1)
    await until(lambda: gateway.mock.unfinished_requests == 0, within_s=10)

    assert 0 < gateway.spent().completion_tokens < 5000
    assert await gateway.metered() == gateway.spent()
    rest = Taken()
    rest.last = taken.last
    async with resume(other, path_of(response), taken.last) as read:
        await rest.take(read)
    error = json.loads(list(rest.events.values())[-1])["error"]
    assert error["message"] == "The stream was not resumed in time."


async def test_completion_that_is_read_elsewhere_goes_on(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.durable.resumable.RENEW_S", 0.05)
    config = {"resume": {"ttl_s": 0.1}}
    gateway, other = await serve(mock=lambda: counting(300), config=config), await serve(config=config)
    taken = Taken()
    async with gateway.stream(resumable=True) as response:
        await taken.take(response, 1)
    async with resume(other, path_of(response), taken.last) as rest:
        await taken.take(rest)

    assert taken.text.split() == [str(number) for number in range(300)]


@pytest.mark.parametrize("replica", ["same", "other"])
async def test_failure_is_replayed_as_its_frame(serve: Start, replica: str) -> None:
    gateway = await serve(mock=counting)
    other = gateway if replica == "same" else await serve()
    gateway.mock.faults.append(Fault(at_token=20, error=EngineError("secret detail")))
    taken = Taken()
    async with gateway.stream(resumable=True) as response:
        await taken.take(response, 5)
    rest = Taken()
    rest.last = taken.last
    async with resume(other, path_of(response), taken.last) as read:
        await rest.take(read)

    *_, last = rest.events.values()
    assert json.loads(last)["error"]["code"] == "internal_error"
    assert "secret" not in last
    assert len(taken.events | rest.events) == 22, "the role, twenty tokens, and the error"
    assert (await gateway.samples("shannon_errors_total"))[("internal_error",)] == 1
    assert await gateway.metered() == gateway.spent()


async def test_early_failure_has_its_status_and_leaves_no_log(serve: Start, store_server: StoreServer) -> None:
    gateway = await serve()
    gateway.mock.faults.append(Fault(error=EngineError("secret detail")))

    failed = await gateway.chat(stream=True, resumable=True)
    too_long = await gateway.chat(stream=True, resumable=True, max_tokens=100_000)

    assert (failed.status_code, too_long.status_code) == (500, 400)
    assert too_long.json()["error"]["param"] == "max_tokens"
    assert "X-Shannon-Resume" not in failed.headers.keys() | too_long.headers.keys()
    await until(lambda: not store_server.client().keys("sh:{l:*"))


async def test_only_its_tenant_takes_a_stream_up(serve: Start) -> None:
    gateway, other = await serve(**TENANTS), await serve(**TENANTS)
    async with gateway.stream(resumable=True) as response:
        await Taken().take(response)

    assert (await resumed(other, path_of(response))).text == "You said: hello there"
    for replica in (gateway, other):
        replica.client.headers["Authorization"] = f"Bearer {OTHER_KEY}"
        assert await refused(replica, path_of(response)) == (404, "stream_not_found")


class _Hanging:
    """Answers to questions about a log that never come, or come as an error, from the `nth` on."""

    def __init__(self, gateway: Gateway, nth: int, error: Exception | None) -> None:
        self.calls = 0
        self._run = gateway.services.store.run
        self._nth = nth
        self._error = error

    async def __call__(self, *command: Any) -> Any:
        self.calls += command[0] is event_log._READ
        if self.calls < self._nth or command[0] is not event_log._READ:
            return await self._run(*command)
        if self._error is not None:
            raise self._error
        return await asyncio.Future()


@pytest.mark.parametrize("error", [None, StoreUnavailable("away"), TimeoutError()], ids=["hangs", "away", "timeout"])
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("replica", ["same", "other"])
async def test_check_without_an_answer_shows_no_stream(
    serve: Start, monkeypatch: pytest.MonkeyPatch, nth: int, error: Exception | None, replica: str
) -> None:
    """Whose stream it is, only the store's answer says: a check that it does not answer fails."""
    monkeypatch.setattr("gateway.durable.resumable._CHECK_S", 0.02)
    monkeypatch.setattr("gateway.durable.resumable._AHEAD_S", 0.2)
    monkeypatch.setattr("gateway.durable.event_log.PATIENCE_S", 0.02)
    monkeypatch.setattr("gateway.durable.event_log._RETRY_S", 0.01)
    gateway = await serve(**TENANTS, mock=lambda: counting(3000))
    other = gateway if replica == "same" else await serve(**TENANTS)
    async with gateway.stream(resumable=True) as response:
        await Taken().take(response, 3)
        path = path_of(response)
        monkeypatch.setattr(other.services.resumable._logs._store, "run", _Hanging(other, nth, error))
        for after in (0, 1000):
            answer = await other.client.get(
                path, params={"starting_after": after}, headers={"Authorization": f"Bearer {OTHER_KEY}"}
            )
            assert answer.status_code in (404, 503)
            assert answer.json()["error"]["code"] in ("stream_not_found", "store_unavailable")
        monkeypatch.undo()


async def test_what_is_no_stream_is_not_found(serve: Start) -> None:
    gateway = await serve()
    async with gateway.stream() as response:
        first = await anext(response.aiter_lines())
        plain = json.loads(first.removeprefix("data: "))["id"]

    for completion_id in (plain, "chatcmpl-" + "0" * 32, "x", f"{KEY_ID}:client"):
        assert await refused(gateway, f"/v1/chat/completions/{completion_id}/stream") == (404, "stream_not_found")


async def test_number_that_can_not_be_is_refused(serve: Start) -> None:
    gateway, other = await serve(), await serve()
    async with gateway.stream(resumable=True) as response:
        taken = Taken()
        await taken.take(response)

    for number in ("-1", "x", "1.5", "9" * 17):
        assert await refused(gateway, path_of(response), starting_after=number) == (400, "invalid_request")
    for replica in (gateway, other):
        answer = await replica.client.get(path_of(response), params={"starting_after": taken.last + 1})
        assert answer.status_code == 400
        assert f"has {taken.last} events so far" in answer.json()["error"]["message"]


async def test_stream_is_forgotten_in_time(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.durable.resumable.LEASE_S", 0.0)
    gateway = await serve(config={"resume": {"ttl_s": 0.1}})
    async with gateway.stream(resumable=True) as response:
        await Taken().take(response)

    async with asyncio.timeout(5):
        while (found := await gateway.client.get(path_of(response))).status_code == 200:
            await asyncio.sleep(0.02)
    assert found.status_code == 404
    assert await refused(gateway, path_of(response)) == (404, "stream_not_found")


async def test_oldest_frames_go_first(serve: Start) -> None:
    gateway = await serve(
        mock=lambda: MockEngine(reply="x" * 2000, token_s=0.0001, max_model_len=8192),
        config={"resume": {"max_bytes": 262_144}},
    )
    fields = {"resumable": True, "ignore_eos": True, "max_tokens": 400}
    taken = Taken()
    async with gateway.stream(**fields) as response:
        await taken.take(response)

    status, code = await refused(gateway, path_of(response), starting_after=10)
    rest = await resumed(gateway, path_of(response), taken.last - 20)
    assert (status, code) == (404, "events_expired")
    assert rest.events == {number: taken.events[number] for number in rest.events}
    assert len(rest.events) == 20


async def test_field_and_key_decide(serve: Start) -> None:
    gateway = await serve(config={"resume": {"keys": [KEY_ID]}})
    off = await serve(config={"resume": {"enabled": False, "keys": [KEY_ID]}})

    async def header_of(gateway: Gateway, **fields: Any) -> bool:
        async with gateway.stream(**fields) as response:
            assert response.status_code == 200
            await response.aread()
            return "X-Shannon-Resume" in response.headers

    assert await header_of(gateway)
    assert not await header_of(gateway, resumable=False)
    assert "X-Shannon-Resume" not in (await gateway.chat()).headers
    assert not await header_of(off)
    for answer, param in (
        (await off.chat(stream=True, resumable=True), "resumable"),
        (await gateway.chat(resumable=True), "resumable"),
        (await gateway.chat(resumable="yes", stream=True), "resumable"),
    ):
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_shutdown_waits_for_a_completion_whose_client_is_away(serve: Start) -> None:
    gateway, other = await serve(mock=counting), await serve()
    async with gateway.stream(resumable=True) as response:
        await Taken().take(response, 1)
    draining = asyncio.create_task(gateway.services.drain.run(timeout_s=30))

    assert await draining == 0
    assert len((await resumed(other, path_of(response))).text.split()) == 60


async def test_shutdown_that_can_not_wait_tells_so_in_the_log(serve: Start) -> None:
    gateway, other = await serve(mock=lambda: counting(5000)), await serve()
    taken = Taken()
    async with gateway.stream(resumable=True) as response:
        await taken.take(response, 1)
    await gateway.services.drain.run(timeout_s=0)
    async with resume(other, path_of(response), taken.last) as rest:
        await taken.take(rest)

    assert "shut down" in json.loads(taken.events[taken.last])["error"]["message"]
    assert gateway.mock.unfinished_requests == 0


async def test_closing_ends_what_is_made(start: Start) -> None:
    gateway = await start(mock=lambda: MockEngine(token_s=10))
    service: ResumableStreams = gateway.services.resumable
    request = asyncio.create_task(gateway.chat(stream=True, resumable=True))
    await until(lambda: gateway.mock.unfinished_requests == 1)

    await service.close()

    error = (await request).text.split("data: ")[-1]
    assert "shut down" in json.loads(error)["error"]["message"]
    assert gateway.mock.unfinished_requests == 0


async def test_too_many_at_once_are_refused(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.durable.resumable.MAX_RESUMABLE", 1)
    gateway = await serve(mock=counting)
    async with gateway.stream(resumable=True) as response:
        await Taken().take(response, 1)
        refused = await gateway.chat(stream=True, resumable=True)

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_overloaded")


async def test_slow_reader_gets_everything(serve: Start) -> None:
    """A client that reads nothing for a while: the completion is long over when it goes on."""
    gateway = await serve(
        mock=lambda: MockEngine(reply="y" * 2000, max_model_len=8192), config={"resume": {"max_bytes": 2**24}}
    )
    taken = Taken()
    async with gateway.stream(resumable=True, ignore_eos=True, max_tokens=3000) as response:
        await until(lambda: gateway.mock.counters.completion_tokens == 3000)
        await until(lambda: gateway.mock.unfinished_requests == 0)
        await taken.take(response)

    assert len(taken.text) == 3000 * 2000 + 2999


@pytest.mark.slow
async def test_cut_of_the_store_is_bridged(serve: Start, store_server: StoreServer) -> None:
    """Tokens of a running completion wait in memory for the store; a new one is refused, plain chat goes on."""
    config = {"store": {"command_timeout_ms": 200, "breaker_s": 0.05}}
    gateway, other = await serve(mock=lambda: counting(200, 0.01), config=config), await serve(config=config)
    taken = Taken()
    async with gateway.stream(resumable=True) as response:
        await taken.take(response, 3)
    store_server.send(signal.SIGSTOP)
    try:
        await until(lambda: not gateway.services.store.available)
        assert (await gateway.chat(stream=True, resumable=True)).json()["error"]["code"] == "store_unavailable"
        assert (await gateway.chat(max_tokens=1)).status_code == 200
        assert await refused(gateway, path_of(response)) == (503, "store_unavailable")
        began = time.monotonic()
        await until(lambda: time.monotonic() - began > 0.5)
    finally:
        store_server.send(signal.SIGCONT)
    await until(lambda: gateway.services.store.available and other.services.store.available)
    async with resume(other, path_of(response), taken.last) as rest:
        await taken.take(rest)

    assert taken.text.split() == [str(number) for number in range(200)]


async def test_official_sdk_reads_a_numbered_stream(serve: Start) -> None:
    from openai import AsyncOpenAI

    gateway = await serve()
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key) as client:
        stream = await client.chat.completions.create(
            model="shannon-chat",
            messages=[{"role": "user", "content": HELLO[0]["content"]}],
            stream=True,
            extra_body={"resumable": True},
        )
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(texts) == "You said: hello there"
