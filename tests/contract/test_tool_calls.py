"""Function calling on the wire: what reaches the engine, and how calls come back, whole and streamed."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import openai
import pytest

from engine.base import Delta, GenerationRequest, ToolCallDelta
from engine.mock import MockEngine
from tests.support.app import HELLO, NOW, Gateway, Start
from tests.support.frames import chunks
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
NO_EVENTS = {"X-Shannon-Events": "off"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
ASK = {"role": "user", "content": "What is the weather?"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}


def piece(index: int, call_id: str | None, name: str | None, arguments: str, text: str = "") -> Delta:
    return Delta(text, tool_calls=[ToolCallDelta(index, call_id, name, arguments)])


def one_call(*, last: str = '"Paris"}') -> list[Delta]:
    return [
        piece(0, "call_1", "get_weather", ""),
        piece(0, None, None, '{"city": '),
        piece(0, None, None, last),
        Delta("", finish_reason="tool_calls"),
    ]


def two_calls() -> list[Delta]:
    return [
        Delta("Let me look."),
        piece(0, "call_1", "get_weather", '{"city": "Paris"}'),
        piece(1, "call_2", "get_weather", '{"city": '),
        piece(1, None, None, '"Tokyo"}'),
        Delta("", finish_reason="tool_calls"),
    ]


def replying(request: GenerationRequest) -> str | list[Delta]:
    """Call the tool on offer; once there is a result, say it."""
    last = request.messages[-1]
    if last["role"] == "tool":
        return f"It is {last['content']}."
    return one_call() if request.tools and request.tool_choice != "none" else "Who knows."


@pytest.fixture
async def gateway(start: Start) -> Gateway:
    """A gateway whose model calls the tools that it is offered."""
    return await start(mock=lambda: MockEngine(reply=replying))


async def ask(gateway: Gateway, *messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Post the messages, with the weather tool unless `tools` are given, and return the whole completion."""
    response = await gateway.chat(**({"messages": list(messages) or [ASK], "tools": [WEATHER]} | fields))
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def raw_stream(gateway: Gateway, **fields: Any) -> bytes:
    """Return the bytes of a stream with the weather tool and without events, its id replaced by ID."""
    body = {"messages": [ASK], "tools": [WEATHER], "stream": True} | fields
    response = await gateway.client.post("/v1/chat/completions", json=body, headers=NO_EVENTS)
    assert response.status_code == 200, response.text
    return re.sub(rb"chatcmpl-[0-9a-f]{32}", b"ID", response.content)


def frame(rest: str) -> bytes:
    head = f'{{"id":"ID","object":"chat.completion.chunk","created":{NOW},"model":"shannon-chat","choices":['
    return f"data: {head}{rest}\n\n".encode()


async def test_whole_answer_has_the_call(gateway: Gateway) -> None:
    (choice,) = (await ask(gateway))["choices"]

    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        "logprobs": None,
        "finish_reason": "tool_calls",
    }


async def test_stream_of_a_call_is_these_bytes(gateway: Gateway) -> None:
    usage = (
        '{"prompt_tokens":5,"completion_tokens":4,"total_tokens":9,'
        '"prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":0}}'
    )
    first = '{"index":0,"id":"call_1","type":"function","function":{"name":"get_weather","arguments":""}}'
    pieces = [
        '{"index":0,"function":{"arguments":"{\\"city\\": "}}',
        '{"index":0,"function":{"arguments":"\\"Paris\\"}"}}',
    ]

    assert await raw_stream(gateway) == b"".join(
        [
            frame('{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}'),
            *(
                frame(f'{{"index":0,"delta":{{"tool_calls":[{it}]}},"finish_reason":null}}]}}')
                for it in (first, *pieces)
            ),
            frame('{"index":0,"delta":{},"finish_reason":"tool_calls"}],"usage":' + usage + "}"),
            b"data: [DONE]\n\n",
        ]
    )


async def test_parallel_calls_keep_their_indexes(start: Start) -> None:
    gateway = await start(mock=lambda: MockEngine(reply=lambda request: two_calls()))
    whole = (await ask(gateway))["choices"][0]["message"]
    calls: dict[int, dict[str, str]] = {}
    text = ""
    for chunk in chunks(await raw_stream(gateway)):
        delta = chunk["choices"][0]["delta"]
        text += delta.get("content") or ""
        for call in delta.get("tool_calls", ()):
            known = calls.setdefault(call["index"], {"id": call.get("id", ""), "arguments": ""})
            known["arguments"] += call["function"]["arguments"]

    assert whole["content"] == text == "Let me look."
    assert [call["id"] for call in whole["tool_calls"]] == ["call_1", "call_2"]
    assert [call["function"]["arguments"] for call in whole["tool_calls"]] == ['{"city": "Paris"}', '{"city": "Tokyo"}']
    assert [calls[index] for index in sorted(calls)] == [
        {"id": call["id"], "arguments": call["function"]["arguments"]} for call in whole["tool_calls"]
    ]


