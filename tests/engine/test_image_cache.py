"""Images that are prepared, counted, refused, left and reordered: none of it costs the next request its image.

Sequences are generated. The cache of images holds only a few of them, so that they are also dropped and sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.base import GenerationRequest, InvalidRequest, Prepared
from engine.local.embedded import EmbeddedEngine
from tests.support.engine.vision import build_checkpoint
from tests.support.pictures import asking, data_url, picture

pytestmark = [pytest.mark.anyio, pytest.mark.vllm, pytest.mark.slow]

PICTURES = {
    color: data_url(picture(color, size=(64, 64))) for color in ("red", "green", "blue", "yellow", "black", "white")
}
SALTS = ("key-one", "key-two")
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 2, 3]}}}
_numbers = itertools.count()


@pytest.fixture(scope="module")
async def sighted(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedEngine]:
    """An engine that sees, and keeps about three images."""
    checkpoint = build_checkpoint(tmp_path_factory.mktemp("vision") / "checkpoint")
    args = {"max_model_len": 1024, "max_num_seqs": 4, "mm_processor_cache_gb": 0.001}
    engine = EmbeddedEngine(str(checkpoint), args)
    await engine.start()
    yield engine
    await engine.close()


def looking(*colors: str, salt: str = "", schema: bool = False, **fields: Any) -> GenerationRequest:
    given: dict[str, Any] = {
        "request_id": f"look-{next(_numbers)}",
        "messages": asking(*(PICTURES[color] for color in colors)),
        "cache_salt": salt or None,
        "response_format": SCHEMA if schema else None,
        "temperature": 0.0,
        "max_tokens": 4,
        "stream": True,
    }
    return GenerationRequest(**given | fields)


async def read(engine: EmbeddedEngine, prepared: Prepared) -> str:
    return "".join([delta.text async for delta in engine.generate(prepared)])


async def leave(engine: EmbeddedEngine, prepared: Prepared, turns: int) -> None:
    task = asyncio.create_task(read(engine, prepared))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("seed", range(6))
async def test_no_order_of_requests_costs_another_its_image(sighted: EmbeddedEngine, seed: int) -> None:
    rng = random.Random(seed)
    texts: dict[tuple[Any, ...], str] = {}
    waiting: list[tuple[tuple[Any, ...], Prepared]] = []

    async def finish(number: int) -> None:
        rng.shuffle(waiting)
        done, waiting[:] = waiting[:number], waiting[number:]
        for (seen, _), text in zip(done, await asyncio.gather(*(read(sighted, one) for _, one in done)), strict=True):
            assert texts.setdefault(seen, text) == text, f"another answer to {seen}"

    for _ in range(150):
        colors = tuple(rng.choices(list(PICTURES), k=rng.choice((1, 1, 2))))
        schema = rng.random() < 0.5
        request: dict[str, Any] = {"salt": rng.choice(SALTS), "schema": schema}
        match rng.choice(("prepare", "prepare", "refuse", "leave", "leave at once", "count", "finish", "drop")):
            case "prepare":
                waiting.append(((colors, schema), await sighted.prepare(looking(*colors, **request))))
            case "refuse":
                with pytest.raises(InvalidRequest):
                    await sighted.prepare(looking(*colors, **request, max_tokens=5000))
                refused = await sighted.prepare(looking(*colors, **request, logit_bias={"9999999": 1.0}))
                with pytest.raises(InvalidRequest):
                    await read(sighted, refused)
            case "leave":
                await leave(sighted, await sighted.prepare(looking(*colors, **request)), rng.randint(2, 40))
            case "leave at once":
                await leave(sighted, await sighted.prepare(looking(*colors, **request)), 1)
            case "count":
                tokens = await sighted.tokenize(looking(*colors, **request))
                assert len(tokens) == (await sighted.prepare(looking(*colors, **request))).prompt_tokens
            case "finish":
                await finish(3)
            case "drop" if waiting:
                waiting.pop(rng.randrange(len(waiting)))
    await finish(len(waiting))
    assert sighted.unfinished_requests == 0


async def test_counting_first_does_not_cost_the_image(sighted: EmbeddedEngine) -> None:
    for color in PICTURES:
        await sighted.tokenize(looking(color))
        prepared = await sighted.prepare(looking(color, ignore_eos=True))
        await read(sighted, prepared)
        assert prepared.usage.completion_tokens == 4


async def test_repeated_image_is_processed_once(sighted: EmbeddedEngine) -> None:
    assert sighted._llm is not None
    cache = sighted._llm.renderer._mm_processor_only_cache
    assert cache is not None
    await sighted.prepare(looking("red"))
    cache.make_stats(delta=True)
    for salt in SALTS:
        await sighted.prepare(looking("red", salt=salt))
    stats = cache.make_stats(delta=True)
    assert (stats.hits, stats.total) == (2, 2)
