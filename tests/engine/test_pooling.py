"""Embeddings by vLLM: vectors in order, counts to the token, also of a request that was left in the middle."""

from __future__ import annotations

import array
import asyncio
import base64
import contextlib
import math
import uuid
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from engine.base import EmbeddingRequest, EngineDied, EngineUnavailable, InvalidRequest
from engine.local.pooling import PoolingEngine
from tests.support.app import Start
from tests.support.engine.demo_requests import STORY, counter, request
from tests.support.engine.embeddings import embed

pytestmark = [pytest.mark.anyio, pytest.mark.vllm]

SIZE = 192
LONG = "What is vLLM? " * 20


@pytest.fixture(scope="module")
async def pooling(anyio_backend: str) -> AsyncIterator[PoolingEngine]:
    engine = PoolingEngine(
        "demo", {"max_model_len": 512, "max_num_seqs": 8, "convert": "embed", "hf_overrides": {"is_matryoshka": True}}
    )
    await engine.start()
    yield engine
    await engine.close()


def norm(vector: list[float]) -> float:
    return math.sqrt(sum(value * value for value in vector))


async def test_vectors_come_in_the_order_of_their_inputs(pooling: PoolingEngine) -> None:
    texts = [f"Sentence number {number}." for number in range(40)]
    together, _ = await embed(pooling, *texts)
    alone, _ = await embed(pooling, texts[17])

    assert len(together) == 40
    assert {len(vector) for vector in together} == {SIZE}
    assert together[17] == pytest.approx(alone[0], abs=1e-5)
    assert together[16] != pytest.approx(together[17], abs=1e-3)
    assert all(math.isclose(norm(vector), 1, abs_tol=1e-4) for vector in together)


async def test_tokens_are_what_vllm_counts(pooling: PoolingEngine) -> None:
    before = counter("prompt_tokens_total")
    _, prepared = await embed(pooling, "Say hello.", [1, 2, 3, 4], LONG)

    assert prepared.usage.prompt_tokens == prepared.prompt_tokens > 80
    assert prepared.usage.completion_tokens == 0
    assert counter("prompt_tokens_total") - before == prepared.usage.prompt_tokens


async def test_tokens_are_another_way_to_say_a_text(pooling: PoolingEngine) -> None:
    tokens = await pooling.tokenize(request([], prompt="Say hello."))
    vectors, prepared = await embed(pooling, "Say hello.", tokens)

    assert vectors[0] == pytest.approx(vectors[1], abs=1e-5)
    assert prepared.prompt_tokens == 2 * len(tokens)


@pytest.mark.parametrize("dimensions", [1, 8, SIZE])
async def test_dimensions_cut_the_vector_and_keep_its_length_one(pooling: PoolingEngine, dimensions: int) -> None:
    (whole, short), _ = await embed(pooling, "Say hello.", "Say hello.")
    (cut,), _ = await embed(pooling, "Say hello.", dimensions=dimensions)

    assert len(cut) == dimensions
    assert whole == pytest.approx(short, abs=1e-5)
    head = whole[:dimensions]
    assert cut == pytest.approx([value / norm(head) for value in head], abs=1e-4)


