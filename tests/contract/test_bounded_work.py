"""What a request may cost before it is refused: depth, number of errors, time that is linear, and what the key pays."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import orjson
import pytest
from pydantic import ValidationError

from engine.mock import MockEngine
from gateway.access.prompt_size import WORK_BYTES
from gateway.api.chat_schema import ChatCompletionRequest
from gateway.api.messages_schema import MessagesRequest
from gateway.api.response_items import InputItem, messages_of
from gateway.api.schema import parse_body
from gateway.errors import BadRequest, from_validation
from gateway.exchange.json_parser import LARGE_BYTES
from tests.support.app import HELLO, Gateway, Start

pytestmark = pytest.mark.anyio


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


TOOL = '{"type":"function","function":{"name":"f","parameters":%s}}'
CHAT = '{"messages":[{"role":"user","content":"hi"}],%s}'
USER = '{"role":"user","content":"hi"}'
ASSISTANT = '{"messages":[' + USER + ',{"role":"assistant",%s},' + USER + '],"max_tokens":5}'
USE = '"content":[{"type":"tool_use","id":"a","name":"f","input":%s}]'
CALL = '"tool_calls":[{"id":"a","function":{"name":"f","arguments":%s}}]'
MESSAGES = '{"messages":[{"role":"user","content":"hi"}],"max_tokens":5,%s}'
FREE_FORM = {
    "chat context": ("/v1/chat/completions", CHAT % '"shannon_options":{"context":%s}', "shannon_options.context"),
    "chat parameters": ("/v1/chat/completions", CHAT % f'"tools":[{TOOL}]', "tools[0].function.parameters"),
    "chat schema": (
        "/v1/chat/completions",
        CHAT % '"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":%s}}',
        "response_format.json_schema.schema",
    ),
    "chat structured": ("/v1/chat/completions", CHAT % '"structured_outputs":{"json":%s}', "structured_outputs.json"),
    "completions structured": (
        "/v1/completions",
        '{"prompt":"hi","structured_outputs":{"json":%s}}',
        "structured_outputs.json",
    ),
    "tokenize": (
        "/tokenize",
        '{"messages":[{"role":"user","content":"hi"}],"tools":[' + TOOL + "]}",
        "tools[0].function",
    ),
    "responses context": (
        "/v1/responses",
        '{"input":"hi","shannon_options":{"context":%s}}',
        "shannon_options.context",
    ),
    "responses parameters": (
        "/v1/responses",
        '{"input":"hi","tools":[{"type":"function","name":"f","parameters":%s}]}',
        "tools[0].parameters",
    ),
    "responses format": (
        "/v1/responses",
        '{"input":"hi","text":{"format":{"type":"json_schema","name":"a","schema":%s}}}',
        "text.format.schema",
    ),
    "messages input": ("/v1/messages", ASSISTANT % USE, "messages[1].content[0].input"),
    "messages counted": ("/v1/messages/count_tokens", ASSISTANT % USE, "messages[1].content[0].input"),
    "messages schema": ("/v1/messages", MESSAGES % '"tools":[{"name":"f","input_schema":%s}]', "tools[0].input_schema"),
    "messages format": (
        "/v1/messages",
        MESSAGES % '"output_config":{"format":{"type":"json_schema","schema":%s}}',
        "output_config.format.schema",
    ),
    "messages context": ("/v1/messages", MESSAGES % '"shannon_options":{"context":%s}', "shannon_options.context"),
    "messages metadata": ("/v1/messages", MESSAGES % '"metadata":%s', "metadata"),
}
AS_TEXT = {
    "chat arguments": ("/v1/chat/completions", ASSISTANT % CALL, "messages[1].tool_calls[0].function.arguments"),
    "tokenize arguments": (
        "/tokenize",
        '{"messages":[{"role":"assistant",' + CALL + "}]}",
        "messages[0].tool_calls[0].function.arguments",
    ),
    "responses arguments": (
        "/v1/responses",
        '{"input":[{"type":"function_call","call_id":"a","name":"f","arguments":%s}]}',
        "input[0].arguments",
    ),
}


@pytest.mark.parametrize("depth", [129, 200, 254, 255, 300, 500, 1000])
@pytest.mark.parametrize("name", [*FREE_FORM, *AS_TEXT])
async def test_json_that_is_nested_too_deep_is_refused_by_name(start: Start, name: str, depth: int) -> None:
    path, body, param = (FREE_FORM | AS_TEXT)[name]
    value = nested(depth)
    gateway = await start()
    response = await gateway.client.post(
        path, content=body.replace("%s", json.dumps(value) if name in AS_TEXT else value)
    )

    assert response.status_code == 400, response.text[:300]
    message = response.json()["error"]["message"]
    assert param in message
    assert "nested at most" in message
    assert len(message) < 400
    assert gateway.mock.requests == []


@pytest.mark.parametrize("name", ["messages input", "messages metadata", *AS_TEXT])
async def test_json_that_is_nested_less_is_served(start: Start, name: str) -> None:
    path, body, _ = (FREE_FORM | AS_TEXT)[name]
    value = nested(128)
    gateway = await start()
    response = await gateway.client.post(
        path, content=body.replace("%s", json.dumps(value) if name in AS_TEXT else value)
    )

    assert response.status_code == 200, response.text[:300]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [1] * 1000}] * 100}, "messages[0].content"),
        ("/v1/chat/completions", {"messages": [5] * 4000}, "messages[0]"),
        (
            "/v1/chat/completions",
            {"messages": HELLO, "logit_bias": {f"x{n}": "a" for n in range(20_000)}},
            "logit_bias",
        ),
        ("/v1/chat/completions", {"messages": HELLO, "tools": [5] * 10_000}, "tools[0]"),
        (
            "/v1/chat/completions",
            {"messages": HELLO, "structured_outputs": {"choice": [5] * 500}},
            "structured_outputs.choice",
        ),
        ("/v1/completions", {"prompt": [["a"] * 100] * 64}, "prompt[0]"),
        ("/v1/completions", {"prompt": [1, *["a"] * 60_000]}, "prompt[1]"),
        ("/v1/embeddings", {"input": [5.5] * 60_000}, "input[0]"),
        ("/v1/responses", {"input": [{"role": "user", "content": [1] * 1000}] * 100}, "input[0].content"),
        ("/v1/responses", {"input": "hi", "metadata": {f"x{n}": 1 for n in range(20_000)}}, "metadata"),
        ("/v1/responses", {"input": "hi", "tools": [{"type": "web_search"}] * 5000}, "tools[0]"),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": [1] * 1000}] * 100, "max_tokens": 5},
            "messages[0].content",
        ),
        ("/v1/messages", {"messages": HELLO, "system": [5] * 50_000, "max_tokens": 5}, "system"),
        ("/v1/inspect", {"messages": [5] * 4000, "trace_layer": 0}, "messages[0]"),
        ("/detokenize", {"tokens": ["a"] * 50_000}, "tokens[0]"),
        ("/admin/keys", {"name": "a"} | {f"x{n}": 1 for n in range(20_000)}, "x0"),
        ("/admin/keys", {"name": "a", "limits": {f"x{n}": {"y": 1} for n in range(20_000)}}, "limits"),
        ("/admin/keys", {"name": "a", "models": [5] * 20_000}, "models"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_first_of_very_many_faults_is_told(
    start: Start, path: str, body: dict[str, Any], param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def counted(error: ValidationError, data: Any) -> BadRequest:
        counts.append(error.error_count())
        return from_validation(error, data)

    monkeypatch.setattr("gateway.api.schema.from_validation", counted)
    gateway = await start(config={"inspector": {"enabled": True}})
    response = await gateway.client.post(path, json=body)

    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert f"'{param}" in message
    assert len(message) < 400
    assert sum(counts) <= 20, "pydantic makes few errors, of which one is told"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/admin/keys", {"name": "a", "models": ["x" * 100_000]}),
        ("/admin/keys", {"name": "a", "limits": {"x" * 100_000: {}}}),
        ("/admin/keys", {"name": "a", "x" * 100_000: 1}),
        ("/admin/keys", {"name": "a", "limits": {"m": {"x" * 100_000: 1}}}),
        ("/v1/chat/completions", {"messages": HELLO, "logit_bias": {"x" * 100_000: 1}}),
        ("/v1/chat/completions", {"messages": HELLO, "model": "x" * 100_000}),
        ("/v1/responses", {"input": "hi", "metadata": {"x" * 100_000: "a"}}),
        ("/v1/responses", {"input": "hi", "previous_response_id": "x" * 100_000}),
        ("/api/v1/chat/submit", {"client_id": "x" * 100_000, "prompt": "hi"}),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_error_does_not_repeat_what_is_long(gateway: Gateway, path: str, body: dict[str, Any]) -> None:
    response = await gateway.client.post(path, json=body)

    assert response.status_code == 400
    assert len(response.content) < 1000


def text_of(size: int) -> str:
    return "word " * (size // 5)


def remaining(response: httpx.Response) -> int:
    return int(response.headers["x-ratelimit-remaining-requests"])


LONG = text_of(2 * WORK_BYTES)
REFUSED_AFTER_WORK = {
    "field": ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}], "temperature": 9}),
    "context": ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
    "prompt": ("/v1/completions", {"prompt": LONG}),
    "token ids": ("/v1/completions", {"prompt": [5] * WORK_BYTES}),
    "parts": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}]}),
    "responses": ("/v1/responses", {"input": LONG}),
    "embeddings": ("/v1/embeddings", {"input": [LONG, ""]}),
    "image": (
        "/v1/chat/completions",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{LONG}"}}],
                }
            ]
        },
    ),
    "key": ("/admin/keys", {"name": LONG}),
}


@pytest.mark.parametrize("name", REFUSED_AFTER_WORK)
async def test_request_that_is_refused_after_work_counts_as_one(gateway: Gateway, name: str) -> None:
    path, body = REFUSED_AFTER_WORK[name]
    for number in (1, 2):
        response = await gateway.client.post(path, json=body)

        assert response.status_code == 400, response.text[:200]
        assert remaining(response) == 60 - number
    assert remaining(await gateway.chat()) == 57


async def test_refused_anthropic_request_counts_as_well(gateway: Gateway) -> None:
    body = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 5}
    response = await gateway.client.post("/v1/messages", json=body)

    assert (response.status_code, remaining(response)) == (400, 59)


async def test_request_that_could_never_be_admitted_counts_if_it_was_tokenized(start: Start) -> None:
    models = {"shannon-chat": {"description": "Chat", "limits": {"tokens_per_minute": 100}}}
    gateway = await start(mock=lambda: MockEngine(max_model_len=10**6), config={"models": models})
    response = await gateway.chat(messages=[{"role": "user", "content": LONG}])

    assert response.json()["error"]["code"] == "tokens_exceed_limit"
    assert remaining(response) == 59


async def test_history_of_a_session_is_work_as_well(start: Start) -> None:
    """A short request behind a long history is tokenized with it."""
    gateway = await start(mock=lambda: MockEngine(max_model_len=100_000))
    session = {"X-Session-ID": "long"}
    messages = [{"role": "user", "content": LONG}]
    first = await gateway.client.post(
        "/v1/chat/completions", json={"messages": messages, "max_tokens": 1}, headers=session
    )
    assert (first.status_code, remaining(first)) == (200, 59)

    for left in (58, 57):
        body = {"messages": HELLO, "max_tokens": 10**9}
        response = await gateway.client.post("/v1/chat/completions", json=body, headers=session)
        assert (response.status_code, remaining(response)) == (400, left)


async def test_refused_request_is_in_the_usage_with_its_error(gateway: Gateway) -> None:
    await gateway.chat(messages=[{"role": "user", "content": LONG}], temperature=9)

    (row,) = (await gateway.client.get("/v1/usage")).json()["data"]
    assert row["requests"] == 1
    assert row["prompt_tokens"] == 0


async def test_model_that_a_bad_body_names_is_the_one_that_is_charged(gateway: Gateway) -> None:
    bad = await gateway.chat(messages=[{"role": "user", "content": LONG}], temperature=9, model="shannon-complex")

    assert remaining(bad) == 59
    assert remaining(await gateway.chat()) == 59


async def test_key_over_its_limit_gets_no_more_work_done(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []

    def counted(body: bytes) -> Any:
        parsed.append(len(body))
        return orjson.loads(body)

    monkeypatch.setattr("gateway.api.schema.load", counted)
    models = {"shannon-chat": {"description": "Chat", "limits": {"requests_per_minute": 2}}}
    gateway = await start(config={"models": models})
    statuses = [(await gateway.chat(messages=[{"role": "user", "content": LONG}])).status_code for _ in range(5)]

    assert statuses == [400, 400, 429, 429, 429]
    assert len(parsed) == 3, "the last two were refused unparsed"
    last = await gateway.chat(messages=[{"role": "user", "content": LONG}])
    assert 0 < int(last.headers["retry-after"]) <= 61
    assert remaining(last) == 0
    assert (await gateway.chat(temperature=9)).status_code == 400, "small requests are looked at"


async def test_large_request_that_is_served_counts_once(start: Start) -> None:
    gateway = await start(mock=lambda: MockEngine(max_model_len=10**6))
    response = await gateway.chat(messages=[{"role": "user", "content": "x" * 2 * LARGE_BYTES}], max_tokens=1)

    assert (response.status_code, remaining(response)) == (200, 59)


async def test_refused_request_leaves_no_running_one_behind(start: Start) -> None:
    models = {"shannon-chat": {"description": "Chat", "limits": {"concurrent_requests": 1}}}
    gateway = await start(config={"models": models})
    for _ in range(3):
        assert (await gateway.chat(messages=[{"role": "user", "content": LONG}])).status_code == 400
        assert (await gateway.chat(messages=[{"role": "user", "content": LONG}], temperature=9)).status_code == 400
    assert (await gateway.chat()).status_code == 200


async def test_token_ids_of_all_prompts_are_bounded_together(gateway: Gateway) -> None:
    ids = [12345] * 600_000
    for path, field in (("/v1/completions", "prompt"), ("/v1/embeddings", "input")):
        response = await gateway.client.post(path, json={field: [ids, ids]})

        assert response.status_code == 400
        assert response.json()["error"]["param"] == field
        assert "1048576 token ids" in response.json()["error"]["message"]


def calls(turns: int) -> Callable[[], Any]:
    """A history of turns that call tools, as an agent sends it again and again."""
    messages: list[dict[str, Any]] = []
    for turn in range(turns // 2):
        made = [
            {"id": f"call_{turn}_{n}", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            for n in range(16)
        ]
        messages.append({"role": "assistant", "content": None, "tool_calls": made})
        messages.append({"role": "tool", "tool_call_id": f"call_{turn}_0", "content": "x"})
    body = orjson.dumps({"messages": messages})
    return lambda: parse_body(ChatCompletionRequest, body)


def assistants(turns: int) -> Callable[[], Any]:
    """Items of an assistant in a row, which become one message."""
    items = [InputItem(role="assistant", content="x" * 2000) for _ in range(turns)]
    return lambda: messages_of(items)


def uses(turns: int) -> Callable[[], Any]:
    content = [
        {"type": "tool_use", "id": f"a{n}", "name": "f", "input": {"path": "/srv/data/" + "x" * 40}} for n in range(16)
    ]
    body = orjson.dumps(
        {"messages": [{"role": "assistant", "content": content}, *HELLO] * (turns // 2), "max_tokens": 5}
    )
    return lambda: parse_body(MessagesRequest, body).for_engine("x")


@pytest.mark.parametrize("make", [calls, assistants, uses])
def test_history_of_twice_the_length_takes_twice_the_time(make: Callable[[int], Callable[[], Any]]) -> None:
    def seconds(turns: int) -> float:
        run = make(turns)
        times = []
        for _ in range(3):
            started = time.thread_time()
            run()
            times.append(time.thread_time() - started)
        return min(times)

    assert seconds(4096) < 3.2 * seconds(2048) < 3.2 * 1.6 * 2 * seconds(1024) + 0.01


async def test_history_of_calls_that_is_valid_is_served(start: Start) -> None:
    gateway = await start(mock=lambda: MockEngine(max_model_len=10**6))
    turns: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
    for turn in range(2000):
        made = [
            {"id": f"call_{turn}_{n}", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            for n in range(40)
        ]
        turns.append({"role": "assistant", "content": None, "tool_calls": made})
        turns.append({"role": "tool", "tool_call_id": f"call_{turn}_39", "content": "done"})
    response = await gateway.chat(messages=turns, max_tokens=1)

    assert response.status_code == 200, response.text[:300]
    assert gateway.mock.requests[-1].messages[1]["tool_calls"][0] == turns[1]["tool_calls"][0]


async def test_resumed_streams_of_a_key_are_bounded(serve: Start) -> None:
    gateway = await serve(
        mock=lambda: MockEngine(reply="word " * 10_000, token_s=0.05, max_model_len=20_000),
        config={"resume": {"max_streams_per_key": 2}},
    )
    async with gateway.stream(resumable=True) as first:
        url = first.headers["x-shannon-resume"]
        async with gateway.client.stream("GET", url) as one, gateway.client.stream("GET", url) as two:
            assert (one.status_code, two.status_code) == (200, 200)
            refused = await gateway.client.get(url)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "too_many_streams"
            assert "2 resumed streams" in refused.json()["error"]["message"]
            assert int(refused.headers["retry-after"]) >= 1

        async def taken_up() -> bool:
            async with gateway.client.stream("GET", url) as again:
                return again.status_code == 200

        async with asyncio.timeout(5):
            while not await taken_up():  # the server has yet to see that the others left
                await asyncio.sleep(0.01)
