"""Sessions on the wire: who owns an id, what history comes back, what is stored, and what the client is told."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from engine.base import EngineDied
from engine.mock import Fault, MockEngine
from gateway.access.keys import KeySpec
from gateway.store.pieces import PIECE_BYTES
from tests.support.app import Gateway, Start
from tests.support.store_commands import watch_store
from tests.support.store_server import StoreServer, run_store
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

ANSWER = "certainly so"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str = ANSWER) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def answering() -> MockEngine:
    return MockEngine(reply=ANSWER)


@pytest.fixture
async def gateway(start: Start) -> Gateway:
    """A gateway whose engine always says ANSWER."""
    return await start(mock=answering)


async def say(
    gateway: Gateway, *messages: dict[str, str], session: str | None = "talk", key: str = "", **fields: Any
) -> httpx.Response:
    """Post `messages` in `session`, with `key` in place of the gateway's own."""
    headers = {} if session is None else {"X-Session-ID": session}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return await gateway.client.post(
        "/v1/chat/completions", json={"messages": list(messages)} | fields, headers=headers
    )


async def key_of(gateway: Gateway, tenant: str) -> str:
    """Return a key of `tenant`."""
    return (await gateway.services.keys.create(KeySpec(name=tenant, tenant=tenant)))[1]


def prompted(gateway: Gateway) -> list[Any]:
    """Return the messages that the engine last saw."""
    return gateway.mock.requests[-1].messages


async def stored(gateway: Gateway, session: str = "talk") -> list[dict[str, Any]]:
    response = await gateway.client.get(f"/v1/sessions/{session}")
    messages: list[dict[str, Any]] = response.raise_for_status().json()["messages"]
    return messages


async def test_stored_turns_come_first_for_an_id_that_the_client_names(gateway: Gateway) -> None:
    await say(gateway, user("one"))
    await say(gateway, user("two"))

    assert prompted(gateway) == [user("one"), assistant(), user("two")]
    assert await stored(gateway) == [user("one"), assistant(), user("two"), assistant()]


async def test_streamed_turns_are_stored_like_whole_ones(gateway: Gateway) -> None:
    await say(gateway, user("one"), stream=True)

    assert await stored(gateway) == [user("one"), assistant()]


async def test_system_prompt_of_the_request_comes_before_history(gateway: Gateway) -> None:
    await say(gateway, system("be brief"), user("one"))
    await say(gateway, system("be long"), user("two"))

    assert prompted(gateway) == [system("be long"), user("one"), assistant(), user("two")]


async def test_stored_system_prompt_serves_a_request_without_one(gateway: Gateway) -> None:
    await say(gateway, system("be brief"), user("one"))
    await say(gateway, user("two"))

    assert prompted(gateway) == [system("be brief"), user("one"), assistant(), user("two")]


async def test_system_prompt_that_was_sent_with_every_turn_comes_once_and_first(gateway: Gateway) -> None:
    # Chat templates commonly refuse a system message anywhere but at the beginning.
    await say(gateway, system("be brief"), user("one"))
    await say(gateway, system("be brief"), user("two"))
    await say(gateway, user("three"))

    assert prompted(gateway) == [system("be brief"), user("one"), assistant(), user("two"), assistant(), user("three")]


async def test_id_is_announced_only_when_it_is_new(gateway: Gateway) -> None:
    first = await say(gateway, user("one"))
    second = await say(gateway, user("two"))

    assert first.headers["x-session-id"] == "talk"
    assert "x-session-id" not in second.headers


async def test_streams_announce_a_new_id_as_well(gateway: Gateway) -> None:
    first = await say(gateway, user("one"), stream=True)

    assert first.headers["x-session-id"] == "talk"


