"""What one key may keep in the store, in the store's own figures."""

from __future__ import annotations

import asyncio
import random
import re
from typing import Any

import pytest

from engine.mock import MockEngine
from gateway.access.keys import KeyLimits, KeySpec
from gateway.conversations.derived_sessions import make_id
from gateway.conversations.retention import Retention
from gateway.settings.config import JobSettings, ResumeSettings, SessionSettings, StoreSettings
from gateway.store.client import Store
from gateway.store.pieces import PIECE_BYTES
from gateway.store.stored_bytes import MEMBER_BYTES, StoredBytes
from gateway.telemetry.metrics import Metrics
from tests.support.app import KEY_ID, ROOT, Gateway, Start
from tests.support.job_client import JobClient, submit, submitted
from tests.support.store_commands import watch_store
from tests.support.store_server import StoreServer
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

LETTERS = "xé中😀"
ROOM = 2**20
CONFIG: dict[str, Any] = {
    "limits": {"enabled": False},
    "sessions": {"max_bytes": 65_536, "max_bytes_per_key": ROOM, "derived_bytes_per_key": 65_536},
    "resume": {"max_bytes": 2**20, "max_bytes_per_key": 2 * ROOM},
    "jobs": {"max_queued_bytes_per_key": ROOM},
}


def taken(server: StoreServer, *parts: str) -> int:
    """Return the bytes that the store says its keys take whose names hold one of `parts`."""
    with server.client() as raw:
        keys = [key for key in raw.keys("*") if any(part in key for part in parts)]
        return sum(int(raw.memory_usage(key, samples=0) or 0) for key in keys)


def words(chosen: random.Random) -> str:
    return chosen.choice(LETTERS) * int(10 ** chosen.uniform(0, 4.2))


def echoing() -> MockEngine:
    return MockEngine(reply="certainly so", max_model_len=10**6)


def accounted(server: StoreServer, kind: str, key_id: str = KEY_ID) -> int:
    """Return the bytes in a key's account, which must be the sum of its members'."""
    with server.client() as raw:
        members = raw.hgetall(f"sh:{{k:{key_id}}}:{kind}:b")
        total = int(members.pop("", 0))
        assert total == sum(map(int, members.values()))
        assert set(members) == set(raw.zrange(f"sh:{{k:{key_id}}}:{kind}", 0, -1))
        return total


@pytest.mark.parametrize("size", ["tiny", "mixed"])
async def test_sessions_and_responses_of_a_key_stay_within_its_room(
    start: Start, store_server: StoreServer, size: str
) -> None:
    gateway = await start(mock=echoing, config=CONFIG)
    chosen = random.Random(3)
    count = 1200 if size == "tiny" else 300

    async def one(number: int) -> None:
        text = "hi" if size == "tiny" else words(chosen)
        body: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
        if number % 3 == 0:
            (await gateway.client.post("/v1/responses", json={"input": text})).raise_for_status()
        elif number % 3 == 1:
            headers = {"X-Session-ID": f"s{number if size == 'tiny' else chosen.randrange(60)}"}
            await gateway.client.post("/v1/chat/completions", json=body, headers=headers)
        else:
            await gateway.client.post("/v1/chat/completions", json=body)

    for first in range(0, count, 20):
        await asyncio.gather(*(one(number) for number in range(first, first + 20)))

    assert accounted(store_server, "kept") <= ROOM
    assert taken(store_server, "{s:", "{r:", ":kept") <= 1.25 * ROOM
    assert taken(store_server, ":derived") <= 1.25 * 65_536 + 180_000, "and digests"


