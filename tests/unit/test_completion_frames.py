"""Frames of the legacy completions, byte by byte: text, logprobs with their offsets, the prompt in front."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.base import Delta, TokenLogprob, ToolCallDelta, Usage
from gateway.exchange.answers import Answer
from gateway.exchange.events import ShannonEvent
from gateway.exchange.frames.completions import CompletionFrames

HEAD = b'data: {"id":"cmpl-1","object":"text_completion","created":1700000000,"model":"shannon-chat","choices":['
USAGE = Usage(prompt_tokens=3, completion_tokens=2)
USAGE_FIELDS = (
    b'{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,'
    b'"prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":0}}'
)
DONE = b"data: [DONE]\n\n"


def frames(*, include_usage: bool = False, echo: dict[int, str] | None = None) -> CompletionFrames:
    return CompletionFrames("cmpl-1", 1700000000, "shannon-chat", USAGE, include_usage=include_usage, echo=echo or {})


def logprob(token: str, value: float, *top: TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token, value, list(token.encode()), top)


def chunk(raw: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(raw.removeprefix(b"data: "))
    return fields


def test_stream_is_these_bytes() -> None:
    encoder = frames()

    assert encoder.open() == b""
    assert encoder.add_delta(Delta("Once")) == (
        HEAD + b'{"index":0,"text":"Once","logprobs":null,"finish_reason":null}]}\n\n'
    )
    assert encoder.add_delta(Delta(" upon", finish_reason="stop")) == (
        HEAD + b'{"index":0,"text":" upon","logprobs":null,"finish_reason":"stop"}]}\n\n'
    )
    assert encoder.close() == DONE


def test_usage_has_a_frame_of_its_own_where_it_was_asked_for() -> None:
    encoder = frames(include_usage=True)

    assert encoder.add_delta(Delta("Once")).endswith(b'"finish_reason":null}],"usage":null}\n\n')
    assert encoder.close() == HEAD + b'],"usage":' + USAGE_FIELDS + b"}\n\n" + DONE


def test_empty_delta_makes_no_frame_but_a_reason_does() -> None:
    encoder = frames()

    assert encoder.add_delta(Delta("")) == b""
    assert chunk(encoder.add_delta(Delta("", finish_reason="length")))["choices"][0]["finish_reason"] == "length"


def test_events_calls_and_thoughts_have_no_place_here() -> None:
    encoder = frames()

    assert encoder.add_event(ShannonEvent("PROGRESS", "planner", "Half way.", 1, {}, deferrable=False)) == b""
    assert encoder.add_delta(Delta("", tool_calls=[ToolCallDelta(0, "call_1", "look", "{}")])) == b""


def test_each_choice_has_its_index() -> None:
    encoder = frames()

    assert [chunk(encoder.add_delta(Delta("a", index)))["choices"][0]["index"] for index in (1, 0, 63)] == [1, 0, 63]


def test_text_is_escaped_to_one_line() -> None:
    raw = frames().add_delta(Delta('one\n"two"\u2028\U0001f5fc'))

    assert raw.count(b"\n") == 2
    assert chunk(raw)["choices"][0]["text"] == 'one\n"two"\u2028\U0001f5fc'


def test_prompt_comes_once_in_front_of_each_choice() -> None:
    encoder = frames(echo={0: "Say: ", 1: "Tell: "})
    texts = [
        chunk(encoder.add_delta(delta))["choices"][0]["text"] for delta in (Delta("a"), Delta("b", 1), Delta("c", 0))
    ]

    assert texts == ["Say: a", "Tell: b", "c"]


def test_prompt_comes_although_nothing_was_made() -> None:
    encoder = frames(echo={0: "Say: "})

    assert chunk(encoder.add_delta(Delta("", finish_reason="stop")))["choices"][0]["text"] == "Say: "


def test_logprobs_have_the_legacy_form() -> None:
    best = logprob(" upon", -0.25)
    raw = frames().add_delta(Delta("Once upon", logprobs=[logprob("Once", -0.5), logprob(" upon", -0.25, best)]))

    assert chunk(raw)["choices"][0]["logprobs"] == {
        "tokens": ["Once", " upon"],
        "token_logprobs": [-0.5, -0.25],
        "top_logprobs": [None, {" upon": -0.25}],
        "text_offset": [0, 4],
    }


def test_offsets_go_on_from_frame_to_frame_per_choice() -> None:
    encoder = frames()
    deltas = [
        Delta("Once", logprobs=[logprob("Once", 0.0)]),
        Delta("A", 1, logprobs=[logprob("A", 0.0)]),
        Delta(" upon", logprobs=[logprob(" upon", 0.0)]),
        Delta(" man", 1, logprobs=[logprob(" man", 0.0)]),
    ]

    offsets = [chunk(encoder.add_delta(delta))["choices"][0]["logprobs"]["text_offset"] for delta in deltas]
    assert offsets == [[0], [0], [4], [1]]


@pytest.mark.parametrize("echo", [{}, {0: "Say: "}], ids=["alone", "with the prompt"])
def test_whole_body_says_what_the_stream_says(echo: dict[int, str]) -> None:
    deltas = [
        Delta("Once", logprobs=[logprob("Once", -0.5)] if not echo else None),
        Delta(" upon", finish_reason="stop", logprobs=[logprob(" upon", -0.25)] if not echo else None),
    ]
    answer = Answer()
    encoder = frames(echo=echo)
    text = ""
    offsets: list[int] = []
    for delta in deltas:
        answer.add(delta)
        choice = chunk(encoder.add_delta(delta))["choices"][0]
        text += choice["text"]
        offsets += (choice["logprobs"] or {"text_offset": []})["text_offset"]

    body = json.loads(frames(echo=echo).body({0: answer}, []))

    assert body.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert (body["id"], body["object"]) == ("cmpl-1", "text_completion")
    (choice,) = body["choices"]
    assert (choice["index"], choice["text"], choice["finish_reason"]) == (0, text, "stop")
    assert (choice["logprobs"] or {"text_offset": []})["text_offset"] == offsets
    assert body["usage"] == json.loads(USAGE_FIELDS)
