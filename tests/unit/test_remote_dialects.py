"""Text and usage of remote servers in loose dialects of the protocol: the right text, and an honest count."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import random
import time
import zlib
from typing import Any

import pytest

from engine.base import Delta, EngineDied, EngineUnavailable, GenerationRequest, Prepared, Usage
from engine.remote.engine import RemoteEngine
from engine.remote.event_stream import Frames
from engine.remote.pool import AttemptFailed
from engine.remote.reply import Reply
from tests.support.app import HELLO
from tests.support.frames import chunks
from tests.support.remote_engine import generate, remote, request
from tests.support.upstream_server import Connection, chunk, run_upstream, summary

pytestmark = pytest.mark.anyio

FULL = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
FRAMES: list[dict[str, Any]] = [
    chunk("", role="assistant"),
    chunk("Hel"),
    chunk("lö"),
    chunk(None, "stop"),
    summary(7, 3),
]
EXACT = Usage(7, 3)


def spoken(frames: list[Any], *, line: bytes = b"data: %b", end: bytes = b"\n\n", last: bytes = b"[DONE]") -> bytes:
    lines = [line % json.dumps(frame, ensure_ascii=False).encode() for frame in frames]
    return b"".join(text + end for text in [*lines, *([line % last] if last else [])])


def told(*usages: Any) -> list[dict[str, Any]]:
    """Return the frames, the last four with these usages; ... leaves it out."""
    frames = FRAMES[: len(usages)]
    return [frame if usage is ... else frame | {"usage": usage} for frame, usage in zip(frames, usages, strict=True)]


MULTI_LINE = json.dumps(FRAMES[1], indent=1).encode().replace(b"\n", b"\ndata: ")
STREAMS: dict[str, bytes] = {
    "plain": spoken(FRAMES),
    "CRLF": spoken(FRAMES, end=b"\r\n\r\n"),
    "CR": spoken(FRAMES, end=b"\r\r"),
    "one line end": spoken(FRAMES, end=b"\n"),
    "many line ends": spoken(FRAMES, end=b"\n\n\n\n"),
    "no space": spoken(FRAMES, line=b"data:%b"),
    "many spaces": spoken(FRAMES, line=b"data:   %b  "),
    "BOM": b"\xef\xbb\xbf" + spoken(FRAMES),
    "comments": spoken(FRAMES, line=b": PROCESSING\n\ndata: %b\n:"),
    "other fields": spoken(FRAMES, line=b"event: message\nid: 7\nretry: 100\ndata: %b"),
    "fields behind": spoken(FRAMES, line=b"data: %b\nid: 7\nevent: message"),
    "unknown field": spoken(FRAMES, line=b"colour: red\ndata: %b"),
    "several data lines": spoken(FRAMES[:1], last=b"") + b"data: " + MULTI_LINE + b"\n\n" + spoken(FRAMES[2:]),
    "several data lines, CRLF": spoken(FRAMES[:1], last=b"")
    + (b"data: " + MULTI_LINE + b"\n\n").replace(b"\n", b"\r\n")
    + spoken(FRAMES[2:]),
    "empty data": spoken(FRAMES, line=b"data: \n\ndata:\n\ndata: %b"),
    "no [DONE]": spoken(FRAMES, last=b""),
    "[DONE] twice": spoken(FRAMES) + b"data: [DONE]\n\n",
    "data behind [DONE]": spoken(FRAMES) + spoken([chunk("evil")]),
    "garbage behind [DONE]": spoken(FRAMES) + b"data: {no",
    "no last line end": spoken(FRAMES, last=b"").rstrip(b"\n"),
    "empty choices first": spoken([{"id": "", "choices": [], "prompt_filter_results": []}, *FRAMES]),
    "error behind the finish": spoken([*FRAMES, {"error": {"message": "late", "code": 400}}], last=b""),
    "garbage behind the finish": spoken(FRAMES, last=b"") + b"data: bye\n\n",
    "broken frame behind the finish": spoken(FRAMES, last=b"") + b"data: {bye\n\n",
    "[DONE] in quotes": spoken(FRAMES, last=b'"[DONE]"'),
    "error event behind the finish": spoken(FRAMES, last=b"") + b'event: error\ndata: {"code": 400}\n\n',
    "refusal in place of content": spoken(
        [FRAMES[0], *(chunk(None, refusal=text) for text in ("Hel", "lö")), *FRAMES[3:]]
    ),
    "numbers that JSON does not have": b"".join(
        b"data: %b\n\n" % json.dumps(frame | {"score": value}).encode()
        for frame, value in zip(FRAMES, [1, float("nan"), float("inf"), -float("inf"), 1], strict=True)
    ),
    "ASCII escapes": b"".join(b"data: %b\n\n" % json.dumps(frame).encode() for frame in FRAMES) + b"data: [DONE]\n\n",
    "role in each": spoken(
        [chunk(frame["choices"][0]["delta"].get("content"), role="assistant") for frame in FRAMES[:3]] + FRAMES[3:]
    ),
    "null fields": spoken(
        [*FRAMES[:2], chunk("lö", tool_calls=None, reasoning_content=None, refusal=None), *FRAMES[3:]]
    ),
    "content null": spoken([chunk(role="assistant") | {}, {"choices": [{"delta": {"content": None}}]}, *FRAMES[1:]]),
    "content in parts": spoken(
        [chunk() | {"choices": [{"index": 0, "delta": {"content": [{"type": "text", "text": "Hellö"}]}}]}, *FRAMES[3:]]
    ),
    "delta null at the end": spoken(
        [*FRAMES[:3], {"choices": [{"index": 0, "delta": None, "finish_reason": "stop"}]}, FRAMES[4]]
    ),
    "delta missing at the end": spoken([*FRAMES[:3], {"choices": [{"index": 0, "finish_reason": "stop"}]}, FRAMES[4]]),
    "index null": spoken([{"choices": [frame["choices"][0] | {"index": None}]} for frame in FRAMES[:4]] + FRAMES[4:]),
    "finish empty before": spoken([chunk("Hel", ""), chunk("lö", ""), *FRAMES[3:]]),
    "finish never": spoken([*FRAMES[:3], FRAMES[4]]),
    "finish empty for ever": spoken([chunk("Hel", ""), chunk("lö", ""), FRAMES[4]]),
    "finish unknown": spoken([*FRAMES[:3], chunk(None, "eos_token"), FRAMES[4]]),
    "finish twice": spoken([*FRAMES[:4], FRAMES[3], FRAMES[4]]),
    "text behind the finish": spoken([FRAMES[0], FRAMES[1], FRAMES[3], FRAMES[2], FRAMES[4]]),
    "halves of a character": spoken(FRAMES[:3], last=b"")
    + b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}\n\n'
    + b'data: {"choices":[{"index":0,"delta":{"content":"\\ude00"}}]}\n\n'
    + spoken(FRAMES[3:]),
    "half of a character": spoken(FRAMES[:3], last=b"")
    + b'data: {"choices":[{"index":0,"delta":{"content":"\\ude00"}}]}\n\n'
    + spoken(FRAMES[3:]),
    "usage in the choices' frames": spoken(
        told(..., FULL | {"completion_tokens": 1}, FULL | {"completion_tokens": 2}, FULL)
    ),
    "usage in each and at the end": spoken(told(None, FULL, FULL, FULL) + FRAMES[4:]),
    "usage null before": spoken(told(None, None, None, None) + FRAMES[4:]),
    "usage with the finish": spoken(told(..., ..., ..., FULL)),
    "usage behind [DONE] only": spoken(FRAMES[:4]) + spoken(FRAMES[4:]),
    "usage absent": spoken(FRAMES[:4]),
    "usage null": spoken(told(None, None, None, None)),
    "usage of zeros": spoken([*FRAMES[:4], FRAMES[4] | {"usage": {"prompt_tokens": 0, "completion_tokens": 0}}]),
    "usage of no completion": spoken([*FRAMES[:4], FRAMES[4] | {"usage": FULL | {"completion_tokens": 0}}]),
    "usage in part": spoken([*FRAMES[:4], FRAMES[4] | {"usage": {"total_tokens": 10}}]),
    "usage in texts": spoken([*FRAMES[:4], FRAMES[4] | {"usage": {"prompt_tokens": "7", "completion_tokens": "3"}}]),
    "usage beyond any context": spoken([*FRAMES[:4], summary(10**9, 3)]),
    "usage beyond 64 bits": spoken([*FRAMES[:4], summary(2**63, 2**62)]),
    "usage of a completion beyond any context": spoken([*FRAMES[:4], summary(7, 10**9)]),
    "usage beyond any context in each": spoken(told(..., *[FULL | {"completion_tokens": 10**12}] * 3)),
    "usage below nothing": spoken([*FRAMES[:4], summary(7, -3)]),
    "usage without choices": spoken([*FRAMES[:4], {"usage": FULL}]),
    "usage with null choices": spoken([*FRAMES[:4], {"choices": None, "usage": FULL}]),
}
TEXTS = {"halves of a character": "Hellö😀", "half of a character": "Hellö\ufffd"}
ESTIMATED = [name for name in STREAMS if name.startswith("usage ")]
for name in ("in the choices' frames", "in each and at the end", "null before", "with the finish", "without choices"):
    ESTIMATED.remove(f"usage {name}")
ESTIMATED.remove("usage with null choices")
DOCUMENT = {
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hellö"}, "finish_reason": "stop"}],
    "usage": FULL,
}
DOCUMENTS: dict[str, bytes] = {
    "one line": json.dumps(DOCUMENT).encode(),
    "many lines": json.dumps(DOCUMENT, indent=2).encode() + b"\n",
    "white space": b"\r\n  " + json.dumps(DOCUMENT).encode() + b"\r\n\r\n",
    "BOM": b"\xef\xbb\xbf" + json.dumps(DOCUMENT, indent=2).encode(),
    "no finish": json.dumps(
        DOCUMENT | {"choices": [{"message": {"content": "Hellö"}, "finish_reason": None}]}
    ).encode(),
    "content in parts": json.dumps(
        DOCUMENT | {"choices": [{"message": {"content": [{"type": "text", "text": "Hellö"}]}, "finish_reason": "stop"}]}
    ).encode(),
}
TYPES = ["text/event-stream", "text/plain", "application/json", "application/octet-stream"]


def whole(content: bytes, content_type: str, **headers: str) -> Any:
    async def answer(connection: Connection) -> None:
        lines = [f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ncontent-length: {len(content)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await connection.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)

    return answer


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("name", STREAMS)
async def test_text_and_usage_are_right_in_every_dialect(name: str, stream: bool) -> None:
    for content_type in TYPES[: 2 if stream else 1]:
        answer = whole(STREAMS[name], content_type)
        async with run_upstream(answer) as server, remote(server) as engine:
            prepared, deltas = await generate(engine, stream=stream)

            assert "".join(delta.text for delta in deltas) == TEXTS.get(name, "Hellö")
            assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]
            assert prepared.usage == (Usage(7, 2, estimated=True) if name in ESTIMATED else EXACT)
            assert engine.replicas[0].breaker.state == "closed"


@pytest.mark.parametrize("content_type", TYPES)
@pytest.mark.parametrize("name", DOCUMENTS)
async def test_document_in_answer_to_a_stream_request_is_an_answer(name: str, content_type: str) -> None:
    async with run_upstream(whole(DOCUMENTS[name], content_type)) as server, remote(server) as engine:
        for stream in (True, False):
            prepared, deltas = await generate(engine, stream=stream)

            assert "".join(delta.text for delta in deltas) == "Hellö"
            assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]
            assert prepared.usage == EXACT


async def test_lines_of_json_in_answer_to_a_stream_request_are_an_answer() -> None:
    async def answer(connection: Connection) -> None:
        await connection.begin("application/x-ndjson")
        for frame in FRAMES:
            await connection.send(json.dumps(frame).encode() + b"\n")
            await asyncio.sleep(0)
        await connection.end(done=False)

    async with run_upstream(answer) as server, remote(server) as engine:
        for stream in (True, False):
            prepared, deltas = await generate(engine, stream=stream)

            assert "".join(delta.text for delta in deltas) == "Hellö"
            assert deltas[-1].finish_reason == "stop"
            assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
            assert prepared.usage == EXACT


def test_first_of_several_documents_ends_nothing() -> None:
    frames = Frames()
    received, failure = frames.read(json.dumps(FRAMES[1]).encode() + b"\n")

    assert (len(received), failure, frames.is_document, frames.done) == (1, None, True, False)


async def test_documents_usage_is_of_all_its_choices() -> None:
    choices = [{"index": n, "message": {"content": "a"}, "finish_reason": "stop"} for n in range(3)]
    answer = whole(json.dumps({"choices": choices, "usage": FULL}).encode(), "application/json")
    async with run_upstream(answer) as server, remote(server) as engine:
        prepared, _ = await generate(engine, n=3)

    assert prepared.usage == EXACT


async def test_document_of_a_bare_prompt_is_an_answer() -> None:
    document = {"object": "text_completion", "choices": [{"text": "Hellö", "finish_reason": "length"}], "usage": FULL}
    answer = whole(json.dumps(document).encode(), "application/json")
    async with run_upstream(answer) as server, remote(server) as engine:
        prepared, deltas = await generate(engine, prompt="Say")

    assert [(delta.text, delta.finish_reason) for delta in deltas] == [("Hellö", "length")]
    assert prepared.usage == EXACT


async def test_long_text_without_usage_is_not_one_token() -> None:
    document = {"choices": [{"message": {"content": "word " * 1000}, "finish_reason": "stop"}]}
    answer = whole(json.dumps(document).encode(), "application/json")
    async with run_upstream(answer, max_model_len=4000) as server, remote(server) as engine:
        prepared, _ = await generate(engine)

    assert prepared.usage == Usage(7, 1250, estimated=True)


async def test_end_without_a_word_has_processed_the_prompt() -> None:
    """Nothing tells how long it was, so it is what was counted before."""
    answer = whole(spoken([FRAMES[0], FRAMES[3]]), "text/event-stream")
    async with run_upstream(answer) as server, remote(server) as engine:
        prepared, _ = await generate(engine)

    assert prepared.usage == Usage(7, 0, estimated=True)


async def test_thoughts_are_not_more_than_the_completion() -> None:
    details = {"reasoning_tokens": 10**9}
    answer = whole(spoken([*FRAMES[:4], summary(7, 3, completion_tokens_details=details)]), "text/event-stream")
    async with run_upstream(answer) as server, remote(server) as engine:
        prepared, _ = await generate(engine)

    assert prepared.usage == Usage(7, 3, reasoning_tokens=3)


@pytest.mark.parametrize("apart", [True, False])
async def test_what_came_before_a_broken_frame_is_handed_over_and_counted(apart: bool) -> None:
    pieces = [spoken(FRAMES[:2], last=b""), spoken(FRAMES[2:3], last=b""), b"data: {no\n\n"]

    async def answer(connection: Connection) -> None:
        await connection.begin()
        for piece in pieces if apart else [b"".join(pieces)]:
            await connection.send(piece)
            await asyncio.sleep(0)
        await connection.left()

    async with run_upstream(answer) as server, remote(server) as engine:
        prepared = await engine.prepare(request())
        deltas: list[Delta] = []
        with pytest.raises(EngineDied):
            await _collect(engine, prepared, deltas)

    assert ("".join(delta.text for delta in deltas), prepared.usage) == ("Hellö", Usage(7, 2, estimated=True))


async def _collect(engine: RemoteEngine, prepared: Prepared, deltas: list[Delta]) -> None:
    async for delta in engine.generate(prepared):
        deltas.append(delta)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("words", ["w", "word " * 100], ids=["short", "long"])
async def test_answer_without_end_is_ended(words: str, stream: bool) -> None:
    async def endless(connection: Connection) -> None:
        await connection.begin()
        while True:
            await connection.send(spoken([chunk(words)] * 100, last=b""))

    async with run_upstream(endless, max_model_len=100) as server, remote(server) as engine:
        prepared = await engine.prepare(request(stream=stream, max_tokens=5))
        deltas: list[Delta] = []
        with pytest.raises(EngineUnavailable):
            await _collect(engine, prepared, deltas)

        assert prepared.usage.completion_tokens <= 1000
        assert len(deltas) <= 800
        assert engine.unfinished_requests == 0


@pytest.mark.parametrize("logprob", [None, float("-inf"), float("nan"), 1e308, -1e308])
@pytest.mark.parametrize("told_bytes", ["ab", [300], {"a": 1}, [None], 7])
async def test_logprobs_are_numbers_and_bytes(logprob: Any, told_bytes: Any) -> None:
    entry = {"token": "ö", "logprob": logprob, "bytes": told_bytes}
    frame = chunk("ö", logprobs={"content": [entry | {"top_logprobs": [entry]}]})
    async with run_upstream(whole(spoken([frame, FRAMES[3]]), "text/event-stream")) as server, remote(server) as engine:
        _, deltas = await generate(engine, logprobs=True)

    (read,) = deltas[0].logprobs or []
    assert (abs(read.logprob), read.bytes, read.top[0].bytes) == (9999.0, [195, 182], [195, 182])


@pytest.mark.parametrize("content", [STREAMS["plain"], DOCUMENTS["one line"]], ids=["stream", "document"])
async def test_compression_that_nobody_asked_for_is_undone(content: bytes) -> None:
    answer = whole(gzip.compress(content), "text/event-stream", content_encoding="gzip")
    async with run_upstream(answer) as server, remote(server) as engine:
        prepared, deltas = await generate(engine)

    assert server.generations[0].headers["accept-encoding"] == "identity"
    assert ("".join(delta.text for delta in deltas), prepared.usage) == ("Hellö", EXACT)


@pytest.mark.parametrize("coding", ["gzip, gzip", "zstd", "br", "gzip, identity", "chunked", "x"])
async def test_other_compression_is_no_answer(coding: str) -> None:
    """Compressed twice, 4 GB are a body of 7 KiB."""
    answer = whole(gzip.compress(gzip.compress(STREAMS["plain"])), "text/event-stream", content_encoding=coding)
    async with run_upstream(answer) as server, remote(server) as engine:
        with pytest.raises(EngineUnavailable):
            await generate(engine)


async def test_compressed_answer_is_decoded_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 MiB of one line are a body of 256 KiB, which arrives at once."""
    longest = 0
    read = Frames.read

    def note(self: Frames, data: bytes) -> Any:
        nonlocal longest
        longest = max(longest, len(data))
        return read(self, data)

    monkeypatch.setattr(Frames, "read", note)
    packer = zlib.compressobj(wbits=31)
    bomb = b"".join(packer.compress(b"x" * 2**20) for _ in range(256)) + packer.flush()
    answer = whole(bomb, "text/event-stream", content_encoding="gzip")
    async with run_upstream(answer) as server, remote(server) as engine:
        with pytest.raises(EngineUnavailable):
            await generate(engine)

    assert 0 < longest <= 8 * 2**20