async def test_each_of_n_choices_has_its_calls(gateway: Gateway) -> None:
    whole = await ask(gateway, n=2)
    frames = chunks(await raw_stream(gateway, n=2))

    assert [choice["message"]["tool_calls"] for choice in whole["choices"]] == [[CALL], [CALL]]
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in frames if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[1]["delta"]["tool_calls"][0]["id"] == "call_1"
        assert [choice["finish_reason"] for choice in mine] == [None] * 4 + ["tool_calls"]


async def test_logprobs_ride_beside_the_pieces(gateway: Gateway) -> None:
    frames = chunks(await raw_stream(gateway, logprobs=True))

    pieces = [chunk["choices"][0] for chunk in frames if "tool_calls" in chunk["choices"][0]["delta"]]
    assert len(pieces) == 3
    assert all(len(choice["logprobs"]["content"]) == 1 for choice in pieces)


async def test_events_ride_on_frames_of_calls(gateway: Gateway) -> None:
    response = await gateway.chat(messages=[ASK], tools=[WEATHER], stream=True)

    frames = chunks(response.content)
    types = [event["type"] for chunk in frames for event in chunk.get("shannon_events", ())]
    assert types == ["WORKFLOW_STARTED", "AGENT_STARTED", "AGENT_COMPLETED", "WORKFLOW_COMPLETED"]
    assert len(frames) == 5, "no frame of their own"


async def test_tools_reach_the_engine_as_they_are(gateway: Gateway) -> None:
    strict = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object"}}}
    bare = {"type": "function", "function": {"name": "now"}}
    await ask(gateway, tools=[WEATHER, strict, bare])

    nothing = {"type": "object", "properties": {}}
    assert gateway.mock.requests[-1].tools == [
        WEATHER,
        strict,
        {"type": "function", "function": {"name": "now", "parameters": nothing}},
    ]


@pytest.mark.parametrize("tool_choice", [None, "auto", "none", "required"])
async def test_tool_choice_reaches_the_engine(gateway: Gateway, tool_choice: str | None) -> None:
    await ask(gateway, tool_choice=tool_choice, parallel_tool_calls=False)

    assert gateway.mock.requests[-1].tool_choice == tool_choice
    assert gateway.mock.requests[-1].parallel_tool_calls is False


async def test_named_tool_choice_reaches_the_engine(gateway: Gateway) -> None:
    named = {"type": "function", "function": {"name": "get_time"}}
    await ask(gateway, tools=[WEATHER, TIME], tool_choice=named)

    assert gateway.mock.requests[-1].tool_choice == named


@pytest.mark.parametrize("fields", [{"tools": []}, {"tools": None}, {"tools": [], "tool_choice": "auto"}], ids=str)
async def test_no_tools_are_no_tools(gateway: Gateway, fields: dict[str, Any]) -> None:
    await ask(gateway, **fields, parallel_tool_calls=True)

    request = gateway.mock.requests[-1]
    assert (request.tools, request.tool_choice, request.parallel_tool_calls) == (None, None, None)


async def test_calls_and_results_of_earlier_turns_reach_the_engine(gateway: Gateway) -> None:
    body = await ask(gateway, ASK, CALLED, RESULT)

    assert body["choices"][0]["message"]["content"] == "It is sunny."
    asked, called, result = gateway.mock.requests[-1].messages
    assert asked == ASK
    assert (called["role"], called["tool_calls"]) == ("assistant", [CALL])
    assert result == RESULT


async def test_result_may_come_in_parts_of_text(gateway: Gateway) -> None:
    parts = [{"type": "text", "text": "sun"}, {"type": "text", "text": "ny"}]
    body = await ask(gateway, ASK, CALLED, RESULT | {"content": parts})

    assert body["choices"][0]["message"]["content"] == "It is sunny."


