"""Work that was accepted asks again whether its key is still good before it spends anything."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from engine.base import GenerationRequest, Usage
from engine.mock import MockEngine
from engine.queue.admission import QueuedEngine
from gateway.access.auth import Authenticator, Principal
from gateway.access.keys import KeySpec
from gateway.api.call import Caller
from gateway.errors import GatewayError, InvalidApiKey, StoreUnavailable, Unavailable
from tests.support.app import HELLO, Gateway, Start
from tests.support.job_client import JobClient, submitted
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


class _Queued(QueuedEngine):
    """A mock engine behind a queue, which takes one request at a time."""

    def __init__(self) -> None:
        self.mock = MockEngine(reply=" ".join(map(str, range(400))), token_s=0.005, max_model_len=8192, max_num_seqs=1)
        super().__init__(self.mock)

    @property
    def counters(self) -> Usage:
        return self.mock.counters

    @property
    def requests(self) -> list[GenerationRequest]:
        return self.mock.requests


@pytest.fixture
async def queued(serve: Start) -> Gateway:
    build: Any = _Queued
    return await serve(mock=build, config={"limits": {"enabled": False}})


def slow() -> MockEngine:
    return MockEngine(reply=" ".join(map(str, range(400))), token_s=0.01, max_model_len=8192)


async def key_of(gateway: Gateway, **fields: Any) -> tuple[str, str]:
    """Return the id of a new key, and the key."""
    record, key = await gateway.services.keys.create(KeySpec(name="tried", **fields))
    return record.id, key


async def revoke(gateway: Gateway, key_id: str) -> None:
    await gateway.services.keys.revoke(key_id)


async def expire(gateway: Gateway, key_id: str) -> None:
    await _change(gateway, key_id, expires_at=int(time.time()) - 1)


async def forbid(gateway: Gateway, key_id: str) -> None:
    await _change(gateway, key_id, models=["shannon-complex"])


async def _change(gateway: Gateway, key_id: str, **fields: Any) -> None:
    record = await gateway.services.keys.get(key_id)
    text = record.model_copy(update=fields).model_dump_json()
    await gateway.services.store.run("SET", f"sh:{{k:{key_id}}}:key", text)


Change = Callable[[Gateway, str], Awaitable[None]]
CHANGES = [
    pytest.param(revoke, "invalid_api_key", id="revoked"),
    pytest.param(expire, "invalid_api_key", id="expired"),
    pytest.param(forbid, "model_not_allowed", id="model taken away"),
]


@pytest.mark.parametrize(("change", "code"), CHANGES)
async def test_waiting_job_of_a_key_that_lost_its_rights_does_not_run(serve: Start, change: Change, code: str) -> None:
    gateway = await serve(mock=slow, config={"limits": {"enabled": False}})
    key_id, key = await key_of(gateway)
    client = JobClient("c")
    async with client.connected(gateway, key):
        first, second = [await submitted(gateway, "c", f"job {n}", key=key, max_tokens=60) for n in range(2)]
        await until(lambda: client.text(first) != "")
        await change(gateway, key_id)
        await until(lambda: client.ended(second))

    assert client.names(second)[-1] == "error"
    assert client.of(second)[-1][1]["error"]["code"] == code
    assert "token" not in client.names(second)
    assert len(gateway.mock.requests) == 1


async def waiting(gateway: Gateway, key: str, kind: str) -> asyncio.Task[httpx.Response]:
    """Return a request of `kind` that waits for the engine behind another one."""
    authorization = {"Authorization": f"Bearer {key}"}
    paths: dict[str, tuple[str, dict[str, Any]]] = {
        "plain": ("/v1/chat/completions", {"messages": HELLO}),
        "stream": ("/v1/chat/completions", {"messages": HELLO, "stream": True}),
        "resumable": ("/v1/chat/completions", {"messages": HELLO, "stream": True, "resumable": True}),
        "background": ("/v1/responses", {"input": "hello there", "background": True}),
        "response": ("/v1/responses", {"input": "hello there"}),
        "completion": ("/v1/completions", {"prompt": "hello there"}),
    }
    path, body = paths[kind]
    prepared = len(gateway.mock.requests)
    task = asyncio.create_task(gateway.client.post(path, json=body, headers=authorization))
    engine: Any = gateway.mock
    await until(lambda: len(gateway.mock.requests) > prepared and engine.queued_requests == 1)
    return task


async def ended_with(gateway: Gateway, key: str, task: asyncio.Task[httpx.Response], kind: str) -> str:
    """Return the code of the error that a request ended with."""
    response = await task
    if kind != "background":
        text = response.text.split("data: ")[-1] if response.text.startswith(("data:", "id:", ":")) else response.text
        code: str = json.loads(text)["error"]["code"]
        return code
    path = f"/v1/responses/{response.json()['id']}"
    body: dict[str, Any] = {}
    async with asyncio.timeout(5):
        while body.get("status") != "failed":
            body = (await gateway.client.get(path)).json()
    message: str = body["error"]["message"]
    return message


@pytest.mark.parametrize("kind", ["plain", "stream", "resumable", "background", "response", "completion"])
@pytest.mark.parametrize(("change", "code"), CHANGES)
async def test_request_that_waits_for_the_engine_asks_again(
    queued: Gateway, kind: str, change: Change, code: str
) -> None:
    gateway = queued
    key_id, key = await key_of(gateway)
    ahead = asyncio.create_task(gateway.chat(max_tokens=100))
    await until(lambda: gateway.mock.unfinished_requests == 1)
    task = await waiting(gateway, key, kind)
    before = gateway.mock.counters.prompt_tokens
    await change(gateway, key_id)
    await ahead

    outcome = await ended_with(gateway, key, task, kind)
    if kind == "background":
        assert "key" in outcome or "model" in outcome
    else:
        assert outcome == code
    await until(lambda: gateway.mock.unfinished_requests == 0)
    assert gateway.mock.counters.prompt_tokens <= before + 3, "nothing but the one ahead"
    assert await gateway.metered() == gateway.spent()


async def test_rotated_key_keeps_its_work(queued: Gateway) -> None:
    gateway = queued
    key_id, key = await key_of(gateway)
    ahead = asyncio.create_task(gateway.chat(max_tokens=20))
    await until(lambda: gateway.mock.unfinished_requests == 1)
    task = await waiting(gateway, key, "plain")
    await gateway.services.keys.rotate(key_id)
    await ahead
    assert (await task).status_code == 200


class _Faulty:
    """Keys that can't be read."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def find(self, key_id: str) -> Any:
        raise self._error


