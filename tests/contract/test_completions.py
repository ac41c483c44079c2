"""POST /v1/completions: bare prompts, one or many, limited and counted as one request; OpenAI's legacy form."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from typing import Any

import httpx
import openai
import pytest

from engine.base import EngineDied, GenerationRequest
from engine.mock import Fault, MockEngine
from gateway.access.auth import Principal
from gateway.access.keys import KeySpec
from gateway.meter import Meter
from tests.support.app import KEY_ID, NOW, Gateway, Start
from tests.support.frames import chunks, data_lines
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

ENDLESS = {"ignore_eos": True, "max_tokens": 900}


def limited(**limits: int) -> dict[str, Any]:
    return {"models": {"shannon-chat": {"description": "General chat completion", "limits": limits}}}


async def complete(gateway: Gateway, prompt: Any = "Once upon", **fields: Any) -> httpx.Response:
    return await gateway.client.post("/v1/completions", json={"prompt": prompt} | fields)


async def raw_stream(gateway: Gateway, **fields: Any) -> bytes:
    """Return the bytes of a stream, its id replaced by ID."""
    response = await complete(gateway, **({"stream": True} | fields))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return re.sub(rb"cmpl-[0-9a-f]{32}", b"ID", response.content)


def frame(rest: str) -> bytes:
    head = f'{{"id":"ID","object":"text_completion","created":{NOW},"model":"shannon-chat","choices":['
    return f"data: {head}{rest}\n\n".encode()


def endless_engine() -> MockEngine:
    return MockEngine(token_s=0.002, max_model_len=4096)


async def settled(gateway: Gateway) -> None:
    await until(lambda: gateway.mock.unfinished_requests == 0, within_s=0.5)
    await until(lambda: gateway.requests_in_progress() == 0)


async def usage_rows(gateway: Gateway) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (await gateway.client.get("/v1/usage")).json()["data"]
    return rows


async def test_whole_completion(gateway: Gateway) -> None:
    response = await complete(gateway)
    body = response.json()

    assert response.status_code == 200
    assert re.fullmatch("cmpl-[0-9a-f]{32}", body["id"])
    assert (body["object"], body["created"], body["model"]) == ("text_completion", NOW, "shannon-chat")
    assert body["choices"] == [{"index": 0, "text": "You said: Once upon", "logprobs": None, "finish_reason": "stop"}]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (2, 4)
    assert "x-session-id" not in response.headers
    assert response.headers["x-ratelimit-remaining-requests"] == "59"


async def test_stream_is_these_bytes(start: Start) -> None:
    gateway = await start(mock=lambda: MockEngine(reply="a time"))

    assert await raw_stream(gateway) == b"".join(
        [
            frame('{"index":0,"text":"a","logprobs":null,"finish_reason":null}]}'),
            frame('{"index":0,"text":" time","logprobs":null,"finish_reason":"stop"}]}'),
            b"data: [DONE]\n\n",
        ]
    )


async def test_usage_of_a_stream_has_a_frame_of_its_own(gateway: Gateway) -> None:
    frames = chunks(await raw_stream(gateway, stream_options={"include_usage": True}))

    assert [chunk["usage"] for chunk in frames[:-1]] == [None] * (len(frames) - 1)
    assert frames[-1]["choices"] == []
    assert frames[-1]["usage"]["total_tokens"] == 6


async def test_prompt_is_bare(gateway: Gateway) -> None:
    await complete(gateway)

    request = gateway.mock.requests[-1]
    assert (request.prompt, request.messages, request.tools) == ("Once upon", [], None)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Once", ["Once"]),
        ([1, 2, 3], [[1, 2, 3]]),
        (["Once", "Twice"], ["Once", "Twice"]),
        (["Once"], ["Once"]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["Once", [1, 2]], ["Once", [1, 2]]),
    ],
    ids=str,
)
async def test_prompt_may_be_text_or_tokens_or_several(gateway: Gateway, prompt: Any, prompts: list[Any]) -> None:
    body = (await complete(gateway, prompt)).json()

    assert [request.prompt for request in gateway.mock.requests] == prompts
    assert [choice["index"] for choice in body["choices"]] == list(range(len(prompts)))


async def test_request_ids_of_several_prompts_differ(gateway: Gateway) -> None:
    body = (await complete(gateway, ["a", "b"])).json()

    assert [request.request_id for request in gateway.mock.requests] == [f"{body['id']}-0", f"{body['id']}-1"]


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        ({}, {"max_tokens": None, "default_max_tokens": 16, "logprobs": False, "n": 1, "stream": False}),
        ({"max_tokens": 7}, {"max_tokens": 7, "max_tokens_param": "max_tokens"}),
        ({"logprobs": 0}, {"logprobs": True, "top_logprobs": 0}),
        ({"logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
        ({"stop": "END", "seed": 5, "temperature": 0}, {"stop": ["END"], "seed": 5, "temperature": 0}),
        ({"n": 2, "top_k": 4, "min_tokens": 1}, {"n": 2, "top_k": 4, "min_tokens": 1}),
        ({"logit_bias": {"5": 1}}, {"logit_bias": {"5": 1}}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"structured_outputs": {"choice": ["a", "b"]}}),
        ({"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_object"}}),
    ],
    ids=str,
)
async def test_field_reaches_the_engine(gateway: Gateway, sent: dict[str, Any], received: dict[str, Any]) -> None:
    assert (await complete(gateway, **sent)).status_code == 200

    request = gateway.mock.requests[-1]
    assert {name: getattr(request, name) for name in received} == received


async def test_text_is_sixteen_tokens_long_unless_asked_for_more(start: Start) -> None:
    gateway = await start(mock=lambda: MockEngine(reply="word " * 50))

    assert (await complete(gateway)).json()["usage"]["completion_tokens"] == 16
    assert (await complete(gateway, max_tokens=20)).json()["usage"]["completion_tokens"] == 20


async def test_choices_are_counted_over_all_prompts(gateway: Gateway) -> None:
    body = (await complete(gateway, ["a", "b c"], n=2)).json()

    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "You said: a"),
        (1, "You said: a"),
        (2, "You said: b c"),
        (3, "You said: b c"),
    ]
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 2 * 3 + 2 * 4


async def test_streams_of_several_prompts_come_side_by_side(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(reply="a b c d", token_s=0.005))
    frames = chunks(await raw_stream(gateway, prompt=["x", "y"], n=2))
    choices = [chunk["choices"][0] for chunk in frames]

    for index in range(4):
        mine = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in mine) == "a b c d"
        assert [choice["finish_reason"] for choice in mine] == [None] * 3 + ["stop"]
    order = [choice["index"] // 2 for choice in choices]
    assert order != sorted(order), "neither waits for the other"


async def test_order_of_choices_is_that_of_the_prompts_whoever_ends_first(serve: Start) -> None:
    def reply(request: GenerationRequest) -> str:
        return "word " * int(str(request.prompt))

    gateway = await serve(mock=lambda: MockEngine(reply=reply, token_s=0.002))
    body = (await complete(gateway, ["9", "1", "5"])).json()

    assert [len(choice["text"].split()) for choice in body["choices"]] == [9, 1, 5]


@pytest.mark.parametrize("n", [1, 2])
async def test_echo_puts_the_prompt_in_front(gateway: Gateway, n: int) -> None:
    prompts = ["Once upon", "Twice"]
    body = (await complete(gateway, prompts, n=n, echo=True)).json()
    texts: dict[int, str] = {}
    for chunk in chunks(await raw_stream(gateway, prompt=prompts, n=n, echo=True)):
        choice = chunk["choices"][0]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]

    expected = [f"{prompt}You said: {prompt}" for prompt in prompts for _ in range(n)]
    assert [choice["text"] for choice in body["choices"]] == expected
    assert [texts[index] for index in sorted(texts)] == expected


async def test_logprobs_have_the_legacy_form(gateway: Gateway) -> None:
    expected = {
        "tokens": ["You", " said:", " Once"],
        "token_logprobs": [0.0, 0.0, 0.0],
        "top_logprobs": [None, None, None],
        "text_offset": [0, 3, 9],
    }
    body = (await complete(gateway, logprobs=1, max_tokens=3)).json()
    frames = [chunk["choices"][0] for chunk in chunks(await raw_stream(gateway, logprobs=1, max_tokens=3))]

    assert body["choices"][0]["logprobs"] == expected
    for name, values in expected.items():
        assert [value for choice in frames for value in choice["logprobs"][name]] == values


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt[0]"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [2**31]}, "prompt[0]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": ["a", [1, "b"]]}, "prompt[1][1]"),
        ({"prompt": [[["a"]]]}, "prompt[0]"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 64, "n": 3}, "n"),
        ({"n": 17}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"echo": "yes"}, "echo"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": True, "prompt": [1, 2]}, "echo"),
        ({"echo": True, "prompt": ["a", [1, 2]]}, "echo"),
        ({"suffix": "the end"}, "suffix"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"best_of": 2}, "best_of"),
        ({"cache_salt": "mine"}, "cache_salt"),
        ({"priority": -1}, "priority"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"temperature": 3}, "temperature"),
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a" * 4097}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ],
    ids=lambda value: re.sub(r"(, 'a'){3,}", "...", str(value))[:60],
)
async def test_bad_value_is_refused_by_name(gateway: Gateway, fields: dict[str, Any], param: str) -> None:
    response = await complete(gateway, **fields)

    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400
    assert gateway.mock.requests == []
    assert "x-ratelimit-limit-requests" in response.headers


async def test_request_without_a_prompt_is_refused(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/completions", json={"messages": [{"role": "user", "content": "hi"}]})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("prompt", ["word " * 30, ["short", "word " * 30]], ids=["alone", "second of two"])
@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_that_does_not_fit_is_refused_and_nothing_runs(start: Start, prompt: Any, stream: bool) -> None:
    gateway = await start(mock=lambda: MockEngine(max_model_len=20))
    response = await complete(gateway, prompt, stream=stream)

    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert "the prompt is 30 tokens long" in error["message"]
    assert gateway.spent().prompt_tokens == 0
    (row,) = await usage_rows(gateway)
    assert (row["requests"], row["prompt_tokens"], row["errors"]) == (1, 0, {"context_length_exceeded": 1})


async def test_max_tokens_that_do_not_fit_are_refused_by_name(start: Start) -> None:
    gateway = await start(mock=lambda: MockEngine(max_model_len=20))
    response = await complete(gateway, max_tokens=19)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_tokens"
    assert "at most 18, not 19" in response.json()["error"]["message"]


async def test_key_and_model_are_checked_as_everywhere(gateway: Gateway) -> None:
    nobody = await gateway.client.post("/v1/completions", json={"prompt": "a"}, headers={"Authorization": ""})
    unknown = await complete(gateway, model="gpt-5")

    assert (nobody.status_code, unknown.status_code) == (401, 404)
    assert unknown.json()["error"]["code"] == "model_not_found"


async def test_many_prompts_are_one_request(start: Start) -> None:
    gateway = await start(config=limited(requests_per_minute=2))
    first = await complete(gateway, ["a", "b", "c", "d"])
    second = await complete(gateway, "a")
    third = await complete(gateway, "a")

    assert [response.status_code for response in (first, second, third)] == [200, 200, 429]
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    (row,) = await usage_rows(gateway)
    assert row["requests"] == 3


async def test_tokens_are_reserved_for_all_prompts_or_none(start: Start) -> None:
    gateway = await start(config=limited(tokens_per_minute=100))
    # Each needs 1 + 30 tokens, so that three fit and four never do.
    refused = await complete(gateway, ["a", "b", "c", "d"], max_tokens=30)

    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "tokens_exceed_limit"
    assert "124 tokens" in refused.json()["error"]["message"]
    assert gateway.spent().prompt_tokens == 0

    served = await complete(gateway, ["a", "b", "c"], max_tokens=30)
    spent = served.json()["usage"]["total_tokens"]
    assert served.status_code == 200
    assert int(served.headers["x-ratelimit-remaining-tokens"]) == 100 - spent, "what was not used is back"

    limited_now = await complete(gateway, ["a", "b", "c"], max_tokens=30, stream=True)
    assert limited_now.status_code == 429
    assert int(limited_now.headers["retry-after"]) > 0
    assert gateway.spent().prompt_tokens == 3, "not one of them ran"


async def test_lease_of_a_request_ends_with_its_last_prompt(serve: Start) -> None:
    gateway = await serve(config=limited(concurrent_requests=1), mock=endless_engine)
    running = asyncio.create_task(complete(gateway, ["a", "b"], **ENDLESS))
    await until(lambda: gateway.mock.unfinished_requests == 2)
    assert (await complete(gateway, ["a", "b"])).status_code == 429

    running.cancel()
    await settled(gateway)

    for _ in range(2):
        assert (await complete(gateway, ["a b c d e f g h i j", "a"])).status_code == 200


async def test_usage_of_all_prompts_is_in_the_ledger(gateway: Gateway) -> None:
    body = (await complete(gateway, ["a", "b c"], n=2)).json()

    (row,) = await usage_rows(gateway)
    assert (row["requests"], row["aborted_requests"], row["errors"]) == (1, 0, {})
    assert (row["prompt_tokens"], row["completion_tokens"]) == (
        body["usage"]["prompt_tokens"],
        body["usage"]["completion_tokens"],
    )
    assert await gateway.metered() == gateway.spent()


@pytest.mark.parametrize("prompt", ["a", ["a", "b", "c"]], ids=["one", "three"])
async def test_leaving_a_stream_aborts_every_prompt_and_settles(serve: Start, prompt: Any) -> None:
    gateway = await serve(mock=endless_engine)
    body = {"prompt": prompt, "stream": True} | ENDLESS
    async with gateway.client.stream("POST", "/v1/completions", json=body) as response:
        await anext(response.aiter_raw())
        assert gateway.mock.unfinished_requests == (1 if prompt == "a" else 3)

    await settled(gateway)
    spent = gateway.spent()
    assert 0 < spent.completion_tokens < 900
    assert await gateway.metered() == spent
    (row,) = await usage_rows(gateway)
    assert (row["requests"], row["aborted_requests"]) == (1, 1)
    assert row["completion_tokens"] == spent.completion_tokens


async def test_leaving_a_whole_completion_aborts_every_prompt_and_settles(serve: Start) -> None:
    gateway = await serve(mock=endless_engine)
    request = asyncio.create_task(complete(gateway, ["a", "b", "c"], **ENDLESS))
    await until(lambda: gateway.mock.counters.completion_tokens > 9)

    request.cancel()

    await settled(gateway)
    assert await gateway.metered() == gateway.spent()
    limits = await complete(gateway)
    spent = gateway.spent()
    assert (
        int(limits.headers["x-ratelimit-remaining-tokens"]) == 200_000 - spent.prompt_tokens - spent.completion_tokens
    )


async def test_failure_of_one_prompt_ends_the_others(serve: Start) -> None:
    gateway = await serve(mock=endless_engine)
    gateway.mock.faults.extend([Fault(at_token=10**6), Fault(at_token=5, error=EngineDied("boom"))])
    response = await complete(gateway, ["a", "b", "c"], **ENDLESS)

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_unavailable"
    await settled(gateway)
    assert gateway.spent().completion_tokens < 900
    assert await gateway.metered() == gateway.spent()
    (row,) = await usage_rows(gateway)
    assert (row["requests"], row["errors"]) == (1, {"engine_unavailable": 1})


async def test_failure_of_one_prompt_in_a_stream_is_an_error_frame(serve: Start) -> None:
    gateway = await serve(mock=endless_engine)
    gateway.mock.faults.extend([Fault(at_token=10**6), Fault(at_token=5, error=EngineDied("boom"))])
    response = await complete(gateway, ["a", "b"], stream=True, **ENDLESS)

    lines = data_lines(response.content)
    assert json.loads(lines[-1])["error"]["code"] == "engine_unavailable"
    assert b"[DONE]" not in lines
    await settled(gateway)
    assert await gateway.metered() == gateway.spent()


async def test_room_reserved_for_a_prompt_that_never_ran_is_given_back(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(first_token_s=5))
    request = asyncio.create_task(complete(gateway, ["a", "b"], max_tokens=500))
    await until(lambda: gateway.mock.unfinished_requests == 2)
    request.cancel()
    await settled(gateway)

    standing = await complete(gateway, "a", temperature=9)  # refused, and tells where the key stands
    assert standing.headers["x-ratelimit-remaining-tokens"] == "200000"
    assert standing.headers["x-ratelimit-remaining-requests"] == "59"


async def test_room_taken_for_several_goes_back_for_those_that_never_began(gateway: Gateway) -> None:
    """As when the client leaves in the very moment between the two."""
    services = gateway.services
    principal = Principal(KEY_ID)
    model = services.catalog.resolve(None, principal)
    meter = Meter("r1", principal, model, services.limits, services.ledger, services.metrics)
    prepared = [
        await meter.prepare(GenerationRequest(request_id=f"r1-{number}", prompt="a", max_tokens=100))
        for number in range(3)
    ]
    async with meter.reserved(prepared):
        standing = await services.limits.peek(principal, model)
        assert standing is not None
        assert (standing.remaining["requests"], standing.remaining["tokens"]) == (59, 200_000 - 3 * 101)
        async with contextlib.aclosing(meter.generate(prepared[1])) as deltas:
            async for _ in deltas:
                pass

    spent = gateway.spent().prompt_tokens + gateway.spent().completion_tokens
    standing = await services.limits.peek(principal, model)
    assert standing is not None
    assert (standing.remaining["requests"], standing.remaining["tokens"]) == (59, 200_000 - spent)
    (row,) = await usage_rows(gateway)
    assert (row["requests"], row["prompt_tokens"], row["aborted_requests"]) == (1, 1, 1)


async def test_other_keys_limits_are_their_own(start: Start) -> None:
    gateway = await start(config=limited(requests_per_minute=1))
    _, key = await gateway.services.keys.create(KeySpec(name="someone"))
    other = {"Authorization": f"Bearer {key}"}

    assert (await complete(gateway)).status_code == 200
    assert (await complete(gateway)).status_code == 429
    response = await gateway.client.post("/v1/completions", json={"prompt": "a"}, headers=other)
    assert response.status_code == 200


async def test_openai_sdk(serve: Start) -> None:
    gateway = await serve()
    async with openai.AsyncOpenAI(api_key=gateway.key, base_url=f"{gateway.url}/v1", max_retries=0) as client:
        whole = await client.completions.create(model="shannon-chat", prompt=["Once upon", "a time"], logprobs=1)
        stream = await client.completions.create(
            model="shannon-chat", prompt="Once upon", stream=True, stream_options={"include_usage": True}
        )
        pieces = [chunk async for chunk in stream]
        with pytest.raises(openai.BadRequestError) as refusal:
            await client.completions.create(model="shannon-chat", prompt="a", suffix="b")

    assert [choice.text for choice in whole.choices] == ["You said: Once upon", "You said: a time"]
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.tokens == ["You", " said:", " Once", " upon"]
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == "You said: Once upon"
    assert pieces[-2].choices[0].finish_reason == "stop"
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.total_tokens == 6
    assert refusal.value.param == "suffix"