@pytest.mark.parametrize("arguments", ["", '{"city": "Pa', "[1]", "null", "sunny"])
async def test_call_that_was_cut_short_does_not_end_the_talk(gateway: Gateway, arguments: str) -> None:
    """What a model wrote up to its maximum comes back with the history, in every turn that follows."""
    broken = CALL | {"function": {"name": "get_weather", "arguments": arguments}}
    await ask(gateway, ASK, {"role": "assistant", "tool_calls": [broken]}, RESULT)

    assert gateway.mock.requests[-1].messages[1]["tool_calls"] == [broken]


def tools(*names: str) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": name}} for name in names]}


def schema(value: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": value}}]}


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def choosing(name: str) -> dict[str, Any]:
    return {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": name}}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": "weather"}, "tools", "array"),
        ({"tools": [5]}, "tools[0]", "object"),
        ({"tools": [{}]}, "tools[0].", "required"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].", ""),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        ({"tools": [WEATHER, {"type": "function", "function": {}}]}, "tools[1].function.name", "required"),
        (tools("get weather"), "tools[0].function.name", "pattern"),
        (tools("x" * 65), "tools[0].function.name", "pattern"),
        (tools(""), "tools[0].function.name", "pattern"),
        (tools("same", "same"), "tools", "different names"),
        (tools(*(f"f{number}" for number in range(129))), "tools", "128"),
        (schema("object"), "tools[0].function.parameters", "object"),
        (schema({"x": "y" * 32_768}), "tools[0].function.parameters", "32768 bytes"),
        (schema(nested(65)), "tools[0].function.parameters", "64 levels"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 8193}}]},
            "tools[0].function.description",
            "8192",
        ),
        ({"tool_choice": "required"}, "tool_choice", "only allowed when 'tools' are given"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "only allowed when 'tools' are given"),
        (choosing("get_wether"), "tool_choice", "'get_wether', which is not among the tools"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice", "'required'"),
        ({"tools": [WEATHER], "tool_choice": 5}, "tool_choice", ""),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
        ({"tools": [WEATHER], "parallel_tool_calls": "no"}, "parallel_tool_calls", "true or false"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_bad_tools_are_refused_by_name(gateway: Gateway, fields: dict[str, Any], param: str, words: str) -> None:
    response = await gateway.chat(**fields)

    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"].startswith(param)
    assert words in error["message"]
    assert len(error["message"]) < 400
    assert gateway.mock.requests == []


async def test_tools_too_large_together_are_refused(gateway: Gateway) -> None:
    many = [{"type": "function", "function": {"name": f"f{number}", "description": "x" * 8000}} for number in range(20)]
    response = await gateway.chat(tools=many)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"
    assert "131072 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["functions", "function_call"])
async def test_old_form_of_function_calling_is_refused_with_the_new_ones_name(gateway: Gateway, name: str) -> None:
    response = await gateway.chat(**{name: [{"name": "f"}]})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == name
    assert "send 'tool" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([ASK, {"role": "tool", "content": "sunny"}], "messages[1].tool_call_id"),
        ([ASK, RESULT | {"tool_call_id": ""}], "messages[1].tool_call_id"),
        ([ASK, RESULT | {"content": None}], "messages[1].content"),
        ([ASK, CALLED, RESULT | {"tool_call_id": "call_2"}], "messages[2].tool_call_id"),
        ([ASK, {"role": "assistant", "content": "Hm."}, RESULT], "messages[2].tool_call_id"),
        ([ASK | {"tool_calls": [CALL]}], "messages[0].tool_calls"),
        ([ASK | {"tool_call_id": "call_1"}], "messages[0].tool_call_id"),
        ([ASK, CALLED | {"tool_calls": []}], "messages[1].content"),
        ([ASK, CALLED | {"tool_calls": [{"id": "a"}]}], "messages[1].tool_calls[0].function"),
        ([ASK, CALLED | {"tool_calls": [CALL | {"id": 5}]}], "messages[1].tool_calls[0].id"),
        ([ASK, CALLED | {"tool_calls": [CALL | {"type": "custom"}]}], "messages[1].tool_calls[0].type"),
        ([ASK, CALLED | {"tool_calls": [CALL] * 129}], "messages[1].tool_calls"),
    ],
    ids=lambda value: str(value)[-60:],
)
async def test_bad_turn_is_refused_by_name(gateway: Gateway, messages: list[Any], param: str) -> None:
    response = await gateway.chat(messages=messages, tools=[WEATHER])

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert f"'{param}'" in response.json()["error"]["message"] or param.endswith("tool_call_id")
    assert gateway.mock.requests == []