@pytest.mark.parametrize("error", [StoreUnavailable("away"), TimeoutError()])
async def test_check_that_gets_no_answer_fails(gateway: Gateway, error: Exception) -> None:
    authenticator = Authenticator(gateway.services.store)
    authenticator._keys = _Faulty(error)  # type: ignore[assignment]
    with pytest.raises((Unavailable, TimeoutError)):
        await authenticator.renewed(Principal("Unseen000001"))


async def test_key_that_was_seen_is_good_without_the_store_for_as_long_as_for_new_requests(gateway: Gateway) -> None:
    key_id, key = await key_of(gateway)
    authenticator = gateway.services.authenticator
    await gateway.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    authenticator._keys = _Faulty(StoreUnavailable("away"))  # type: ignore[assignment]
    assert (await authenticator.renewed(Principal(key_id))).key_id == key_id
    authenticator._confirmed_at -= 301
    with pytest.raises(Unavailable):
        await authenticator.renewed(Principal(key_id))


async def test_key_of_the_configuration_that_was_removed_is_void(start: Start) -> None:
    gateway = await start()
    authenticator = gateway.services.authenticator
    principal = next(iter(authenticator.own.values()))[1]
    assert await authenticator.renewed(principal) == principal
    authenticator.accept({}, failed_per_minute=30)
    with pytest.raises(InvalidApiKey):
        await authenticator.renewed(principal)


async def test_later_generation_of_a_request_asks_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """As agents make one after the other: the key was revoked after the first."""
    monkeypatch.setattr("gateway.access.account._CHECK_EVERY_S", 0.0)
    gateway = await start()
    key_id, _ = await key_of(gateway)
    principal = await gateway.services.authenticator.renewed(Principal(key_id))
    caller = Caller(principal, gateway.services)
    meter = caller.meter("req_1", await caller.admit(None))
    async with meter.counted():
        for number in range(2):
            prepared = await meter.prepare(GenerationRequest(request_id=f"req_1-{number}", messages=HELLO))
            if number:
                await gateway.services.keys.revoke(key_id)
                with pytest.raises(GatewayError) as caught:
                    [delta async for delta in meter.generate(prepared)]
                assert caught.value.code == "invalid_api_key"
            else:
                [delta async for delta in meter.generate(prepared)]
    assert gateway.spent().prompt_tokens == 3
    assert await gateway.metered() == gateway.spent()


