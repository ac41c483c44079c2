"""Two engine cores behind one front end (vLLM's data parallelism): the same promises, summed over both."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client import REGISTRY

from engine.base import EngineDied, EngineUnavailable
from engine.local.embedded import EmbeddedEngine
from tests.support.engine.demo_requests import STORY, answer, request
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.vllm, pytest.mark.slow]

NAME = "parallel"
HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]


def by_rank(name: str) -> dict[str, float]:
    """Return one of vLLM's metrics of this engine by rank, which is the label `engine`."""
    found: dict[str, float] = {}
    for sample in (sample for family in REGISTRY.collect() for sample in family.samples):
        if sample.name == f"vllm:{name}" and sample.labels["model_name"] == NAME:
            found[sample.labels["engine"]] = found.get(sample.labels["engine"], 0) + sample.value
    return found


@pytest.fixture(scope="module")
async def parallel(anyio_backend: str) -> AsyncIterator[EmbeddedEngine]:
    # Without an executor named each core has a worker process, and vLLM is imported twice more.
    args = {"data_parallel_size": 2, "distributed_executor_backend": "uni"}
    engine = EmbeddedEngine("demo", {"max_model_len": 1024, "max_num_seqs": 8, "served_model_name": [NAME]} | args)
    await engine.start()
    yield engine
    await engine.close()


async def test_both_ranks_answer_and_their_counters_sum_to_the_usage(parallel: EmbeddedEngine) -> None:
    before = by_rank("prompt_tokens_total"), by_rank("generation_tokens_total")
    answers = await asyncio.gather(*(answer(parallel, HELLO) for _ in range(8)))
    read, made = by_rank("prompt_tokens_total"), by_rank("generation_tokens_total")

    assert {text for text, _ in answers} == {"Hello! I am the Shannon demo model."}
    assert read.keys() == made.keys() == {"0", "1"}
    assert all(made[rank] > before[1].get(rank, 0) for rank in made), "the work was shared"
    usages = [prepared.usage for _, prepared in answers]
    assert sum(read.values()) - sum(before[0].values()) == sum(usage.prompt_tokens for usage in usages)
    assert sum(made.values()) - sum(before[1].values()) == sum(usage.completion_tokens for usage in usages)


async def test_room_is_that_of_both_ranks(parallel: EmbeddedEngine) -> None:
    assert parallel.max_num_seqs == 16, "the queue in front lets that many in"


async def test_leaving_frees_the_rank_that_was_at_work(parallel: EmbeddedEngine) -> None:
    before = sum(by_rank("generation_tokens_total").values())
    prepared = [await parallel.prepare(request(STORY, stream=True, ignore_eos=True, max_tokens=900)) for _ in range(6)]
    streams = [parallel.generate(one) for one in prepared]
    for stream in streams:
        await anext(stream)
    await until(lambda: all(by_rank("num_requests_running").values()), within_s=10)

    for stream in streams:
        await stream.aclose()
    assert parallel.unfinished_requests == 0
    await until(lambda: not any(by_rank("num_requests_running").values()), within_s=10)
    assert sum(by_rank("generation_tokens_total").values()) - before == sum(
        one.usage.completion_tokens for one in prepared
    )


async def test_death_of_one_rank_is_the_engines(parallel: EmbeddedEngine) -> None:
    """Must stay the last of this file."""
    prepared = [await parallel.prepare(request(STORY, stream=True, ignore_eos=True, max_tokens=900)) for _ in range(2)]
    streams = [parallel.generate(one) for one in prepared]
    for stream in streams:
        await anext(stream)
    dead, *others = parallel._core_processes()

    waiting = asyncio.create_task(parallel.check_health())
    await asyncio.sleep(0)
    dead.kill()
    for stream in streams:
        with pytest.raises(EngineDied):
            async for _ in stream:
                pass
    await asyncio.wait([waiting], timeout=10)
    assert waiting.done(), "nobody waits for a rank that will never answer"
    assert waiting.exception() is None or isinstance(
        waiting.exception(), EngineUnavailable
    )  # the question may have been answered before
    dead.join()
    with pytest.raises(EngineDied):
        await answer(parallel, HELLO)

    with pytest.raises(EngineUnavailable, match="core has died"):
        await asyncio.wait_for(parallel.check_health(), 30)
    await parallel.close()
    await until(lambda: not set(others) & set(multiprocessing.active_children()), within_s=10)
