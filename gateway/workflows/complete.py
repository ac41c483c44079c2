"""Bare prompts completed side by side: what the legacy completions endpoint needs, without agents or events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace

from engine.base import Delta, GenerationRequest, Prepared
from gateway.exchange.events import Event
from gateway.meter import Meter


async def complete(requests: list[GenerationRequest], meter: Meter) -> AsyncGenerator[Event, None]:
    """Yield the deltas of all requests as they come. Choice `j` of request `i` has the index `i * n + j`.

    Room is reserved for all of them or for none.
    """
    prepared = [await meter.prepare(request) for request in requests]
    if len(prepared) == 1:
        async with contextlib.aclosing(meter.generate(prepared[0])) as deltas:
            async for delta in deltas:
                yield delta
        return
    async with meter.reserved(prepared):
        queue: asyncio.Queue[Delta | None] = asyncio.Queue()
        tasks = [asyncio.create_task(_run(meter, one, number, queue)) for number, one in enumerate(prepared)]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if item is None:
                    running -= 1
                    if failed := next((task for task in tasks if task.done() and task.exception()), None):
                        failed.result()
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _run(meter: Meter, prepared: Prepared, number: int, queue: asyncio.Queue[Delta | None]) -> None:
    try:
        async with contextlib.aclosing(meter.generate(prepared)) as deltas:
            async for delta in deltas:
                queue.put_nowait(replace(delta, index=number * prepared.n + delta.index))
    finally:
        # Only once the task is done can its failure be seen.
        asyncio.get_running_loop().call_soon(queue.put_nowait, None)
