"""The physical ceiling: AsyncLLM alone in a loop, no HTTP. Run as a process; one scenario per line on stdin.

Reads a scenario as a JSON object per line, runs it, and prints {"duration_s", "first_byte_s"} per line on stdout.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import statistics
import sys
import time
import uuid

from engine.base import GenerationRequest
from engine.local.embedded import EmbeddedEngine
from tests.bench.load import Scenario, prompt


async def _generate(engine: EmbeddedEngine, scenario: Scenario, number: int) -> float:
    """Run one generation on AsyncLLM itself; the engine around it only lends its prompt and parameters."""
    llm = engine._running()
    prepared = await engine.prepare(
        GenerationRequest(
            request_id=uuid.uuid4().hex,
            messages=[{"role": "user", "content": prompt(number)}],
            stream=scenario.stream,
            max_tokens=scenario.tokens,
            ignore_eos=True,
            temperature=0,
        )
    )
    engine_input, sampling_params = prepared.payload.rendered.engine_input, prepared.payload.sampling_params
    started = time.perf_counter()
    first: float | None = None
    async for _output in llm.generate(engine_input, sampling_params, prepared.request_id):
        first = first or time.perf_counter() - started
    assert first is not None
    return first


async def _run(engine: EmbeddedEngine, scenario: Scenario) -> dict[str, float]:
    numbers = iter(range(scenario.requests))
    firsts: list[float] = []

    async def work() -> None:
        for number in numbers:
            firsts.append(await _generate(engine, scenario, number))

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(scenario.concurrency)))
    return {"duration_s": time.perf_counter() - started, "first_byte_s": statistics.median(firsts)}


async def main() -> None:
    engine = EmbeddedEngine("demo", json.loads(sys.argv[1]))
    await engine.start()
    print(json.dumps({"ready": True}), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        fields = json.loads(line)
        result = await _run(engine, Scenario(**{f.name: fields[f.name] for f in dataclasses.fields(Scenario)}))
        print(json.dumps(result), flush=True)
    await engine.close()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
