"""A stream, byte for byte: the role first, one finish reason at the end, the usage once, then [DONE]."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from engine.mock import MockEngine
from tests.support.app import NOW, Gateway, Start
from tests.support.frames import chunks, data_lines

pytestmark = pytest.mark.anyio

USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
}
NO_EVENTS = {"X-Shannon-Events": "off"}


async def raw_stream(gateway: Gateway, headers: dict[str, str] | None = None, **fields: Any) -> bytes:
    """Return the bytes of a streamed completion, its id replaced by ID."""
    body = {"messages": [{"role": "user", "content": "hello there"}], "stream": True} | fields
    response = await gateway.client.post("/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == 200
    return re.sub(rb"chatcmpl-[0-9a-f]{32}", b"ID", response.content)


@pytest.fixture
async def two_words(start: Start) -> Gateway:
    """A gateway whose every reply is two tokens."""
    return await start(mock=lambda: MockEngine(reply="Hello you"))


def frame(rest: str) -> bytes:
    """Return the bytes of a frame of the default model: its head, then `rest`."""
    head = f'{{"id":"ID","object":"chat.completion.chunk","created":{NOW},"model":"shannon-chat","choices":['
    return f"data: {head}{rest}\n\n".encode()


async def test_stream_is_these_bytes(two_words: Gateway) -> None:
    usage = json.dumps(USAGE, separators=(",", ":"))

    assert await raw_stream(two_words, NO_EVENTS) == b"".join(
        [
            frame('{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}'),
            frame('{"index":0,"delta":{"content":"Hello"},"finish_reason":null}]}'),
            frame('{"index":0,"delta":{"content":" you"},"finish_reason":null}]}'),
            frame('{"index":0,"delta":{},"finish_reason":"stop"}],"usage":' + usage + "}"),
            b"data: [DONE]\n\n",
        ]
    )


async def test_stream_with_usage_is_these_bytes(two_words: Gateway) -> None:
    usage = json.dumps(USAGE, separators=(",", ":"))

    assert await raw_stream(two_words, NO_EVENTS, stream_options={"include_usage": True}) == b"".join(
        [
            frame('{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}],"usage":null}'),
            frame('{"index":0,"delta":{"content":"Hello"},"finish_reason":null}],"usage":null}'),
            frame('{"index":0,"delta":{"content":" you"},"finish_reason":null}],"usage":null}'),
            frame('{"index":0,"delta":{},"finish_reason":"stop"}],"usage":null}'),
            frame('],"usage":' + usage + "}"),
            b"data: [DONE]\n\n",
        ]
    )


async def test_include_usage_false_is_like_leaving_it_out(two_words: Gateway) -> None:
    assert await raw_stream(two_words, stream_options={"include_usage": False}) == await raw_stream(two_words)


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("logprobs", [False, True])
async def test_usage_is_sent_exactly_once(two_words: Gateway, include_usage: bool, n: int, logprobs: bool) -> None:
    raw = await raw_stream(two_words, n=n, logprobs=logprobs, stream_options={"include_usage": include_usage})

    frames = chunks(raw)
    assert [frame["usage"] for frame in frames if frame.get("usage")] == [
        USAGE | {"completion_tokens": 2 * n, "total_tokens": 3 + 2 * n}
    ]
    assert frames[-1]["usage"]
    if include_usage:
        assert frames[-1]["choices"] == []
        assert all("usage" in frame for frame in frames)
    else:
        assert frames[-1]["choices"][0]["finish_reason"] == "stop"
        assert all("usage" not in frame for frame in frames[:-1])


async def test_every_frame_has_the_head_of_its_completion(two_words: Gateway) -> None:
    frames = chunks(await raw_stream(two_words, stream_options={"include_usage": True}))

    heads = {(frame["id"], frame["object"], frame["created"], frame["model"]) for frame in frames}
    assert heads == {("ID", "chat.completion.chunk", NOW, "shannon-chat")}


@pytest.mark.parametrize("fields", [{}, {"logprobs": True}, {"max_tokens": 1}], ids=str)
async def test_role_comes_first_and_the_reason_last(two_words: Gateway, fields: dict[str, Any]) -> None:
    choices = [frame["choices"][0] for frame in chunks(await raw_stream(two_words, **fields))]

    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == ("length" if fields == {"max_tokens": 1} else "stop")
    assert choices[-1]["delta"] == {}


async def test_each_of_n_choices_has_its_role_text_and_reason(two_words: Gateway) -> None:
    frames = chunks(await raw_stream(two_words, n=3))

    assert all(len(frame["choices"]) == 1 for frame in frames)
    for index in range(3):
        mine = [frame["choices"][0] for frame in frames if frame["choices"][0]["index"] == index]
        assert [choice["delta"] for choice in mine] == [
            {"role": "assistant", "content": ""},
            {"content": "Hello"},
            {"content": " you"},
            {},
        ]
        assert [choice["finish_reason"] for choice in mine] == [None, None, None, "stop"]


async def test_logprobs_ride_on_the_frame_of_their_token(two_words: Gateway) -> None:
    frames = chunks(await raw_stream(two_words, logprobs=True))

    assert [
        (frame["choices"][0]["delta"]["content"], [e["token"] for e in frame["choices"][0]["logprobs"]["content"]])
        for frame in frames[1:-1]
    ] == [("Hello", ["Hello"]), (" you", [" you"])]


async def test_done_is_the_last_frame(two_words: Gateway) -> None:
    lines = data_lines(await raw_stream(two_words))

    assert lines[-1] == b"[DONE]"
    assert lines.count(b"[DONE]") == 1


async def test_frames_are_single_lines_whatever_the_text(gateway: Gateway) -> None:
    text = "line\none\r\ntwo\u2028three data: [DONE] 🗼"
    raw = await raw_stream(gateway, messages=[{"role": "user", "content": text}])

    content = "".join(frame["choices"][0]["delta"].get("content", "") for frame in chunks(raw))
    assert content.split() == ["You", "said:", *text.split()]
    assert raw.count(b"\n") == 2 * len(data_lines(raw))


async def test_stream_headers_forbid_buffering_and_caching(two_words: Gateway) -> None:
    response = await two_words.chat(stream=True)

    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers


async def test_tokens_arrive_as_they_are_made(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(token_s=0.002))
    made: list[int] = []
    async with gateway.stream(ignore_eos=True, max_tokens=100) as response:
        async for _ in response.aiter_raw():
            made.append(gateway.mock.counters.completion_tokens)

    assert made[0] < 50
    assert made[-1] == 100
    assert len(made) > 20
