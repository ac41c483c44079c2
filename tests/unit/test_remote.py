"""A remote engine over scripted servers: what it sends, what it makes of any answer, and where it tries again."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import struct
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
import respx

from engine.base import (
    Delta,
    EmbeddingRequest,
    EngineDied,
    EngineError,
    EngineOverloaded,
    EngineUnavailable,
    InvalidRequest,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from engine.mock import MockEngine
from engine.remote.engine import RemoteEngine
from engine.remote.http1 import Http1Transport
from engine.remote.reply import read_vectors
from engine.supervisor import SupervisedEngine
from gateway.settings.config import ConfigError, RemoteSettings, parse_config
from tests.support.app import HELLO, Start
from tests.support.remote_engine import DEAD, generate, hello, refusing, remote, request, saying, stuck
from tests.support.upstream_server import (
    CHAT,
    COMPLETIONS,
    HELLO_STREAM,
    SECRET_WORDS,
    TOKENIZE,
    Connection,
    chunk,
    error,
    run_upstream,
    summary,
)
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


def settings(**fields: Any) -> RemoteSettings:
    engine = {"kind": "remote", "urls": ["http://one/v1"], "model": "demo"} | fields
    tree = {"engines": {"main": engine}, "models": {"shannon-chat": {"description": "x"}}}
    parsed = parse_config(tree).engines["main"]
    assert isinstance(parsed, RemoteSettings)
    return parsed


async def silent_after_a_token(connection: Connection) -> None:
    await connection.begin()
    await connection.frames(*HELLO_STREAM[:2])
    await connection.left()


async def cut_after_a_token(connection: Connection) -> None:
    await connection.begin()
    await connection.frames(*HELLO_STREAM[:2])
    connection.cut()


async def cut_before_a_token(connection: Connection) -> None:
    await connection.begin()
    await connection.frames(HELLO_STREAM[0])
    connection.cut()


# What is sent


async def test_only_what_was_given_is_sent() -> None:
    async with run_upstream(hello) as server, remote(server) as engine:
        await generate(engine)

    assert server.generations[0].path == CHAT
    assert server.generations[0].body == {
        "model": "demo",
        "messages": HELLO,
        "max_tokens": 993,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


async def test_every_parameter_is_passed_on() -> None:
    given: dict[str, Any] = {
        "max_tokens": 5,
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "structured_outputs": {"choice": ["a"]},
        "n": 2,
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 1.0,
        "repetition_penalty": 1.1,
        "seed": 0,
        "stop": ["x"],
        "stop_token_ids": [1],
        "ignore_eos": True,
        "min_tokens": 2,
        "logprobs": True,
        "top_logprobs": 3,
        "logit_bias": {"5": 1.0},
        "response_format": {"type": "json_object"},
    }
    answer = saying(chunk("a", "stop"), chunk("b", "stop", index=1))
    async with run_upstream(answer) as server, remote(server) as engine:
        await generate(engine, **given)

    assert server.generations[0].body.items() >= given.items()


async def test_schema_is_sent_in_the_words_that_all_servers_know() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    async with run_upstream(hello) as server, remote(server) as engine:
        await generate(engine, structured_outputs={"json": schema})

    body = server.generations[0].body
    assert "structured_outputs" not in body
    assert body["response_format"] == {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


async def test_key_and_request_id_are_sent_and_no_cookie_is_kept() -> None:
    async def biscuit(connection: Connection) -> None:
        await connection.reply(200, {"count": 7, "tokens": [1] * 7}, set_cookie="lb=replica-1")

    async with run_upstream(hello, routes={TOKENIZE: biscuit}) as server, remote(server, api_key="sk-up") as engine:
        await generate(engine)

    assert all(received.headers["authorization"] == "Bearer sk-up" for received in server.received)
    assert server.generations[0].headers["x-request-id"] == "r1"
    assert not any("cookie" in received.headers for received in server.received)


@pytest.mark.parametrize(
    ("owned_by", "settings", "sent"),
    [
        ("vllm", {}, {"cache_salt": "salt"}),
        ("shannon", {}, {}),
        ("vllm", {"cache_salt": False}, {}),
        ("shannon", {"cache_salt": True, "priority": True}, {"cache_salt": "salt", "priority": 5}),
    ],
)
async def test_salt_goes_to_vllm_only_and_priority_on_demand(
    owned_by: str, settings: dict[str, Any], sent: dict[str, Any]
) -> None:
    async with run_upstream(hello, owned_by=owned_by) as server, remote(server, **settings) as engine:
        await generate(engine, cache_salt="salt", priority=5)

    body = server.generations[0].body
    assert {name: body[name] for name in ("cache_salt", "priority") if name in body} == sent


@pytest.mark.parametrize("prompt", ["Once upon", [1, 2, 3]])
async def test_bare_prompt_goes_to_completions(prompt: str | list[int]) -> None:
    logprobs = {"tokens": [" a"], "token_logprobs": [-0.5], "top_logprobs": [{" a": -0.5, " b": -1.5}]}
    frames = [
        {"choices": [{"index": 0, "text": " a", "logprobs": logprobs, "finish_reason": None}]},
        {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]},
        summary(4, 1),
    ]
    async with run_upstream(saying(*frames)) as server, remote(server) as engine:
        _, deltas = await generate(engine, prompt=prompt, logprobs=True, top_logprobs=2)

    received = server.generations[0]
    assert (received.path, received.body["prompt"], received.body["logprobs"]) == (COMPLETIONS, prompt, 2)
    assert "messages" not in received.body
    top = (TokenLogprob(" a", -0.5, [32, 97]), TokenLogprob(" b", -1.5, [32, 98]))
    assert deltas == [Delta(" a", 0, None, [TokenLogprob(" a", -0.5, [32, 97], top)]), Delta("", 0, "length")]


async def test_connection_is_used_again() -> None:
    async with run_upstream(hello) as server, remote(server) as engine:
        for _ in range(5):
            await generate(engine)

    assert server.connections == 1


# What is made of the answer


async def test_stream_becomes_deltas_and_exact_usage() -> None:
    async with run_upstream(hello) as server, remote(server) as engine:
        prepared, deltas = await generate(engine)

    assert deltas == [Delta("Hello"), Delta(" there"), Delta("", finish_reason="stop")]
    assert (prepared.prompt_tokens, prepared.usage) == (7, Usage(7, 3))


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10_000])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
async def test_frames_may_arrive_in_pieces_of_any_size(size: int, newline: bytes) -> None:
    lines = [b": a comment", b"event: message", b"", b"id: 7"]
    lines += [b"data:" + b" " * (number % 2) + json.dumps(frame).encode() for number, frame in enumerate(HELLO_STREAM)]
    raw = (newline * 2).join([*lines, b"data: [DONE]"])  # whose own line has no end

    async def in_pieces(connection: Connection) -> None:
        await connection.begin()
        await connection.send(*(raw[at : at + size] for at in range(0, len(raw), size)))
        await connection.end(done=False)

    async with run_upstream(in_pieces) as server, remote(server) as engine:
        prepared, deltas = await generate(engine)

    assert "".join(delta.text for delta in deltas) == "Hello there"
    assert prepared.usage == Usage(7, 3)


async def test_whole_answer_is_one_delta_per_choice() -> None:
    frames = [
        chunk("a", index=1, reasoning_content="hm"),
        chunk("b", index=0),
        chunk("c", "length", index=1),
        chunk("d", "stop", index=0),
        summary(7, 9),
    ]
    async with run_upstream(saying(*frames)) as server, remote(server) as engine:
        prepared, deltas = await generate(engine, stream=False, n=2)

    assert deltas == [
        Delta("bd", 0, "stop", tool_calls=[]),
        Delta("ac", 1, "length", reasoning="hm", tool_calls=[]),
    ]
    assert server.generations[0].body["stream"] is True
    assert prepared.usage == Usage(7, 9)


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
async def test_reasoning_is_kept_apart(field: str) -> None:
    thoughts: list[dict[str, Any]] = [{field: "Let me"}, {field: " see."}]
    frames = [*(chunk(**thought) for thought in thoughts), chunk("Yes.", "stop"), summary(7, 5)]
    async with run_upstream(saying(*frames)) as server, remote(server) as engine:
        _, deltas = await generate(engine)

    assert [(delta.reasoning, delta.text) for delta in deltas] == [("Let me", ""), (" see.", ""), ("", "Yes.")]


async def test_tool_calls_arrive_in_pieces() -> None:
    frames = [
        chunk(tool_calls=[{"index": 0, "id": "call-1", "type": "function", "function": {"name": "weather"}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": '{"city":'}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": '"Kyoto"}'}}, {"index": 1, "id": "call-2"}]),
        chunk(tool_calls=[{"index": 1, "function": {"name": "time", "arguments": "{}"}}]),
        chunk(None, "tool_calls"),
    ]
    tools = [{"type": "function", "function": {"name": name}} for name in ("weather", "time")]
    async with run_upstream(saying(*frames)) as server, remote(server) as engine:
        _, deltas = await generate(engine, tools=tools)

    assert [call for delta in deltas for call in delta.tool_calls] == [
        ToolCallDelta(0, "call-1", "weather"),
        ToolCallDelta(0, arguments='{"city":'),
        ToolCallDelta(0, arguments='"Kyoto"}'),
        ToolCallDelta(1, "call-2", "time", "{}"),
    ]
    assert deltas[-1].finish_reason == "tool_calls"


async def test_logprobs_are_read_with_their_alternatives() -> None:
    other = {"token": "Hi", "logprob": -2.5, "bytes": None}
    entry = {"token": "Hé", "logprob": -0.5, "bytes": [72, 195, 169], "top_logprobs": [other]}
    frames = [chunk("Hé", "stop", logprobs={"content": [entry]})]
    async with run_upstream(saying(*frames)) as server, remote(server) as engine:
        _, deltas = await generate(engine, logprobs=True, top_logprobs=1)

    assert deltas[0].logprobs == [TokenLogprob("Hé", -0.5, [72, 195, 169], (TokenLogprob("Hi", -2.5, [72, 105]),))]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("max_tokens", "length"),
        ("tool_calls", "stop"),
        ("function_call", "stop"),
        ("content_filter", "stop"),
        ("eos_of_another_kind", "stop"),
    ],
)
async def test_finish_reasons_become_ours(theirs: str, ours: str) -> None:
    async with run_upstream(saying(chunk("a", theirs))) as server, remote(server) as engine:
        _, deltas = await generate(engine)

    assert deltas[-1].finish_reason == ours


async def test_finish_without_done_is_an_end() -> None:
    async def without_done(connection: Connection) -> None:
        await connection.begin()
        await connection.frames(chunk("a", "stop", usage=(7, 1)))
        await connection.end(done=False)

    async with run_upstream(without_done) as server, remote(server) as engine:
        prepared, deltas = await generate(engine)

    assert deltas == [Delta("a", finish_reason="stop")]
    assert prepared.usage == Usage(7, 1)


async def test_answer_that_is_complete_survives_a_break_before_its_usage() -> None:
    async def cut_at_the_end(connection: Connection) -> None:
        await connection.begin()
        await connection.frames(chunk("a", "stop"))
        connection.cut()

    async with run_upstream(cut_at_the_end) as server, remote(server) as engine:
        prepared, deltas = await generate(engine)

    assert deltas == [Delta("a", finish_reason="stop")]
    assert prepared.usage == Usage(7, 1, estimated=True)


# Tokens


async def test_usage_after_an_abort_is_what_the_server_had_told() -> None:
    async def many_tokens_per_frame(connection: Connection) -> None:
        await connection.begin()
        await connection.frames(chunk("a", usage=(7, 4)), chunk("b", usage=(7, 9)))
        await connection.left()

    async with run_upstream(many_tokens_per_frame) as server, remote(server) as engine:
        prepared = await engine.prepare(request())
        async with contextlib.aclosing(engine.generate(prepared)) as deltas:
            assert [(await anext(deltas)).text for _ in range(2)] == ["a", "b"]

        assert prepared.usage == Usage(7, 9)


async def test_tokens_that_the_reader_did_not_wait_for_are_counted() -> None:
    asked_for = asyncio.Event()
    rest = [b"data: %b\n\n" % json.dumps(chunk(" word", usage=(7, number))).encode() for number in range(2, 10_001)]

    async def fast(connection: Connection) -> None:
        await connection.begin()
        await connection.frames(chunk("One", usage=(7, 1)))
        await asked_for.wait()
        await connection.send(*rest)
        await connection.left()

    transport = Http1Transport(None, keepalive_s=1.0)
    async with run_upstream(fast, max_model_len=40_000) as server, remote(server, transport=transport) as engine:
        prepared = await engine.prepare(request())
        async with contextlib.aclosing(engine.generate(prepared)) as deltas:
            await anext(deltas)
            asked_for.set()
            size = sum(map(len, rest))
            await until(lambda: sum(connection.waiting_bytes for connection in transport.connections) == size)

        assert prepared.usage == Usage(7, 10_000)


async def test_usage_per_choice_is_summed() -> None:
    frames = [chunk("a", index=0, usage=(7, 2)), chunk("b", index=1, usage=(7, 3)), chunk("c", index=0, usage=(7, 5))]
    async with run_upstream(saying(*frames)) as server, remote(server) as engine:
        prepared = await engine.prepare(request(n=2))
        with contextlib.suppress(EngineDied):
            _ = [delta async for delta in engine.generate(prepared)]

    assert prepared.usage == Usage(7, 8)


async def test_server_that_tells_no_usage_is_counted_by_frames_and_marked() -> None:
    frames = [chunk("", role="assistant"), chunk("a"), chunk("b"), chunk("", "stop")]
    async with run_upstream(saying(*frames)) as server, remote(server) as engine:
        prepared, _ = await generate(engine)

    assert prepared.usage == Usage(7, 2, estimated=True)


@pytest.mark.parametrize(
    "usage",
    [{"prompt_tokens": 7, "completion_tokens": None}, {"prompt_tokens": "7", "completion_tokens": 1}, [], "none", {}],
)
async def test_usage_that_is_none_counts_as_untold(usage: Any) -> None:
    frames = [chunk("a") | {"usage": usage}, chunk("b", "stop") | {"usage": usage}, {"choices": [], "usage": usage}]
    async with run_upstream(saying(*frames)) as server, remote(server) as engine:
        prepared, _ = await generate(engine)

    assert prepared.usage == Usage(7, 2, estimated=True)


async def test_sum_at_the_end_replaces_the_count() -> None:
    told = summary(8, 30, prompt_tokens_details={"cached_tokens": 4}, completion_tokens_details={"reasoning_tokens": 9})
    async with run_upstream(saying(chunk("a"), chunk("b", "stop"), told)) as server, remote(server) as engine:
        prepared, _ = await generate(engine)

    assert prepared.usage == Usage(8, 30, 4, 9)


async def test_generation_that_never_began_cost_nothing() -> None:
    async with run_upstream(stuck) as server, remote(server, first_token_timeout_s=0.05) as engine:
        prepared = await engine.prepare(request())
        with pytest.raises(EngineUnavailable):
            _ = [delta async for delta in engine.generate(prepared)]

    assert prepared.usage == Usage()


async def test_prompt_is_counted_by_the_server() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    async with run_upstream(hello) as server, remote(server) as engine:
        prepared = await engine.prepare(request(tools=tools))
        ids = await engine.tokenize(request(prompt="one two"))

    asked = [received.body for received in server.received if received.path == TOKENIZE]
    assert asked == [
        {"model": "demo", "messages": HELLO, "add_generation_prompt": True, "tools": tools},
        {"model": "demo", "prompt": "one two"},
    ]
    assert (prepared.prompt_tokens, prepared.usage.estimated, ids) == (7, False, list(range(7)))


@pytest.mark.parametrize(
    "answer",
    [refusing(404), refusing(405), refusing(403), refusing(200, {"tokens": []}), refusing(200, b"<html>")],
    ids=["404", "405", "403", "llama.cpp", "html"],
)
async def test_prompt_is_estimated_where_nobody_counts(answer: Callable[[Connection], Awaitable[None]]) -> None:
    messages = [{"role": "user", "content": "x" * 400}]
    async with run_upstream(saying(chunk("a", "stop")), routes={TOKENIZE: answer}) as server, remote(server) as engine:
        for _ in range(2):
            prepared, _ = await generate(engine, messages=messages, max_tokens=5)
        with pytest.raises(InvalidRequest, match="does not tokenize"):
            await engine.tokenize(request())

    assert prepared.prompt_tokens == 108
    assert prepared.usage == Usage(108, 1, estimated=True)
    assert sum(received.path == TOKENIZE for received in server.received) == 1, "asked once"


async def test_estimate_is_corrected_by_the_server() -> None:
    routes = {TOKENIZE: refusing(404)}
    async with run_upstream(hello, routes=routes) as server, remote(server) as engine:
        prepared, _ = await generate(engine)

    assert prepared.usage == Usage(7, 3)
    assert "max_tokens" not in server.generations[0].body, "all the room there is, by an estimate, may be too much"


async def test_images_are_not_estimated_by_the_length_of_their_urls() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]
    routes = {TOKENIZE: refusing(404)}
    async with run_upstream(hello, routes=routes, max_model_len=8192) as server, remote(server) as engine:
        prepared = await engine.prepare(request(messages=messages))

    assert 1000 < prepared.prompt_tokens < 1100


async def test_prompt_that_the_tokenizer_refuses_is_left_to_the_generation() -> None:
    routes = {TOKENIZE: refusing(400, error(type="BadRequestError"))}
    async with run_upstream(hello, routes=routes) as server, remote(server) as engine:
        assert (await engine.prepare(request())).usage.estimated
        with pytest.raises(InvalidRequest) as caught:
            await engine.tokenize(request())

    assert SECRET_WORDS not in str(caught.value)


async def test_prompt_beyond_the_context_is_refused_before_it_is_sent() -> None:
    async with run_upstream(hello, prompt_tokens=1000) as server, remote(server) as engine:
        with pytest.raises(InvalidRequest, match="maximum context length is 1000") as caught:
            await engine.prepare(request())

    assert caught.value.code == "context_length_exceeded"
    assert server.generations == []


async def test_detokenizer_is_the_servers() -> None:
    routes = {"/detokenize": refusing(200, {"prompt": "one two"})}
    async with run_upstream(hello, routes=routes) as server, remote(server) as engine:
        assert await engine.detokenize([1, 2]) == "one two"
        server.routes["/detokenize"] = refusing(400, error())
        with pytest.raises(InvalidRequest, match="not in the vocabulary"):
            await engine.detokenize([10**9])

    assert server.received[-2].body == {"model": "demo", "tokens": [1, 2]}


# Where it is tried again


@pytest.mark.parametrize(
    "failing",
    [
        refusing(502, b"<html>Bad Gateway"),
        refusing(503, b""),
        refusing(504, b""),
        refusing(429, error(), retry_after="3"),
        refusing(503, error(code="server_overloaded")),
        refusing(401, error(code="invalid_api_key")),
        cut_before_a_token,
        saying(error(type="InternalServerError", code=500) | {"choices": []}),
        lambda connection: connection.reply(200, {"choices": []}),
    ],
    ids=["502", "503", "504", "429", "overloaded", "401", "cut", "error frame", "not a stream"],
)
async def test_another_replica_serves_what_one_could_not_begin(
    failing: Callable[[Connection], Awaitable[None]],
) -> None:
    async with run_upstream(failing) as bad, run_upstream(hello) as good, remote(bad, good) as engine:
        for _ in range(8):
            prepared, deltas = await generate(engine)
            assert "".join(delta.text for delta in deltas) == "Hello there"
            assert prepared.usage == Usage(7, 3)

        assert len(bad.generations) >= 1
        assert [replica.in_flight for replica in engine.replicas] == [0, 0]


async def test_slow_first_token_is_waited_for_elsewhere_and_slow_is_not_dead() -> None:
    impatient = {"first_token_timeout_s": 0.05, "breaker_failures": 1}
    async with run_upstream(stuck) as slow, run_upstream(hello) as good, remote(slow, good, **impatient) as engine:
        while not slow.generations:
            await generate(engine)
        await until(lambda: not engine.replicas[0].breaker.suspected)

        assert slow.probes == 2, "at the start, and when it was slow"
        assert [replica.breaker.state for replica in engine.replicas] == ["closed", "closed"]
        assert [replica.weight > 1 for replica in engine.replicas] == [True, False], "it gets less to do"


async def test_slow_first_token_of_a_server_that_fails_its_probe_opens_the_breaker() -> None:
    impatient = {"first_token_timeout_s": 0.05, "breaker_failures": 1}
    async with run_upstream(stuck) as bad, run_upstream(hello) as good, remote(bad, good, **impatient) as engine:
        bad.routes["/health"] = refusing(503, b"")
        while not bad.generations:
            await generate(engine)

        await until(lambda: engine.replicas[0].breaker.state == "open")
        assert engine.replicas[1].breaker.state == "closed"


async def queueing(connection: Connection) -> None:
    """Say that the request is in a queue, for ever."""
    await connection.begin()
    while True:
        await connection.send(b": queued, position 3\n\n")
        await asyncio.sleep(0.01)


async def test_comments_from_a_queue_prolong_the_wait_for_the_first_token() -> None:
    async def queue(connection: Connection) -> None:
        await connection.begin()
        for _ in range(10):
            await connection.send(b": queued, position 3\n\n")
            await asyncio.sleep(0.03)
        await connection.frames(*HELLO_STREAM)
        await connection.end()

    async with run_upstream(queue) as server, remote(server, first_token_timeout_s=0.2) as engine:
        prepared, _ = await generate(engine)

    assert prepared.usage == Usage(7, 3)


async def test_comments_prolong_no_wait_for_ever() -> None:
    times = {"first_token_timeout_s": 0.1, "queue_timeout_s": 0.2}
    async with run_upstream(queueing) as server, remote(server, **times) as engine:
        with pytest.raises(EngineUnavailable):
            await generate(engine)


async def test_dead_replica_is_tried_a_few_times_and_then_left_alone() -> None:
    async with run_upstream(hello) as good, run_upstream(hello) as doomed, remote(good, doomed) as engine:
        await doomed.stop()
        for _ in range(40):
            await generate(engine)

        await until(lambda: engine.replicas[1].breaker.state == "open")
        assert engine.replicas[0].breaker.state == "closed"


async def test_only_replica_is_tried_again_when_it_broke_the_connection() -> None:
    answers = [cut_before_a_token, hello]
    async with run_upstream(lambda connection: answers.pop(0)(connection)) as server, remote(server) as engine:
        _, deltas = await generate(engine)

    assert len(server.generations) == 2
    assert "".join(delta.text for delta in deltas) == "Hello there"


async def ending_early(connection: Connection) -> None:
    await connection.begin()
    await connection.frames(*HELLO_STREAM[:2])
    await connection.end(done=False)


LATE_FAILURES = [
    cut_after_a_token,
    saying(*HELLO_STREAM[:2], error(type="InternalServerError", code=500)),
    ending_early,
    saying(*HELLO_STREAM[:2], {"choices": "none"}),
    saying(*HELLO_STREAM[:2], chunk("", "abort")),
]
LATE_FAILURE_IDS = ["cut", "error frame", "no finish", "nonsense", "abort"]
LATE_REFUSAL = saying(*HELLO_STREAM[:2], error(type="BadRequestError", code=400))


@pytest.mark.parametrize("failing", LATE_FAILURES, ids=LATE_FAILURE_IDS)
async def test_whole_answer_is_tried_again_after_the_first_token(
    failing: Callable[[Connection], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    async with run_upstream(failing) as bad, run_upstream(hello) as good, remote(bad, good) as engine:
        while not bad.generations:
            prepared, deltas = await generate(engine, stream=False)
            assert deltas == [Delta("Hello there", finish_reason="stop", tool_calls=[])]
            assert prepared.usage == Usage(7, 3), "the attempt that failed is not on the bill"

        assert [replica.discarded_tokens for replica in engine.replicas] == [8, 0]


@pytest.mark.parametrize("failing", LATE_FAILURES, ids=LATE_FAILURE_IDS)
async def test_whole_answer_is_tried_again_a_few_times_and_costs_nothing_in_the_end(
    failing: Callable[[Connection], Awaitable[None]],
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(run_upstream(failing)) for _ in range(5)]
        engine = await stack.enter_async_context(remote(*servers, retries=2))
        prepared = await engine.prepare(request(stream=False))
        with pytest.raises(EngineUnavailable):
            _ = [delta async for delta in engine.generate(prepared)]

        assert 2 <= sum(len(server.generations) for server in servers) <= 3
        assert prepared.usage == Usage()
        assert engine.unfinished_requests == 0


async def test_late_refusal_of_a_whole_answer_is_the_requests_fault() -> None:
    async with run_upstream(LATE_REFUSAL) as server, remote(server) as engine:
        with pytest.raises(InvalidRequest):
            await generate(engine, stream=False)

        assert len(server.generations) == 1


@pytest.mark.parametrize("failing", [*LATE_FAILURES, LATE_REFUSAL], ids=[*LATE_FAILURE_IDS, "late refusal"])
async def test_stream_is_not_tried_again_after_the_first_token(
    failing: Callable[[Connection], Awaitable[None]],
) -> None:
    async with run_upstream(failing) as one, run_upstream(failing) as other, remote(one, other) as engine:
        prepared = await engine.prepare(request())
        with pytest.raises(EngineDied) as caught:
            _ = [delta async for delta in engine.generate(prepared)]

        assert str(caught.value) == "The engine failed during generation."
        assert len(one.generations) + len(other.generations) == 1
        assert prepared.usage == Usage(7, 1)
        assert engine.unfinished_requests == 0


async def test_silence_after_the_first_token_ends_the_generation() -> None:
    async with run_upstream(silent_after_a_token) as server, remote(server, idle_timeout_s=0.05) as engine:
        with pytest.raises(EngineDied):
            await generate(engine)


async def test_signs_of_life_keep_a_silent_stream_open() -> None:
    async def slow(connection: Connection) -> None:
        await connection.begin()
        await connection.frames(HELLO_STREAM[1])
        for _ in range(10):
            await asyncio.sleep(0.03)
            await connection.send(b": keepalive\n\n")
        await connection.frames(*HELLO_STREAM[2:])
        await connection.end()

    async with run_upstream(slow) as server, remote(server, idle_timeout_s=0.2) as engine:
        prepared, _ = await generate(engine)

    assert prepared.usage == Usage(7, 3)


async def test_unreachable_network_is_given_up_in_time() -> None:
    # TEST-NET-1: packets to it go nowhere, or are refused at once where there is no route.
    async with remote("http://192.0.2.1/v1", connect_timeout_s=0.05, max_model_len=100) as engine:
        assert engine.replicas[0].breaker.state == "open"
        with pytest.raises(EngineUnavailable):
            await generate(engine)


async def test_overload_everywhere_is_told_as_overload() -> None:
    full = refusing(429, error(code="rate_limit_exceeded"), retry_after="4")
    async with run_upstream(full) as one, run_upstream(full) as other, remote(one, other) as engine:
        for _ in range(10):
            with pytest.raises(EngineOverloaded) as caught:
                await generate(engine)

        assert caught.value.retry_after_s == 4.0
        assert [replica.breaker.state for replica in engine.replicas] == ["closed", "closed"]


async def test_request_that_breaks_servers_is_carried_to_one_more_only() -> None:
    async with contextlib.AsyncExitStack() as stack:
        broken = refusing(500, error())
        servers = [await stack.enter_async_context(run_upstream(broken)) for _ in range(4)]
        engine = await stack.enter_async_context(remote(*servers, retries=9))
        with pytest.raises(EngineUnavailable):
            await generate(engine)

    assert sum(len(server.generations) for server in servers) == 2


@pytest.mark.parametrize("status", [302, 401, 403, 404, 405])
async def test_what_an_operator_must_mend_is_logged_once_and_opens_no_breaker_by_itself(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    answer = refusing(status, error(code="invalid_api_key"), location="http://127.0.0.1:9/")
    async with run_upstream(answer) as server, remote(server, api_key="sk-up") as engine:
        prepared = await engine.prepare(request())
        for _ in range(10):
            with pytest.raises(EngineUnavailable) as caught:
                _ = [delta async for delta in engine.generate(prepared)]

        assert engine.replicas[0].breaker.state == "closed"
    assert caplog.text.count(f"answered {status} (invalid_api_key); check") == 1
    for words in (SECRET_WORDS, "sk-up"):
        assert words not in caplog.text + str(caught.value)


ROUTED = "http://replica.test/v1"


def vllm_router() -> respx.Router:
    """Return a router that answers at ROUTED what vLLM answers to everything but generations."""
    router = respx.Router(assert_all_called=False)
    router.get("http://replica.test/health").respond(200)
    models = {"data": [{"id": "demo", "max_model_len": 1000, "owned_by": "vllm"}]}
    router.get(f"{ROUTED}/models").respond(json=models)
    router.post("http://replica.test/tokenize").respond(json={"count": 3, "tokens": [0] * 3})
    return router


# The request's own fault: each of these is the body of a refusal, and what a client reads of it.
REFUSALS: list[tuple[int, Any, str | None, str | None, str]] = [
    (
        400,
        error(param="temperature", code=400, type="BadRequestError"),
        "temperature",
        None,
        "Invalid value for 'temperature'",
    ),
    (422, error(param="messages[0].role", code="bad_role"), "messages[0].role", "bad_role", "Invalid value"),
    (400, error(param="max_tokens"), "max_completion_tokens", None, "Invalid value for 'max_completion_tokens'"),
    (400, error(param=f"<b>{SECRET_WORDS}"), None, None, "refuses the request as invalid"),
    (400, error(code=SECRET_WORDS), None, None, "refuses the request as invalid"),
    (400, error(f"maximum context length is 9. {SECRET_WORDS}"), "messages", "context_length_exceeded", "does not fit"),
    (400, error(param="input_tokens"), "messages", "context_length_exceeded", "does not fit"),
    (400, error(code="context_length_exceeded"), "messages", "context_length_exceeded", "does not fit"),
    (
        422,
        {"detail": [{"loc": ["body", "messages", 0, "role"], "msg": SECRET_WORDS}]},
        "messages[0].role",
        None,
        "role",
    ),
    (422, {"detail": [{"loc": "body", "msg": SECRET_WORDS}]}, None, None, "refuses the request as invalid"),
    (422, {"detail": [{"loc": ["body", SECRET_WORDS]}]}, None, None, "refuses the request as invalid"),
    (422, {"detail": ["x", None]}, None, None, "refuses the request as invalid"),
    (413, SECRET_WORDS.encode(), None, "request_too_large", "too large"),
    (400, SECRET_WORDS.encode() * 10_000, None, None, "refuses the request as invalid"),
    (400, ["nonsense"], None, None, "refuses the request as invalid"),
    (400, {"error": SECRET_WORDS}, None, None, "refuses the request as invalid"),
    (400, {"object": "error", "message": SECRET_WORDS, "param": "seed"}, "seed", None, "Invalid value for 'seed'"),
]


@pytest.mark.parametrize(("status", "body", "param", "code", "words"), REFUSALS)
async def test_refusal_of_a_request_is_told_in_our_words(
    status: int, body: Any, param: str | None, code: str | None, words: str
) -> None:
    router = vllm_router()
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    chat = router.post(f"{ROUTED}/chat/completions").respond(status, content=content)
    async with remote(ROUTED, transport=httpx.MockTransport(router.async_handler)) as engine:
        prepared = await engine.prepare(request(max_tokens=5, max_tokens_param="max_completion_tokens"))
        for _ in range(4):
            with pytest.raises(InvalidRequest, match=words) as caught:
                _ = [delta async for delta in engine.generate(prepared)]

        assert (caught.value.param, caught.value.code) == (param, code)
        assert SECRET_WORDS not in f"{caught.value}{caught.value.param}{caught.value.code}"
        assert chat.call_count == 4, "never tried again"
        assert engine.replicas[0].breaker.state == "closed", "a client must not be able to shut a replica off"
        assert engine.unfinished_requests == 0


async def test_refusal_inside_a_stream_is_the_requests_fault_too() -> None:
    frame = error(type="BadRequestError", code=400, param="seed")
    async with run_upstream(saying(frame)) as server, remote(server) as engine:
        with pytest.raises(InvalidRequest, match="seed") as caught:
            await generate(engine)

    assert SECRET_WORDS not in str(caught.value)


@pytest.mark.parametrize(
    ("param", "expected"),
    [
        ("stream_options.continuous_usage_stats", {"include_usage": True}),
        ("stream_options", None),
    ],
)
async def test_options_that_a_server_does_not_know_are_left_out_from_then_on(
    param: str, expected: dict[str, Any] | None
) -> None:
    async def choosy(connection: Connection) -> None:
        if connection.request.body.get("stream_options") == expected:
            await hello(connection)
        else:
            await connection.reply(400, error(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter"))

    async with run_upstream(choosy) as server, remote(server) as engine:
        for _ in range(2):
            await generate(engine)

    assert [received.body.get("stream_options") for received in server.generations][1:] == [expected, expected]


WORDS_ON_OPTIONS: dict[str, Any] = {
    "OpenAI": lambda path: error(f"Unrecognized request argument supplied: {path[-1]}"),
    "vLLM": lambda path: {"object": "error", "message": f"[{{'loc': ('body', {path})}}]", "code": 400},
    "FastAPI": lambda path: {"detail": [{"type": "extra_forbidden", "loc": ["body", *path], "msg": "not permitted"}]},
    "FastAPI's second": lambda path: {"detail": [{"loc": ["body", "x"]}, {"loc": ["body", *path], "msg": "no"}]},
    "Mistral": lambda path: {"object": "error", "message": {"detail": [{"loc": ["body", *path]}]}, "code": None},
    "object": lambda path: {"detail": {"error": {"message": f"{path[-1]} is unknown"}}},
    "text": lambda path: {"error": f"{'.'.join(path)}: unknown field"},
}


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("server_kind", WORDS_ON_OPTIONS)
async def test_options_are_left_out_in_whatever_words_a_server_refuses_them(server_kind: str, status: int) -> None:
    """Without it every request of every client would be refused by such a server."""

    async def strict(connection: Connection) -> None:
        options = connection.request.body.get("stream_options")
        if options is None:
            await hello(connection)
        else:
            path = ["stream_options", *(["continuous_usage_stats"] if len(options) > 1 else [])]
            await connection.reply(status, WORDS_ON_OPTIONS[server_kind](path))

    async with run_upstream(strict) as server, remote(server) as engine:
        for _ in range(2):
            await generate(engine)

    assert len(server.generations) == 4


async def test_newer_name_of_max_tokens_is_used_where_the_older_is_refused() -> None:
    async def choosy(connection: Connection) -> None:
        if "max_tokens" in connection.request.body:
            await connection.reply(400, error(param="max_tokens", code="unsupported_parameter"))
        else:
            await hello(connection)

    async with run_upstream(choosy) as server, remote(server) as engine:
        await generate(engine, max_tokens=5)

    assert server.generations[-1].body["max_completion_tokens"] == 5


async def test_option_refused_for_ever_is_an_error_in_the_end() -> None:
    refusal = refusing(400, error("stream_options are forbidden"))
    async with run_upstream(refusal) as server, remote(server) as engine:
        with pytest.raises(InvalidRequest):
            await generate(engine)

        assert len(server.generations) == 2


async def test_refusal_that_quotes_a_client_does_not_turn_counting_off() -> None:
    async def quoting(connection: Connection) -> None:
        words = connection.request.body.get("stop")
        if words:
            await connection.reply(400, error(f"Bad stop: {words}"))
        else:
            await hello(connection)

    async with run_upstream(quoting) as server, remote(server) as engine:
        with pytest.raises(InvalidRequest):
            await generate(engine, stop=["continuous_usage_stats"])
        await generate(engine)

    assert server.generations[-1].body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


# Leaving


async def test_leaving_closes_the_connection_at_once() -> None:
    left = asyncio.Event()

    async def watched(connection: Connection) -> None:
        await silent_after_a_token(connection)
        left.set()

    async with run_upstream(watched) as server, remote(server) as engine:
        prepared = await engine.prepare(request())
        async with contextlib.aclosing(engine.generate(prepared)) as deltas:
            await anext(deltas)
            assert engine.unfinished_requests == engine.replicas[0].in_flight == 1

        await asyncio.wait_for(left.wait(), 5)
        assert engine.unfinished_requests == engine.replicas[0].in_flight == 0
        assert engine.replicas[0].breaker.state == "closed"


@pytest.mark.parametrize("answer", [stuck, silent_after_a_token])
async def test_cancelled_generation_is_aborted(answer: Callable[[Connection], Awaitable[None]]) -> None:
    left = asyncio.Event()

    async def watched(connection: Connection) -> None:
        await answer(connection)
        left.set()

    async with run_upstream(watched) as server, remote(server) as engine:
        prepared = await engine.prepare(request())

        async def read() -> None:
            async with contextlib.aclosing(engine.generate(prepared)) as deltas:
                async for _ in deltas:
                    pass

        task = asyncio.create_task(read())
        await until(lambda: bool(server.generations))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        await asyncio.wait_for(left.wait(), 5)
        assert engine.unfinished_requests == engine.replicas[0].in_flight == 0


@pytest.mark.parametrize("answer", [stuck, silent_after_a_token])
async def test_closing_ends_running_generations(answer: Callable[[Connection], Awaitable[None]]) -> None:
    async with run_upstream(answer) as server, remote(server) as engine:
        task = asyncio.create_task(generate(engine))
        await until(lambda: engine.replicas[0].in_flight == 1 and bool(server.generations))
        await engine.close()

        with pytest.raises(EngineDied):
            await task
        with pytest.raises(EngineUnavailable, match="not running"):
            await engine.prepare(request())
        with pytest.raises(EngineUnavailable, match="not running"):
            await engine.check_health()
        await engine.close()


# Replicas that come and go


async def test_start_names_replicas_that_do_not_answer_and_serves_with_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with run_upstream(hello) as server, remote(DEAD, server) as engine:
        assert f"replica {DEAD} could not be reached" in caplog.text
        for _ in range(5):
            await generate(engine)


async def test_engine_starts_before_its_servers_and_serves_when_they_come() -> None:
    async with run_upstream(hello) as server:
        await server.stop()
        async with remote(server, breaker_open_s=0.01, breaker_max_open_s=0.02) as engine:
            await engine.check_health()
            with pytest.raises(EngineUnavailable, match="Try again shortly"):
                await engine.prepare(request())
            with pytest.raises(EngineUnavailable, match="No server of this model has answered yet"):
                _ = engine.max_model_len

            await server.start()
            await until(lambda: engine.replicas[0].breaker.state != "open")

            assert engine.max_model_len == 1000
            prepared, _ = await generate(engine)
            assert prepared.usage == Usage(7, 3)
            assert engine.replicas[0].breaker.state == "closed"


async def test_unwell_server_is_not_asked_until_it_says_that_it_is_well() -> None:
    routes = {"/health": refusing(503, b"")}
    async with run_upstream(hello, routes=routes) as server, remote(server, breaker_open_s=0.01) as engine:
        with pytest.raises(EngineUnavailable):
            await engine.prepare(request())
        assert not server.generations

        del server.routes["/health"]
        await until(lambda: engine.replicas[0].breaker.state != "open")

        await generate(engine)


async def test_outage_of_all_servers_does_not_restart_the_engine() -> None:
    async with run_upstream(cut_after_a_token) as server:
        built: list[RemoteEngine] = []

        def build() -> RemoteEngine:
            built.append(RemoteEngine([server.url], "demo", breaker_open_s=0.01))
            return built[-1]

        engine = SupervisedEngine("main", build, check_every_s=0.005)
        await engine.start()
        for _ in range(2):
            prepared = await engine.prepare(request())
            with pytest.raises(EngineDied):
                _ = [delta async for delta in engine.generate(prepared)]
        await server.stop()
        await until(lambda: _fails_to_probe(engine))
        server.chat = hello
        await server.start()
        await until(lambda: built[0].replicas[0].breaker.state != "open")

        assert [delta async for delta in engine.generate(await engine.prepare(request()))]
        assert (engine.state, len(built)) == ("ready", 1)
        await engine.close()


def _fails_to_probe(engine: SupervisedEngine) -> bool:
    assert isinstance(engine.current, RemoteEngine)
    (replica,) = engine.current.replicas
    replica.breaker.doubt()
    return replica.breaker.state == "open"


async def test_context_length_is_the_least_that_is_told_unless_it_is_set() -> None:
    async with run_upstream(hello, max_model_len=4096) as large, run_upstream(hello, max_model_len=2048) as small:
        async with remote(large, small) as engine:
            assert engine.max_model_len == 2048
        async with remote(large, small, max_model_len=512) as engine:
            assert engine.max_model_len == 512


async def test_untold_context_length_is_an_operators_task(caplog: pytest.LogCaptureFixture) -> None:
    async with run_upstream(hello, max_model_len=None) as server, remote(server) as engine:
        assert "set max_model_len" in caplog.text
        with pytest.raises(EngineUnavailable):
            await engine.prepare(request())


async def test_unlisted_model_is_named(caplog: pytest.LogCaptureFixture) -> None:
    async with run_upstream(hello) as server:
        engine = RemoteEngine([server.url], "another", max_model_len=100)
        await engine.start()
        for _ in range(3):
            await engine._upstream.probe(engine.replicas[0])
        await engine.close()

    assert caplog.text.count("does not list the model another") == 1


async def test_session_stays_with_its_replica() -> None:
    async with run_upstream(hello) as one, run_upstream(hello) as other, remote(one, other, choice="sticky") as engine:
        for _ in range(6):
            await generate(engine, affinity="oai-1")

    assert sorted([len(one.generations), len(other.generations)]) == [0, 6]


# Another gateway of this kind


async def test_another_shannon_is_a_server_like_any_other(serve: Start) -> None:
    upstream = await serve(mock=lambda: MockEngine(reply="one two three", token_s=0.005))
    engine = RemoteEngine([f"{upstream.url}/v1"], "shannon-chat", api_key=upstream.key, max_model_len=1024)
    await engine.start()
    for stream in (True, False):
        prepared = await engine.prepare(request(stream=stream, cache_salt="salt", priority=3))
        text = "".join([delta.text async for delta in engine.generate(prepared)])
        assert (text, prepared.usage) == ("one two three", Usage(3, 3))
    with pytest.raises(InvalidRequest) as caught:
        _ = [delta async for delta in engine.generate(await engine.prepare(request(temperature=9.0)))]
    assert caught.value.param == "temperature"

    leaving = await engine.prepare(request(ignore_eos=True, max_tokens=900))
    async with contextlib.aclosing(engine.generate(leaving)) as deltas:
        await anext(deltas)
    await until(lambda: upstream.mock.unfinished_requests == 0)
    assert upstream.mock.counters.completion_tokens < 100, "leaving here must abort there"
    await engine.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_wait_at_another_shannon_may_be_longer_than_a_silence(serve: Start, stream: bool) -> None:
    slow = MockEngine(reply="one two three", first_token_s=0.5)
    upstream = await serve(mock=lambda: slow, server={"keepalive_s": 0.05})
    times: dict[str, Any] = {"first_token_timeout_s": 0.3, "queue_timeout_s": 60.0, "max_model_len": 1024}
    engine = RemoteEngine([f"{upstream.url}/v1"], "shannon-chat", api_key=upstream.key, **times)
    await engine.start()
    prepared = await engine.prepare(request(stream=stream))
    text = "".join([delta.text async for delta in engine.generate(prepared)])

    assert (text, prepared.usage) == ("one two three", Usage(3, 3))
    assert engine.replicas[0].weight == 1.0
    await engine.close()


# Embeddings


def packed(*values: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


@pytest.mark.parametrize("encode", [packed, lambda *values: list(values)], ids=["base64", "list"])
async def test_embeddings_come_in_the_order_of_their_inputs(encode: Callable[..., Any]) -> None:
    rows = [{"index": 1, "embedding": encode(0.5, -1.0)}, {"index": 0, "embedding": encode(0.25, 2.0)}]
    router = vllm_router()
    route = router.post(f"{ROUTED}/embeddings").respond(json={"data": rows, "usage": {"prompt_tokens": 9}})
    async with remote(ROUTED, transport=httpx.MockTransport(router.async_handler)) as engine:
        asked = EmbeddingRequest(request_id="r1", inputs=["one", [1, 2]], dimensions=2, cache_salt="salt")
        prepared = await engine.prepare(asked)
        vectors = await engine.pool(prepared)

    assert vectors == [[0.25, 2.0], [0.5, -1.0]]
    assert (prepared.prompt_tokens, prepared.usage) == (5, Usage(9))
    assert json.loads(route.calls.last.request.content) == {
        "model": "demo",
        "input": ["one", [1, 2]],
        "encoding_format": "base64",
        "dimensions": 2,
        "cache_salt": "salt",
    }


@pytest.mark.parametrize(
    "rows",
    [
        [(0, [1.0]), (0, [2.0])],
        [(0, [1.0]), (2, [2.0])],
        [(-1, [1.0]), (0, [2.0])],
        [(0, [1.0]), (True, [2.0, 3.0])],
        [(0, [1.0]), (1, [2.0, 3.0])],
        [(0, []), (1, [])],
        [(0, packed(float("nan"))), (1, packed(1.0))],
        [(0, packed(float("inf"))), (1, packed(-float("inf")))],
    ],
    ids=["same index", "gap", "negative", "truth", "lengths", "empty", "NaN", "infinite"],
)
async def test_vectors_that_do_not_belong_to_the_inputs_are_refused(rows: list[tuple[Any, Any]]) -> None:
    answer = {"data": [{"index": index, "embedding": embedding} for index, embedding in rows]}
    routes = {"/v1/embeddings": refusing(200, answer)}
    async with run_upstream(hello, routes=routes) as server, remote(server, retries=0) as engine:
        prepared = await engine.prepare(EmbeddingRequest(request_id="r1", inputs=["one", "two"]))
        with pytest.raises(EngineUnavailable):
            await engine.pool(prepared)


@pytest.mark.parametrize("told", [10**9, 2**63, -1, None, "9"])
async def test_usage_of_embeddings_that_cannot_be_true_is_not_believed(told: Any) -> None:
    answer = {"data": [{"index": 0, "embedding": [1.0]}], "usage": {"prompt_tokens": told}}
    routes = {"/v1/embeddings": refusing(200, answer)}
    async with run_upstream(hello, routes=routes) as server, remote(server) as engine:
        prepared = await engine.prepare(EmbeddingRequest(request_id="r1", inputs=["one"]))
        await engine.pool(prepared)

    assert prepared.usage == Usage(7)


async def test_long_embeddings_are_read_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full answer, of 2,048 vectors of 4,096 numbers, takes a third of a second."""
    readers: list[threading.Thread] = []

    def read(*args: Any) -> Any:
        readers.append(threading.current_thread())
        return read_vectors(*args)

    monkeypatch.setattr("engine.remote.embeddings.read_vectors", read)
    rows = [{"index": number, "embedding": packed(*[0.5] * 1024)} for number in range(64)]
    routes = {"/v1/embeddings": refusing(200, {"data": rows})}
    async with run_upstream(hello, routes=routes) as server, remote(server) as engine:
        prepared = await engine.prepare(EmbeddingRequest(request_id="r1", inputs=["one"] * 64))
        vectors = await engine.pool(prepared)

    assert vectors == [[0.5] * 1024] * 64
    assert threading.main_thread() not in readers


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, error(param="dimensions"), InvalidRequest),
        (429, error(), EngineOverloaded),
        (200, {"data": []}, EngineUnavailable),
        (200, {"data": [{"index": 0, "embedding": "!"}]}, EngineUnavailable),
        (200, {"data": [{"index": 0, "embedding": ["x"]}]}, EngineUnavailable),
        (200, ["nonsense"], EngineUnavailable),
        (500, error(), EngineUnavailable),
    ],
)
async def test_failed_embedding_is_told_like_a_failed_generation(
    status: int, body: Any, kind: type[EngineError]
) -> None:
    routes = {"/v1/embeddings": refusing(status, body)}
    async with run_upstream(hello, routes=routes) as server, remote(server, retries=0) as engine:
        prepared = await engine.prepare(EmbeddingRequest(request_id="r1", inputs=["one"]))
        with pytest.raises(kind) as caught:
            await engine.pool(prepared)

        assert SECRET_WORDS not in str(caught.value)
        assert engine.unfinished_requests == 0


