"""What an operator may bound for all clients, under each of its names: prompts, completions, frames, sampling."""

from __future__ import annotations

from typing import Any

import pytest

from engine.mock import MockEngine
from gateway.settings.environment import override
from tests.support.app import HELLO, Gateway, Start
from tests.support.frames import chunks

pytestmark = pytest.mark.anyio

REPLY = "one two three four five six seven eight nine ten"


async def bounded(start: Start, mock: Any = None, **environment: str) -> Gateway:
    """Open a gateway as a deployment with these environment variables has it."""
    models = {"shannon-chat": {"description": "General chat completion"}, "shannon-complex": {"description": "b"}}
    tree, _ = override({"models": models, "server": {"port": 0}}, environment)
    return await start(mock=mock or (lambda: MockEngine(reply=REPLY)), config=tree)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SYSTEM = message("system", "be brief")
TURNS = [message("user", "question 1"), message("assistant", "answer 1"), message("user", "hello there")]
"""With SYSTEM twelve tokens for the mock engine, of which the last message has three."""


# Completions


@pytest.mark.parametrize("variable", ["SHANNON_MAX_OUTPUT_TOKENS", "MAX_LENGTH"])
@pytest.mark.parametrize("model", ["shannon-chat", "shannon-complex"])
async def test_completion_without_a_maximum_is_held_to_the_bound(start: Start, variable: str, model: str) -> None:
    gateway = await bounded(start, **{variable: "4"})
    body = (await gateway.chat(model=model)).json()

    assert body["choices"][0]["message"]["content"] == "one two three four"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("param", ["max_tokens", "max_completion_tokens"])
async def test_completion_beyond_the_bound_is_refused_in_openais_words(start: Start, param: str) -> None:
    gateway = await bounded(start, SHANNON_MAX_OUTPUT_TOKENS="4")
    response = await gateway.chat(**{param: 5})

    assert response.status_code == 400
    assert response.json() == {
        "error": {
            "message": f"{param} is too large: 5. This model supports at most 4 completion tokens, whereas you "
            "provided 5.",
            "type": "invalid_request_error",
            "param": param,
            "code": "invalid_value",
        }
    }
    assert response.headers["x-ratelimit-limit-requests"]
    assert gateway.spent().prompt_tokens == 0


async def test_completion_within_the_bound_is_the_clients_choice(start: Start) -> None:
    gateway = await bounded(start, SHANNON_MAX_OUTPUT_TOKENS="4")

    assert (await gateway.chat(max_tokens=4)).json()["usage"]["completion_tokens"] == 4
    assert (await gateway.chat(max_tokens=2)).json()["usage"]["completion_tokens"] == 2


async def test_bound_above_the_default_does_not_raise_it(start: Start) -> None:
    models = {"shannon-chat": {"description": "a", "defaults": {"max_tokens": 3}, "max_output_tokens": 8}}
    gateway = await start(mock=lambda: MockEngine(reply=REPLY), config={"models": models})

    assert (await gateway.chat()).json()["usage"]["completion_tokens"] == 3
    assert (await gateway.chat(max_tokens=8)).json()["usage"]["completion_tokens"] == 8
    assert (await gateway.chat(max_tokens=9)).status_code == 400


async def test_bound_holds_for_each_choice(start: Start) -> None:
    gateway = await bounded(start, SHANNON_MAX_OUTPUT_TOKENS="4")

    assert (await gateway.chat(n=3)).json()["usage"]["completion_tokens"] == 12


async def test_bound_holds_for_bare_completions(start: Start) -> None:
    gateway = await bounded(start, SHANNON_MAX_OUTPUT_TOKENS="4")
    path, body = "/v1/completions", {"model": "shannon-chat", "prompt": "go on"}

    assert (await gateway.client.post(path, json=body)).json()["usage"]["completion_tokens"] == 4
    refused = await gateway.client.post(path, json=body | {"max_tokens": 5})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")


# Prompts


@pytest.mark.parametrize(
    ("most", "left"),
    [("12", [SYSTEM, *TURNS]), ("11", [SYSTEM, TURNS[2]]), ("6", [SYSTEM, TURNS[2]])],
)
async def test_oldest_turns_are_left_out_of_a_long_prompt(start: Start, most: str, left: list[dict[str, str]]) -> None:
    gateway = await bounded(start, SHANNON_MAX_INPUT_TOKENS=most)
    body = (await gateway.chat(messages=[SYSTEM, *TURNS])).json()

    assert gateway.mock.requests[-1].messages == left
    assert body["usage"]["prompt_tokens"] == sum(1 + len(m["content"].split()) for m in left)


