"""Reasoning models on the wire: reasoning is separate from content, whole and streamed, and is counted."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest

from engine.base import Delta, ToolCallDelta
from engine.mock import MockEngine
from tests.support.app import HELLO, NOW, Gateway, Start
from tests.support.frames import chunks

pytestmark = pytest.mark.anyio

NO_EVENTS = {"X-Shannon-Events": "off"}


def thinking() -> list[Delta]:
    return [
        Delta("", reasoning="Let me"),
        Delta("", reasoning=" see."),
        Delta("Yes"),
        Delta(", it is.", finish_reason="stop"),
    ]


@pytest.fixture
async def gateway(start: Start) -> Gateway:
    """A gateway whose model thinks in two tokens and answers in two."""
    return await start(mock=lambda: MockEngine(reply=lambda request: thinking()))


async def raw_stream(gateway: Gateway, **fields: Any) -> bytes:
    """Return the bytes of a stream without events, its id replaced by ID."""
    body = {"messages": HELLO, "stream": True} | fields
    response = await gateway.client.post("/v1/chat/completions", json=body, headers=NO_EVENTS)
    assert response.status_code == 200
    return re.sub(rb"chatcmpl-[0-9a-f]{32}", b"ID", response.content)


def frame(rest: str) -> bytes:
    head = f'{{"id":"ID","object":"chat.completion.chunk","created":{NOW},"model":"shannon-chat","choices":['
    return f"data: {head}{rest}\n\n".encode()


async def test_whole_answer_has_the_reasoning_beside_the_content(gateway: Gateway) -> None:
    body = (await gateway.chat()).json()

    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Yes, it is.",
        "refusal": None,
        "reasoning_content": "Let me see.",
    }
    assert body["usage"]["completion_tokens"] == 4
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


async def test_stream_of_reasoning_is_these_bytes(gateway: Gateway) -> None:
    usage = (
        '{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7,'
        '"prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":2}}'
    )

    assert await raw_stream(gateway) == b"".join(
        [
            frame('{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}'),
            frame('{"index":0,"delta":{"reasoning_content":"Let me"},"finish_reason":null}]}'),
            frame('{"index":0,"delta":{"reasoning_content":" see."},"finish_reason":null}]}'),
            frame('{"index":0,"delta":{"content":"Yes"},"finish_reason":null}]}'),
            frame('{"index":0,"delta":{"content":", it is."},"finish_reason":null}]}'),
            frame('{"index":0,"delta":{},"finish_reason":"stop"}],"usage":' + usage + "}"),
            b"data: [DONE]\n\n",
        ]
    )


async def test_usage_frame_counts_the_reasoning(gateway: Gateway) -> None:
    frames = chunks(await raw_stream(gateway, stream_options={"include_usage": True}))

    assert frames[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


async def test_end_of_a_thought_and_start_of_the_answer_may_share_a_frame(start: Start) -> None:
    gateway = await start(mock=lambda: MockEngine(reply=lambda request: [Delta("Yes.", reasoning="Hm.")]))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(await raw_stream(gateway))]

    assert deltas[1] == {"reasoning_content": "Hm.", "content": "Yes."}


async def test_answer_cut_short_while_it_thinks_has_no_content_yet(gateway: Gateway) -> None:
    (choice,) = (await gateway.chat(max_tokens=2)).json()["choices"]

    assert choice["finish_reason"] == "length"
    assert (choice["message"]["content"], choice["message"]["reasoning_content"]) == ("", "Let me see.")


async def test_each_of_n_choices_has_its_own(gateway: Gateway) -> None:
    body = (await gateway.chat(n=2)).json()

    assert [choice["message"]["reasoning_content"] for choice in body["choices"]] == ["Let me see."] * 2
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}


async def test_logprobs_come_with_thoughts_too(gateway: Gateway) -> None:
    choices = [chunk["choices"][0] for chunk in chunks(await raw_stream(gateway, logprobs=True))]

    assert [len(choice["logprobs"]["content"]) for choice in choices if "logprobs" in choice] == [1, 1, 1, 1]


async def test_thought_before_a_call(start: Start) -> None:
    deltas = [
        Delta("", reasoning="I must look."),
        Delta("", tool_calls=[ToolCallDelta(0, "call_1", "look", "{}")], finish_reason="tool_calls"),
    ]
    gateway = await start(mock=lambda: MockEngine(reply=lambda request: deltas))
    message = (await gateway.chat()).json()["choices"][0]["message"]

    assert (message["content"], message["reasoning_content"]) == (None, "I must look.")
    assert message["tool_calls"][0]["id"] == "call_1"


async def test_answer_of_a_model_that_does_not_think_has_no_such_key(start: Start) -> None:
    gateway = await start()
    body = (await gateway.chat()).json()

    assert "reasoning_content" not in body["choices"][0]["message"]
    assert b"reasoning_content" not in await raw_stream(gateway)


async def test_session_remembers_what_was_said_not_what_was_thought(gateway: Gateway) -> None:
    for _ in range(2):
        body = {"messages": HELLO}
        await gateway.client.post("/v1/chat/completions", json=body, headers={"X-Session-ID": "talk"})

    assert gateway.mock.requests[-1].messages == [*HELLO, {"role": "assistant", "content": "Yes, it is."}, *HELLO]
    assert "Let me see" not in (await gateway.client.get("/v1/sessions/talk")).text


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_thoughts_that_a_client_sends_back_are_let_go(gateway: Gateway, name: str) -> None:
    said = {"role": "assistant", "content": "Yes, it is.", name: "Let me see."}
    response = await gateway.chat(messages=[*HELLO, said, *HELLO])

    assert response.status_code == 200
    assert gateway.mock.requests[-1].messages[1] == {"role": "assistant", "content": "Yes, it is."}


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh", None])
async def test_effort_reaches_the_engine(gateway: Gateway, effort: str | None) -> None:
    assert (await gateway.chat(reasoning_effort=effort)).status_code == 200

    assert gateway.mock.requests[-1].reasoning_effort == effort


@pytest.mark.parametrize("effort", ["a lot", "", 3, ["high"]])
async def test_unknown_effort_is_refused_by_name(gateway: Gateway, effort: Any) -> None:
    response = await gateway.chat(reasoning_effort=effort)

    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "reasoning_effort"
    assert "'medium'" in error["message"]


async def test_openai_sdk_hands_thoughts_on(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(reply=lambda request: thinking()))
    async with openai.AsyncOpenAI(api_key=gateway.key, base_url=f"{gateway.url}/v1", max_retries=0) as client:
        messages: Any = HELLO
        completion = await client.chat.completions.create(
            model="shannon-chat", messages=messages, reasoning_effort="low"
        )
        stream = await client.chat.completions.create(model="shannon-chat", messages=messages, stream=True)
        thoughts = [(chunk.choices[0].delta.model_extra or {}).get("reasoning_content") async for chunk in stream]

    assert (completion.choices[0].message.model_extra or {})["reasoning_content"] == "Let me see."
    assert completion.usage is not None
    assert completion.usage.completion_tokens_details is not None
    assert completion.usage.completion_tokens_details.reasoning_tokens == 2
    assert [thought for thought in thoughts if thought] == ["Let me", " see."]


async def test_thoughts_are_metered_like_all_tokens(gateway: Gateway) -> None:
    body = json.loads((await gateway.chat(ignore_eos=True, max_tokens=10)).content)

    assert body["usage"]["completion_tokens"] == 10
    assert await gateway.metered() == gateway.spent()
