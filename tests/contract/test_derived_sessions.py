"""Sessions of requests that name none: whose they are, which conversation is in them, and how little is kept."""

from __future__ import annotations

import asyncio
import random
import re
from typing import Any

import httpx
import pytest

from engine.mock import MockEngine
from gateway.access.keys import KeySpec
from gateway.errors import StoreUnavailable
from tests.support.app import KEY_ID, Gateway, Start
from tests.support.store_server import StoreServer

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


async def away(*_: object) -> Any:
    """Stand in for a store that does not answer."""
    raise StoreUnavailable("away")


def prompted(gateway: Gateway) -> list[Any]:
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


async def test_conversation_that_is_brought_back_continues_its_session(start: Start) -> None:
    gateway = await start(mock=answering)
    conversation = [user("hi")]
    session = await announced(gateway, *conversation)
    for number in range(5):
        conversation += [assistant(), user(f"question {number}")]
        assert "x-session-id" not in (await say(gateway, *conversation)).headers, "it is not new"

    assert await stored(gateway, session) == [*conversation, assistant()]
    await say(gateway, user("last"), session=session)
    assert prompted(gateway) == [*conversation, assistant(), user("last")]


@pytest.mark.parametrize(
    "changed",
    [
        [user("hello"), assistant(), user("more")],
        [user("hi"), assistant("as I edited it"), user("more")],
        [{"role": "system", "content": "x"}, user("hi"), assistant(), user("more")],
        [user("hi"), assistant(), user("more"), assistant(), user("and more")],
    ],
)
async def test_conversation_that_differs_is_another(start: Start, changed: list[dict[str, Any]]) -> None:
    gateway = await start(mock=answering)
    first = await announced(gateway, user("hi"))

    assert await announced(gateway, *changed) != first
    assert await stored(gateway, first) == [user("hi"), assistant()]


@pytest.mark.parametrize("seed", range(4))
async def test_session_never_shows_turns_of_another_conversation(start: Start, seed: int) -> None:
    """Conversations that begin alike, with an engine that always answers alike, in any order and at once."""
    chosen = random.Random(seed)
    gateway = await start(mock=answering, config=UNLIMITED)
    said: list[list[dict[str, Any]]] = [[] for _ in range(8)]
    owner: dict[str, int] = {}

    async def continue_(number: int) -> None:
        conversation = said[number]
        text = "hi" if len(conversation) < 3 else f"secret of {number}"
        conversation += [user(text)]
        response = await say(gateway, *conversation)
        conversation += [assistant()]
        if id_ := response.headers.get("x-session-id"):
            assert owner.setdefault(id_, number) == number

    for _ in range(12):
        await asyncio.gather(*(continue_(number) for number in chosen.sample(range(8), 3)))

    for id_, number in owner.items():
        messages = await stored(gateway, id_) or []
        assert messages == said[number][: len(messages)]


@pytest.mark.parametrize("missing", ["forgotten", "not recorded"])
async def test_conversation_is_not_continued_where_a_prompt_is_missing(
    start: Start, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """An earlier conversation with the same words and answer could not be told from the one in the session."""
    monkeypatch.setattr("gateway.conversations.derived_sessions._MAX_PROMPTS", 3)
    gateway = await start(mock=answering, config=UNLIMITED)
    if missing == "forgotten":
        for text in ("hi", "one", "two", "three"):
            await say(gateway, user(text))
    else:
        with monkeypatch.context() as patch:
            patch.setattr(gateway.services.sessions._derived._store, "run", away)
            await say(gateway, user("hi"))
    theirs = await announced(gateway, user("hi"))
    mine = await announced(gateway, user("hi"), assistant(), user("my secret"))

    assert mine != theirs
    assert await stored(gateway, theirs) == [user("hi"), assistant()]
    assert await stored(gateway, mine) == [user("hi"), assistant(), user("my secret"), assistant()]


async def test_two_requests_that_continue_at_once_lose_nothing_to_others(start: Start) -> None:
    gateway = await start(mock=answering)
    session = await announced(gateway, user("hi"))
    texts = [f"fork {number}" for number in range(6)]
    await asyncio.gather(*(say(gateway, user("hi"), assistant(), user(text)) for text in texts))

    messages = await stored(gateway, session)
    assert messages is not None
    assert messages[:2] == [user("hi"), assistant()]
    assert messages[2] in [user(text) for text in texts]


async def test_retry_of_a_continuation_keeps_the_session(start: Start) -> None:
    gateway = await start(mock=answering)
    await announced(gateway, user("hi"))
    for _ in range(3):
        assert "x-session-id" not in (await say(gateway, user("hi"), assistant(), user("more"))).headers


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
    """The request has read what was said in the derived session, and not yet put it into the ordinary one."""
    gateway = await start(mock=answering)
    session = await announced(gateway, user("hi"))
    derived = gateway.services.sessions._derived
    show = derived.show

    async def show_and_wait(key_id: str, session_id: str) -> Any:
        said = await show(key_id, session_id)
        await gateway.client.delete(f"/v1/sessions/{session}")
        return said

    monkeypatch.setattr(derived, "show", show_and_wait)
    await say(gateway, user("more"), session=session)
    monkeypatch.undo()

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
        assert int(raw.hget(f"{CONTENTS}:prompts", "")) == sum(len(text.encode()) for text in kept)

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

    monkeypatch.setattr(gateway.services.sessions._derived._store, "run", away)
    response = await say(gateway, user("hi"))
    assert response.headers["x-shannon-session"] == "unavailable"
    assert "x-session-id" not in response.headers