async def test_job_stream_that_must_be_opened_again_asks_for_its_key(
    serve: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, other = await serve(), await serve()
    key_id, key = await key_of(gateway)
    client = JobClient("c")
    async with client.connected(gateway, key):
        pass
    async with client.connected(other, key):
        await gateway.services.keys.revoke(key_id)
        await gateway.services.jobs.close()  # its log is given away, which the stream elsewhere takes over
        await until(lambda: client.ends == ["invalid_api_key"])


BODIES: dict[str, dict[str, Any]] = {
    "/admin/keys": {"name": "another", "admin": True},
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/responses": {"input": "hello there", "background": True},
    "/v1/messages": {"messages": HELLO, "max_tokens": 8},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/v1/completions": {"prompt": "hello there"},
    "/v1/embeddings": {"input": "hello there"},
    "/tokenize": {"prompt": "hello there"},
    "/api/v1/chat/submit": {"client_id": "c", "prompt": "hello there"},
}


@pytest.mark.parametrize("change", ["revoke", "rotate"])
async def test_key_that_was_lost_while_its_body_came_opens_nothing(serve: Start, change: str) -> None:
    gateway = await serve()
    key_id, key = await key_of(gateway, admin=True)
    authorization = {"Authorization": f"Bearer {key}"}
    before = len(await gateway.services.keys.list())
    go = asyncio.Event()

    async def send(path: str, body: dict[str, Any]) -> httpx.Response:
        async def slowly() -> AsyncIterator[bytes]:
            text = json.dumps(body).encode()
            yield text[:5]
            await go.wait()
            yield text[5:]

        return await gateway.client.post(path, content=slowly(), headers=authorization)

    sending = {path: asyncio.create_task(send(path, body)) for path, body in BODIES.items()}
    await until(lambda: gateway.requests_in_progress() == len(BODIES))
    await getattr(gateway.services.keys, change)(key_id)
    async with asyncio.timeout(5):
        while (await gateway.client.get("/v1/models", headers=authorization)).status_code != 401:
            pass
    go.set()
    statuses = {path: (await task).status_code for path, task in sending.items()}

    assert statuses == dict.fromkeys(BODIES, 401)
    assert len(await gateway.services.keys.list()) == before
    assert gateway.mock.requests == []


@pytest.mark.parametrize("change", ["revoke", "rotate"])
async def test_open_stream_of_jobs_ends_with_its_key(
    serve: Start, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Who has the new secret submits a job, and who has the old one has the stream open."""
    monkeypatch.setattr("gateway.api.dependencies._CHECK_EVERY_S", 0.0)
    gateway = await serve(mock=slow, config={"limits": {"enabled": False}})
    key_id, key = await key_of(gateway)
    spy = JobClient("c")
    async with spy.connected(gateway, key):
        running = await submitted(gateway, "c", "mine", key=key, max_tokens=300)
        await until(lambda: spy.text(running) != "")
        changed = await getattr(gateway.services.keys, change)(key_id)
        await until(lambda: spy.ends != [])
        if change == "rotate":
            job = await submitted(gateway, "c", "a secret of the owner", key=changed[1], max_tokens=5)
            owner = JobClient("c")
            async with owner.connected(gateway, changed[1]):
                await until(lambda: owner.ended(job))

    assert spy.ends == ["invalid_api_key"]
    assert len(spy.text(running).split()) < 300


@pytest.mark.parametrize("change", ["revoke", "rotate"])
async def test_resumed_stream_ends_with_the_key_that_reads_it(
    serve: Start, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr("gateway.api.dependencies._CHECK_EVERY_S", 0.0)
    gateway = await serve(mock=slow, config={"limits": {"enabled": False}})
    key_id, key = await key_of(gateway)
    body = {"messages": HELLO, "stream": True, "resumable": True, "max_tokens": 300}
    async with gateway.client.stream("POST", "/v1/chat/completions", json=body) as made:
        path, headers = made.headers["x-shannon-resume"], {"Authorization": f"Bearer {key}"}
        async with gateway.client.stream("GET", path, headers=headers) as read:
            lines = read.aiter_lines()
            await anext(lines)
            await getattr(gateway.services.keys, change)(key_id)
            last = [line async for line in lines if line.startswith("data: ")][-1]

    assert json.loads(last[6:])["error"]["code"] == "invalid_api_key"
