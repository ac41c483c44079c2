"""Several engines in one process: started side by side, counted each for itself on one page, closed one by one."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from engine.base import EngineDied, EngineError, EngineUnavailable, InvalidRequest
from engine.demo import load
from engine.local.embedded import EmbeddedEngine
from engine.local.pooling import PoolingEngine
from engine.local.vllm_metrics import claim_name, drop_metrics
from tests.support.engine.demo_requests import STORY, answer, request
from tests.support.engine.embeddings import embed

pytestmark = [pytest.mark.anyio, pytest.mark.vllm]

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
SAID = "Hello! I am the Shannon demo model."
WEATHER = load().tools["get_weather"]


def counts(name: str) -> dict[str, float]:
    """Return one of vLLM's counters by the engine's name, as Prometheus reads the page."""
    families = list(text_string_to_metric_families(generate_latest(REGISTRY).decode()))
    names = [family.name for family in families]
    assert len(set(names)) == len(names), "every metric is described once"
    samples = [sample for family in families for sample in family.samples if sample.name == f"vllm:{name}"]
    keys = [tuple(sorted(sample.labels.items())) for sample in samples]
    assert len(set(keys)) == len(keys), "every sample is there once"
    found: dict[str, float] = {}
    for sample in samples:
        engine = sample.labels["model_name"]
        found[engine] = found.get(engine, 0) + sample.value
    return found


@pytest.fixture(scope="module")
async def others(anyio_backend: str, engine: EmbeddedEngine) -> AsyncIterator[tuple[EmbeddedEngine, PoolingEngine]]:
    """Two more engines, started at the same time, beside the one of all tests."""
    # By the same name as the one of all tests: what is shown is made unique.
    second = EmbeddedEngine("demo", {"max_model_len": 1024, "served_model_name": ["demo"]}, tool_parser="")
    pooling = PoolingEngine("demo", {"max_model_len": 512, "convert": "embed", "served_model_name": ["pooling"]})
    await asyncio.gather(second.start(), pooling.start())
    yield second, pooling
    await asyncio.gather(second.close(), pooling.close())


async def test_each_counts_for_itself_on_one_page(
    engine: EmbeddedEngine, others: tuple[EmbeddedEngine, PoolingEngine]
) -> None:
    second, pooling = others
    generated, prompts = counts("generation_tokens_total"), counts("prompt_tokens_total")

    (text, first_cost), (same, second_cost), (_, embedded) = await asyncio.gather(
        answer(engine, HELLO), answer(second, STORY, max_tokens=50, ignore_eos=True), embed(pooling, "Say hello.")
    )

    assert text == SAID
    assert len(same) > 50
    made = {name: value - generated.get(name, 0) for name, value in counts("generation_tokens_total").items()}
    read = {name: value - prompts.get(name, 0) for name, value in counts("prompt_tokens_total").items()}
    (numbered,) = (name for name, tokens in made.items() if name.startswith("demo-") and tokens)
    expected: dict[str, Any] = {"demo": first_cost.usage, numbered: second_cost.usage, "pooling": embedded.usage}
    assert expected.keys() <= made.keys() & read.keys()
    for name, usage in expected.items():
        assert (made[name], read[name]) == (usage.completion_tokens, usage.prompt_tokens), name


async def test_each_has_its_own_settings(engine: EmbeddedEngine, others: tuple[EmbeddedEngine, PoolingEngine]) -> None:
    second, pooling = others

    assert (engine.max_model_len, second.max_model_len, pooling.max_model_len) == (2048, 1024, 512)
    assert (await engine.prepare(request(HELLO, tools=[WEATHER]))).prompt_tokens > 100
    with pytest.raises(InvalidRequest, match="can't call tools") as refusal:
        await second.prepare(request(HELLO, tools=[WEATHER]))
    assert refusal.value.param == "tools"


async def test_start_that_is_given_up_takes_no_other_engine_along(
    engine: EmbeddedEngine, others: tuple[EmbeddedEngine, PoolingEngine]
) -> None:
    before = set(multiprocessing.active_children())
    third = EmbeddedEngine("demo", {"max_model_len": 1024, "served_model_name": ["third"]})
    start = asyncio.create_task(third.start())
    while not set(multiprocessing.active_children()) - before:
        await asyncio.sleep(0.01)

    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await third.close()

    assert set(multiprocessing.active_children()) == before, "its core is gone"
    for other in (engine, others[0]):
        assert (await answer(other, HELLO))[0] == SAID
    assert "third" not in counts("generation_tokens_total")


async def test_start_that_is_given_up_before_its_core_runs_leaves_no_core(engine: EmbeddedEngine) -> None:
    before = set(multiprocessing.active_children())
    third = EmbeddedEngine("demo", {"max_model_len": 1024, "served_model_name": ["third"]})
    start = asyncio.create_task(third.start())
    await asyncio.sleep(0)

    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start

    assert set(multiprocessing.active_children()) == before
    assert (await answer(engine, HELLO))[0] == SAID


async def test_start_that_fails_frees_the_name_of_its_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr("vllm.v1.engine.async_llm.AsyncLLM.from_engine_args", fail)
    failing = EmbeddedEngine("demo", {"max_model_len": 1024, "served_model_name": ["failing"]})
    with pytest.raises(EngineError, match="no memory"):
        await failing.start()

    registry = CollectorRegistry()
    assert claim_name(registry, "failing") == "failing"
    drop_metrics(registry)


async def test_closing_one_leaves_the_others(
    engine: EmbeddedEngine, others: tuple[EmbeddedEngine, PoolingEngine]
) -> None:
    """Must stay the last of this file."""
    second, pooling = others
    prepared = await second.prepare(request(STORY, stream=True, ignore_eos=True, max_tokens=900))
    running = second.generate(prepared)
    await anext(running)
    story = asyncio.create_task(answer(engine, STORY, ignore_eos=True, max_tokens=300))

    await second.close()

    with pytest.raises(EngineDied):
        async for _ in running:
            pass
    with pytest.raises(EngineUnavailable):
        await second.check_health()
    before = counts("generation_tokens_total")
    assert "demo-2" not in before
    assert {"demo", "pooling"} <= before.keys()

    _, cost = await story
    assert cost.usage.completion_tokens == 300, "it was not even held up"
    await engine.check_health()
    started = counts("generation_tokens_total")["demo"]
    _, again = await answer(engine, HELLO)
    assert counts("generation_tokens_total")["demo"] - started == again.usage.completion_tokens
    vectors, _ = await embed(pooling, "Say hello.")
    assert len(vectors) == 1
