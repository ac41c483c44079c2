"""One real engine with the demo model in this process, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

pytest.importorskip("vllm", reason="engine tests need vllm; `make setup` installs it")

from engine.local.embedded import EmbeddedEngine


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
async def engine(anyio_backend: str) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine("demo", {"max_model_len": 2048, "max_num_seqs": 256})
    await engine.start()
    yield engine
    await engine.close()
