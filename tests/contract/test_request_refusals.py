"""What can't be served is refused with a clear error that names the parameter; nothing a client sends is a 500."""

from __future__ import annotations

import json
import re
from typing import Any

import anyio
import pytest

from engine.mock import MockEngine
from tests.support.app import HELLO, Gateway, Start

pytestmark = pytest.mark.anyio


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"} | fields]}


def nested(depth: int, inner: str = "1") -> str:
    return '{"a":' * depth + inner + "}" * depth


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": HELLO * 4097}, "messages"),
        (message(role="alien"), "messages[0].role"),
        (message(role="tool"), "messages[0].tool_call_id"),
        (message(role=None), "messages[0].role"),
        ({"messages": [*HELLO, {"content": "hi"}]}, "messages[1].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (message(content=None), "messages[0].content"),
        (message(content=5), "messages[0].content"),
        (message(content=[]), "messages[0].content"),
        (message(content={"type": "text"}), "messages[0].content"),
        (message(name=5), "messages[0].name"),
        (message(name="x" * 257), "messages[0].name"),
        ({"model": 5}, "model"),
        ({"model": ["shannon-chat"]}, "model"),
        ({"model": "x" * 257}, "model"),
        ({"stream": "true"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": "usage"}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"frequency_penalty": "x"}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 11}, "repetition_penalty"),
        ({"seed": "x"}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": "2"}, "n"),
        ({"stop": 5}, "stop"),
        ({"stop": {}}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"ignore_eos": "no"}, "ignore_eos"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"min_tokens": 9, "max_completion_tokens": 3}, "min_tokens"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": []}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"1": -101}}, "logit_bias.1"),
        ({"logit_bias": {"1": "much"}}, "logit_bias.1"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"x": "y" * 32_768}}}},
            "response_format.json_schema.schema",
        ),
        ({"user": 5}, "user"),
        ({"user": "x" * 513}, "user"),
    ],
    ids=lambda value: re.sub(r"(\w)\1{20,}", r"\1...", str(value))[:60],
)
async def test_bad_value_is_refused_by_name(gateway: Gateway, fields: dict[str, Any], param: str) -> None:
    response = await gateway.chat(**fields)

    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert f"'{param}'" in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
    assert len(error["message"]) < 400
    assert gateway.mock.requests == [], "the engine never sees it"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": ["END", 5]}, "stop"),
        ({"stop": ["END", ""]}, "stop"),
        (message(content=[{"type": "text"}]), "messages[0].content"),
        (message(content=[{"type": "image_url", "image_url": {"url": "http://x"}}]), "messages[0].content"),
        (message(content=["hi"]), "messages[0].content"),
        ({"logit_bias": {"comma": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_bad_part_of_a_value_is_refused_by_a_path_of_the_clients_own_names(
    gateway: Gateway, fields: dict[str, Any], param: str
) -> None:
    response = await gateway.chat(**fields)

    assert response.status_code == 400
    error = response.json()["error"]
    # The path may go on to the part, in the names and numbers that the client wrote.
    assert re.fullmatch(re.escape(param) + r"(\[\d+\]|\.(type|text|comma|-1|1{1,64}))*", error["param"])
    assert param in error["message"]
    assert "[key]" not in error["message"]
    assert "constrained" not in error["message"]
    assert len(error["message"]) < 400


async def test_error_speaks_the_clients_language_not_pythons(gateway: Gateway) -> None:
    for fields in ({"messages": ["hi"]}, {"response_format": "json"}, {"stream": True, "stream_options": 5}):
        text = (await gateway.chat(**fields)).json()["error"]["message"]

        assert not re.search("instance of|ChatMessage|ResponseFormat|StreamOptions|dictionary", text), text


async def test_request_without_messages_is_refused(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/chat/completions", json={"model": "shannon-chat"})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    "name",
    [
        *("priority", "cache_salt", "request_id", "kv_transfer_params", "chat_template", "chat_template_kwargs"),
        *("add_generation_prompt", "continue_final_message", "documents", "mm_processor_kwargs", "vllm_xargs"),
        *("truncate_prompt_tokens", "use_beam_search", "best_of", "prompt_logprobs"),
    ],
)
async def test_field_that_only_the_server_sets_never_reaches_the_engine(gateway: Gateway, name: str) -> None:
    response = await gateway.chat(**{name: 1})

    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == name
    assert error["message"] == f"'{name}' is set by the server and can't be sent by clients. Leave it out."


@pytest.mark.parametrize("field", [{"audio": {"voice": "a"}}, {"web_search_options": {"a": 1}}], ids=str)
async def test_what_is_not_offered_is_refused_by_name(gateway: Gateway, field: dict[str, Any]) -> None:
    response = await gateway.chat(**field)

    assert response.status_code == 400
    assert [response.json()["error"]["param"]] == list(field)


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_that_does_not_fit_is_refused_with_the_numbers(start: Start, stream: bool) -> None:
    gateway = await start(mock=lambda: MockEngine(max_model_len=20))
    response = await gateway.chat(messages=[{"role": "user", "content": "word " * 30}], stream=stream)

    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "This model's maximum context length is 20 tokens, but the messages are 31 tokens long. "
        "Shorten the messages.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_max_tokens_that_do_not_fit_are_refused_with_what_would(start: Start, name: str) -> None:
    gateway = await start(mock=lambda: MockEngine(max_model_len=20))
    response = await gateway.chat(**{name: 18})

    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "at most 17, not 18" in error["message"]
    assert error["param"] == name
    assert (await gateway.chat(**{name: 17})).status_code == 200


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"hello", "not valid JSON"),
        (b'{"messages": \xff\xfe}', "not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "caf\xe9"}]}', "not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}', "not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "hi"}], "temperature": 1e999}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"messages"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"7", "must be a JSON object"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_body_that_is_no_json_object_is_refused(gateway: Gateway, body: bytes, problem: str) -> None:
    response = await gateway.client.post("/v1/chat/completions", content=body)

    assert response.status_code == 400
    error = response.json()["error"]
    assert problem in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_request")


@pytest.mark.parametrize("depth", [100, 255, 500, 1000])
@pytest.mark.parametrize(
    ("template", "param"),
    [
        ('{"messages": %s}', "messages"),
        ('{"messages": [%s]}', "messages[0].role"),
        ('{"messages": [{"role": "user", "content": %s}]}', "messages[0].content"),
        ('{"messages": [{"role": "user", "content": "hi"}], "logit_bias": %s}', "logit_bias"),
        ('{"messages": [{"role": "user", "content": "hi"}], "stop": %s}', "stop"),
        ('{"messages": [{"role": "user", "content": "hi"}], "response_format": %s}', "response_format"),
        (
            '{"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "json_schema",'
            ' "json_schema": {"name": "a", "schema": %s}}}',
            "response_format",
        ),
        ('{"messages": [{"role": "user", "content": "hi"}], "metadata": %s}', None),
    ],
    ids=lambda value: str(value)[:90],
)
async def test_nested_bomb_is_served_or_refused_but_never_a_500(
    gateway: Gateway, template: str, param: str | None, depth: int
) -> None:
    response = await gateway.client.post("/v1/chat/completions", content=template % nested(depth))

    assert response.status_code in (200, 400)
    if response.status_code == 400:
        error = response.json()["error"]
        assert "not valid JSON" in error["message"] or (error["param"] or "").startswith(param or "?"), error
        assert len(error["message"]) < 400


@pytest.mark.parametrize("announced", [True, False])
async def test_body_over_the_cap_is_refused_whether_or_not_its_length_is_announced(
    start: Start, announced: bool
) -> None:
    gateway = await start(server={"max_body_bytes": 2048})
    body = json.dumps({"messages": HELLO, "padding": "x" * 2048}).encode()

    async def pieces() -> Any:
        for at in range(0, len(body), 500):
            yield body[at : at + 500]

    response = await gateway.client.post("/v1/chat/completions", content=body if announced else pieces())

    assert response.status_code == 413
    assert "limit of 2048 bytes" in response.json()["error"]["message"]
    assert gateway.mock.requests == []


async def test_body_of_exactly_the_cap_is_served(start: Start) -> None:
    gateway = await start(server={"max_body_bytes": 2048})
    body = json.dumps({"messages": HELLO, "padding": ""})
    body = body.replace('"padding": ""', f'"padding": "{"x" * (2048 - len(body))}"')
    assert len(body) == 2048

    assert (await gateway.client.post("/v1/chat/completions", content=body)).status_code == 200
    assert (await gateway.client.post("/v1/chat/completions", content=body + " ")).status_code == 413


async def test_body_that_stalls_is_a_timeout_the_client_may_retry(start: Start) -> None:
    gateway = await start(server={"body_timeout_s": 0.05})

    async def stalling() -> Any:
        yield b'{"messages": '
        await anyio.sleep_forever()

    response = await gateway.client.post("/v1/chat/completions", content=stalling())

    assert response.status_code == 408
    assert response.headers["x-should-retry"] == "true"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "request_timeout")
    assert "0.05 seconds" in error["message"]
