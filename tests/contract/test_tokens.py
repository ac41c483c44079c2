"""/tokenize and /detokenize: exact counts before anything is generated; requests that cost no tokens."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from engine.base import EngineUnavailable, GenerationRequest
from engine.messages import images_of
from engine.mock import MockEngine
from tests.support.app import HELLO, Gateway, Start
from tests.support.pictures import asking, data_url, picture

pytestmark = pytest.mark.anyio

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


class Noting(MockEngine):
    """Keeps what it was asked to tokenize."""

    def __init__(self) -> None:
        super().__init__(takes_images=True)
        self.tokenized: list[GenerationRequest] = []

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        self.tokenized.append(request)
        return await super().tokenize(request)


async def tokenize(gateway: Gateway, path: str = "/tokenize", **fields: Any) -> httpx.Response:
    return await gateway.client.post(path, json=fields)


async def detokenize(gateway: Gateway, tokens: Any, path: str = "/detokenize") -> httpx.Response:
    return await gateway.client.post(path, json={"tokens": tokens})


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
async def test_text_is_counted(gateway: Gateway, path: str) -> None:
    response = await tokenize(gateway, path, prompt="hello there hello")

    assert response.status_code == 200
    assert response.json() == {"count": 3, "max_model_len": 1024, "tokens": [0, 1, 0]}


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
async def test_tokens_become_the_text_again(gateway: Gateway, path: str) -> None:
    tokens = (await tokenize(gateway, prompt="hello there you")).json()["tokens"]
    response = await detokenize(gateway, tokens, path)

    assert response.status_code == 200
    assert response.json() == {"prompt": "hello there you"}


async def test_conversation_is_counted_as_chat_counts_it(gateway: Gateway) -> None:
    counted = (await tokenize(gateway, messages=HELLO)).json()["count"]
    chat = (await gateway.chat(messages=HELLO)).json()["usage"]["prompt_tokens"]

    assert counted == chat == 3


async def test_longer_than_the_context_is_counted_too(gateway: Gateway) -> None:
    assert (await tokenize(gateway, prompt="word " * 3000)).json()["count"] == 3000


async def test_conversation_reaches_the_engine_as_in_chat(start: Start) -> None:
    engines: list[Noting] = []

    def noting() -> Noting:
        engines.append(Noting())
        return engines[-1]

    gateway = await start(mock=noting)
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        *HELLO,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    assert (await tokenize(gateway, messages=messages, tools=[TOOL])).status_code == 200
    await gateway.chat(messages=messages, tools=[TOOL])

    asked, chatted = engines[0].tokenized[-1], engines[0].requests[-1]
    assert (asked.messages, asked.tools) == (chatted.messages, chatted.tools)


async def test_image_reaches_the_engine_as_data_that_was_checked(start: Start) -> None:
    engines: list[Noting] = []

    def noting() -> Noting:
        engines.append(Noting())
        return engines[-1]

    gateway = await start(mock=noting)
    url = data_url(picture("red"))
    assert (await tokenize(gateway, messages=asking(url))).status_code == 200
    (image,) = images_of(engines[0].tokenized[-1].messages)
    assert image.url == url

    for bad in ("http://127.0.0.1:9/secret.png", "file:///etc/passwd", "data:image/png;base64,AAAA"):
        response = await tokenize(gateway, messages=asking(bad))
        assert response.status_code == 400
        assert "image_url.url" in response.json()["error"]["param"]
    assert len(engines[0].tokenized) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": HELLO}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "alien", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "sunny"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": HELLO, "tools": [{}]}, "tools[0].type"),
        ({"prompt": "a", "model": 5}, "model"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_bad_text_is_refused_by_name(gateway: Gateway, fields: dict[str, Any], param: str) -> None:
    response = await tokenize(gateway, **fields)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert "x-ratelimit-limit-requests" in response.headers


@pytest.mark.parametrize(
    ("tokens", "param"),
    [
        (None, "tokens"),
        ([], "tokens"),
        ("hello", "tokens"),
        ([-1], "tokens[0]"),
        ([0, 2**31], "tokens[1]"),
        ([1.5], "tokens[0]"),
        (["0"], "tokens[0]"),
        ([0] * 1_048_577, "tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_bad_tokens_are_refused_by_name(gateway: Gateway, tokens: Any, param: str) -> None:
    response = await detokenize(gateway, tokens)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_token_beyond_the_vocabulary_is_refused(gateway: Gateway) -> None:
    response = await detokenize(gateway, [999_999])

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tokens"
    assert "vocabulary" in response.json()["error"]["message"]


async def test_key_and_model_are_checked_as_everywhere(gateway: Gateway) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [0]})):
        nobody = await gateway.client.post(path, json=body, headers={"Authorization": ""})
        unknown = await gateway.client.post(path, json=body | {"model": "gpt-5"})

        assert (nobody.status_code, unknown.status_code) == (401, 404)


async def test_each_is_a_request_that_costs_no_tokens(start: Start) -> None:
    limits = {"requests_per_minute": 3, "tokens_per_minute": 5}
    gateway = await start(
        config={"models": {"shannon-chat": {"description": "General chat completion", "limits": limits}}}
    )
    responses = [
        await tokenize(gateway, prompt="word " * 100),
        await tokenize(gateway, messages=HELLO),
        await detokenize(gateway, [0]),
        await detokenize(gateway, [0]),
    ]

    assert [response.status_code for response in responses] == [200, 200, 200, 429]
    assert [response.headers["x-ratelimit-remaining-requests"] for response in responses] == ["2", "1", "0", "0"]
    assert {response.headers["x-ratelimit-remaining-tokens"] for response in responses} == {"5"}
    (row,) = (await gateway.client.get("/v1/usage")).json()["data"]
    assert (row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (4, 0, 0)
    assert gateway.spent().prompt_tokens == 0


async def test_engine_that_is_away_is_a_503(start: Start) -> None:
    gateway = await start(check_every_s=60.0)  # or it would be back at once
    gateway.mock.kill()
    response = await tokenize(gateway, prompt="a")

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_unavailable"
    assert response.headers["retry-after"]


async def test_failure_is_in_the_ledger(start: Start) -> None:
    class Broken(MockEngine):
        async def tokenize(self, request: GenerationRequest) -> list[int]:
            raise EngineUnavailable()

    gateway = await start(mock=Broken)
    await tokenize(gateway, prompt="a")

    (row,) = (await gateway.client.get("/v1/usage")).json()["data"]
    assert (row["requests"], row["errors"]) == (1, {"engine_unavailable": 1})
