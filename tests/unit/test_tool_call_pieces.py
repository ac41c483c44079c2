"""Tool calls in every dialect that servers are known to speak: the same calls come out, in OpenAI's form."""

from __future__ import annotations

import gc
import json
import random
import time
from typing import Any

import pytest

from engine.base import ToolCallDelta
from engine.remote.tool_call_pieces import CallPieces
from tests.support.tool_call_dialects import CALLS, DIALECTS, NAMES, calls_of


def put_together(frames: list[dict[str, Any]], names: list[str]) -> tuple[list[ToolCallDelta], list[tuple[str, Any]]]:
    """Return the pieces that come out, and the calls that they make."""
    pieces = CallPieces(names)
    out: list[ToolCallDelta] = []
    for delta in frames:
        given = delta.get("tool_calls") or delta.get("function_call")
        out += pieces.add(given) if given else []
    out += pieces.finish(cut=False)
    calls: dict[int, list[str]] = {}
    for piece in out:
        if piece.index not in calls:
            assert piece.id, "the first piece has an id"
            assert piece.name, "and a name"
            calls[piece.index] = [piece.name, ""]
        else:
            assert (piece.id, piece.name) == (None, None), "later pieces have arguments only"
        calls[piece.index][1] += piece.arguments
    assert sorted(calls) == list(range(len(calls)))
    ids = [piece.id for piece in out if piece.id]
    assert len(set(ids)) == len(ids) == len(calls)
    return out, [(name, json.loads(arguments)) for name, arguments in calls.values()]


@pytest.mark.parametrize("knows_tools", [True, False], ids=["tools", "no tools"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_same_calls_come_out_of_every_dialect(dialect: str, knows_tools: bool) -> None:
    _, calls = put_together(DIALECTS[dialect], NAMES if knows_tools else [])

    assert calls == calls_of(dialect)


def test_known_name_is_handed_over_at_once() -> None:
    pieces = CallPieces(["weather", "time"])

    assert pieces.add([{"index": 0, "id": "c1", "function": {"name": "weather", "arguments": ""}}]) == [
        ToolCallDelta(0, "c1", "weather")
    ]


def test_name_that_may_go_on_is_waited_for() -> None:
    pieces = CallPieces(["get", "get_weather"])

    assert pieces.add([{"index": 0, "id": "c1", "function": {"name": "get"}}]) == []
    assert pieces.add([{"index": 0, "function": {"name": "_weather"}}]) == [ToolCallDelta(0, "c1", "get_weather")]


def test_call_that_the_length_cut_off_gets_no_arguments_of_ours() -> None:
    pieces = CallPieces(["weather"])
    pieces.add([{"index": 0, "id": "c1", "function": {"name": "weather", "arguments": ""}}])

    assert pieces.finish(cut=True) == []
    assert not pieces.are_whole()


@pytest.mark.parametrize("given", ["text", [["list"]], [5], 7])
def test_what_is_no_call_is_an_error(given: Any) -> None:
    with pytest.raises((TypeError, AttributeError)):
        CallPieces().add(given)


def test_any_cut_of_openais_form_makes_the_same_calls() -> None:
    """Names, ids and arguments cut anywhere, with what may be left out left out at random."""
    rng = random.Random(7)
    for _ in range(300):
        frames: list[dict[str, Any]] = []
        has_index, has_ids = rng.choice([(True, True), (True, False), (False, True)])
        for number, (name, arguments) in enumerate(CALLS):
            text = json.dumps(arguments)
            cuts = sorted(rng.sample(range(1, len(text)), rng.randint(0, min(5, len(text) - 1))))
            parts = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, None], strict=True)]
            first: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": ""}}
            rest: list[dict[str, Any]] = [{"function": {"arguments": part}} for part in parts]
            if has_ids:
                first["id"] = f"c{number}"
                repeats = rng.choice([None, "", f"c{number}"])
                rest = [piece | {"id": repeats} for piece in rest]
            if has_index:
                first["index"] = number
                rest = [piece | {"index": number} for piece in rest]
            frames += [{"tool_calls": [piece]} for piece in [first, *rest]]
        _, calls = put_together(frames, NAMES if rng.random() < 0.5 else [])

        assert calls == CALLS, frames


@pytest.mark.parametrize("fields", [("index", "id"), ("id",), ("index",), ()], ids="+".join)
def test_many_calls_take_linear_time(fields: tuple[str, ...]) -> None:
    took_s = []
    for count in (500, 8_000):
        calls = [
            {"index": number, "id": f"c{number}", "function": {"name": "f", "arguments": f'{{"n": {number}}}'}}
            for number in range(count)
        ]
        given = [{name: call[name] for name in (*fields, "function")} for call in calls]
        tries_s = []
        for _ in range(3):
            gc.collect()
            began = time.process_time()
            added = CallPieces(["f"]).add(given)
            tries_s.append(time.process_time() - began)
            assert len({delta.index for delta in added}) == count
        took_s.append(min(tries_s))

    assert took_s[1] < 60 * took_s[0], "16 times as many"
