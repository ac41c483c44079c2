"""An answer put together from deltas: text, reasoning, calls in their order, and the message it makes."""

from __future__ import annotations

from engine.base import Delta, TokenLogprob, ToolCallDelta
from gateway.exchange.answers import Answer


def answer(*deltas: Delta) -> Answer:
    whole = Answer()
    for delta in deltas:
        whole.add(delta)
    return whole


def call(index: int, call_id: str | None, name: str | None, arguments: str = "") -> Delta:
    return Delta("", tool_calls=[ToolCallDelta(index, call_id, name, arguments)])


def test_text_is_joined() -> None:
    whole = answer(Delta("Hello"), Delta(""), Delta(" you", finish_reason="stop"))

    assert whole.text == "Hello you"
    assert whole.finish_reason == "stop"
    assert whole.logprobs is None
    assert whole.message() == {"role": "assistant", "content": "Hello you"}


def test_nothing_said_is_empty_text() -> None:
    assert answer(Delta("", finish_reason="length")).message() == {"role": "assistant", "content": ""}


def test_reasoning_is_kept_apart_and_out_of_the_message() -> None:
    whole = answer(Delta("", reasoning="Let me"), Delta("Yes.", reasoning=" see."), Delta("", finish_reason="stop"))

    assert whole.reasoning == "Let me see."
    assert whole.message() == {"role": "assistant", "content": "Yes."}


def test_pieces_of_calls_are_joined_by_index() -> None:
    whole = answer(
        call(0, "call_a", "get_weather"),
        call(1, "call_b", "get_time", '{"zone": '),
        call(0, None, None, '{"city": '),
        call(1, None, None, '"UTC"}'),
        call(0, None, None, '"Paris"}'),
        Delta("", finish_reason="tool_calls"),
    )

    assert whole.tool_calls == [
        {"id": "call_a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}},
        {"id": "call_b", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "UTC"}'}},
    ]


def test_calls_stand_in_the_order_of_their_indexes() -> None:
    whole = answer(call(1, "call_b", "second", "{}"), call(0, "call_a", "first", "{}"))

    assert [entry["id"] for entry in whole.tool_calls] == ["call_a", "call_b"]


def test_several_calls_in_one_delta_are_all_kept() -> None:
    pieces = [ToolCallDelta(0, "call_a", "first", "{}"), ToolCallDelta(1, "call_b", "second", "{}")]

    assert [entry["function"]["name"] for entry in answer(Delta("", tool_calls=pieces)).tool_calls] == [
        "first",
        "second",
    ]


def test_message_of_calls_alone_has_no_content() -> None:
    message = answer(call(0, "call_a", "look", "{}")).message()

    assert message["content"] is None
    assert [entry["id"] for entry in message["tool_calls"]] == ["call_a"]


def test_text_beside_calls_is_kept() -> None:
    message = answer(Delta("Let me look."), call(0, "call_a", "look", "{}")).message()

    assert message["content"] == "Let me look."
    assert len(message["tool_calls"]) == 1


def test_call_that_was_cut_off_is_not_remembered() -> None:
    whole = answer(
        Delta("Let me look."),
        call(0, "call_a", "look", '{"at": "sky"}'),
        call(1, "call_b", "look", '{"at": "se'),
        Delta("", finish_reason="length"),
    )

    assert [entry["id"] for entry in whole.message()["tool_calls"]] == ["call_a", "call_b"]
    assert [entry["id"] for entry in whole.remembered()["tool_calls"]] == ["call_a"]
    assert whole.remembered()["content"] == "Let me look."


def test_answer_of_nothing_but_a_call_that_was_cut_off_is_remembered_as_silence() -> None:
    whole = answer(call(0, "call_a", "look", '{"at": "se'))

    assert whole.remembered() == {"role": "assistant", "content": ""}


def test_logprobs_of_all_deltas_are_joined() -> None:
    one, two = TokenLogprob("a", -0.5, [97]), TokenLogprob("b", -1.0, [98])
    whole = answer(Delta("a", logprobs=[one]), Delta(""), Delta("b", logprobs=[two]))

    assert whole.logprobs == [one, two]


def test_the_last_reason_stays() -> None:
    assert answer(Delta("a", finish_reason="length"), Delta("")).finish_reason == "length"


def test_logprobs_are_gathered_and_those_of_the_deltas_left_alone() -> None:
    deltas = [Delta(text, logprobs=[TokenLogprob(text, 0.0, [])]) for text in ("a", "b")]
    whole = answer(*deltas, Delta("c"))

    assert whole.logprobs is not None
    assert [entry.token for entry in whole.logprobs] == ["a", "b"]
    assert [len(delta.logprobs or ()) for delta in deltas] == [1, 1]