@pytest.mark.parametrize(
    ("inputs", "fields", "param", "reason"),
    [
        (["a"], {"dimensions": SIZE + 1}, "dimensions", "at most 192"),
        (["a", "word " * 600], {}, "input", "512 tokens"),
        (["a", [5] * 600], {}, "input", "512 tokens"),
        (["a", [5000]], {}, "input[1]", "vocabulary"),
    ],
    ids=["dimensions", "long text", "many tokens", "no such token"],
)
async def test_what_cannot_be_is_refused_by_name(
    pooling: PoolingEngine, inputs: list[Any], fields: dict[str, Any], param: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await embed(pooling, *inputs, **fields)

    assert refusal.value.param == param
    assert reason in str(refusal.value)
    assert pooling.unfinished_requests == 0


async def test_cached_prefix_serves_equal_salts_only(pooling: PoolingEngine) -> None:
    text = f"{uuid.uuid4().hex} {LONG}"
    _, first = await embed(pooling, text, cache_salt="acme")
    _, second = await embed(pooling, text, cache_salt="acme")
    _, other = await embed(pooling, text, cache_salt="initech")

    assert (first.usage.cached_tokens, other.usage.cached_tokens) == (0, 0)
    assert 32 <= second.usage.cached_tokens < second.prompt_tokens


@pytest.mark.parametrize("made", [0, 1, 500], ids=["before the first", "after the first step", "half way"])
async def test_leaving_in_the_middle_frees_the_engine_and_costs_what_was_made(
    pooling: PoolingEngine, made: int
) -> None:
    before = counter("prompt_tokens_total")
    texts = [f"{uuid.uuid4().hex} {number} " + "word " * 100 for number in range(150)]
    prepared = await pooling.prepare(EmbeddingRequest(request_id=uuid.uuid4().hex, inputs=list(texts)))
    task = asyncio.create_task(pooling.pool(prepared))
    await asyncio.sleep(0)
    while counter("prompt_tokens_total") < before + made:
        await asyncio.sleep(0.001)

    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task

    assert pooling.unfinished_requests == 0
    assert made <= prepared.usage.prompt_tokens < prepared.prompt_tokens
    await embed(pooling, "Say hello.")  # after which nothing of the first can still be on its way
    _, last = await embed(pooling, "Say hello.")
    assert counter("prompt_tokens_total") - before == prepared.usage.prompt_tokens + 2 * last.usage.prompt_tokens


async def test_more_inputs_than_the_engine_runs_at_once_are_served(pooling: PoolingEngine) -> None:
    assert pooling.max_num_seqs == 8
    vectors, prepared = await embed(pooling, *(f"{number} hello" for number in range(300)))

    assert len(vectors) == 300
    assert prepared.usage.prompt_tokens == prepared.prompt_tokens


async def test_text_longer_than_the_context_is_counted(pooling: PoolingEngine) -> None:
    assert len(await pooling.tokenize(request([], prompt="word " * 600))) > 600
    assert await pooling.detokenize(await pooling.tokenize(request([], prompt="Say hello."))) == "Say hello."
    with pytest.raises(InvalidRequest, match="At most 2048 tokens are counted") as refusal:
        await pooling.tokenize(request([], prompt="word " * 3000))
    assert (refusal.value.param, refusal.value.code) == ("prompt", "context_length_exceeded")


async def test_it_makes_embeddings_and_nothing_else(pooling: PoolingEngine) -> None:
    for asked in (pooling.prepare(request(STORY)), pooling.tokenize(request(STORY))):
        with pytest.raises(InvalidRequest, match="makes embeddings only") as refusal:
            await asked
        assert (refusal.value.param, refusal.value.code) == ("model", "model_not_supported")
    assert not pooling.takes_images


class _Borrowed(PoolingEngine):
    """The module's engine, which an app that closes must leave running."""

    def __init__(self, engine: PoolingEngine) -> None:
        self.__dict__ = engine.__dict__

    async def start(self) -> None: ...

    async def close(self) -> None: ...


async def test_clients_get_the_engines_vectors_and_the_ledger_its_count(pooling: PoolingEngine, start: Start) -> None:
    texts = ["Say hello.", "What is vLLM?"]
    gateway = await start(mock=lambda: cast(Any, _Borrowed(pooling)))

    async def post(**fields: Any) -> Any:
        response = await gateway.client.post("/v1/embeddings", json={"input": texts} | fields)
        return response.raise_for_status().json()

    before = counter("prompt_tokens_total")
    bodies = [await post(), await post(encoding_format="base64"), await post(dimensions=8)]
    counted = counter("prompt_tokens_total") - before
    vectors, _ = await embed(pooling, *texts)

    floats, packed, short = ([entry["embedding"] for entry in body["data"]] for body in bodies)
    unpacked = [array.array("f", base64.b64decode(text)).tolist() for text in packed]
    for number, vector in enumerate(vectors):
        assert floats[number] == pytest.approx(vector, abs=1e-5)
        assert unpacked[number] == pytest.approx(vector, abs=1e-5)
        assert len(short[number]) == 8
    (row,) = (await gateway.client.get("/v1/usage")).json()["data"]
    assert row["requests"] == 3
    assert row["prompt_tokens"] == counted == sum(body["usage"]["prompt_tokens"] for body in bodies)


async def test_closing_ends_what_runs(pooling: PoolingEngine) -> None:
    """Must stay the last of this file."""
    asked = EmbeddingRequest(request_id=uuid.uuid4().hex, inputs=["word " * 400] * 300)
    task = asyncio.create_task(pooling.pool(await pooling.prepare(asked)))
    while not pooling.unfinished_requests:
        await asyncio.sleep(0)
    await pooling.close()

    with pytest.raises(EngineDied):
        await task
    with pytest.raises(EngineUnavailable):
        await embed(pooling, "Say hello.")
