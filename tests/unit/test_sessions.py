"""Sessions without HTTP: how ids are derived, and which messages a request ends up with."""

from __future__ import annotations

import contextlib
import hashlib
import re
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.base import GenerationRequest, InvalidRequest
from engine.mock import MockEngine
from engine.supervisor import SupervisedEngine
from gateway.conversations.fitting import fit_history
from gateway.conversations.sessions import Session, derive_id

pytestmark = pytest.mark.anyio


def message(role: str, content: str) -> Any:
    return {"role": role, "content": content}


def turn(number: int) -> list[Any]:
    """Return a turn of four mock tokens and the roles' two."""
    return [message("user", f"question {number}"), message("assistant", f"answer {number}")]


def test_derived_id_is_the_documented_hash() -> None:
    messages = [message("system", "s" * 201), message("user", "u" * 101), message("user", "later")]
    seed = orjson.dumps(["acme", "s" * 200, "u" * 100])

    assert derive_id("acme", messages) == f"oai-{hashlib.sha256(seed).hexdigest()[:16]}"


def test_derived_id_needs_neither_text() -> None:
    assert re.fullmatch("oai-[0-9a-f]{16}", derive_id("acme", [message("assistant", "hi")]))


@given(st.text(), st.text(), st.text())
def test_derived_id_is_a_function_of_its_parts(tenant: str, system: str, user: str) -> None:
    messages = [message("system", system), message("user", user)]

    assert derive_id(tenant, messages) == derive_id(tenant, [*messages, message("assistant", "x")])
    assert re.fullmatch("oai-[0-9a-f]{16}", derive_id(tenant, messages))
    assert derive_id(f"{tenant}x", messages) != derive_id(tenant, messages)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "b|c", "d"), ("a", "b", "c|d")),
        (("a|b", "c", "d"), ("a", "b|c", "d")),
        (("a", '"]', "d"), ("a", "", '"]d')),
        (("a", "b", ""), ("a", "", "b")),
    ],
)
def test_parts_of_a_derived_id_cannot_run_into_each_other(
    one: tuple[str, str, str], other: tuple[str, str, str]
) -> None:
    ids = {derive_id(tenant, [message("system", s), message("user", u)]) for tenant, s, u in (one, other)}

    assert len(ids) == 2


def test_messages_without_history_are_the_requests_own() -> None:
    request = [message("system", "be brief"), message("user", "hi")]

    assert Session().messages(request, 0) == request


def test_messages_come_behind_the_last_stored_turns() -> None:
    session = Session(history=[turn(1), turn(2), turn(3)])
    request = [message("user", "hi")]

    assert session.messages(request, 2) == [*turn(2), *turn(3), *request]


async def prepared_messages(session: Session, max_model_len: int, **fields: Any) -> list[Any]:
    engine = MockEngine(max_model_len=max_model_len)
    await engine.start()
    request = GenerationRequest(request_id="r1", messages=[message("user", "hi")], **fields)
    prepared = await fit_history(engine, request, session)
    chosen, _ = prepared.payload
    assert prepared.prompt_tokens + prepared.max_tokens <= max_model_len
    messages: list[Any] = chosen.messages
    return messages