async def in_session(gateway: Gateway, *messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    body = {"messages": list(messages), "tools": [WEATHER]} | fields
    response = await gateway.client.post("/v1/chat/completions", json=body, headers={"X-Session-ID": "talk"})
    assert response.status_code == 200, response.text
    return chunks(response.content)[-1] if fields.get("stream") else response.json()


@pytest.mark.parametrize("stream", [False, True])
async def test_session_remembers_the_call_so_that_the_result_alone_goes_on(gateway: Gateway, stream: bool) -> None:
    await in_session(gateway, ASK, stream=stream)
    body = await in_session(gateway, RESULT)

    assert body["choices"][0]["message"]["content"] == "It is sunny."
    asked, called, result = gateway.mock.requests[-1].messages
    assert (asked, result) == (ASK, RESULT)
    assert (called["content"], called["tool_calls"]) == (None, [CALL])

    stored = (await gateway.client.get("/v1/sessions/talk")).json()["messages"]
    assert [message["role"] for message in stored] == ["user", "assistant", "tool", "assistant"]
    assert stored[1]["tool_calls"] == [CALL]


async def test_session_goes_on_after_a_call_that_was_cut_short(start: Start) -> None:
    def cut(request: GenerationRequest) -> str | list[Delta]:
        return "And now?" if len(request.messages) > 1 else one_call(last='"Par')

    gateway = await start(mock=lambda: MockEngine(reply=cut))
    await in_session(gateway, ASK)
    body = await in_session(gateway, {"role": "user", "content": "Go on."})

    assert body["choices"][0]["message"]["content"] == "And now?"


async def test_history_too_long_for_the_context_never_parts_a_result_from_its_call(start: Start) -> None:
    gateway = await start(mock=lambda: MockEngine(reply=replying, max_model_len=40))
    for _ in range(6):
        await in_session(gateway, ASK, max_tokens=4)
        await in_session(gateway, RESULT, max_tokens=4)
        messages = gateway.mock.requests[-1].messages
        assert messages[0]["role"] != "tool", messages
        for before, message in itertools.pairwise(messages):
            assert message["role"] != "tool" or before["role"] == "assistant"
    assert len(messages) < 24, "some did not fit"


async def test_leaving_in_the_middle_of_a_call_is_settled_to_the_token(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(reply=lambda request: one_call(), token_s=0.002))
    body = {"tools": [WEATHER], "ignore_eos": True, "max_tokens": 900}
    async with gateway.stream(**body) as response:
        async for raw in response.aiter_raw():
            if b"tool_calls" in raw:
                break

    await until(lambda: gateway.mock.unfinished_requests == 0 and gateway.requests_in_progress() == 0)
    assert 0 < gateway.spent().completion_tokens < 900
    assert await gateway.metered() == gateway.spent()


async def test_openai_sdk_gets_the_call_whole_and_streamed(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(reply=replying))
    arguments: dict[str, Any] = {"model": "shannon-chat", "messages": [ASK], "tools": [WEATHER]}
    async with openai.AsyncOpenAI(api_key=gateway.key, base_url=f"{gateway.url}/v1", max_retries=0) as client:
        completion = await client.chat.completions.create(**arguments)
        async with client.chat.completions.stream(**arguments) as stream:
            done = [event async for event in stream if event.type == "tool_calls.function.arguments.done"]
            streamed = await stream.get_final_completion()

    for choice in (completion.choices[0], streamed.choices[0]):
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        assert (call.id, call.function.name) == ("call_1", "get_weather")
        assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert len(done) == 1


async def test_openai_sdk_goes_on_with_the_message_that_it_got(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(reply=replying))
    async with openai.AsyncOpenAI(api_key=gateway.key, base_url=f"{gateway.url}/v1", max_retries=0) as client:
        messages: list[Any] = [ASK]
        called = await client.chat.completions.create(model="shannon-chat", messages=messages, tools=[WEATHER])  # type: ignore[list-item]
        messages += [called.choices[0].message, RESULT]
        answered = await client.chat.completions.create(model="shannon-chat", messages=messages, tools=[WEATHER])  # type: ignore[list-item]

    assert answered.choices[0].message.content == "It is sunny."


async def test_answer_without_tools_has_no_key_of_calls(gateway: Gateway) -> None:
    body = (await gateway.chat(messages=HELLO)).json()

    assert "tool_calls" not in body["choices"][0]["message"]
    assert body["choices"][0]["finish_reason"] == "stop"
