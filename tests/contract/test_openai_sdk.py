"""The OpenAI Python SDK against the gateway over a real socket: results, streams, and the exceptions it raises."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from engine.base import EngineError, EngineOverloaded, EngineUnavailable
from engine.mock import Fault, MockEngine
from tests.support.app import NOW, Gateway, Start
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello there"}]


@pytest.fixture
async def gateway(serve: Start) -> Gateway:
    """A gateway on a socket, with a second key that may use one model."""
    return await serve(
        server={"max_body_bytes": 4096},
        config={"keys": [{"name": "ci", "key_env": "CI_KEY", "models": ["shannon-complex"]}]},
        environment={"CI_KEY": "a-key-chosen-by-hand-1"},
    )


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    """The SDK as it comes, except that it does not retry."""
    async with openai.AsyncOpenAI(api_key=gateway.key, base_url=f"{gateway.url}/v1", max_retries=0) as client:
        yield client


async def test_completion(client: openai.AsyncOpenAI) -> None:
    completion = await client.chat.completions.create(model="shannon-chat", messages=HI)

    assert completion.id.startswith("chatcmpl-")
    assert (completion.object, completion.created, completion.model) == ("chat.completion", NOW, "shannon-chat")
    (choice,) = completion.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "You said: hello there"
    assert choice.finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 3
    assert completion.usage.completion_tokens == 4
    assert completion.usage.total_tokens == 7
    assert completion._request_id is not None
    assert completion._request_id.startswith("req_")
    assert completion.model_extra is not None
    assert len(completion.model_extra["shannon_events"]) == 4


async def test_n_choices(client: openai.AsyncOpenAI) -> None:
    completion = await client.chat.completions.create(model="shannon-chat", messages=HI, n=2)

    assert [choice.index for choice in completion.choices] == [0, 1]
    assert [choice.message.content for choice in completion.choices] == ["You said: hello there"] * 2


async def test_logprobs(client: openai.AsyncOpenAI) -> None:
    completion = await client.chat.completions.create(
        model="shannon-chat", messages=HI, logprobs=True, top_logprobs=2, max_tokens=2
    )

    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert [(entry.token, entry.logprob) for entry in logprobs.content or []] == [("You", 0.0), (" said:", 0.0)]
    assert completion.choices[0].finish_reason == "length"


async def test_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="shannon-chat", messages=HI, stream=True)
    chunks = [chunk async for chunk in stream]

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "You said: hello there"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 5 + ["stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 7
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].model_extra is not None
    assert chunks[0].model_extra["shannon_events"][0]["type"] == "WORKFLOW_STARTED"


async def test_stream_with_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="shannon-chat", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]

    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "stop"


async def test_stream_of_n_choices_with_logprobs(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="shannon-chat", messages=HI, stream=True, n=2, logprobs=True, max_tokens=2
    )
    tokens: dict[int, list[str]] = {0: [], 1: []}
    reasons = {}
    async for chunk in stream:
        (choice,) = chunk.choices
        if choice.logprobs is not None:
            tokens[choice.index] += [entry.token for entry in choice.logprobs.content or []]
        if choice.finish_reason is not None:
            reasons[choice.index] = choice.finish_reason

    assert tokens == {0: ["You", " said:"], 1: ["You", " said:"]}
    assert reasons == {0: "length", 1: "length"}


async def test_stream_helper_rebuilds_the_completion(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="shannon-chat", messages=HI, n=2) as stream:
        completion = await stream.get_final_completion()

    assert [choice.message.content for choice in completion.choices] == ["You said: hello there"] * 2
    assert [choice.finish_reason for choice in completion.choices] == ["stop", "stop"]


async def test_vllms_extras_go_in_the_extra_body(client: openai.AsyncOpenAI, gateway: Gateway) -> None:
    completion = await client.chat.completions.create(
        model="shannon-chat",
        messages=HI,
        max_completion_tokens=6,
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "stop_token_ids": [7]},
    )

    assert completion.usage is not None
    assert completion.usage.completion_tokens == 6
    request = gateway.mock.requests[-1]
    assert (request.top_k, request.min_p, request.repetition_penalty) == (5, 0.1, 1.2)
    assert (request.ignore_eos, request.stop_token_ids, request.max_tokens) == (True, [7], 6)


async def test_leaving_a_stream_aborts_it(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(token_s=0.002))
    async with openai.AsyncOpenAI(api_key=gateway.key, base_url=f"{gateway.url}/v1") as client:
        stream = await client.chat.completions.create(
            model="shannon-chat", messages=HI, stream=True, extra_body={"ignore_eos": True}
        )
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()

    await until(lambda: gateway.requests_in_progress() == 0, within_s=0.5)
    assert gateway.spent().completion_tokens < 500
    assert await gateway.metered() == gateway.spent()


async def test_models(client: openai.AsyncOpenAI) -> None:
    listed = await client.models.list()
    one = await client.models.retrieve("shannon-complex")

    assert [model.id for model in listed.data] == ["shannon-chat", "shannon-complex"]
    assert (one.id, one.object, one.owned_by) == ("shannon-complex", "model", "shannon")


async def test_bad_request(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="shannon-chat", messages=HI, temperature=9)

    assert (caught.value.status_code, caught.value.param, caught.value.code) == (400, "temperature", "invalid_request")
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id is not None
    assert "less than or equal to 2" in caught.value.message


async def test_prompt_that_does_not_fit(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model="shannon-chat", messages=[{"role": "user", "content": "a " * 1100}], stream=True
        )

    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("key", ["sk-shannon-wrong", "x"])
async def test_wrong_key(gateway: Gateway, key: str) -> None:
    async with openai.AsyncOpenAI(api_key=key, base_url=f"{gateway.url}/v1") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.models.list()

    assert caught.value.code == "invalid_api_key"


async def test_model_beyond_the_key(gateway: Gateway) -> None:
    async with openai.AsyncOpenAI(api_key="a-key-chosen-by-hand-1", base_url=f"{gateway.url}/v1") as client:
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await client.chat.completions.create(model="shannon-chat", messages=HI)

    assert caught.value.code == "model_not_allowed"


async def test_unknown_model(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-5", messages=HI)

    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_endpoint_that_does_not_exist(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Unknown request URL: POST /v1/moderations"):
        await client.moderations.create(input="hi")


async def test_body_over_the_cap(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(model="shannon-chat", messages=[{"role": "user", "content": "a" * 5000}])

    assert caught.value.status_code == 413
    assert caught.value.code == "request_too_large"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineOverloaded("full"), 503, "server_overloaded"),
        (EngineUnavailable("gone"), 503, "engine_unavailable"),
        (EngineError("odd"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_engine_error(
    client: openai.AsyncOpenAI, gateway: Gateway, error: EngineError, status: int, code: str, stream: bool
) -> None:
    gateway.mock.faults.append(Fault(error=error))
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model="shannon-chat", messages=HI, stream=stream)

    assert (caught.value.status_code, caught.value.code) == (status, code)


async def test_sdk_does_not_repeat_what_would_fail_again(gateway: Gateway) -> None:
    gateway.mock.faults.extend([Fault(error=EngineError("odd"))] * 3)
    async with openai.AsyncOpenAI(api_key=gateway.key, base_url=f"{gateway.url}/v1", max_retries=2) as client:
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="shannon-chat", messages=HI)

    assert len(gateway.mock.requests) == 1


async def test_sdk_repeats_what_the_server_had_no_room_for(gateway: Gateway) -> None:
    gateway.mock.faults.append(Fault(error=EngineOverloaded("full")))
    async with openai.AsyncOpenAI(api_key=gateway.key, base_url=f"{gateway.url}/v1", max_retries=2) as client:
        completion = await client.chat.completions.create(model="shannon-chat", messages=HI)

    assert completion.choices[0].message.content == "You said: hello there"
    assert len(gateway.mock.requests) == 2
