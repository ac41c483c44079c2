"""Sessions without HTTP: how ids are derived, and which messages a request ends up with."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.base import GenerationRequest, InvalidRequest
from engine.mock import MockEngine
from gateway.sessions import Session, derive_id, prepare_with_history

pytestmark = pytest.mark.anyio


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def turn(number: int) -> list[dict[str, Any]]:
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


async def prepared_messages(session: Session, max_model_len: int, **fields: Any) -> list[dict[str, Any]]:
    engine = MockEngine(max_model_len=max_model_len)
    await engine.start()
    request = GenerationRequest(request_id="r1", messages=[message("user", "hi")], **fields)
    prepared = await prepare_with_history(engine.prepare, request, session, max_model_len)
    chosen, _ = prepared.payload
    assert prepared.prompt_tokens + prepared.max_tokens <= max_model_len
    messages: list[dict[str, Any]] = chosen.messages
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
    with pytest.raises(InvalidRequest, match="messages take 2"):
        await prepared_messages(Session(history=[turn(1)]), 64, max_tokens=63)


async def test_stored_system_prompt_that_does_not_fit_is_no_reason_to_refuse() -> None:
    history = [[message("system", "word " * 70), *turn(1)]]
    messages = await prepared_messages(Session(history=history), 64)

    assert messages == [message("user", "hi")]