async def test_id_of_another_tenant_becomes_a_fresh_one_and_leaks_nothing(gateway: Gateway) -> None:
    await say(gateway, user("my secret"))
    other = await key_of(gateway, "other")
    response = await say(gateway, user("two"), key=other)

    fresh = response.headers["x-session-id"]
    assert re.fullmatch("oai-[0-9a-f]{8}", fresh)
    assert prompted(gateway) == [user("two")]
    assert await stored(gateway) == [user("my secret"), assistant()]
    again = await say(gateway, user("three"), key=other, session=fresh)
    assert "x-session-id" not in again.headers
    assert prompted(gateway) == [user("two"), assistant(), user("three")]
    assert (await gateway.client.get(f"/v1/sessions/{fresh}")).status_code == 404


async def test_history_sent_under_another_tenants_id_replaces_nothing_of_theirs(gateway: Gateway) -> None:
    await say(gateway, user("one"))
    await say(gateway, user("x"), assistant("y"), user("z"), key=await key_of(gateway, "other"))

    assert await stored(gateway) == [user("one"), assistant()]


async def test_keys_of_one_tenant_share_sessions(gateway: Gateway) -> None:
    await say(gateway, user("one"))
    response = await say(gateway, user("two"), key=await key_of(gateway, "default"))

    assert "x-session-id" not in response.headers
    assert prompted(gateway) == [user("one"), assistant(), user("two")]


async def test_two_tenants_that_come_at_once_do_not_share_an_id(gateway: Gateway) -> None:
    keys = [await key_of(gateway, f"tenant-{number}") for number in range(8)]
    responses = await asyncio.gather(*(say(gateway, user("hi"), key=key) for key in keys))
    ids = [response.headers["x-session-id"] for response in responses]

    assert len(set(ids)) == 8
    assert ids.count("talk") == 1
    assert all(messages == [user("hi")] for messages in (request.messages for request in gateway.mock.requests))


async def test_derived_ids_of_two_tenants_differ(gateway: Gateway) -> None:
    mine = await say(gateway, user("hi"), session=None)
    theirs = await say(gateway, user("hi"), session=None, key=await key_of(gateway, "other"))

    assert mine.headers["x-session-id"] != theirs.headers["x-session-id"]


async def test_derived_id_never_brings_history(gateway: Gateway) -> None:
    await say(gateway, user("hi"), session=None)
    await say(gateway, user("hi"), session=None)

    assert prompted(gateway) == [user("hi")]


async def test_derived_id_brings_history_once_the_client_names_it(gateway: Gateway) -> None:
    derived = (await say(gateway, user("hi"), session=None)).headers["x-session-id"]
    await say(gateway, user("more"), session=derived)

    assert prompted(gateway) == [user("hi"), assistant(), user("more")]


async def test_history_of_the_client_replaces_what_is_stored_and_is_not_repeated(gateway: Gateway) -> None:
    await say(gateway, user("one"))
    own = [user("one"), assistant("as I edited it"), user("two")]
    await say(gateway, *own)

    assert prompted(gateway) == own
    assert await stored(gateway) == [*own, assistant()]
    await say(gateway, *own, assistant(), user("three"))
    assert prompted(gateway) == [*own, assistant(), user("three")]
    assert await stored(gateway) == [*own, assistant(), user("three"), assistant()]


async def test_turns_are_stored_around_hanging_and_failing_ones(serve: Start) -> None:
    gateway = await serve(mock=answering)
    mock = gateway.mock
    mock.faults.extend([Fault(), Fault(error=EngineDied("boom"))])
    slow = asyncio.create_task(say(gateway, user("first")))  # hangs
    await until(lambda: mock.unfinished_requests == 1)
    assert (await say(gateway, user("failing"))).status_code == 503
    numbers = [str(number) for number in range(5)]
    for number in numbers:
        await say(gateway, user(number))
    slow.cancel()

    messages = [message for number in numbers for message in (user(number), assistant())]
    assert await stored(gateway) == messages


async def test_turn_that_began_first_is_stored_first_whoever_finishes_first(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(reply=ANSWER, token_s=0.5))
    slow = asyncio.create_task(say(gateway, user("slow"), max_tokens=2))
    await until(lambda: gateway.mock.unfinished_requests == 1)
    await say(gateway, user("fast"), max_tokens=1)
    assert not slow.done()
    await slow

    assert await stored(gateway) == [user("slow"), assistant(), user("fast"), assistant("certainly")]


