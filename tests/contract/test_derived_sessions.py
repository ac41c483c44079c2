"""Sessions of requests that name none: whose they are, which conversation is in them, and how little is kept."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from engine.mock import MockEngine
from gateway.errors import StoreUnavailable
from gateway.keys import KeySpec
from tests.conftest import KEY_ID, Gateway, Start
from tests.store_server import StoreServer

pytestmark = pytest.mark.anyio

ANSWER = "certainly so"
UNLIMITED: dict[str, Any] = {"limits": {"enabled": False}}
CONTENTS = f"sh:{{k:{KEY_ID}}}:derived"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str = ANSWER) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def answering() -> MockEngine:
    return MockEngine(reply=ANSWER, max_model_len=100_000)


async def say(gateway: Gateway, *messages: dict[str, Any], session: str = "", key: str = "") -> httpx.Response:
    headers = {"X-Session-ID": session} if session else {}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    response = await gateway.client.post("/v1/chat/completions", json={"messages": list(messages)}, headers=headers)
    assert response.status_code == 200, response.text
    return response


async def announced(gateway: Gateway, *messages: dict[str, Any], **options: str) -> str:
    return (await say(gateway, *messages, **options)).headers["x-session-id"]


async def stored(gateway: Gateway, session: str, key: str = "") -> list[dict[str, Any]] | None:
    """Return the messages of a session, None if there is none."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    response = await gateway.client.get(f"/v1/sessions/{session}", headers=headers)
    if response.status_code == 404:
        return None
    messages: list[dict[str, Any]] = response.raise_for_status().json()["messages"]
    return messages


async def other_key(gateway: Gateway, tenant: str = "default") -> str:
    return (await gateway.services.keys.create(KeySpec(name="other", tenant=tenant)))[1]


def prompted(gateway: Gateway) -> list[dict[str, Any]]:
    return gateway.mock.requests[-1].messages


@pytest.mark.parametrize("beginning", ["hi", "u" * 300, "¿qué? " * 50])
async def test_conversations_that_begin_alike_have_sessions_of_their_own(start: Start, beginning: str) -> None:
    gateway = await start(mock=answering)
    other = await other_key(gateway)
    first = await announced(gateway, user(beginning + " one"))
    alike = await announced(gateway, user(beginning + " two"))
    equal = await announced(gateway, user(beginning + " one"))
    theirs = await announced(gateway, user(beginning + " one"), key=other)

    assert len({first, alike, equal, theirs}) == 4
    assert all(re.fullmatch("oai-[0-9a-f]{32}", id_) for id_ in (first, alike, equal, theirs))
    assert await stored(gateway, first) == [user(beginning + " one"), assistant()]
    assert await stored(gateway, alike) == [user(beginning + " two"), assistant()]


async def test_derived_session_belongs_to_its_key(start: Start) -> None:
    gateway = await start(mock=answering)
    other = await other_key(gateway)
    mine = await announced(gateway, user("my secret"))

    assert await stored(gateway, mine, other) is None
    headers = {"Authorization": f"Bearer {other}"}
    assert (await gateway.client.delete(f"/v1/sessions/{mine}", headers=headers)).status_code == 404
    taken = await say(gateway, user("planted"), session=mine, key=other)
    assert taken.headers["x-session-id"] != mine, "as an id of another tenant"
    assert prompted(gateway) == [user("planted")]
    await say(gateway, user("more"), session=mine)
    assert prompted(gateway) == [user("my secret"), assistant(), user("more")]
    await say(gateway, user("and more"), session=mine, key=other)
    assert len(prompted(gateway)) == 5, "an ordinary session by now, which the tenant shares"


@pytest.mark.parametrize("forgotten", [False, True])
async def test_id_of_another_key_is_never_begun(start: Start, store_server: StoreServer, forgotten: bool) -> None:
    """Else what one key says there would be another's history."""
    gateway = await start(mock=answering)
    other = await other_key(gateway)
    mine = await announced(gateway, user("hi"))
    if forgotten:
        store_server.client().delete(*store_server.client().keys(f"{CONTENTS}*"))
    await say(gateway, user("planted"), session=mine, key=other)
    await say(gateway, user("more"), session=mine)

    assert prompted(gateway) == ([] if forgotten else [user("hi"), assistant()]) + [user("more")]