async def test_prompt_without_a_bound_is_left_whole(start: Start) -> None:
    gateway = await bounded(start)
    await gateway.chat(messages=[SYSTEM, *TURNS])

    assert [request.messages for request in gateway.mock.requests] == [[SYSTEM, *TURNS]], "prepared once"


async def test_system_prompt_and_last_turn_that_are_too_long_are_refused(start: Start) -> None:
    gateway = await bounded(start, SHANNON_MAX_INPUT_TOKENS="5")
    response = await gateway.chat(messages=[SYSTEM, *TURNS])

    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "This model takes prompts of at most 5 tokens, but the system prompt and last turn alone are 6 "
        "tokens long. Shorten the messages.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }


async def test_bare_prompt_that_is_too_long_is_refused(start: Start) -> None:
    gateway = await bounded(start, SHANNON_MAX_INPUT_TOKENS="3")
    body = {"model": "shannon-chat", "prompt": "one two three four"}
    response = await gateway.client.post("/v1/completions", json=body)

    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


async def test_stored_turns_are_left_out_of_a_long_prompt(start: Start) -> None:
    gateway = await bounded(start, mock=lambda: MockEngine(reply="fine"), SHANNON_MAX_INPUT_TOKENS="13")
    for number in range(4):
        body = {"messages": [message("user", f"question {number}")]}
        await gateway.client.post("/v1/chat/completions", json=body, headers={"X-Session-ID": "talk"})

    assert [m["content"] for m in gateway.mock.requests[-1].messages] == [
        *("question 1", "fine", "question 2", "fine"),
        "question 3",
    ]
    stored = (await gateway.client.get("/v1/sessions/talk")).json()["messages"]
    assert len(stored) == 8, "what is left out of a prompt stays stored"


async def test_bound_is_applied_before_the_stream_starts(start: Start) -> None:
    gateway = await bounded(start, SHANNON_MAX_INPUT_TOKENS="3", SHANNON_MAX_OUTPUT_TOKENS="2")
    stream = chunks((await gateway.chat(messages=TURNS, stream=True)).content)

    assert stream[-1]["usage"]["prompt_tokens"] == 3
    assert stream[-1]["usage"]["completion_tokens"] == 2


# Frames


async def frames(gateway: Gateway, **fields: Any) -> list[str]:
    stream = chunks((await gateway.chat(stream=True, **fields)).content)
    assert stream[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert stream[-1]["choices"][0]["finish_reason"] == "stop"
    return [chunk["choices"][0]["delta"]["content"] for chunk in stream[1:-1]]


@pytest.mark.parametrize("chars", [1, 7, 48, 49])
async def test_frames_have_so_many_characters(start: Start, chars: int) -> None:
    gateway = await bounded(start, SHANNON_STREAM_CHUNK_SIZE=str(chars))
    pieces = await frames(gateway)

    assert "".join(pieces) == REPLY
    assert {len(piece) for piece in pieces[:-1]} <= {chars}
    assert len(pieces) == -(-len(REPLY) // chars)


async def test_frames_without_a_size_are_tokens(start: Start) -> None:
    assert await frames(await bounded(start)) == ["one", *(f" {word}" for word in REPLY.split()[1:])]


async def test_frames_with_logprobs_are_tokens(start: Start) -> None:
    gateway = await bounded(start, SHANNON_STREAM_CHUNK_SIZE="20")

    assert len(await frames(gateway, logprobs=True)) == 10


async def test_session_remembers_the_answer_that_was_cut(start: Start) -> None:
    gateway = await bounded(start, SHANNON_STREAM_CHUNK_SIZE="7")
    body = {"messages": HELLO, "stream": True}
    await gateway.client.post("/v1/chat/completions", json=body, headers={"X-Session-ID": "talk"})

    stored = (await gateway.client.get("/v1/sessions/talk")).json()["messages"]
    assert stored[-1]["content"] == REPLY


# Sampling


@pytest.mark.parametrize("variable", ["SHANNON_TEMPERATURE", "TEMPERATURE"])
async def test_temperature_of_the_environment_is_the_default(start: Start, variable: str) -> None:
    gateway = await bounded(start, **{variable: "0.0"})
    await gateway.chat()
    await gateway.chat(temperature=0.7)

    assert [request.temperature for request in gateway.mock.requests] == [0.0, 0.7], "0.0 means greedy, not unset"


async def test_top_p_of_the_environment_is_the_default(start: Start) -> None:
    gateway = await bounded(start, SHANNON_TOP_P="0.9")
    await gateway.chat()
    await gateway.chat(top_p=0.5)

    assert [request.top_p for request in gateway.mock.requests] == [0.9, 0.5]
