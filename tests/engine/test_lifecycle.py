"""An engine that dies or is closed ends every wait for it, and another can follow in the same process."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import pytest

from engine.base import EngineDied, EngineError, EngineUnavailable, GenerationRequest
from engine.embedded import EmbeddedEngine
from engine.supervisor import SupervisedEngine
from tests.conftest import until
from tests.engine.test_embedded import STORY, request

pytestmark = [pytest.mark.anyio, pytest.mark.vllm]

HELLO = [{"role": "user", "content": "Say hello."}]
STALL_S = 2.0
HANG_S = 15.0
"""Only a wait that nobody ends lasts so long; a core's own end takes a tenth of a second."""
OFFSETS_MS = (-5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100)
"""When requests are sent, by the moment of the kill."""


def spin(worker: Any, seconds: float) -> None:
    """Runs in the core, which answers nobody meanwhile: what a compilation looks like from outside."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pass


async def ask(engine: SupervisedEngine, number: int) -> None:
    request = GenerationRequest(
        request_id=f"ask-{number}", messages=HELLO, max_tokens=400, ignore_eos=True, stream=bool(number % 2)
    )
    async for _ in engine.generate(await engine.prepare(request)):
        pass


async def kill_amid_requests(engine: SupervisedEngine, number: signal.Signals) -> None:
    """Signal the core, which has served nothing, while requests of every kind are sent; all must end."""
    inner = engine.current
    assert isinstance(inner, EmbeddedEngine)
    (core,) = inner._core_processes()
    assert core.pid is not None
    sent_at = asyncio.get_running_loop().time() + 0.1
    tasks: list[asyncio.Task[Any]] = []

    async def at(offset_ms: float, number: int) -> None:
        await asyncio.sleep(sent_at + offset_ms / 1000 - asyncio.get_running_loop().time())
        for wait in (ask(engine, number), inner.check_health(), engine.tokenize(request(HELLO))):
            tasks.append(asyncio.create_task(wait))

    sent = [asyncio.create_task(at(offset_ms, number)) for number, offset_ms in enumerate(OFFSETS_MS)]
    await asyncio.sleep(sent_at - asyncio.get_running_loop().time())
    os.kill(core.pid, number)
    started = time.monotonic()
    await asyncio.gather(*sent)
    for outcome in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), HANG_S):
        assert outcome is None or isinstance(outcome, (list, EngineUnavailable)), repr(outcome)
    print(f"{number.name}: all ended after {time.monotonic() - started:.2f} s")


@pytest.mark.slow
async def test_nobody_waits_for_an_engine_that_has_died_or_was_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills a core that has served nothing, at first and after a restart.

    The third one is busy for longer than a stall may last, and lives; then it is closed under a generation.
    """
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # lets `spin` be sent to the core
    supervised = SupervisedEngine(
        "main", lambda: EmbeddedEngine("demo", {"max_model_len": 2048}), max_engine_restarts=5, engine_stall_s=STALL_S
    )
    await supervised.start()
    for _ in range(2):
        old = supervised.current
        await kill_amid_requests(supervised, signal.SIGKILL)
        await until(lambda old=old: supervised.current is not old and supervised.state == "ready", within_s=90)  # type: ignore[misc]
    assert supervised.restarts == {"died": 2, "stalled": 0, "load": 0}

    engine = supervised.current
    assert isinstance(engine, EmbeddedEngine)
    assert engine._llm is not None
    await engine._llm.collective_rpc(spin, args=(2.5 * STALL_S,))
    assert (supervised.current, supervised.state) == (engine, "ready"), "a core that works is not stalled"
    assert (await supervised.prepare(request(HELLO))).prompt_tokens

    prepared = await supervised.prepare(request(STORY, stream=True, ignore_eos=True, max_tokens=1500))
    deltas = supervised.generate(prepared)
    await anext(deltas)
    await supervised.close()
    with pytest.raises(EngineDied):
        async for _ in deltas:
            pass
    with pytest.raises(EngineUnavailable):
        await engine.check_health()
    with pytest.raises(EngineError):
        await supervised.prepare(request(STORY))