async def test_each_request_has_a_session_with_what_it_said(start: Start) -> None:
    gateway = await start(mock=answering)
    conversation = [user("hi")]
    sessions = [await announced(gateway, *conversation)]
    for number in range(5):
        conversation += [assistant(), user(f"question {number}")]
        sessions.append(await announced(gateway, *conversation))

    assert len(set(sessions)) == 6
    for number, session in enumerate(sessions):
        assert await stored(gateway, session) == [*conversation[: 2 * number + 1], assistant()]
    await say(gateway, user("last"), session=sessions[-1])
    assert prompted(gateway) == [*conversation, assistant(), user("last")]


async def _before_the_store(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: object) -> Any:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(gateway.services.sessions._derived._store, "run", away)
        await say(gateway, user("hi"))


async def _with_another_key(gateway: Gateway, _: pytest.MonkeyPatch) -> None:
    await say(gateway, user("hi"), key=await other_key(gateway))


async def _in_a_named_session(gateway: Gateway, _: pytest.MonkeyPatch) -> None:
    await say(gateway, user("hi"), session="mine")


async def _by_responses(gateway: Gateway, _: pytest.MonkeyPatch) -> None:
    (await gateway.client.post("/v1/responses", json={"input": "hi"})).raise_for_status()


async def _long_ago(gateway: Gateway, _: pytest.MonkeyPatch) -> None:
    await say(gateway, user("hi"))
    await gateway.services.store.run("FLUSHALL")


async def _many_requests_ago(gateway: Gateway, _: pytest.MonkeyPatch) -> None:
    await say(gateway, user("hi"))
    for number in range(600):
        await say(gateway, user(f"{number}"))


@pytest.mark.parametrize(
    "begin",
    [_before_the_store, _with_another_key, _in_a_named_session, _by_responses, _long_ago, _many_requests_ago],
)
async def test_conversation_whose_beginning_is_not_known_joins_no_other(
    start: Start, monkeypatch: pytest.MonkeyPatch, begin: Callable[[Gateway, pytest.MonkeyPatch], Awaitable[None]]
) -> None:
    """Both begin with the same words and get the same answer. Only the second one's beginning is in the store."""
    gateway = await start(mock=answering, config=UNLIMITED)
    await begin(gateway, monkeypatch)
    second = await announced(gateway, user("hi"))
    await say(gateway, user("hi"), assistant(), user("a secret of the first"))

    assert await stored(gateway, second) == [user("hi"), assistant()]
    await say(gateway, user("what did I say?"), session=second)
    assert prompted(gateway) == [user("hi"), assistant(), user("what did I say?")]


@pytest.mark.parametrize("seed", range(4))
async def test_session_never_shows_turns_of_another_conversation(start: Start, seed: int) -> None:
    """Conversations that begin alike, with an engine that always answers alike, in any order and at once."""
    chosen = random.Random(seed)
    gateway = await start(mock=answering, config=UNLIMITED)
    said: list[list[dict[str, Any]]] = [[] for _ in range(8)]
    told: dict[str, list[dict[str, Any]]] = {}

    async def continue_(number: int) -> None:
        conversation = said[number]
        text = "hi" if len(conversation) < 3 else f"secret of {number}"
        conversation += [user(text)]
        session = await announced(gateway, *conversation)
        conversation += [assistant()]
        assert session not in told
        told[session] = list(conversation)

    for _ in range(12):
        await asyncio.gather(*(continue_(number) for number in chosen.sample(range(8), 3)))

    for session, conversation in told.items():
        assert await stored(gateway, session) == conversation


async def test_named_session_is_no_longer_derived(start: Start) -> None:
    """What a client keeps in it is not replaced by a request that names no session."""
    gateway = await start(mock=answering)
    session = await announced(gateway, user("hi"))
    await say(gateway, user("kept"), session=session)
    await say(gateway, user("hi"), assistant(), user("a fork"))

    assert await stored(gateway, session) == [user("hi"), assistant(), user("kept"), assistant()]


async def test_first_uses_at_once_make_one_session(start: Start) -> None:
    gateway = await start(mock=answering)
    session = await announced(gateway, user("hi"))
    await asyncio.gather(*(say(gateway, user(f"more {number}"), session=session) for number in range(5)))

    messages = await stored(gateway, session)
    assert messages is not None
    assert messages[:2] == [user("hi"), assistant()]
    assert len(messages) == 12