async def test_every_key_of_the_store_expires_or_is_bounded(serve: Start, store_server: StoreServer) -> None:
    """After everything that writes to it: whatever has no expiry is one of a few that don't grow with use."""
    gateway = await serve(mock=lambda: MockEngine(token_s=0.002), config=CONFIG)
    client = JobClient("c")
    async with client.connected(gateway):
        job_id = await submitted(gateway, "c", "hello")
        for headers in ({}, {"X-Session-ID": "named"}):
            body = {"messages": [{"role": "user", "content": "hello"}]}
            session = (await gateway.client.post("/v1/chat/completions", json=body, headers=headers)).headers
        await gateway.client.post("/v1/chat/completions", json=body, headers={"X-Session-ID": session["x-session-id"]})
        await gateway.client.delete("/v1/sessions/named")
        await gateway.chat(stream=True, resumable=True)
        for background in (False, True):
            created = await gateway.client.post("/v1/responses", json={"input": "x " * 500, "background": background})
            path = f"/v1/responses/{created.json()['id']}"
            await gateway.client.post(f"{path}/cancel")
            await gateway.client.delete(path)
        await until(lambda: client.ended(job_id))
        with store_server.client() as raw:
            kept = {key for key in raw.keys("*") if int(str(raw.ttl(key))) < 0}
    assert {re.sub(r"\{k:[^}]*\}", "{k}", key) for key in kept} <= {"sh:schema", "sh:cache-salt", "sh:keys:used"}


async def test_ids_that_a_refused_request_made_up_are_within_the_room(start: Start, store_server: StoreServer) -> None:
    room = 2**16
    gateway = await start(config={"sessions": {"max_bytes": room, "max_bytes_per_key": room}})
    spec = KeySpec(name="flood", limits={"shannon-chat": KeyLimits(requests_per_minute=1)})
    record, key = await gateway.services.keys.create(spec)
    authorization = {"Authorization": f"Bearer {key}"}
    most = room // MEMBER_BYTES
    statuses = set()

    async def one(number: int) -> None:
        headers = authorization | {"X-Session-ID": f"flood{number}"}
        body = {"messages": [{"role": "user", "content": "hello"}]}
        statuses.add((await gateway.client.post("/v1/chat/completions", json=body, headers=headers)).status_code)

    for first in range(0, most + 100, 20):
        await asyncio.gather(*(one(number) for number in range(first, first + 20)))

    assert statuses == {200, 429}
    assert accounted(store_server, "kept", record.id) <= room
    with store_server.client() as raw:
        assert len(raw.keys("sh:{s:flood*}")) <= most


async def test_deletion_of_what_is_not_there_leaves_nothing(start: Start, store_server: StoreServer) -> None:
    gateway = await start()
    for _ in range(10):
        assert (await gateway.client.delete(f"/v1/sessions/{make_id(KEY_ID)}")).status_code == 404
    with store_server.client() as raw:
        assert raw.keys("sh:{s:*") == []


async def test_least_recently_used_go_first(start: Start) -> None:
    gateway = await start(mock=echoing, config=CONFIG)

    async def say(session: str) -> None:
        body = {"messages": [{"role": "user", "content": "é" * 25_000}]}
        headers = {"X-Session-ID": session}
        (await gateway.client.post("/v1/chat/completions", json=body, headers=headers)).raise_for_status()

    async def there(session: str) -> bool:
        return (await gateway.client.get(f"/v1/sessions/{session}")).status_code == 200

    for number in range(18):
        await say(f"s{number}")
    assert all([await there(f"s{number}") for number in range(18)])
    await say("s0")
    for number in range(18, 36):
        await say(f"s{number}")
        await say("s0")
    assert await there("s0")
    assert not await there("s1")
    assert await there("s35")


async def test_last_writer_of_a_shared_session_pays(start: Start, store_server: StoreServer) -> None:
    gateway = await start(mock=echoing, config=CONFIG)
    record, other = await gateway.services.keys.create(KeySpec(name="other"))
    body = {"messages": [{"role": "user", "content": "x" * 5000}]}
    headers = {"X-Session-ID": "shared"}
    await gateway.client.post("/v1/chat/completions", json=body, headers=headers)
    assert accounted(store_server, "kept") > 5000
    await gateway.client.post("/v1/chat/completions", json=body, headers=headers | {"Authorization": f"Bearer {other}"})
    assert accounted(store_server, "kept") == 0
    assert accounted(store_server, "kept", record.id) > 10_000
    await gateway.client.delete("/v1/sessions/shared")
    assert accounted(store_server, "kept", record.id) == 0