async def test_no_turn_is_lost_when_many_come_at_once(gateway: Gateway) -> None:
    texts = {f"turn {number}" for number in range(20)}
    await asyncio.gather(*(say(gateway, user(text)) for text in texts))
    messages = await stored(gateway)

    assert {message["content"] for message in messages[::2]} == texts
    assert messages[1::2] == [assistant()] * 20


async def test_failed_request_stores_nothing(gateway: Gateway) -> None:
    await say(gateway, user("one"))
    gateway.mock.faults.append(Fault(at_token=1, error=EngineDied("boom")))
    assert (await say(gateway, user("two"))).status_code == 503

    assert await stored(gateway) == [user("one"), assistant()]


async def test_request_that_its_client_left_stores_nothing(serve: Start) -> None:
    gateway = await serve(mock=answering)
    await say(gateway, user("one"))
    gateway.mock.faults.append(Fault(at_token=1))  # hangs
    async with gateway.client.stream(
        "POST",
        "/v1/chat/completions",
        json={"messages": [user("two")], "stream": True},
        headers={"X-Session-ID": "talk"},
    ) as response:
        await anext(response.aiter_raw())
    await until(lambda: gateway.mock.unfinished_requests == 0 and gateway.requests_in_progress() == 0)

    assert await stored(gateway) == [user("one"), assistant()]


async def test_session_lives_on_from_its_last_use(start: Start, store_server: StoreServer) -> None:
    gateway = await start(mock=answering, config={"sessions": {"ttl_s": 1000}})
    await say(gateway, user("one"))
    with store_server.client() as raw:
        keys = ["sh:{s:talk}", "sh:{s:talk}:t"]
        assert [0 < int(str(raw.ttl(key))) <= 1000 for key in keys] == [True, True]
        for key in keys:
            raw.expire(key, 100)
        await say(gateway, user("two"))

        assert [int(str(raw.ttl(key))) > 900 for key in keys] == [True, True]


async def test_default_time_to_live_is_a_day(gateway: Gateway, store_server: StoreServer) -> None:
    await say(gateway, user("one"))
    with store_server.client() as raw:
        assert int(str(raw.ttl("sh:{s:talk}"))) == pytest.approx(86_400, abs=5)


async def test_oldest_turns_go_beyond_max_turns(start: Start) -> None:
    gateway = await start(mock=answering, config={"sessions": {"max_turns": 2}})
    for text in ("one", "two", "three"):
        await say(gateway, user(text))

    assert await stored(gateway) == [user("two"), assistant(), user("three"), assistant()]


async def test_oldest_turns_go_beyond_max_bytes(start: Start) -> None:
    gateway = await start(mock=answering, config={"sessions": {"max_bytes": 1024}})
    for letter in "abc":
        await say(gateway, user(letter * 350))

    assert await stored(gateway) == [user("b" * 350), assistant(), user("c" * 350), assistant()]


async def test_turn_larger_than_max_bytes_is_not_kept(start: Start) -> None:
    gateway = await start(mock=answering, config={"sessions": {"max_bytes": 1024}})
    await say(gateway, user("small"))
    await say(gateway, user("x" * 2000))

    assert await stored(gateway) == []


async def test_history_is_trimmed_oldest_first_to_the_context(start: Start) -> None:
    gateway = await start(mock=lambda: MockEngine(reply=ANSWER, max_model_len=40))
    for number in range(12):
        response = await say(gateway, user(f"number {number}"))
        assert response.status_code == 200, response.text
    messages = prompted(gateway)
    kept = [message["content"] for message in messages if message["role"] == "user"]

    assert kept == [f"number {number}" for number in range(12 - len(kept), 12)], "the newest, without gaps"
    assert 1 < len(kept) < 12
    assert len(await stored(gateway)) == 24, "what does not fit is still kept"