@pytest.mark.parametrize("named", [False, True])
async def test_deleted_session_does_not_come_back_from_a_turn_that_runs(
    serve: Start, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    gateway = await serve(mock=answering)
    session = await announced(gateway, user("hi")) if named else ""
    go, pause = asyncio.Event(), gateway.mock._pause

    async def pause_after_a_token(seconds: float, dead: asyncio.Event) -> None:
        if seconds:
            await go.wait()
        await pause(0, dead)

    monkeypatch.setattr(gateway.mock, "_token_s", 1)
    monkeypatch.setattr(gateway.mock, "_pause", pause_after_a_token)
    headers = {"X-Session-ID": session} if named else {}
    body = {"messages": [user("more")], "stream": True}
    async with gateway.client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as running:
        session = session or running.headers["x-session-id"]
        deleted = await gateway.client.delete(f"/v1/sessions/{session}")
        assert gateway.mock.unfinished_requests == 1
        go.set()
        await running.aread()

    assert deleted.status_code == 200
    assert await stored(gateway, session) is None


async def test_deletion_wins_over_a_first_use_that_has_begun(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request has taken what was said out of the derived session, and not yet put it into the ordinary one."""
    gateway = await start(mock=answering)
    session = await announced(gateway, user("hi"))
    derived = gateway.services.sessions._derived
    take = derived.take

    async def take_and_wait(key_id: str, session_id: str) -> Any:
        said = await take(key_id, session_id)
        await gateway.client.delete(f"/v1/sessions/{session}")
        return said

    monkeypatch.setattr(derived, "take", take_and_wait)
    await say(gateway, user("more"), session=session)

    assert await stored(gateway, session) == [user("more"), assistant()]


async def test_derived_session_is_forgotten_in_minutes(start: Start, store_server: StoreServer) -> None:
    gateway = await start(mock=answering)
    session = await announced(gateway, user("a private matter"))
    with store_server.client() as raw:
        holding = [key for key in raw.keys("*") if "derived" in key or "{s:" in key]
        assert 0 < int(str(raw.ttl(CONTENTS))) <= 600
        assert all(key.startswith(CONTENTS) for key in holding)
        assert all(int(str(raw.ttl(key))) > 0 for key in holding)
        raw.zadd(f"{CONTENTS}:at", {session: 1})
    assert await stored(gateway, session) is None
    await say(gateway, user("other"))
    with store_server.client() as raw:
        assert raw.hkeys(CONTENTS) != [session], "it goes with the next use, though the key is kept"
        assert len(raw.hkeys(CONTENTS)) == 1


@pytest.mark.parametrize("letter", ["x", "é", "中", "😀"])
async def test_bytes_of_derived_sessions_are_bounded(start: Start, store_server: StoreServer, letter: str) -> None:
    most = 8192
    gateway = await start(mock=answering, config=UNLIMITED | {"sessions": {"derived_bytes_per_key": most}})
    sessions = [await announced(gateway, user(f"{number} {letter * 500}")) for number in range(40)]
    with store_server.client() as raw:
        kept = raw.hvals(CONTENTS)
        assert sum(len(text.encode()) for text in kept) <= most
        assert int(str(raw.get(f"{CONTENTS}:bytes"))) == sum(len(text.encode()) for text in kept)

    assert await stored(gateway, sessions[-1]) is not None, "the newest stay"
    assert await stored(gateway, sessions[0]) is None
    await announced(gateway, user(letter * most))
    with store_server.client() as raw:
        assert sum(len(text.encode()) for text in raw.hvals(CONTENTS)) <= most


async def test_large_conversation_names_a_session_and_keeps_nothing(start: Start) -> None:
    gateway = await start(mock=answering, config={"sessions": {"derived_bytes_per_key": 1024}})
    session = await announced(gateway, user("x " * 2000))
    assert await stored(gateway, session) is None
    await say(gateway, user("more"), session=session)
    assert prompted(gateway) == [user("more")]


async def test_derived_sessions_that_are_off_keep_and_announce_nothing(start: Start, store_server: StoreServer) -> None:
    gateway = await start(mock=answering, config={"sessions": {"derived": False}})
    response = await say(gateway, user("hi"))
    assert "x-session-id" not in response.headers
    with store_server.client() as raw:
        assert not [key for key in raw.keys("*") if "derived" in key or "{s:" in key]
    await say(gateway, user("one"), session="talk")
    await say(gateway, user("two"), session="talk")
    assert prompted(gateway) == [user("one"), assistant(), user("two")]


async def test_store_that_is_away_costs_the_session_and_not_the_answer(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start(mock=answering)

    async def away(*_: object) -> Any:
        raise StoreUnavailable("away")

    monkeypatch.setattr(gateway.services.sessions._derived._store, "run", away)
    response = await say(gateway, user("hi"))
    assert response.headers["x-shannon-session"] == "unavailable"
    assert "x-session-id" not in response.headers