async def test_sessions_of_refused_requests_are_bounded(start: Start, store_server: StoreServer) -> None:
    limits = {"requests_per_minute": 1, "tokens_per_minute": 1000}
    models = {"shannon-chat": {"description": "Chat", "limits": limits}}
    gateway = await start(mock=echoing, config={"models": models, "sessions": CONFIG["sessions"]})
    body = {"messages": [{"role": "user", "content": "hello"}]}
    most = ROOM // MEMBER_BYTES
    for number in range(most + 200):
        headers = {"X-Session-ID": f"s{number}"}
        status = (await gateway.client.post("/v1/chat/completions", json=body, headers=headers)).status_code
    assert status == 429

    with store_server.client() as raw:
        assert len(raw.keys("sh:{s:*")) <= most
    assert accounted(store_server, "kept") <= ROOM


def deleted_before_it_is_counted(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, kept: Retention, path: str) -> None:
    """Have the first thing that a key keeps be deleted right after it is written, before it is counted."""
    keep, raced = kept.keep, False

    async def delete_and_keep(key_id: str, member: str, size_bytes: int, ttl_s: float) -> None:
        nonlocal raced
        if not raced:
            raced = True
            (await gateway.client.delete(f"{path}/{member[2:]}")).raise_for_status()
        await keep(key_id, member, size_bytes, ttl_s)

    monkeypatch.setattr(kept, "keep", delete_and_keep)


