"""What the demo model says through the whole product, as SDK objects and as raw bytes."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest

from engine.demo import Exchange, corpus
from tests.support.event_grammar import check_events
from tests.support.gateway_process import GatewayProcess

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
SAID = "Hello! I am the Shannon demo model."

PLAIN = [exchange for conversation in corpus() for exchange in conversation.exchanges() if not exchange.tools]
SEVERAL_TURNS = [exchange for exchange in PLAIN if len(exchange.messages) > 1]
UNICODE = next(exchange for exchange in PLAIN if exchange.conversation_id == "unicode")


@pytest.fixture(scope="module")
def client(gateway: GatewayProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, max_retries=0)


def _messages(exchange: Exchange) -> Any:
    return list(exchange.messages)


@pytest.mark.parametrize("exchange", SEVERAL_TURNS, ids=lambda exchange: exchange.conversation_id)
def test_later_turn_depends_on_earlier_one(client: openai.OpenAI, exchange: Exchange) -> None:
    completion = client.chat.completions.create(model="shannon-chat", messages=_messages(exchange))
    assert completion.choices[0].message.content == exchange.answer


def test_stream_pieces_add_up_to_the_answer(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="shannon-chat", messages=_messages(UNICODE), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == UNICODE.answer
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens > len(UNICODE.answer) / 6


def test_stream_is_the_documented_bytes(gateway: GatewayProcess) -> None:
    body = {"messages": [{"role": "user", "content": "Say hello."}], "stream": True, "max_tokens": 2}
    response = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, headers=gateway.authorization)
    frames = response.content.split(b"\n\n")
    head = (
        rb'data: \{"id":"chatcmpl-[0-9a-f]{32}","object":"chat\.completion\.chunk","created":[0-9]{10},'
        rb'"model":"shannon-chat","choices":\[\{"index":0,"delta":'
    )
    assert re.fullmatch(
        head + rb'\{"role":"assistant","content":""\},"finish_reason":null\}\],"shannon_events":\[.*\]\}', frames[0]
    )
    for frame in frames[1:-3]:
        assert re.fullmatch(head + rb'\{"content":"[^"]+"\},"finish_reason":null\}\]\}', frame)
    last = rb'\{\},"finish_reason":"length"\}\],"shannon_events":\[.*\],"usage":\{"prompt_tokens":[0-9]+,'
    assert re.fullmatch(head + last + rb'"completion_tokens":2,"total_tokens":[0-9]+,.*\}\}', frames[-3])
    assert frames[-2:] == [b"data: [DONE]", b""]


def test_chat_answers_with_its_lifecycle(gateway: GatewayProcess) -> None:
    answer = gateway.chat(model="shannon-chat", temperature=0, messages=HELLO).json()
    assert answer["model"] == "shannon-chat"
    assert answer["choices"][0]["message"]["content"] == SAID
    assert answer["choices"][0]["finish_reason"] == "stop"
    types = [event["type"] for event in answer["shannon_events"]]
    assert types == ["WORKFLOW_STARTED", "AGENT_STARTED", "AGENT_COMPLETED", "WORKFLOW_COMPLETED"]


@pytest.mark.parametrize("depth", ["quick", "standard", "deep", "academic"])
def test_research_without_a_search_answers_and_says_so(gateway: GatewayProcess, depth: str) -> None:
    answer = gateway.chat(model=f"shannon-{depth}-research", temperature=0, messages=HELLO).json()
    told, said = answer["choices"][0]["message"]["content"].split("\n\n", 1)
    assert told == "No sources were consulted: no search is available to this model here."
    assert said == SAID
    check_events(answer["shannon_events"])
    assert answer["shannon_events"][-1]["payload"]["sources"] == []
    assert any("sources" in event["message"] for event in answer["shannon_events"] if event["type"] == "PROGRESS")


@pytest.mark.parametrize(("model", "setting"), [("shannon-ads-research", "serp_ads"), ("shannon-analytics", "ga4")])
def test_model_without_its_tool_names_the_setting(gateway: GatewayProcess, model: str, setting: str) -> None:
    answer = gateway.chat(model=model, messages=HELLO).json()
    assert f"`tools.{setting}`" in answer["choices"][0]["message"]["content"]
    check_events(answer["shannon_events"])


def test_json_schema_is_obeyed_by_any_model(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Tokyo"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    completion = client.chat.completions.create(
        model="shannon-chat",
        messages=[{"role": "user", "content": "Name a city."}],
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}},
    )
    assert json.loads(completion.choices[0].message.content or "")["city"] in ("Paris", "Tokyo")


def test_logprobs_choices_and_seed(client: openai.OpenAI) -> None:
    def ask() -> list[str | None]:
        completion = client.chat.completions.create(
            model="shannon-chat",
            messages=[{"role": "user", "content": "Say hello."}],
            max_tokens=4,
            n=2,
            temperature=1.5,
            seed=7,
            logprobs=True,
            top_logprobs=3,
        )
        assert [choice.index for choice in completion.choices] == [0, 1]
        for choice in completion.choices:
            assert choice.logprobs is not None
            assert choice.logprobs.content is not None
            assert len(choice.logprobs.content) == 4
            assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in choice.logprobs.content)
            assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
        return [choice.message.content for choice in completion.choices]

    assert ask() == ask()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": "word " * 4000}]}, "messages"),
        ({"max_tokens": 4000}, "max_tokens"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}}, None),
        ({"stop_token_ids": [2**31 - 1], "min_tokens": 1}, None),
    ],
    ids=["long prompt", "max_tokens", "logit_bias", "schema", "stop_token_ids"],
)
def test_engine_refusals_are_400(gateway: GatewayProcess, fields: dict[str, Any], param: str | None) -> None:
    response = gateway.chat(**({"messages": [{"role": "user", "content": "Say hello."}]} | fields))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    if param:
        assert error["param"] == param
    assert gateway.ready()
