"""The demo model's tool call from end to end, as agents make it: ask, call, tell the result, get the answer."""

from __future__ import annotations

import json
import re
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from langchain_core.messages import BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from engine.demo import corpus, load
from tests.support.client_scripts import run_client
from tests.support.gateway_process import GatewayProcess

CITY, ANSWER = "Paris", "It is sunny in Paris, 18 degrees."
QUESTION = f"What is the weather in {CITY}?"
RESULT = '{"city": "Paris", "temperature_c": 18, "sky": "sunny"}'
TOOLS: Any = [load().tools["get_weather"]]
ASK: Any = [{"role": "user", "content": QUESTION}]


@tool
def get_weather(city: str) -> str:
    """Get the current weather in a city."""
    assert city == CITY
    return RESULT


@pytest.fixture(scope="module")
def client(gateway: GatewayProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, max_retries=0)


def test_question_and_answer_are_the_models_own() -> None:
    answers = {(exchange.messages[0]["content"], exchange.answer) for talk in corpus() for exchange in talk.exchanges()}

    assert (QUESTION, ANSWER) in answers


@pytest.mark.parametrize("tool_choice", ["auto", "required"])
def test_openai_sdk_calls_and_answers(client: openai.OpenAI, tool_choice: Literal["auto", "required"]) -> None:
    called = client.chat.completions.create(
        model="shannon-chat", messages=ASK, tools=TOOLS, tool_choice=tool_choice, parallel_tool_calls=False
    )
    (choice,) = called.choices
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "get_weather")
    assert json.loads(call.function.arguments) == {"city": CITY}

    messages = [*ASK, choice.message, {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
    answered = client.chat.completions.create(model="shannon-chat", messages=messages, tools=TOOLS)
    assert answered.choices[0].message.content == ANSWER
    assert answered.choices[0].finish_reason == "stop"


def test_openai_sdk_streams_the_arguments(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="shannon-chat", messages=ASK, tools=TOOLS) as stream:
        pieces = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        completion = stream.get_final_completion()

    (call,) = completion.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == json.loads("".join(pieces)) == {"city": CITY}
    assert len(pieces) > 2
    assert completion.choices[0].finish_reason == "tool_calls"


def test_session_goes_on_with_the_result_alone(gateway: GatewayProcess) -> None:
    def ask(messages: Any, session: dict[str, str]) -> httpx.Response:
        body = {"messages": messages, "tools": TOOLS}
        url = f"{gateway.url}/v1/chat/completions"
        return httpx.post(url, json=body, headers=gateway.authorization | session, timeout=60)

    first = ask(ASK, {})
    session = {"X-Session-ID": first.headers.get("x-session-id", "weather-talk")}
    first = ask(ASK, session)
    (call,) = first.json()["choices"][0]["message"]["tool_calls"]
    second = ask([{"role": "tool", "tool_call_id": call["id"], "content": RESULT}], session)

    assert second.json()["choices"][0]["message"]["content"] == ANSWER


def _langchain(gateway: GatewayProcess, **fields: Any) -> ChatOpenAI:
    key = SecretStr(gateway.key)
    return ChatOpenAI(model="shannon-chat", base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, **fields)


@pytest.mark.parametrize("streaming", [False, True])
def test_langchain_with_bound_tools_calls_and_answers(gateway: GatewayProcess, streaming: bool) -> None:
    agent = _langchain(gateway, streaming=streaming).bind_tools([get_weather])
    messages: list[BaseMessage] = [HumanMessage(QUESTION)]
    called = agent.invoke(messages)
    (call,) = called.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": CITY})
    assert called.invalid_tool_calls == []

    messages += [called, get_weather.invoke(call)]
    assert isinstance(messages[-1], ToolMessage)
    assert agent.invoke(messages).content == ANSWER


def test_langchain_adds_up_the_pieces_of_a_call(gateway: GatewayProcess) -> None:
    agent = _langchain(gateway).bind_tools([get_weather], tool_choice="get_weather")
    whole: Any = reduce(add, agent.stream(QUESTION))

    assert [call["args"] for call in whole.tool_calls] == [{"city": CITY}]
    assert 15 < whole.usage_metadata["output_tokens"] < 60, "the usage is counted once"


NODE = """
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.SHANNON_URL + "/v1", apiKey: process.env.SHANNON_KEY });
const get_weather = (args) => JSON.stringify({ ...args, temperature_c: 18, sky: "sunny" });
const [tool] = JSON.parse(process.env.TOOLS);
for (const stream of [false, true]) {
  const runner = client.chat.completions.runTools({
    model: "shannon-chat",
    messages: [{ role: "user", content: process.env.QUESTION }],
    tools: [{ type: "function", function: { ...tool.function, parse: JSON.parse, function: get_weather } }],
    stream,
  });
  console.log(await runner.finalContent());
}
"""


def test_node_sdk_runs_the_tool_whole_and_streamed(
    gateway: GatewayProcess,
    node_client: tuple[str, Path],
) -> None:
    node, folder = node_client
    environment = {"TOOLS": json.dumps(TOOLS), "QUESTION": QUESTION}
    output = run_client(gateway, node, "--input-type=module", "--eval", NODE, cwd=folder, **environment)

    assert output.splitlines() == [ANSWER, ANSWER]


class Report(BaseModel):
    """What LangChain and the OpenAI SDK make a strict schema of."""

    city: Literal["Paris", "Tokyo"]
    sunny: bool


def test_openai_sdk_parses_a_model_of_its_own(client: openai.OpenAI) -> None:
    completion = client.chat.completions.parse(model="shannon-chat", messages=ASK, response_format=Report)

    assert isinstance(completion.choices[0].message.parsed, Report)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gives_structured_output(gateway: GatewayProcess, method: Any) -> None:
    report = _langchain(gateway).with_structured_output(Report, method=method, strict=True).invoke(QUESTION)

    assert isinstance(report, Report)


def test_choice_and_pattern_go_in_the_extra_body(client: openai.OpenAI) -> None:
    for constraint, pattern in (({"choice": ["yes", "no"]}, "yes|no"), ({"regex": "[0-9]{4}"}, "[0-9]{4}")):
        completion = client.chat.completions.create(
            model="shannon-chat", messages=ASK, extra_body={"structured_outputs": constraint}
        )
        assert re.fullmatch(pattern, completion.choices[0].message.content or "")


def test_bare_prompts_and_their_tokens(gateway: GatewayProcess, client: openai.OpenAI) -> None:
    prompt = "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n"
    completion = client.completions.create(model="shannon-chat", prompt=[prompt, prompt], max_tokens=20, temperature=0)
    counted = httpx.post(f"{gateway.url}/tokenize", json={"prompt": prompt}, headers=gateway.authorization).json()
    back = httpx.post(
        f"{gateway.url}/detokenize", json={"tokens": counted["tokens"]}, headers=gateway.authorization
    ).json()

    assert [choice.text for choice in completion.choices] == ["Hello! I am the Shannon demo model."] * 2
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 2 * counted["count"]
    assert counted["max_model_len"] == 2048
    assert back == {"prompt": prompt}


def test_model_that_generates_makes_no_embeddings(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.embeddings.create(model="shannon-chat", input="Say hello.")

    assert (refusal.value.param, refusal.value.code) == ("model", "model_not_supported")