async def test_many_inputs_are_estimated_and_then_told() -> None:
    rows = [{"index": index, "embedding": [0.0]} for index in range(100)]
    routes = {"/v1/embeddings": refusing(200, {"data": rows, "usage": {"prompt_tokens": 321}})}
    async with run_upstream(hello, routes=routes) as server, remote(server) as engine:
        prepared = await engine.prepare(EmbeddingRequest(request_id="r1", inputs=["x" * 12] * 100))
        assert (prepared.prompt_tokens, prepared.usage.estimated) == (300, True)
        await engine.pool(prepared)

    assert prepared.usage == Usage(321)
    assert not any(received.path == TOKENIZE for received in server.received)


# Settings


def test_settings_are_the_engines_arguments() -> None:
    given = settings(urls=["http://one/v1/", "https://two:8443/prefix/v1"], choice="sticky", lazy=True)
    engine = RemoteEngine(**given.arguments())

    assert [replica.url for replica in engine.replicas] == ["http://one/v1", "https://two:8443/prefix/v1"]
    assert [replica.root for replica in engine.replicas] == ["http://one", "https://two:8443/prefix"]


def test_defaults_of_settings_and_engine_agree() -> None:
    defaults: dict[str, Any] = RemoteEngine.__init__.__kwdefaults__ or {}
    given = settings().arguments()

    assert {name: given[name] for name in given.keys() & defaults.keys()} == {
        name: defaults[name] for name in given.keys() & defaults.keys()
    }
    assert given.keys() - defaults.keys() == {"urls", "model"}
    assert defaults.keys() - given.keys() == {"api_key", "resolve", "clock", "transport"}


@pytest.mark.parametrize(
    "urls",
    [
        [],
        ["http://one"],
        ["one/v1"],
        ["ftp://one/v1"],
        ["http:///v1"],
        ["http://user:secret@one/v1"],
        ["http://one/v1?key=x"],
        ["http://one/v1", "http://one/v1/"],
    ],
)
def test_urls_that_are_no_base_urls_are_refused(urls: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"engines\.main\.urls"):
        settings(urls=urls)


def test_unreadable_authority_is_refused() -> None:
    with pytest.raises(EngineError, match="tls_ca_file"):
        RemoteEngine(["https://one/v1"], "demo", tls_ca_file="/nowhere.pem")


async def test_log_of_httpx_is_not_needed_to_see_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with run_upstream(cut_after_a_token) as server, remote(server) as engine:
        with pytest.raises(EngineDied):
            await generate(engine)

    assert f"replica {server.url} could not be reached (RemoteProtocolError)" in caplog.text or (
        f"replica {server.url} could not be reached (ReadError)" in caplog.text
    )


def test_httpx_errors_have_one_root() -> None:
    assert issubclass(httpx.TransportError, httpx.HTTPError)
    assert issubclass(httpx.DecodingError, httpx.HTTPError)
