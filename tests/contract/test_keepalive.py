"""A silent stream says so: a comment line after `server.keepalive_s`, which clients skip and proxies count as life."""

from __future__ import annotations

import asyncio

import openai
import pytest

from engine.base import EngineDied
from engine.mock import Fault, MockEngine
from tests.support.app import Gateway, Start
from tests.support.frames import chunks, data_lines

pytestmark = pytest.mark.anyio

COMMENT = b": keepalive\n\n"
KEEPALIVE_S = 0.05


@pytest.fixture
async def quiet(serve: Start) -> Gateway:
    """A gateway whose engine pauses between tokens for longer than a proxy would like."""
    return await serve(
        server={"keepalive_s": KEEPALIVE_S},
        mock=lambda: MockEngine(reply="one two", first_token_s=2.5 * KEEPALIVE_S, token_s=2.5 * KEEPALIVE_S),
    )


async def test_silence_is_broken_before_the_first_token_and_between_tokens(quiet: Gateway) -> None:
    async with quiet.stream() as response:
        raw = await response.aread()

    assert response.status_code == 200
    frames = raw.split(b"\n\n")
    assert raw.startswith(COMMENT)
    assert b": keepalive" in frames[frames.index(next(frame for frame in frames if b'"one"' in frame)) :]
    assert 2 <= raw.count(COMMENT) <= 6
    text = "".join(frame["choices"][0]["delta"].get("content", "") for frame in chunks(raw))
    assert text == "one two"


async def test_headers_come_with_the_first_comment(quiet: Gateway) -> None:
    quiet.mock.faults.append(Fault())  # hangs: no token will ever come
    async with quiet.stream() as response:
        first = await anext(response.aiter_raw())

    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert first == COMMENT


async def test_failure_after_a_comment_is_an_error_frame(quiet: Gateway) -> None:
    quiet.mock.faults.append(Fault(error=EngineDied()))
    async with quiet.stream() as response:
        raw = await response.aread()

    assert raw.startswith(COMMENT)
    (line,) = data_lines(raw)
    assert b'"code":"engine_unavailable"' in line


async def test_stream_that_talks_is_sent_no_comments(serve: Start) -> None:
    gateway = await serve(server={"keepalive_s": 1}, mock=lambda: MockEngine(token_s=0.002))
    async with gateway.stream(ignore_eos=True, max_tokens=100) as response:
        raw = await response.aread()

    assert COMMENT not in raw


async def test_whole_body_is_sent_no_comments(quiet: Gateway) -> None:
    response = await quiet.chat()

    assert response.json()["choices"][0]["message"]["content"] == "one two"


async def test_openai_sdk_skips_comments(quiet: Gateway) -> None:
    async with openai.AsyncOpenAI(api_key=quiet.key, base_url=f"{quiet.url}/v1", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="shannon-chat", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert text == "one two"


async def test_client_that_reads_late_gets_every_frame_once(serve: Start) -> None:
    """Comments and frames share a socket; neither may land inside the other."""
    gateway = await serve(server={"keepalive_s": 0.005}, mock=lambda: MockEngine(token_s=0.006, max_model_len=4096))
    async with asyncio.timeout(20):
        async with gateway.stream(ignore_eos=True, max_tokens=50, n=2) as response:
            raw = b"".join([piece async for piece in response.aiter_raw(chunk_size=7)])

    frames = [frame for frame in chunks(raw) if frame["choices"][0]["delta"].get("content")]
    assert len(frames) == 100