async def test_frame_is_handed_over_before_the_blank_line_behind_it() -> None:
    async def slow(connection: Connection) -> None:
        await connection.begin()
        await connection.send(spoken(FRAMES[:2], end=b"\n", last=b""))
        await connection.left()

    async with run_upstream(slow) as server, remote(server) as engine:
        prepared = await engine.prepare(request())
        deltas = engine.generate(prepared)
        assert (await anext(deltas)).text == "Hel"
        await deltas.aclose()


@pytest.mark.parametrize("name", [*STREAMS, *DOCUMENTS])
def test_pieces_of_any_size_make_the_same_frames(name: str) -> None:
    raw = (STREAMS | DOCUMENTS)[name]
    expected = _read(raw, [len(raw)])
    rng = random.Random(name)
    for size in (1, 2, 3, 7):
        assert _read(raw, [size] * (len(raw) // size + 1)) == expected
    for _ in range(20):
        assert _read(raw, [rng.randint(1, 40) for _ in range(len(raw))]) == expected


def _read(raw: bytes, sizes: list[int]) -> tuple[str, Usage, list[str]]:
    prepared = Prepared(request_id="r", prompt_tokens=7, max_tokens=9)
    asked = GenerationRequest(request_id="r", messages=HELLO)
    frames, reply = Frames(), Reply(prepared, asked, estimated=False, context_tokens=1000)
    text, at = "", 0
    failures: list[str] = []
    for size in [*sizes, len(raw)]:
        if frames.done or failures:
            break
        received, broken = frames.read(raw[at : at + size])
        deltas, failure = reply.read_all(received)
        text += "".join(delta.text for delta in deltas)
        failures += [str(found) for found in (failure or broken,) if found is not None]
        at += size
    return text, prepared.usage, failures


def test_frame_without_end_is_refused_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.remote.event_stream._MAX_FRAME_BYTES", 2**20)
    for piece in (b"x" * 1000, b"data: {\n", b"data: {}}\n", b'{"a":\n', b'[{"a": "b"},\n{}\n'):
        frames = Frames()
        with pytest.raises(AttemptFailed, match=r"without end|not JSON"):
            feed_for_ever(frames, piece)


def feed_for_ever(frames: Frames, piece: bytes) -> None:
    for _ in range(2**20):
        frames.feed(piece)


def test_long_document_in_many_lines_is_parsed_in_linear_time() -> None:
    took_s = []
    for count in (2_000, 20_000):
        entries = [{"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -1.5}]}] * count
        raw = json.dumps({"choices": [{"logprobs": {"content": entries}}]}, indent=2).encode()
        tries_s = []
        for _ in range(3):
            gc.collect()
            began = time.process_time()
            frames = Frames()
            (frame,) = frames.feed(raw) + frames.end()
            tries_s.append(time.process_time() - began)
            assert len(frame["choices"][0]["logprobs"]["content"]) == count
        took_s.append(min(tries_s))

    assert took_s[1] < 40 * took_s[0], "ten times as long a document"


async def test_dialects_reach_clients_as_one(start: Any) -> None:
    names = iter(STREAMS)

    async def answer(connection: Connection) -> None:
        await whole(STREAMS[next(names)], "text/event-stream")(connection)

    async with run_upstream(answer) as server:
        limits = {"requests_per_minute": 10_000, "tokens_per_minute": 100_000_000}
        models = {"shannon-chat": {"description": "The one under test", "limits": limits}}
        mock: Any = lambda: RemoteEngine([server.url], "demo")  # noqa: E731
        gateway = await start(mock=mock, config={"models": models})
        for name in STREAMS:
            raw = (await gateway.chat(stream=True)).content
            text = "".join(frame["choices"][0]["delta"].get("content") or "" for frame in chunks(raw))
            assert text == TEXTS.get(name, "Hellö"), name
