"""Anthropic's Messages API on the wire and, where it is installed, through its own SDK."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from engine.base import Delta, EngineDied, EngineOverloaded, GenerationRequest, ToolCallDelta
from engine.mock import Fault, MockEngine, echo
from tests.support.app import KEY, Gateway, Start
from tests.support.pictures import data_url, picture
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

HELLO: list[Any] = [{"role": "user", "content": "hello there"}]
TOOL = {
    "name": "get_weather",
    "description": "Tell the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {"city": "Paris"}}
RED = data_url(picture("red")).partition(",")[2]
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": RED}}


def reply(request: GenerationRequest) -> str | list[Delta]:
    """Call the tool where there is one, end at a stop string where there is one, and echo else."""
    if request.stop:
        return [Delta("one"), Delta(" two", finish_reason="stop", stop_reason=request.stop[0])]
    if request.reasoning_effort == "high":
        return [Delta("", reasoning="hm"), Delta("yes", finish_reason="stop")]
    if request.tools and request.messages[-1]["role"] == "user":
        pieces = [
            ToolCallDelta(0, "call_1", "get_weather", ""),
            ToolCallDelta(0, arguments='{"city": '),
            ToolCallDelta(0, arguments='"Paris"}'),
        ]
        last = Delta("", finish_reason="tool_calls")
        return [Delta("Let me see."), *(Delta("", tool_calls=[piece]) for piece in pieces), last]
    return echo(request)


@pytest.fixture
async def gateway(start: Start) -> Gateway:
    return await start(mock=lambda: MockEngine(reply=reply, max_model_len=4096, takes_images=True))


async def send(gateway: Gateway, messages: Any = HELLO, **fields: Any) -> httpx.Response:
    body = {"model": "shannon-chat", "max_tokens": 100, "messages": messages} | fields
    return await gateway.client.post("/v1/messages", json=body)


async def message_to(gateway: Gateway, messages: Any = HELLO, **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = (await send(gateway, messages, **fields)).raise_for_status().json()
    return body


def read(raw: bytes) -> list[dict[str, Any]]:
    """Return the events of a stream; each must say in both places what it is."""
    events = []
    for frame in raw.decode().split("\n\n")[:-1]:
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def prompted(gateway: Gateway) -> list[Any]:
    """Return the messages that the engine last saw."""
    return gateway.mock.requests[-1].messages


async def test_message_has_anthropics_shape(gateway: Gateway) -> None:
    response = await send(gateway)
    body = response.json()

    assert body.pop("id").startswith("msg_")
    assert [event["type"] for event in body.pop("shannon_events")][-1:] == ["WORKFLOW_COMPLETED"]
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": "shannon-chat",
        "content": [{"type": "text", "text": "You said: hello there"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 4,
        },
    }
    assert response.headers["x-ratelimit-remaining-requests"] == "59"
    assert response.headers["request-id"] == response.headers["x-request-id"]
    assert await gateway.metered() == gateway.spent()


async def test_stream_has_anthropics_events_in_their_order(gateway: Gateway) -> None:
    events = read((await send(gateway, stream=True)).content)

    assert [event["type"] for event in events] == [
        *("message_start", "content_block_start"),
        *["content_block_delta"] * 4,
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    start, end = events[0], events[-2]
    assert start["message"]["content"] == []
    assert (start["message"]["usage"]["input_tokens"], start["message"]["usage"]["output_tokens"]) == (3, 0)
    assert events[1]["content_block"] == {"type": "text", "text": ""}
    text = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    assert text == "You said: hello there"
    assert end["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert end["usage"]["output_tokens"] == 4
    assert start["shannon_events"][0]["type"] == "WORKFLOW_STARTED"
    assert end["shannon_events"][-1]["type"] == "WORKFLOW_COMPLETED"


@pytest.mark.parametrize("streamed", [False, True])
async def test_calls_are_blocks(gateway: Gateway, streamed: bool) -> None:
    response = await send(gateway, tools=[TOOL], stream=streamed)
    if not streamed:
        body = response.json()
        assert body["content"] == [{"type": "text", "text": "Let me see."}, CALL]
        assert body["stop_reason"] == "tool_use"
        return
    events = read(response.content)
    starts = [event for event in events if event["type"] == "content_block_start"]
    assert [event["index"] for event in starts] == [0, 1]
    assert starts[1]["content_block"] == CALL | {"input": {}}
    pieces = [
        event["delta"]["partial_json"] for event in events if event.get("delta", {}).get("type") == "input_json_delta"
    ]
    assert json.loads("".join(pieces)) == {"city": "Paris"}
    order = [event["type"].removeprefix("content_block_") for event in events if "content_block" in event["type"]]
    assert order == ["start", "delta", "stop", "start", "delta", "delta", "stop"]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize("streamed", [False, True])
async def test_thinking_is_a_block_of_its_own(gateway: Gateway, streamed: bool) -> None:
    response = await send(gateway, output_config={"effort": "high"}, stream=streamed)
    if not streamed:
        thought = {"type": "thinking", "thinking": "hm", "signature": ""}
        assert response.json()["content"] == [thought, {"type": "text", "text": "yes"}]
        return
    deltas = [event["delta"] for event in read(response.content) if event["type"] == "content_block_delta"]
    assert deltas == [{"type": "thinking_delta", "thinking": "hm"}, {"type": "text_delta", "text": "yes"}]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("fields", "stop_reason", "stop_sequence"),
    [({"max_tokens": 2}, "max_tokens", None), ({"stop_sequences": ["three"]}, "stop_sequence", "three")],
)
async def test_stop_reasons(
    gateway: Gateway, streamed: bool, fields: dict[str, Any], stop_reason: str, stop_sequence: str | None
) -> None:
    response = await send(gateway, stream=streamed, **fields)
    end = read(response.content)[-2]["delta"] if streamed else response.json()

    assert (end["stop_reason"], end["stop_sequence"]) == (stop_reason, stop_sequence)


async def test_blocks_become_the_messages_that_templates_know(gateway: Gateway) -> None:
    await message_to(
        gateway,
        [
            {"role": "user", "content": [{"type": "text", "text": "Weather "}, {"type": "text", "text": "in Paris?"}]},
            {"role": "system", "content": "Hurry."},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "text", "text": "So:"},
                    CALL,
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
                    {"type": "text", "text": "And?"},
                ],
            },
        ],
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: 81f"},
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        ],
        tools=[TOOL],
    )

    function = {"name": "get_weather", "arguments": '{"city":"Paris"}'}
    assert prompted(gateway) == [
        {"role": "system", "content": "Be brief.\n\nHurry."},
        {"role": "user", "content": "Weather in Paris?"},
        {
            "role": "assistant",
            "content": "So:",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "user", "content": "And?"},
    ]


async def test_images_reach_the_engine_and_errors_say_where_they_stand(gateway: Gateway) -> None:
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "look"}, IMAGE]}
    history = [*HELLO, {"role": "assistant", "content": [CALL]}]
    await message_to(gateway, [*history, {"role": "user", "content": [result]}], system="Look.")
    assert [message["role"] for message in prompted(gateway)] == ["system", "user", "assistant", "tool", "user"]
    assert prompted(gateway)[-1]["content"][0]["image_url"]["url"] == f"data:image/png;base64,{RED}"

    broken = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        body = {
            "max_tokens": 5,
            "system": "Look.",
            "messages": [*history, {"role": "user", "content": [result, broken]}],
        }
        refused = await gateway.client.post(path, json=body)
        assert refused.status_code == 400
        assert "'messages[2].content[1].source'" in refused.json()["error"]["message"]


async def test_parameters_reach_the_engine_under_its_own_names(gateway: Gateway) -> None:
    await message_to(
        gateway,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        tools=[TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        thinking={"type": "disabled"},
        output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}},
        metadata={"user_id": "me"},
    )

    request = gateway.mock.requests[-1]
    assert (request.temperature, request.top_p, request.top_k, request.default_max_tokens) == (0.5, 0.9, 7, 100)
    assert (request.tool_choice, request.parallel_tool_calls, request.reasoning_effort) == ("required", False, "none")
    assert request.response_format is not None
    assert request.response_format["json_schema"]["schema"] == {"type": "object"}
    function = {"name": "get_weather", "description": "Tell the weather.", "parameters": TOOL["input_schema"]}
    assert request.tools == [{"type": "function", "function": function}]


async def test_maximum_is_a_bound_and_not_a_demand(start: Start) -> None:
    gateway = await start(mock=lambda: MockEngine(max_model_len=50))

    assert (await message_to(gateway, max_tokens=32_000))["stop_reason"] == "end_turn"


@pytest.mark.parametrize("call_tokens", [False, True])
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": None}, "'max_tokens'"),
        ({"messages": []}, "'messages'"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "'messages[0].content[0].type'"),
        ({"messages": [{"role": "user", "content": [CALL]}]}, "can't have a block of type 'tool_use'"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "Well,"}]}, "must end with a message of role 'user'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'tools[0]"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "not among the tools"),
        ({"mcp_servers": [{"url": "https://x"}]}, "MCP servers"),
    ],
)
async def test_refusals_have_anthropics_shape(
    gateway: Gateway, fields: dict[str, Any], says: str, call_tokens: bool
) -> None:
    if call_tokens and fields.keys() & {"max_tokens", "mcp_servers"}:
        return  # not among its fields
    body = {"max_tokens": 5, "messages": HELLO} | fields
    response = await gateway.client.post("/v1/messages" + "/count_tokens" * call_tokens, json=body)

    assert response.status_code == 400, response.text
    assert response.json()["type"] == "error"
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert says in response.json()["error"]["message"]
    assert response.headers["x-ratelimit-limit-requests"] == "60"


async def test_errors_keep_their_status_and_their_headers(start: Start) -> None:
    models = {"shannon-chat": {"description": "Chat", "limits": {"requests_per_minute": 3}}}
    gateway = await start(config={"models": models}, server={"max_body_bytes": 2048})

    async def error(status: int, **fields: Any) -> dict[str, Any]:
        response = await send(gateway, **fields)
        assert response.status_code == status
        assert "x-should-retry" in response.headers
        assert response.headers["request-id"]
        found: dict[str, Any] = response.json()["error"]
        return found

    assert (await error(404, model="claude"))["type"] == "not_found_error"
    assert (await error(413, system="a" * 3000))["type"] == "request_too_large"
    for streamed in (False, True):
        gateway.mock.faults.append(Fault(error=EngineOverloaded("full")))
        assert (await error(503, stream=streamed))["type"] == "overloaded_error"
    await message_to(gateway)
    assert (await error(429))["type"] == "rate_limit_error"
    assert (await error(429, stream=True))["type"] == "rate_limit_error"
    gateway.client.headers["Authorization"] = "Bearer wrong"
    assert (await error(401))["type"] == "authentication_error"


async def test_failure_in_the_middle_of_a_stream_is_an_error_event(gateway: Gateway) -> None:
    gateway.mock.faults.append(Fault(at_token=1, error=EngineDied("The engine failed.")))
    last = read((await send(gateway, stream=True)).content)[-1]

    assert last == {"type": "error", "error": {"type": "api_error", "message": "The engine failed."}}


async def test_tokens_are_counted_exactly_and_cost_none(gateway: Gateway) -> None:
    counted = await gateway.client.post("/v1/messages/count_tokens", json={"messages": HELLO, "system": "Be brief."})
    assert counted.json() == {"input_tokens": 6}
    assert "x-ratelimit-remaining-tokens" in counted.headers
    assert (await message_to(gateway, system="Be brief."))["usage"]["input_tokens"] == 6


async def test_key_may_come_in_anthropics_header(gateway: Gateway) -> None:
    del gateway.client.headers["Authorization"]
    body = {"max_tokens": 5, "messages": HELLO}
    response = await gateway.client.post("/v1/messages", json=body, headers={"x-api-key": KEY})

    assert response.status_code == 200


async def test_leaving_a_stream_aborts_it_and_settles_what_it_cost(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(reply="word " * 1000, token_s=0.002, max_model_len=4096))
    body = {"max_tokens": 2000, "messages": HELLO, "stream": True}
    async with gateway.client.stream("POST", "/v1/messages", json=body) as response:
        await anext(response.aiter_raw())
        assert gateway.mock.unfinished_requests == 1

    await until(lambda: gateway.mock.unfinished_requests == 0)
    await until(lambda: gateway.requests_in_progress() == 0)
    assert 0 < gateway.spent().completion_tokens < 1000
    assert await gateway.metered() == gateway.spent()


async def test_session_is_remembered_as_for_chat(gateway: Gateway) -> None:
    for text in ("one", "two"):
        body = {"max_tokens": 50, "messages": [{"role": "user", "content": text}]}
        await gateway.client.post("/v1/messages", json=body, headers={"X-Session-ID": "talk"})

    assert [message["content"] for message in prompted(gateway)] == ["one", "You said: one", "two"]


async def test_sdk_reads_all_of_it(serve: Start) -> None:
    anthropic = pytest.importorskip("anthropic")
    gateway = await serve(mock=lambda: MockEngine(reply=reply, max_model_len=4096))
    arguments: Any = {"model": "shannon-chat", "max_tokens": 100}
    async with anthropic.AsyncAnthropic(api_key=gateway.key, base_url=gateway.url, max_retries=0) as client:
        whole = await client.messages.create(messages=HELLO, system="Be brief.", **arguments)
        async with client.messages.stream(messages=HELLO, tools=[TOOL], **arguments) as stream:
            texts = [text async for text in stream.text_stream]
            streamed = await stream.get_final_message()
        counted = await client.messages.count_tokens(model="shannon-chat", messages=HELLO)
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(messages=HELLO, max_tokens=5, model="claude")
        gateway.mock.faults.append(Fault(at_token=1, error=EngineDied("The engine failed.")))
        with pytest.raises(anthropic.APIStatusError, match="The engine failed"):
            await asyncio.wait_for(_drain(client, arguments), 5)

    assert whole.content[0].text == "You said: hello there"
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (6, 4)
    assert whole._request_id.startswith("req_")
    assert texts == ["Let me see."]
    assert streamed.content[1].input == {"city": "Paris"}
    assert (streamed.stop_reason, streamed.usage.output_tokens) == ("tool_use", 5)
    assert counted.input_tokens == 3


async def _drain(client: Any, arguments: Any) -> None:
    async with client.messages.stream(messages=HELLO, **arguments) as stream:
        async for _ in stream:
            pass