async def test_room_made_for_one_key_costs_no_other_tenant_its_session(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The account of a key may still name a session that was deleted and begun again by somebody else."""
    gateway = await start(mock=echoing, config=CONFIG)
    _, other = await gateway.services.keys.create(KeySpec(name="other", tenant="other"))
    theirs = {"X-Session-ID": "user-1", "Authorization": f"Bearer {other}"}
    kept = gateway.services.sessions._kept
    await kept.charge(KEY_ID, "s:user-1", 1, 3600)  # the release of it was lost
    body = {"messages": [{"role": "user", "content": "precious"}]}
    (await gateway.client.post("/v1/chat/completions", json=body, headers=theirs)).raise_for_status()

    for number in range(36):
        body = {"messages": [{"role": "user", "content": "é" * 25_000}]}
        headers = {"X-Session-ID": f"s{number}"}
        (await gateway.client.post("/v1/chat/completions", json=body, headers=headers)).raise_for_status()
    assert (await gateway.client.get("/v1/sessions/s0")).status_code == 404, "room was made"
    shown = await gateway.client.get("/v1/sessions/user-1", headers=theirs)
    assert shown.json()["messages"][0]["content"] == "precious"


async def test_session_that_is_deleted_before_it_is_counted_is_not_counted(
    start: Start, store_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start(mock=echoing, config=CONFIG)
    deleted_before_it_is_counted(gateway, monkeypatch, gateway.services.sessions._kept, "/v1/sessions")
    body = {"messages": [{"role": "user", "content": "x" * 5000}]}
    headers = {"X-Session-ID": "gone"}
    (await gateway.client.post("/v1/chat/completions", json=body, headers=headers)).raise_for_status()

    assert accounted(store_server, "kept") == 0


async def test_response_that_is_deleted_before_it_is_counted_is_not_counted(
    start: Start, store_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start(mock=echoing, config=CONFIG)
    stored = gateway.services.responses.stored
    deleted_before_it_is_counted(gateway, monkeypatch, stored._kept, "/v1/responses")
    (await gateway.client.post("/v1/responses", json={"input": "hello"})).raise_for_status()

    assert accounted(store_server, "kept") == 0


async def test_deleted_responses_are_no_longer_counted(start: Start, store_server: StoreServer) -> None:
    gateway = await start(mock=echoing, config=CONFIG)
    body = (await gateway.client.post("/v1/responses", json={"input": "hello"})).json()
    assert accounted(store_server, "kept") > MEMBER_BYTES
    await gateway.client.delete(f"/v1/responses/{body['id']}")
    assert accounted(store_server, "kept") == 0


@pytest.mark.parametrize("letter", LETTERS)
async def test_streams_of_a_key_stay_within_their_room(serve: Start, store_server: StoreServer, letter: str) -> None:
    config = CONFIG | {"resume": {"max_bytes": 2**20, "max_bytes_per_key": ROOM}}
    gateway = await serve(
        mock=lambda: MockEngine(reply=letter * (4000 // len(letter.encode())), max_model_len=8192), config=config
    )

    async def one(asked: bool) -> int:
        fields = {"resumable": True, "ignore_eos": True, "max_tokens": 200}
        response = await gateway.chat(stream=True, **fields)
        return response.status_code

    statuses = await asyncio.gather(*(one(True) for _ in range(8)))
    assert set(statuses) == {200, 429}, "each has 256 KiB at least, or is refused"
    await until(lambda: accounted(store_server, "logs") <= ROOM)
    assert taken(store_server, "{l:", ":logs") <= 1.25 * ROOM


async def test_stream_too_many_is_refused_by_name_or_not_resumable(serve: Start, store_server: StoreServer) -> None:
    config = CONFIG | {"resume": {"max_bytes_per_key": 300_000}}
    gateway = await serve(mock=lambda: MockEngine(token_s=0.2), config=config)
    by_key = await serve(config=config | {"resume": {"max_bytes_per_key": 300_000, "keys": [KEY_ID]}})
    async with gateway.stream(resumable=True) as response:
        await anext(response.aiter_lines())
        refused = await gateway.chat(stream=True, resumable=True)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_streams")
        assert "resume.max_bytes_per_key" in refused.json()["error"]["message"]
        plain = await by_key.chat(stream=True)
        assert plain.status_code == 200
        assert plain.text.endswith("data: [DONE]\n\n")
        assert "X-Shannon-Resume" not in plain.headers
    await until(lambda: accounted(store_server, "logs") < 10_000)
    assert (await gateway.chat(stream=True, resumable=True)).status_code == 200


async def test_jobs_of_a_key_that_wait_stay_within_their_room(serve: Start, store_server: StoreServer) -> None:
    room = 300_000
    gateway = await serve(
        mock=lambda: MockEngine(token_s=0.05, reply="x " * 200),
        config=CONFIG | {"jobs": {"max_queued_bytes_per_key": room}},
    )
    clients = [JobClient(f"c{number}") for number in range(2)]
    async with clients[0].connected(gateway), clients[1].connected(gateway):
        answers = [await submit(gateway, f"c{number % 2}", "中" * 20_000) for number in range(12)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) == 12 - 4
        assert {answer.json()["error"]["code"] for answer in refused} == {"job_queue_full"}
        assert "jobs.max_queued_bytes_per_key" in refused[0].json()["error"]["message"]
        assert accounted(store_server, "jobs") <= room + MEMBER_BYTES * 2
    for client in clients:
        await gateway.client.delete(f"/api/v1/chat/stream/{client.id}")
    await until(lambda: accounted(store_server, "jobs") == 0)
    async with clients[0].connected(gateway):
        await submitted(gateway, "c0", "中" * 20_000)


async def test_members_of_an_account_expire(store_server: StoreServer) -> None:
    store_server.client().flushall()
    store = Store(StoreSettings(command_timeout_ms=2000), {"SHANNON_REDIS_URL": store_server.url}, Metrics())
    await store.start()
    account = StoredBytes(store, "kept", 10_000)
    assert await account.charge("Key", "a", 5000, 0.01)
    await asyncio.gather(*(account.charge("Key", f"m{number}", 100, 60) for number in range(3)))
    await until(lambda: True)
    async with asyncio.timeout(5):
        while not await account.charge("Key", "b", 5500, 60):
            pass
    assert await account.total("Key") == 3 * (100 + MEMBER_BYTES) + 5500 + MEMBER_BYTES
    assert not await account.charge("Key", "c", 5000, 60)
    assert await account.add("Key", "b", -5000, 60)
    assert await account.charge("Key", "c", 4000, 60)
    await store.close()


async def test_readme_names_the_sum_of_the_bounds() -> None:
    sessions, resume, jobs = SessionSettings(), ResumeSettings(), JobSettings()
    digests = 256 * 1024
    total = sessions.derived_bytes_per_key + digests + sessions.max_bytes_per_key
    total += resume.max_bytes_per_key + jobs.max_queued_bytes_per_key
    text = (ROOT / "docs/keys-and-limits.md").read_text()
    assert f"**{total / 2**20:g} MiB** of values" in text


@pytest.mark.parametrize("letter", ["x", "中"])
async def test_large_responses_come_and_go_in_pieces(
    start: Start, monkeypatch: pytest.MonkeyPatch, letter: str
) -> None:
    config = {"limits": {"enabled": False}, "sessions": {"max_bytes": 4 * 2**20}}
    reply = letter * (900_000 // len(letter.encode()))
    gateway = await start(mock=lambda: MockEngine(reply=reply, max_model_len=10**7), config=config)
    largest = watch_store(gateway.services.store, monkeypatch)
    previous: dict[str, Any] = {}
    asked = []
    for number in range(3):
        asked.append(f"{number} " + letter * (600_000 // len(letter.encode())))
        body = {"input": asked[-1], "stream": number == 1} | previous
        response = await gateway.client.post("/v1/responses", json=body)
        response_id = re.findall("resp_[0-9a-f]+", response.text)[0]
        previous = {"previous_response_id": response_id}
    shown = (await gateway.client.get(f"/v1/responses/{response_id}")).json()

    assert shown["output"][0]["content"][0]["text"] == reply
    texts = [message["content"] for message in gateway.mock.requests[-1].messages]
    assert texts == [asked[0], reply, asked[1], reply, asked[2]]
    assert largest.bytes <= 1.1 * PIECE_BYTES, largest.command
    items = (await gateway.client.get(f"/v1/responses/{response_id}/input_items")).json()["data"]
    assert items[0]["content"][0]["text"] == asked[2]


async def test_streams_and_jobs_travel_in_pieces(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame of a MiB, a backlog of several, and a queue of several are read by another gateway."""
    config: dict[str, Any] = {"limits": {"enabled": False}, "resume": {"max_bytes": 2**24}}
    reply = " ".join(["中" * 400_000, *("é" * 3000 for _ in range(300))])
    gateway, other = (
        await serve(mock=lambda: MockEngine(reply=reply, max_model_len=10**6), config=config),
        await serve(),
    )
    largest = [watch_store(each.services.store, monkeypatch) for each in (gateway, other)]
    async with gateway.stream(resumable=True) as response:
        path = response.headers["X-Shannon-Resume"]
        whole = await response.aread()
    assert (await other.client.get(path)).content == whole
    assert (await gateway.client.get(path)).content == whole
    for after in (1, 2, 3, 150):
        rest = (await other.client.get(path, params={"starting_after": after})).content
        assert whole.endswith(rest)
        assert rest.startswith(b"id: %d\n" % (after + 1))
    assert max(each.bytes for each in largest) <= 1.1 * PIECE_BYTES, [each.command for each in largest]


async def test_waiting_jobs_are_taken_over_in_pieces(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = {"limits": {"enabled": False}}
    gateway: Gateway = await serve(mock=lambda: MockEngine(reply="yes", token_s=60, max_model_len=10**6), config=config)
    other: Gateway = await serve(mock=lambda: MockEngine(reply="yes", max_model_len=10**6), config=config)
    largest = [watch_store(each.services.store, monkeypatch) for each in (gateway, other)]
    client = JobClient("c")
    async with client.connected(gateway):
        jobs = [await submitted(gateway, "c", f"{number} " + "x" * 200_000) for number in range(12)]
        await gateway.services.jobs.close()
    async with client.connected(other):
        await until(lambda: len(client.in_order()) == len(jobs), within_s=10)
    assert client.in_order() == jobs
    assert max(each.bytes for each in largest) <= 1.1 * PIECE_BYTES, [each.command for each in largest]
