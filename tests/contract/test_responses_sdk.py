"""The official clients of the Responses API over a real socket: the OpenAI SDK, and LangChain's ChatOpenAI on top."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from openai.types.responses import Response
from pydantic import BaseModel

from engine.base import Delta, EngineDied, GenerationRequest, ToolCallDelta
from engine.mock import Fault, MockEngine, echo
from tests.support.app import Gateway, Start

pytestmark = pytest.mark.anyio

TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Tell the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
SUNNY = '{"city": "Paris", "sky": "sunny"}'


class Weather(BaseModel):
    """What the model is asked to say."""

    city: str
    sky: str


def reply(request: GenerationRequest) -> str | list[Delta]:
    """Call the tool where there is one, obey a schema where there is one, think where asked to, and echo else."""
    if request.response_format is not None:
        return [Delta(SUNNY, finish_reason="stop")]
    if request.reasoning_effort == "high":
        return [Delta("", reasoning="hm"), Delta("yes", finish_reason="stop")]
    if request.tools and request.messages[-1]["role"] == "user":
        pieces = [
            ToolCallDelta(0, "call_1", "get_weather", ""),
            ToolCallDelta(0, arguments='{"city": '),
            ToolCallDelta(0, arguments='"Paris"}'),
        ]
        return [*(Delta("", tool_calls=[piece]) for piece in pieces), Delta("", finish_reason="tool_calls")]
    return echo(request)


@pytest.fixture
async def gateway(serve: Start) -> Gateway:
    return await serve(mock=lambda: MockEngine(reply=reply))


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(api_key=gateway.key, base_url=f"{gateway.url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture
def llm(gateway: Gateway) -> ChatOpenAI:
    arguments: dict[str, Any] = {"base_url": f"{gateway.url}/v1", "api_key": gateway.key, "max_retries": 0}
    return ChatOpenAI(model="shannon-chat", use_responses_api=True, **arguments)


async def test_create_continue_retrieve_list_and_delete(client: openai.AsyncOpenAI, gateway: Gateway) -> None:
    first = await client.responses.create(model="shannon-chat", input="hello there", instructions="Be brief.")
    second = await client.responses.create(model="shannon-chat", input="again", previous_response_id=first.id)

    assert first.output_text == "You said: hello there"
    assert first.usage is not None
    assert (first.usage.input_tokens, first.usage.output_tokens, first.usage.total_tokens) == (6, 4, 10)
    assert second.output_text == "You said: again"
    assert len(gateway.mock.requests[-1].messages) == 3
    assert (await client.responses.retrieve(first.id)).output_text == first.output_text
    items = [item async for item in client.responses.input_items.list(first.id)]
    assert items[0].type == "message"
    await client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match=r"Response with id 'resp_.*' not found\."):
        await client.responses.retrieve(first.id)


async def test_stream_yields_typed_events(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(model="shannon-chat", input="hello there", stream=True)
    events = [event async for event in stream]

    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == (
        "You said: hello there"
    )
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "You said: hello there"
    assert last.model_extra is not None
    assert last.model_extra["shannon_events"][-1]["type"] == "WORKFLOW_COMPLETED"


async def test_stream_helper_rebuilds_the_response(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="shannon-chat", input="hello there", tools=[TOOL]) as stream:
        snapshots = [event.snapshot async for event in stream if event.type == "response.function_call_arguments.delta"]
        response = await stream.get_final_response()

    assert snapshots == ['{"city": ', '{"city": "Paris"}']
    (call,) = response.output
    assert call.type == "function_call"
    assert call.parsed_arguments == {"city": "Paris"}


async def test_parse_reads_the_schema(client: openai.AsyncOpenAI, gateway: Gateway) -> None:
    response = await client.responses.parse(model="shannon-chat", input="Paris?", text_format=Weather)

    assert response.output_parsed == Weather(city="Paris", sky="sunny")
    asked = gateway.mock.requests[-1].response_format
    assert asked is not None
    assert asked["json_schema"]["schema"]["properties"].keys() == {"city", "sky"}


async def test_function_call_round_trip(client: openai.AsyncOpenAI) -> None:
    conversation: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
    response = await client.responses.create(model="shannon-chat", input=conversation, tools=[TOOL])
    (call,) = response.output
    assert call.type == "function_call"
    conversation += [item.to_dict() for item in response.output]
    conversation.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})

    answer = await client.responses.create(model="shannon-chat", input=conversation, tools=[TOOL])
    assert answer.output_text == "You said: sunny"


async def test_background_and_cancel(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(reply="word " * 1000, token_s=0.002, max_model_len=4096))
    async with openai.AsyncOpenAI(api_key=gateway.key, base_url=f"{gateway.url}/v1", max_retries=0) as client:
        response = await client.responses.create(model="shannon-chat", input="hello there", background=True)
        assert response.status == "in_progress"
        cancelled = await client.responses.cancel(response.id)

        short = await client.responses.create(
            model="shannon-chat", input="hello there", background=True, max_output_tokens=5
        )
        while short.status in ("queued", "in_progress"):
            short = await client.responses.retrieve(short.id)
            await asyncio.sleep(0.01)

    assert cancelled.status == "cancelled"
    assert cancelled.output_text.startswith("word")
    assert short.status == "incomplete"
    assert short.output_text == "word word word word word"
    assert await gateway.metered() == gateway.spent()


async def test_cancel_ends_the_stream_with_an_event_that_the_sdk_knows(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(reply="word " * 1000, token_s=0.002, max_model_len=4096))
    async with openai.AsyncOpenAI(api_key=gateway.key, base_url=f"{gateway.url}/v1", max_retries=0) as client:
        last: Response | None = None
        async with client.responses.stream(model="shannon-chat", input="hello there") as stream:
            async for event in stream:
                if event.type == "response.created":
                    await client.responses.cancel(event.response.id)
                if event.type == "response.incomplete":
                    last = event.response

    assert last is not None
    assert last.status == "cancelled"


async def test_failures_are_the_sdks_exceptions(client: openai.AsyncOpenAI, gateway: Gateway) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="shannon-chat", input="x", previous_response_id="resp_gone")
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")

    gateway.mock.faults.append(Fault(at_token=1, error=EngineDied("The engine failed.")))
    stream = await client.responses.create(model="shannon-chat", input="hello there", stream=True)
    last = [event async for event in stream][-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert (last.response.error.code, last.response.error.message) == ("server_error", "The engine failed.")


async def test_langchain_invokes(llm: ChatOpenAI, gateway: Gateway) -> None:
    message = await llm.ainvoke([SystemMessage("Be brief."), HumanMessage("hello there")])

    assert message.text == "You said: hello there"
    assert message.usage_metadata is not None
    assert (message.usage_metadata["input_tokens"], message.usage_metadata["output_tokens"]) == (6, 4)
    assert gateway.mock.requests[-1].messages[0] == {"role": "system", "content": "Be brief."}


async def test_langchain_streams(llm: ChatOpenAI) -> None:
    chunks = [chunk async for chunk in llm.astream("hello there")]
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk

    assert whole.text == "You said: hello there"
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["total_tokens"] == 7
    assert len([chunk for chunk in chunks if chunk.text]) == 4


@pytest.mark.parametrize("streamed", [False, True])
async def test_langchain_calls_tools(llm: ChatOpenAI, streamed: bool) -> None:
    def get_weather(city: str) -> str:
        """Tell the weather."""
        return city

    bound = llm.bind_tools([get_weather])
    question = HumanMessage("Weather in Paris?")
    message: Any = None
    if streamed:
        async for chunk in bound.astream([question]):
            message = chunk if message is None else message + chunk
    else:
        message = await bound.ainvoke([question])
    assert isinstance(message, AIMessage)
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})

    answer = await bound.ainvoke([question, message, ToolMessage("sunny", tool_call_id=call["id"])])
    assert answer.text == "You said: sunny"


async def test_langchain_continues_by_the_response_id(llm: ChatOpenAI, gateway: Gateway) -> None:
    continuing = llm.model_copy(update={"use_previous_response_id": True})
    first = await continuing.ainvoke([HumanMessage("hello there")])
    await continuing.ainvoke([HumanMessage("hello there"), first, HumanMessage("again")])

    assert [message["content"] for message in gateway.mock.requests[-1].messages] == [
        *("hello there", "You said: hello there", "again"),
    ]


async def test_langchain_reads_structured_output_and_reasoning(llm: ChatOpenAI) -> None:
    assert await llm.with_structured_output(Weather).ainvoke("Paris?") == Weather(city="Paris", sky="sunny")

    thinking = llm.model_copy(update={"reasoning": {"effort": "high"}})
    message = await thinking.ainvoke("sure?")
    assert message.text == "yes"
    assert isinstance(message.content, list)
    reasoning = message.content[0]
    assert isinstance(reasoning, dict)
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}]
    again = await thinking.ainvoke([HumanMessage("sure?"), message, HumanMessage("really?")])
    assert again.text == "yes", "what it thought may come back"