async def test_history_never_makes_an_explicit_max_tokens_too_long(start: Start) -> None:
    gateway = await start(mock=lambda: MockEngine(reply=ANSWER, max_model_len=40))
    for _ in range(5):
        await say(gateway, user("hello there"))
    response = await say(gateway, user("hello"), max_tokens=38)

    assert response.status_code == 200
    assert prompted(gateway)[-1] == user("hello")


async def test_owner_sees_and_deletes_a_session(gateway: Gateway) -> None:
    await say(gateway, user("one"))
    shown = (await gateway.client.get("/v1/sessions/talk")).json()
    assert (shown["id"], shown["object"], shown["messages"]) == ("talk", "session", [user("one"), assistant()])
    deleted = await gateway.client.delete("/v1/sessions/talk")

    assert deleted.json() == {"id": "talk", "object": "session.deleted", "deleted": True}
    assert (await gateway.client.get("/v1/sessions/talk")).status_code == 404
    again = await say(gateway, user("two"))
    assert again.headers["x-session-id"] == "talk"
    assert prompted(gateway) == [user("two")]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_session_of_another_tenant_looks_like_none(gateway: Gateway, method: str) -> None:
    await say(gateway, user("one"))
    headers = {"Authorization": f"Bearer {await key_of(gateway, 'other')}"}
    theirs = await gateway.client.request(method, "/v1/sessions/talk", headers=headers)
    none = await gateway.client.request(method, "/v1/sessions/gone", headers=headers)

    assert theirs.status_code == none.status_code == 404
    assert theirs.json()["error"]["code"] == none.json()["error"]["code"] == "session_not_found"
    assert theirs.text.replace("talk", "gone") == none.text
    assert await stored(gateway) == [user("one"), assistant()]


async def test_session_that_is_deleted_while_a_request_runs_stays_deleted(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(reply=ANSWER, token_s=0.05))
    running = asyncio.create_task(say(gateway, user("one")))
    await until(lambda: gateway.mock.unfinished_requests == 1)
    await gateway.client.delete("/v1/sessions/talk")
    assert (await running).status_code == 200

    assert (await gateway.client.get("/v1/sessions/talk")).status_code == 404


async def test_deleted_session_that_is_begun_again_has_nothing_of_the_one_before(serve: Start) -> None:
    """A turn of the deleted one is still running, and ends after the new one has begun."""
    gateway = await serve(mock=lambda: MockEngine(reply=ANSWER, token_s=0.3))
    await say(gateway, user("early"), max_tokens=1)
    running = asyncio.create_task(say(gateway, user("my secret")))
    await until(lambda: gateway.mock.unfinished_requests == 1)
    await gateway.client.delete("/v1/sessions/talk")
    await say(gateway, user("fresh"), max_tokens=1)
    assert not running.done()
    assert (await running).status_code == 200

    assert await stored(gateway) == [user("fresh"), assistant("certainly")]


