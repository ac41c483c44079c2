"""POST /v1/embeddings: one vector per input, as floats or base64, limited and counted like chat."""

from __future__ import annotations

import array
import asyncio
import base64
import math
import re
from typing import Any

import httpx
import openai
import pytest

from engine.base import EngineDied, EngineOverloaded, Prepared
from engine.mock import MockEngine
from tests.support.app import Gateway, Start
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

DIMENSIONS = 64
"""Of the mock engine's vectors, unless asked for others."""


def limited(**limits: int) -> dict[str, Any]:
    return {"models": {"shannon-chat": {"description": "General chat completion", "limits": limits}}}


async def embed(gateway: Gateway, given: Any = "hello there", **fields: Any) -> httpx.Response:
    return await gateway.client.post("/v1/embeddings", json={"input": given} | fields)


def vectors(response: httpx.Response) -> list[list[float]]:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return [entry["embedding"] for entry in data]


def decoded(text: str) -> list[float]:
    """Read base64 of little-endian float32, as the SDKs do."""
    values = array.array("f")
    values.frombytes(base64.b64decode(text, validate=True))
    return list(values)


async def usage_row(gateway: Gateway) -> dict[str, Any]:
    (row,) = (await gateway.client.get("/v1/usage")).json()["data"]
    found: dict[str, Any] = row
    return found


async def test_whole_response(gateway: Gateway) -> None:
    response = await embed(gateway)
    body = response.json()

    assert response.status_code == 200
    assert body.keys() == {"object", "data", "model", "usage"}
    assert (body["object"], body["model"]) == ("list", "shannon-chat")
    assert body["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    (entry,) = body["data"]
    assert (entry["object"], entry["index"], len(entry["embedding"])) == ("embedding", 0, DIMENSIONS)
    assert math.isclose(sum(value * value for value in entry["embedding"]), 1)
    assert response.headers["content-type"] == "application/json"
    assert "x-session-id" not in response.headers
    assert re.fullmatch("req_.+", response.headers["x-request-id"])


async def test_vectors_come_in_the_order_of_their_inputs(gateway: Gateway) -> None:
    words = [f"word{number}" for number in range(40)]
    together = vectors(await embed(gateway, words))
    alone = [vectors(await embed(gateway, word))[0] for word in words[::13]]

    assert together[::13] == alone
    assert len({tuple(vector) for vector in together}) > 1


async def test_equal_texts_have_equal_vectors_and_like_texts_near_ones(gateway: Gateway) -> None:
    one, same, near, far = vectors(await embed(gateway, ["a red car", "a red car", "a red bus", "some other thing"]))

    def likeness(other: list[float]) -> float:
        return sum(left * right for left, right in zip(one, other, strict=True))

    assert one == same
    assert likeness(near) > likeness(far)


async def test_base64_is_the_same_vector(gateway: Gateway) -> None:
    texts = ["hello there", "a red car"]
    floats = vectors(await embed(gateway, texts, encoding_format="float"))
    encoded = vectors(await embed(gateway, texts, encoding_format="base64"))

    for vector, text in zip(floats, encoded, strict=True):
        assert isinstance(text, str)
        assert decoded(text) == list(array.array("f", vector)), "to the last bit of a float32"


async def test_float_is_what_comes_unasked(gateway: Gateway) -> None:
    assert vectors(await embed(gateway)) == vectors(await embed(gateway, encoding_format="float"))
    assert vectors(await embed(gateway)) == vectors(await embed(gateway, encoding_format=None))


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
@pytest.mark.parametrize("dimensions", [1, 8, 100])
async def test_dimensions_are_the_length_of_the_vector(gateway: Gateway, encoding_format: str, dimensions: int) -> None:
    (vector,) = vectors(await embed(gateway, dimensions=dimensions, encoding_format=encoding_format))

    assert len(decoded(vector) if isinstance(vector, str) else vector) == dimensions


async def test_input_may_be_tokens(gateway: Gateway) -> None:
    tokens = (await gateway.client.post("/tokenize", json={"prompt": "hello there you"})).json()["tokens"]
    text, one, several = [
        await embed(gateway, given) for given in ("hello there you", tokens, [tokens, tokens[:1], "hello"])
    ]

    assert vectors(one) == vectors(text)
    assert vectors(several)[0] == vectors(text)[0]
    assert vectors(several)[1] == vectors(several)[2]
    assert several.json()["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [""]}, "input[0]"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", None]}, "input[1]"),
        ({"input": [[]]}, "input[0]"),
        ({"input": {}}, "input"),
        ({"input": 5}, "input"),
        ({"input": [-1]}, "input[0]"),
        ({"input": [1, "a"]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"encoding_format": 5}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": -5}, "dimensions"),
        ({"dimensions": 1.5}, "dimensions"),
        ({"dimensions": "8"}, "dimensions"),
        ({"dimensions": 10**9}, "dimensions"),
        ({"model": 5}, "model"),
        ({"user": 5}, "user"),
    ],
    ids=lambda value: re.sub(r"(, 'a'){3,}", "...", str(value))[:60],
)
async def test_bad_value_is_refused_by_name(gateway: Gateway, fields: dict[str, Any], param: str) -> None:
    response = await embed(gateway, **({"given": fields["input"]} if "input" in fields else fields))

    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert f"'{param}'" in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
    assert "x-ratelimit-limit-requests" in response.headers
    assert gateway.spent().prompt_tokens == 0


