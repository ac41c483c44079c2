"""An engine that is closed lets go of everything, and another can follow in the same process."""

from __future__ import annotations

import pytest

from engine.base import EngineDied, EngineUnavailable
from engine.embedded import EmbeddedEngine
from tests.engine.test_embedded import STORY, request

pytestmark = [pytest.mark.anyio, pytest.mark.vllm]


@pytest.mark.slow
async def test_closing_an_engine_ends_its_generations_and_another_can_follow() -> None:
    engine = EmbeddedEngine("demo", {"max_model_len": 2048})
    await engine.start()
    prepared = await engine.prepare(request(STORY, stream=True, ignore_eos=True, max_tokens=1500))
    deltas = engine.generate(prepared)
    await anext(deltas)
    await engine.close()
    with pytest.raises(EngineDied):
        async for _ in deltas:
            pass
    with pytest.raises(EngineUnavailable):
        await engine.check_health()
