"""An engine that dies or is closed ends every wait for it, and another can follow in the same process."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

import engine.local.async_llm
import engine.local.embedded
from engine.base import EngineDied, EngineError, EngineOverloaded, EngineUnavailable, GenerationRequest
from engine.local.embedded import EmbeddedEngine
from engine.supervisor import SupervisedEngine
from tests.support.engine.demo_requests import STORY, request
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.vllm]

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
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


async def ask(supervised: SupervisedEngine, number: int) -> None:
    request = GenerationRequest(
        request_id=f"ask-{number}", messages=HELLO, max_tokens=400, ignore_eos=True, stream=bool(number % 2)
    )
    async for _ in supervised.generate(await supervised.prepare(request)):
        pass


async def kill_amid_requests(supervised: SupervisedEngine, number: signal.Signals) -> None:
    """Signal the core, which has served nothing, while requests of every kind are sent; all must end."""
    inner = supervised.current
    assert isinstance(inner, EmbeddedEngine)
    (core,) = inner._core_processes()
    assert core.pid is not None
    sent_at = asyncio.get_running_loop().time() + 0.1
    tasks: list[asyncio.Task[Any]] = []

    async def at(offset_ms: float, number: int) -> None:
        await asyncio.sleep(sent_at + offset_ms / 1000 - asyncio.get_running_loop().time())
        for wait in (ask(supervised, number), inner.check_health(), supervised.tokenize(request(HELLO))):
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
    try:
        await die_work_and_close(supervised)
    finally:
        await supervised.close()


async def die_work_and_close(supervised: SupervisedEngine) -> None:
    for _ in range(2):
        old = supervised.current
        await kill_amid_requests(supervised, signal.SIGKILL)
        await until(lambda old=old: supervised.current is not old and supervised.state == "ready", within_s=90)  # type: ignore[misc]
    assert supervised.restarts == {"died": 2, "stalled": 0, "load": 0}

    last = supervised.current
    assert isinstance(last, EmbeddedEngine)
    assert last._llm is not None
    await last._llm.collective_rpc(cast(Any, spin), args=(2.5 * STALL_S,))
    assert (supervised.current, supervised.state) == (last, "ready"), "a core that works is not stalled"
    assert (await supervised.prepare(request(HELLO))).prompt_tokens

    prepared = await supervised.prepare(request(STORY, stream=True, ignore_eos=True, max_tokens=1500))
    deltas = supervised.generate(prepared)
    await anext(deltas)
    await supervised.close()
    with pytest.raises(EngineDied):
        async for _ in deltas:
            pass
    with pytest.raises(EngineUnavailable):
        await last.check_health()
    with pytest.raises(EngineError):
        await supervised.prepare(request(STORY))


class Asleep(EmbeddedEngine):
    """An engine whose core is stopped before it has said a word."""

    core: Any = None

    def _build(self) -> Any:
        self.core = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
        self.core.start()
        self.core.join()
        raise RuntimeError("the core is gone")


async def test_start_that_gets_nowhere_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.local.async_llm, "_LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(engine.local.async_llm, "_MAX_QUIET_START_S", 0.5)
    asleep = Asleep("demo")
    supervised = SupervisedEngine("main", lambda: asleep, lazy=True, max_engine_restarts=0)
    await supervised.start()

    with pytest.raises(EngineUnavailable):
        await asyncio.wait_for(supervised.prepare(request(HELLO)), HANG_S)

    assert "have done nothing for" in str(supervised.failure)
    await until(lambda: not asleep.core.is_alive())  # the thread of the build reaps it


async def test_core_that_is_up_and_says_nothing_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that froze in that moment: it has reported itself ready, and does not die."""

    async def never() -> None:
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(engine.local.async_llm, "_MAX_QUIET_START_S", 0.05)
    resources = SimpleNamespace(engine_manager=None)
    core = SimpleNamespace(resources=resources)
    monkeypatch.setattr(
        EmbeddedEngine, "_build", lambda _: SimpleNamespace(engine_core=core, get_supported_tasks=never)
    )
    with pytest.raises(EngineError, match="does not answer"):
        await asyncio.wait_for(EmbeddedEngine("demo").start(), HANG_S)


async def test_prompt_that_is_long_in_preparation_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread can't be stopped; whoever waits for it must not wait for ever."""
    monkeypatch.setattr(engine.local.embedded, "_MAX_PREPARE_S", 0.05)
    with pytest.raises(EngineOverloaded, match="Images take too long"):
        async with engine.local.embedded._in_time("Images"):
            await asyncio.get_running_loop().create_future()
    with pytest.raises(TimeoutError):
        async with engine.local.embedded._in_time("Images"):
            raise TimeoutError  # of something else


@pytest.mark.parametrize("content", ["long", "image"])
async def test_prompts_that_take_long_are_prepared_by_keys_in_turns(content: str) -> None:
    """One key's flood of them is no other key's wait, though its callers leave and come again."""
    url = "data:image/png;base64,"
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    messages: list[Any] = [{"role": "user", "content": parts if content == "image" else "x" * 200_000}]
    embedded = EmbeddedEngine("demo")
    embedded._llm = cast(Any, SimpleNamespace(model_config=SimpleNamespace(is_multimodal_model=True)))
    served: list[str] = []
    places = max(embedded._image_places.free if content == "image" else embedded._long_places.free, 1)
    going = asyncio.Semaphore(0)

    async def render(request: GenerationRequest) -> None:
        served.append(request.flow)
        await going.acquire()

    def send(flow: str) -> asyncio.Task[None]:
        prompt = GenerationRequest(request_id="r", messages=messages, flow=flow)
        return asyncio.create_task(embedded._in_turn(prompt, render))

    flood = [send("flood") for _ in range(50)]
    await until(lambda: len(served) == places)
    for task in flood[:places]:
        task.cancel()
    flood += [send("flood") for _ in range(50)]
    other = send("other")
    await asyncio.sleep(0)
    assert served == ["flood"] * places

    for _ in range(2):
        going.release()
    await until(lambda: len(served) == places + 2)
    assert "other" in served[places:]
    for _ in range(200):
        going.release()
    await other
    await asyncio.gather(*flood, return_exceptions=True)