@pytest.mark.parametrize("turns", range(12))
@pytest.mark.parametrize("max_model_len", [16, 33, 64])
async def test_as_many_turns_as_fit_are_kept(turns: int, max_model_len: int) -> None:
    history = [turn(number) for number in range(turns)]
    messages = await prepared_messages(Session(history=history), max_model_len)

    # A turn is 6 tokens, the request 2, and a quarter of the context is left for the answer.
    fits = min(turns, (max_model_len - max_model_len // 4 - 2) // 6)
    assert messages == [m for kept in history[turns - fits :] for m in kept] + [message("user", "hi")]


async def test_history_makes_room_for_the_max_tokens_that_the_client_names() -> None:
    history = [turn(number) for number in range(5)]
    messages = await prepared_messages(Session(history=history), 64, max_tokens=50)

    assert messages == [*turn(3), *turn(4), message("user", "hi")]


async def test_error_is_about_the_request_and_not_its_history() -> None:
    with pytest.raises(InvalidRequest, match="messages took 2"):
        await prepared_messages(Session(history=[turn(1)]), 64, max_tokens=63)


async def test_stored_system_prompt_that_does_not_fit_is_no_reason_to_refuse() -> None:
    history = [[message("system", "word " * 70), *turn(1)]]
    messages = await prepared_messages(Session(history=history), 64)

    assert messages == [message("user", "hi")]


async def test_history_waits_for_an_engine_that_loads_at_the_first_request() -> None:
    engine = SupervisedEngine("main", lambda: MockEngine(max_model_len=16), lazy=True)
    await engine.start()
    request = GenerationRequest(request_id="r1", messages=[message("user", "hi")])
    try:
        prepared = await fit_history(engine, request, Session(history=[turn(1), turn(2)]))
    finally:
        await engine.close()

    chosen, _ = prepared.payload
    assert chosen.messages == [*turn(2), message("user", "hi")]


async def bounded(
    messages: list[Any], most: int, *, history: Any = (), max_model_len: int = 1024, **fields: Any
) -> list[Any]:
    """Return the messages that are left of a prompt bounded to `most` tokens."""
    engine = MockEngine(max_model_len=max_model_len)
    await engine.start()
    request = GenerationRequest(request_id="r1", messages=messages, **fields)
    prepared = await fit_history(engine, request, Session(history=list(history)), most)
    chosen, _ = prepared.payload
    assert prepared.prompt_tokens <= most
    assert chosen.max_tokens == request.max_tokens
    left: list[Any] = chosen.messages
    return left


SYSTEM = message("system", "be brief")
"""Three mock tokens."""
LONG = [SYSTEM, *turn(1), *turn(2), *turn(3), message("user", "hi")]
"""Three turns of six tokens each between the system prompt and a question of two."""


@pytest.mark.parametrize("most", range(5, 30))
@pytest.mark.parametrize("max_model_len", [6, 14, 1024])
async def test_oldest_turns_of_the_request_go_first(most: int, max_model_len: int) -> None:
    kept = min(3, (min(most, max_model_len - 1) - 5) // 6)

    left = await bounded(LONG, most, max_model_len=max_model_len)

    assert left == [SYSTEM, *LONG[7 - 2 * kept :]]


async def test_stored_turns_go_before_any_of_the_request() -> None:
    history = [turn(number) for number in range(4)]

    assert await bounded([SYSTEM, message("user", "hi")], 17, history=history) == [
        *(SYSTEM, *turn(2), *turn(3)),
        message("user", "hi"),
    ]
    assert await bounded([SYSTEM, message("user", "hi")], 10, history=history) == [SYSTEM, message("user", "hi")]


async def test_what_must_stay_is_refused_where_it_is_too_long() -> None:
    with pytest.raises(InvalidRequest) as caught:
        await bounded(LONG, 4)

    assert str(caught.value) == (
        "This model takes prompts of at most 4 tokens, but the system prompt and last turn alone are 5 tokens long. "
        "Shorten the messages."
    )
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")


async def test_single_message_is_refused_where_it_is_too_long() -> None:
    with pytest.raises(InvalidRequest, match="the messages are 5 tokens long"):
        await bounded([message("user", "a b c d")], 4)


async def test_bare_prompt_is_refused_where_it_is_too_long() -> None:
    with pytest.raises(InvalidRequest, match=r"the prompt is 5 tokens long\. Shorten the prompt") as caught:
        await bounded([], 4, prompt="a b c d e")

    assert caught.value.param == "prompt"


async def test_call_of_a_tool_stays_with_its_result() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]}
    result = {"role": "tool", "content": "twenty degrees", "tool_call_id": "c1"}
    now = [message("user", "and tomorrow"), call, result]
    messages = [message("user", "weather today"), call, result, message("assistant", "fine"), *now]

    for most in range(7, 13):
        assert await bounded(messages, most) == now
    with pytest.raises(InvalidRequest, match="last turn alone are 7 tokens"):
        await bounded(messages, 6)


async def test_result_of_a_tool_keeps_the_stored_turn_with_its_call() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]}
    result = {"role": "tool", "content": "twenty degrees", "tool_call_id": "c1"}
    asked = [message("user", "weather today"), call]
    history = [turn(1), asked, [result, {**call}]]

    assert await bounded([result], 16, history=history) == [*asked, result, call, result]
    with pytest.raises(InvalidRequest, match="last turn alone are 11 tokens"):
        await bounded([result], 9, history=history)


async def test_turns_are_not_dropped_for_a_maximum_that_does_not_fit() -> None:
    with pytest.raises(InvalidRequest, match="max_tokens can be at most 41, not 50") as caught:
        await bounded(LONG, 25, max_model_len=64, max_tokens=50)

    assert caught.value.param == "max_tokens"


async def test_turns_are_dropped_for_the_bound_though_the_maximum_does_not_fit() -> None:
    assert await bounded(LONG, 12, max_model_len=64, max_tokens=50) == [SYSTEM, *turn(3), message("user", "hi")]


@given(
    st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1, max_size=12),
    st.integers(1, 60),
)
async def test_bounded_prompt_is_the_longest_that_fits(roles: list[str], most: int) -> None:
    messages = [message(role, "w " * (3 * number % 5)) for number, role in enumerate(roles)]
    sizes = [1 + len(m["content"].split()) for m in messages]
    left: list[Any] = []
    with contextlib.suppress(InvalidRequest):
        left = await bounded(messages, most)
    dropped = [m for m in messages if all(m is not other for other in left)]

    if left:
        assert all(m["role"] != "system" for m in dropped)
        assert [m for m in messages if all(m is not other for other in dropped)] == left, "in order"
        assert not dropped or sum(sizes) > most, "nothing goes without need"
        users = [m for m in messages if m["role"] == "user"]
        assert not users or any(m is users[-1] for m in left)