async def test_request_without_input_is_refused(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/embeddings", json={"prompt": "hello"})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "input"


async def test_most_inputs_are_served_at_once(gateway: Gateway) -> None:
    assert len(vectors(await embed(gateway, ["a"] * 2048))) == 2048


async def test_key_and_model_are_checked_as_everywhere(gateway: Gateway) -> None:
    nobody = await gateway.client.post("/v1/embeddings", json={"input": "a"}, headers={"Authorization": ""})
    unknown = await embed(gateway, model="text-embedding-3-small")

    assert (nobody.status_code, unknown.status_code) == (401, 404)
    assert unknown.json()["error"]["code"] == "model_not_found"


async def test_request_is_limited_and_in_the_ledger_like_chat(start: Start) -> None:
    gateway = await start(config=limited(requests_per_minute=2, tokens_per_minute=10))
    first = await embed(gateway, ["one two", "three"])
    too_large = await embed(gateway, "word " * 11)
    second = await embed(gateway, "a")
    third = await embed(gateway, "a")

    assert [response.status_code for response in (first, too_large, second, third)] == [200, 400, 200, 429]
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-remaining-tokens"] == "7"
    assert too_large.json()["error"]["code"] == "tokens_exceed_limit"
    assert "retry-after" in third.headers
    row = await usage_row(gateway)
    assert (row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (4, 4, 0)
    assert row["errors"] == {"tokens_exceed_limit": 1, "rate_limit_exceeded": 1}
    assert await gateway.metered() == gateway.spent()


async def test_leaving_in_the_middle_is_settled_and_gives_its_room_back(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(first_token_s=30))
    request = asyncio.create_task(embed(gateway, ["word " * 50] * 3))
    await until(lambda: gateway.mock.unfinished_requests == 1)

    request.cancel()

    await until(lambda: gateway.mock.unfinished_requests == 0, within_s=0.5)
    await until(lambda: gateway.requests_in_progress() == 0)
    row = await usage_row(gateway)
    assert (row["requests"], row["prompt_tokens"], row["aborted_requests"]) == (1, 0, 1)
    assert await gateway.metered() == gateway.spent()
    standing = await embed(gateway, dimensions=0)
    assert standing.headers["x-ratelimit-remaining-tokens"] == "200000"


class HalfWay(MockEngine):
    """Embeds the first input and then hangs."""

    async def pool(self, prepared: Prepared) -> list[list[float]]:
        self.unfinished_requests += 1
        try:
            prepared.usage.prompt_tokens = 3
            self.counters.prompt_tokens += 3
            await asyncio.sleep(30)
        finally:
            self.unfinished_requests -= 1
        return []


async def test_what_was_embedded_before_the_client_left_is_paid(serve: Start) -> None:
    gateway = await serve(mock=HalfWay)
    request = asyncio.create_task(embed(gateway, ["one two three", "four five"]))
    await until(lambda: gateway.mock.unfinished_requests == 1)

    request.cancel()

    await until(lambda: gateway.requests_in_progress() == 0)
    assert (await usage_row(gateway))["prompt_tokens"] == 3
    assert await gateway.metered() == gateway.spent()
    standing = await embed(gateway, dimensions=0)
    assert standing.headers["x-ratelimit-remaining-tokens"] == str(200_000 - 3)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(EngineDied("gone"), 503, "engine_unavailable"), (EngineOverloaded("full"), 503, "server_overloaded")],
    ids=["died", "full"],
)
async def test_engine_error(start: Start, error: Exception, status: int, code: str) -> None:
    class Broken(MockEngine):
        async def pool(self, prepared: Prepared) -> list[list[float]]:
            raise error

    gateway = await start(mock=Broken)
    response = await embed(gateway)

    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    row = await usage_row(gateway)
    assert (row["requests"], row["prompt_tokens"], row["errors"]) == (1, 0, {code: 1})


async def test_openai_sdk_asks_for_base64_and_gets_floats(serve: Start) -> None:
    gateway = await serve()
    texts = ["hello there", "a red car"]
    plain = vectors(await embed(gateway, texts))
    async with openai.AsyncOpenAI(api_key=gateway.key, base_url=f"{gateway.url}/v1", max_retries=0) as client:
        found = await client.embeddings.create(model="shannon-chat", input=texts)
        floats = await client.embeddings.create(model="shannon-chat", input=texts, encoding_format="float")
        short = await client.embeddings.create(model="shannon-chat", input="hello", dimensions=8)
        with pytest.raises(openai.BadRequestError) as refusal:
            await client.embeddings.create(model="shannon-chat", input="")

    assert [list(array.array("f", entry.embedding)) for entry in found.data] == [
        list(array.array("f", vector)) for vector in plain
    ]
    assert [entry.embedding for entry in floats.data] == plain
    assert len(short.data[0].embedding) == 8
    assert found.usage.prompt_tokens == 5
    assert refusal.value.param == "input"
