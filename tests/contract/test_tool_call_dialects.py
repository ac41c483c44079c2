"""Tool calls of remote servers in any dialect, as clients of each protocol get them, streamed and whole."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

from engine.remote.engine import RemoteEngine
from tests.support.app import Gateway, Start
from tests.support.tool_call_dialects import DIALECTS, NAMES, calls_of
from tests.support.upstream_server import Connection, chunk, run_upstream, summary

pytestmark = pytest.mark.anyio

PARAMETERS = {"type": "object", "properties": {}}
ENDS = {"tool_calls": "tool_calls", "stop": "stop", "function_call": "function_call", "none but [DONE]": None}
"""How a server may end an answer with calls."""


async def speak(connection: Connection) -> None:
    """Answer in the dialect, and with the end, that the user names."""
    asked = connection.request.body["messages"][-1]["content"]
    asked = asked if isinstance(asked, str) else asked[0]["text"]
    dialect, end, form = json.loads(asked)
    finish = [chunk(None, ENDS[end])] if ENDS[end] else []
    if form == "stream":
        frames = [chunk(**delta) for delta in DIALECTS[dialect]]
        await connection.stream(*frames, *finish, summary(7, 9))
        return
    (delta,) = DIALECTS[dialect]
    choice = {"index": 0, "message": {"role": "assistant", "content": None} | delta, "finish_reason": ENDS[end]}
    usage = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
    await connection.reply(200, {"object": "chat.completion", "choices": [choice], "usage": usage})


async def ask_chat(gateway: Gateway, text: str, stream: bool) -> tuple[list[tuple[str, str, str]], str, int]:
    tools = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in NAMES]
    response = await gateway.chat(messages=[{"role": "user", "content": text}], tools=tools, stream=stream)
    assert response.status_code == 200, response.text
    if not stream:
        body = response.json()
        (choice,) = body["choices"]
        calls = choice["message"]["tool_calls"]
        read = [(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in calls]
        return read, choice["finish_reason"], body["usage"]["completion_tokens"]
    frames = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    begun: dict[int, list[str]] = {}
    for piece in (call for frame in frames for call in frame["choices"][0]["delta"].get("tool_calls", [])):
        if piece["index"] not in begun:
            begun[piece["index"]] = [piece["id"], piece["function"]["name"], ""]
        begun[piece["index"]][2] += piece["function"].get("arguments") or ""
    calls = [(call_id, name, arguments) for _, (call_id, name, arguments) in sorted(begun.items())]
    return calls, frames[-1]["choices"][0]["finish_reason"], frames[-1]["usage"]["completion_tokens"]


async def ask_messages(gateway: Gateway, text: str, stream: bool) -> tuple[list[tuple[str, str, str]], str, int]:
    tools = [{"name": name, "input_schema": PARAMETERS} for name in NAMES]
    body = {"model": "shannon-chat", "max_tokens": 64, "messages": [{"role": "user", "content": text}]}
    response = await gateway.client.post("/v1/messages", json=body | {"tools": tools, "stream": stream})
    assert response.status_code == 200, response.text
    reasons = {"tool_use": "tool_calls", "end_turn": "stop"}
    if not stream:
        answer = response.json()
        read = [(block["id"], block["name"], json.dumps(block["input"])) for block in answer["content"]]
        return read, reasons[answer["stop_reason"]], answer["usage"]["output_tokens"]
    blocks: dict[int, list[str]] = {}
    end: dict[str, Any] = {}
    for event in (json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")):
        if event["type"] == "content_block_start":
            block = event["content_block"]
            blocks[event["index"]] = [block["id"], block["name"], ""]
        elif event["type"] == "content_block_delta":
            blocks[event["index"]][2] += event["delta"]["partial_json"]
        elif event["type"] == "message_delta":
            end = event
    calls = [(call_id, name, arguments) for _, (call_id, name, arguments) in sorted(blocks.items())]
    return calls, reasons[end["delta"]["stop_reason"]], end["usage"]["output_tokens"]


async def ask_responses(gateway: Gateway, text: str, stream: bool) -> tuple[list[tuple[str, str, str]], str, int]:
    tools = [{"type": "function", "name": name, "parameters": PARAMETERS} for name in NAMES]
    body = {"model": "shannon-chat", "input": text, "tools": tools, "stream": stream}
    response = await gateway.client.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    if stream:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        answer = events[-1]["response"]
        deltas: dict[str, str] = {}
        for event in events:
            if event["type"] == "response.function_call_arguments.delta":
                deltas[event["item_id"]] = deltas.get(event["item_id"], "") + event["delta"]
        assert deltas == {item["id"]: item["arguments"] for item in answer["output"]}
    else:
        answer = response.json()
    assert answer["status"] == "completed"
    read = [(item["call_id"], item["name"], item["arguments"]) for item in answer["output"]]
    return read, "tool_calls", answer["usage"]["output_tokens"]


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("ask", [ask_chat, ask_messages, ask_responses], ids=["chat", "messages", "responses"])
async def test_same_calls_in_every_dialect(start: Start, ask: Any, stream: bool) -> None:
    async with run_upstream(speak) as server:
        remote: Any = partial(RemoteEngine, [server.url], "demo")
        limits = {"requests_per_minute": 10_000, "tokens_per_minute": 100_000_000}
        models = {"shannon-chat": {"description": "The one under test", "limits": limits}}
        gateway = await start(mock=remote, config={"models": models})
        forms = [
            (dialect, end, "stream") for dialect in DIALECTS for end in ENDS if end == "stop" or dialect == "openai"
        ]
        forms += [(dialect, "stop", "document") for dialect, deltas in DIALECTS.items() if len(deltas) == 1]
        for form in forms:
            calls, finish_reason, tokens = await ask(gateway, json.dumps(form), stream)

            assert [(name, json.loads(arguments)) for _, name, arguments in calls] == calls_of(form[0]), form
            ids = [call_id for call_id, *_ in calls]
            assert all(ids), form
            assert len(set(ids)) == len(ids), form
            assert (finish_reason, tokens) == ("tool_calls", 9), form