@pytest.mark.parametrize("letter", ["x", "中", "😀"])
async def test_bytes_are_what_max_bytes_counts(start: Start, letter: str) -> None:
    gateway = await start(mock=answering, config={"sessions": {"max_bytes": 1024}})
    size = 900 // len(letter.encode())
    await say(gateway, user(letter * size))
    assert await stored(gateway) == [user(letter * size), assistant()]
    await say(gateway, user(letter * (1024 // len(letter.encode()))))
    assert await stored(gateway) == []


@pytest.mark.parametrize("letter", ["x", "中"])
async def test_large_sessions_come_and_go_in_pieces(start: Start, monkeypatch: pytest.MonkeyPatch, letter: str) -> None:
    config = {"limits": {"enabled": False}, "sessions": {"max_bytes": 3_000_000}}
    gateway = await start(mock=lambda: MockEngine(reply=ANSWER, max_model_len=10**7), config=config)
    largest = watch_store(gateway.services.store, monkeypatch)
    expected = []
    for size in (10, 200_000, 700_000, 100_000, 30):
        text = f"{size} " + letter * (size // len(letter.encode()))
        await say(gateway, user(text))
        expected += [user(text), assistant()]
        assert prompted(gateway) == expected[:-1]
    assert await stored(gateway) == expected
    assert largest.bytes <= 1.1 * PIECE_BYTES
    await say(gateway, user("y" * 2_500_000))
    assert (await stored(gateway))[-2:] == [user("y" * 2_500_000), assistant()]
    assert len(await stored(gateway)) < 12, "the oldest went"
    assert largest.bytes <= 1.1 * PIECE_BYTES


@pytest.mark.parametrize("bad", ["", " ", "a b", "x" * 129, "{talk}", "a}b", "naïve", "a\tb", "*", "a;b", "a\\b"])
async def test_bad_id_is_refused_by_name(gateway: Gateway, bad: str) -> None:
    response = await gateway.client.post(
        "/v1/chat/completions", json={"messages": [user("hi")]}, headers={b"X-Session-ID": bad.encode()}
    )

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "X-Session-ID"
    assert "X-Session-ID" in response.json()["error"]["message"]
    assert gateway.mock.requests == []


@pytest.mark.parametrize("session", ["a|b", "a:t", "x/../y", "a=b+c~d@e", "x" * 128, "..", "k:TestKey00001"])
async def test_odd_ids_are_safe(gateway: Gateway, session: str) -> None:
    """An id becomes part of the store's key names and of a path."""
    await say(gateway, user("one"), session=session)
    await say(gateway, user("two"), session=session)

    assert prompted(gateway) == [user("one"), assistant(), user("two")]
    plain = await say(gateway, user("one"), session="a")
    assert plain.headers["x-session-id"] == "a"
    assert prompted(gateway) == [user("one")]


@pytest.mark.parametrize("session", ["a|b", "a:t", "x/y", "a=b+c~d@e"])
async def test_odd_ids_can_be_shown(gateway: Gateway, session: str) -> None:
    await say(gateway, user("one"), session=session)

    assert await stored(gateway, session) == [user("one"), assistant()]


async def test_sessions_that_are_off_store_and_announce_nothing(start: Start, store_server: StoreServer) -> None:
    gateway = await start(mock=answering, config={"sessions": {"enabled": False}})
    for text in ("one", "two"):
        response = await say(gateway, user(text))
        assert "x-session-id" not in response.headers

    assert prompted(gateway) == [user("two")]
    with store_server.client() as raw:
        assert raw.keys("sh:{s:*") == []


async def test_answer_comes_without_history_while_the_store_is_away(start: Start, tmp_path: Path) -> None:
    with run_store("valkey", tmp_path / "own") as own:
        settings = {"data_dir": str(tmp_path / "data"), "command_timeout_ms": 2000, "breaker_s": 0.02}
        gateway = await start(mock=answering, environment={"SHANNON_REDIS_URL": own.url}, config={"store": settings})
        await say(gateway, user("one"))
        own.stop()
        response = await say(gateway, user("two"))
        assert response.status_code == 200
        assert response.headers["x-shannon-session"] == "unavailable"
        assert "x-session-id" not in response.headers
        assert prompted(gateway) == [user("two")]
        gone = await gateway.client.get("/v1/sessions/talk")
        assert (gone.status_code, gone.json()["error"]["code"]) == (503, "store_unavailable")

        own.start()
        await until(lambda: gateway.services.store.available)
        response = await say(gateway, user("three"))
        assert "x-shannon-session" not in response.headers
        assert prompted(gateway) == [user("one"), assistant(), user("three")]


async def test_equal_turns_are_both_stored(gateway: Gateway) -> None:
    for _ in range(2):
        await say(gateway, user("again"))

    assert await stored(gateway) == [user("again"), assistant()] * 2


async def test_no_key_of_the_store_outlives_a_deleted_session(gateway: Gateway, store_server: StoreServer) -> None:
    await say(gateway, user("one"))
    await gateway.client.delete("/v1/sessions/talk")
    raw: redis.Redis = store_server.client()

    assert raw.keys("sh:{s:talk}*") == []
    raw.close()
