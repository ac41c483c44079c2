"""A whole chat completion is OpenAI's object, with the engine's own token counts."""

from __future__ import annotations

import re

import pytest

from engine.mock import MockEngine
from tests.support.app import HELLO, NOW, Gateway, Start

pytestmark = pytest.mark.anyio


async def test_body_is_openais_object(gateway: Gateway) -> None:
    response = await gateway.chat()

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["content-length"] == str(len(response.content))
    body = response.json()
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", body.pop("id"))
    del body["shannon_events"]
    assert body == {
        "object": "chat.completion",
        "created": NOW,
        "model": "shannon-chat",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "You said: hello there", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


async def test_completion_ids_differ(gateway: Gateway) -> None:
    assert (await gateway.chat()).json()["id"] != (await gateway.chat()).json()["id"]


async def test_finish_reason_is_length_when_the_tokens_run_out(gateway: Gateway) -> None:
    body = (await gateway.chat(max_tokens=2)).json()

    assert body["choices"][0]["message"]["content"] == "You said:"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2


async def test_n_gives_that_many_choices_and_counts_them_all(gateway: Gateway) -> None:
    body = (await gateway.chat(n=3)).json()

    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in body["choices"]} == {"You said: hello there"}
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 12


async def test_logprobs_have_one_entry_per_token(gateway: Gateway) -> None:
    body = (await gateway.chat(logprobs=True)).json()

    entries = body["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == "You said: hello there"
    assert entries[0] == {"token": "You", "logprob": 0.0, "bytes": [89, 111, 117], "top_logprobs": []}


async def test_text_survives_every_character(gateway: Gateway) -> None:
    text = 'quote"backslash\\nul\0snowman☃emoji🗼'
    body = (await gateway.chat(messages=[{"role": "user", "content": text}])).json()

    assert body["choices"][0]["message"]["content"] == f"You said: {text}"


async def test_content_type_of_the_request_does_not_matter(gateway: Gateway) -> None:
    response = await gateway.client.post(
        "/v1/chat/completions",
        content=b'{"messages": [{"role": "user", "content": "hi"}]}',
        headers={"Content-Type": "text/plain"},
    )

    assert response.status_code == 200


async def test_empty_reply_is_an_empty_string(start: Start) -> None:
    gateway = await start(mock=lambda: MockEngine(reply=""))
    body = (await gateway.chat(messages=HELLO)).json()

    assert body["choices"][0]["message"]["content"] == ""
    assert body["choices"][0]["finish_reason"] == "stop"
