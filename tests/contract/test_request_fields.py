"""Every field of a chat completion request reaches the engine as it was sent, or is filled in from the model."""

from __future__ import annotations

from typing import Any

import pytest

from engine.mock import MockEngine
from tests.support.app import HELLO, Gateway, Start

pytestmark = pytest.mark.anyio

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": ["string", "null"], "default": None, "enum": ["x", None]}},
    "required": ["a"],
}


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 8}, {"max_tokens": 8}),
        ({"max_tokens": 7, "max_completion_tokens": 8}, {"max_tokens": 8}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 2}, {"temperature": 2}),
        ({"top_p": 0.9}, {"top_p": 0.9}),
        ({"top_p": 1}, {"top_p": 1}),
        ({"stop": "END"}, {"stop": ["END"]}),
        ({"stop": ["END", "\n\n"]}, {"stop": ["END", "\n\n"]}),
        ({"stop": []}, {"stop": []}),
        ({"stop": None}, {"stop": []}),
        ({"seed": 42}, {"seed": 42}),
        ({"seed": -1}, {"seed": -1}),
        ({"seed": 2**63 - 1}, {"seed": 2**63 - 1}),
        ({"n": 3}, {"n": 3}),
        ({"presence_penalty": -2}, {"presence_penalty": -2}),
        ({"frequency_penalty": 2}, {"frequency_penalty": 2}),
        ({"logprobs": True}, {"logprobs": True, "top_logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": True, "top_logprobs": 20}),
        ({"logit_bias": {"50256": -100, "11": 2.5}}, {"logit_bias": {"50256": -100, "11": 2.5}}),
        ({"response_format": {"type": "text"}}, {"response_format": {"type": "text"}}),
        ({"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_object"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}},
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "description": "d", "strict": True, "schema": {}},
                }
            },
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "description": "d", "strict": True, "schema": {}},
                }
            },
        ),
        ({"top_k": 40}, {"top_k": 40}),
        ({"top_k": -1}, {"top_k": -1}),
        ({"min_p": 0.05}, {"min_p": 0.05}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"ignore_eos": True, "max_tokens": 5}, {"ignore_eos": True}),
        ({"min_tokens": 2}, {"min_tokens": 2}),
        ({"stop_token_ids": [2, 32007]}, {"stop_token_ids": [2, 32007]}),
        ({"stream": True}, {"stream": True}),
        ({"stream": False}, {"stream": False}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
async def test_field_reaches_the_engine(gateway: Gateway, sent: dict[str, Any], received: dict[str, Any]) -> None:
    response = await gateway.chat(**sent)

    assert response.status_code == 200
    (request,) = gateway.mock.requests
    assert {name: getattr(request, name) for name in received} == received


async def test_request_of_messages_alone_is_served(gateway: Gateway) -> None:
    response = await gateway.chat()

    assert response.status_code == 200
    (request,) = gateway.mock.requests
    assert request.messages == HELLO
    assert (request.n, request.stream, request.stop, request.max_tokens) == (1, False, [], None)
    assert (request.temperature, request.top_p, request.seed, request.response_format) == (None, None, None, None)


async def test_null_means_not_given(gateway: Gateway) -> None:
    names = [
        *("model", "stream", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "user"),
        *("stream_options", "seed", "n", "presence_penalty", "frequency_penalty", "logprobs", "top_logprobs"),
        *("logit_bias", "response_format", "top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens"),
        "stop_token_ids",
    ]
    await gateway.chat()
    await gateway.chat(**dict.fromkeys(names))

    plain, nulls = gateway.mock.requests
    assert {name: getattr(nulls, name) for name in plain.__dataclass_fields__ if name != "request_id"} == {
        name: getattr(plain, name) for name in plain.__dataclass_fields__ if name != "request_id"
    }


async def test_model_defaults_to_shannon_chat(gateway: Gateway) -> None:
    assert (await gateway.chat()).json()["model"] == "shannon-chat"


async def test_model_is_the_one_asked_for(gateway: Gateway) -> None:
    assert (await gateway.chat(model="shannon-complex")).json()["model"] == "shannon-complex"


@pytest.mark.parametrize("query", ["stream=true", "stream=1", "stream=True"])
async def test_stream_in_the_query_means_the_same_as_in_the_body(gateway: Gateway, query: str) -> None:
    body = {"messages": HELLO, "stream_options": {"include_usage": True}}
    response = await gateway.client.post(f"/v1/chat/completions?{query}", json=body)

    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.content.endswith(b"data: [DONE]\n\n")
    assert gateway.mock.requests[0].stream


async def test_stream_false_in_the_query_gives_a_whole_body(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/chat/completions?stream=false", json={"messages": HELLO})

    assert response.json()["object"] == "chat.completion"


async def test_senseless_stream_in_the_query_is_refused(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/chat/completions?stream=maybe", json={"messages": HELLO})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stream"
    assert "'maybe'" in response.json()["error"]["message"]


async def test_roles_and_names_reach_the_engine(gateway: Gateway) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi", "name": "ada"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "so "}, {"type": "text", "text": "what?"}]},
    ]
    await gateway.chat(messages=messages)

    assert gateway.mock.requests[0].messages == [*messages[:3], {"role": "user", "content": "so what?"}]


async def test_developer_role_is_the_system_role(gateway: Gateway) -> None:
    await gateway.chat(messages=[{"role": "developer", "content": "Be brief."}, *HELLO])

    assert gateway.mock.requests[0].messages[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "user-123"},
        {"store": True},
        {"metadata": {"team": "a"}},
        {"service_tier": "auto"},
        {"parallel_tool_calls": True},
        {"tools": []},
        {"tools": None},
        {"some_field_of_next_year": {"deeply": [{"nested": 1}]}},
    ],
    ids=lambda extra: ",".join(extra),
)
async def test_field_without_effect_is_accepted(gateway: Gateway, extra: dict[str, Any]) -> None:
    assert (await gateway.chat(**extra)).status_code == 200


async def test_request_id_of_the_engine_is_made_by_the_server(gateway: Gateway) -> None:
    for _ in range(2):
        await gateway.client.post(
            "/v1/chat/completions", json={"messages": HELLO}, headers={"x-request-id": "chosen-by-client"}
        )

    first, second = (request.request_id for request in gateway.mock.requests)
    assert first != second
    assert "chosen-by-client" not in (first, second)


async def test_models_defaults_fill_in_what_is_left_out(start: Start) -> None:
    model = {"description": "x", "defaults": {"max_tokens": 50, "temperature": 0.3, "top_p": 0.8}}
    gateway = await start(config={"models": {"shannon-chat": model}})
    await gateway.chat()
    await gateway.chat(max_tokens=60, temperature=0, top_p=1)

    filled, given = gateway.mock.requests
    assert (filled.max_tokens, filled.default_max_tokens, filled.temperature, filled.top_p) == (None, 50, 0.3, 0.8)
    assert (given.max_tokens, given.temperature, given.top_p) == (60, 0, 1)


async def test_default_max_tokens_bounds_the_completion(start: Start) -> None:
    model = {"description": "x", "defaults": {"max_tokens": 5}}
    gateway = await start(config={"models": {"shannon-chat": model}})
    body = (await gateway.chat(ignore_eos=True)).json()

    assert body["usage"]["completion_tokens"] == 5
    assert body["choices"][0]["finish_reason"] == "length"


async def test_default_max_tokens_is_cut_to_what_the_context_leaves(start: Start) -> None:
    gateway = await start(mock=lambda: MockEngine(max_model_len=10))
    body = (await gateway.chat(ignore_eos=True)).json()

    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 7,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
