"""Frames of a fixed size: exact pieces but for the last, nothing lost, nothing moved, nothing held back for long."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.base import Delta, EngineDied, TokenLogprob, ToolCallDelta
from gateway.exchange.chunking import rechunk
from gateway.exchange.events import Event, ShannonEvent

pytestmark = pytest.mark.anyio


async def source(events: list[Event | Exception]) -> AsyncGenerator[Event, None]:
    for event in events:
        if isinstance(event, Exception):
            raise event
        yield event


async def cut(chunk_chars: int, *events: Event) -> list[Event]:
    return [event async for event in rechunk(source(list(events)), chunk_chars)]


def texts(events: list[Event], index: int = 0) -> list[str]:
    return [event.text for event in events if isinstance(event, Delta) and event.index == index and event.text]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["ab", "cdef", "g"], ["abc", "def", "g"]),
        (["abcdef"], ["abc", "def"]),
        (["a", "b"], ["ab"]),
        (["äöü", "日本語", "🙂"], ["äöü", "日本語", "🙂"]),
    ],
)
async def test_pieces_have_so_many_characters_but_the_last(pieces: list[str], expected: list[str]) -> None:
    *most, last = pieces
    events = await cut(3, *(Delta(piece) for piece in most), Delta(last, finish_reason="stop"))

    assert texts(events) == expected
    assert isinstance(events[-1], Delta)
    assert events[-1].finish_reason == "stop"


@given(st.lists(st.text(max_size=9), max_size=20), st.integers(1, 7))
async def test_nothing_is_lost_and_no_piece_but_the_last_is_short(pieces: list[str], chunk_chars: int) -> None:
    events = await cut(chunk_chars, *(Delta(piece) for piece in pieces), Delta("", finish_reason="length"))

    *most, last = texts(events) or [""]
    assert "".join([*most, last]) == "".join(pieces)
    assert {len(piece) for piece in most} <= {chunk_chars}
    assert len(last) <= chunk_chars


async def test_first_token_opens_the_choice_at_once() -> None:
    events = rechunk(source([Delta("a"), RuntimeError("not needed")]), 100)

    assert await anext(events) == Delta("")
    await events.aclose()


async def test_full_piece_does_not_wait_for_the_next_token() -> None:
    events = rechunk(source([Delta("abcd"), RuntimeError("not needed")]), 4)

    assert await anext(events) == Delta("")
    assert await anext(events) == Delta("abcd")
    await events.aclose()


async def test_reasoning_and_answer_are_cut_separately() -> None:
    events = await cut(
        4, Delta("", reasoning="hmm, so"), Delta("it ", reasoning="!"), Delta("is so", finish_reason="stop")
    )

    assert [(event.reasoning, event.text) for event in events if isinstance(event, Delta)] == [
        ("", ""),
        ("hmm,", ""),
        (" so!", ""),
        ("", "it i"),
        ("", "s so"),
        ("", ""),
    ]


async def test_rest_of_the_reasoning_comes_before_the_answer() -> None:
    events = await cut(4, Delta("", reasoning="well"), Delta("", reasoning="?"), Delta("yes", finish_reason="stop"))

    assert [(event.reasoning, event.text) for event in events if isinstance(event, Delta)] == [
        ("", ""),
        ("well", ""),
        ("?", ""),
        ("", "yes"),
    ]


async def test_choices_are_cut_separately() -> None:
    events = await cut(2, Delta("a"), Delta("x", 1), Delta("bc"), Delta("yz", 1, "stop"), Delta("d", 0, "stop"))

    assert texts(events, 0) == ["ab", "cd"]
    assert texts(events, 1) == ["xy", "z"]


async def test_delta_with_logprobs_passes_behind_the_text_before_it() -> None:
    scored = Delta("efghi", logprobs=[TokenLogprob("efghi", -0.5, [])], finish_reason="stop")
    events = await cut(4, Delta("ab"), scored)

    assert events == [Delta(""), Delta("ab"), scored]


async def test_tool_call_passes_behind_the_text_before_it() -> None:
    call = Delta("", tool_calls=[ToolCallDelta(0, "call-1", "look_up", '{"a": 1}')])
    events = await cut(4, Delta("let me see"), call, Delta("", finish_reason="tool_calls"))

    assert texts(events) == ["let ", "me s", "ee"]
    assert events[-2:] == [call, Delta("", finish_reason="tool_calls")]


async def test_shannon_event_does_not_wait_for_a_full_piece() -> None:
    event = ShannonEvent("PROGRESS", "planner", "half way", 0)
    events = await cut(4, Delta("abcde"), event, Delta("fg", finish_reason="stop"))

    assert events == [Delta(""), Delta("abcd"), event, Delta("efg", finish_reason="stop")]


async def test_text_without_an_end_is_sent_whole() -> None:
    assert texts(await cut(4, Delta("abcdef"))) == ["abcd", "ef"]


async def test_failure_comes_behind_what_was_said() -> None:
    events = rechunk(source([Delta("abcdef"), EngineDied("boom")]), 4)

    assert texts([await anext(events) for _ in range(3)]) == ["abcd", "ef"]
    with pytest.raises(EngineDied):
        await anext(events)


async def test_leaving_closes_the_source() -> None:
    closed = []

    async def endless() -> AsyncGenerator[Event, None]:
        try:
            while True:
                yield Delta("x")
        finally:
            closed.append(True)

    events = rechunk(endless(), 3)
    await anext(events)
    await events.aclose()

    assert closed == [True]
