"""An Engine as one caller may use it: the same protocol, bound to a Principal and a model, and counted.

Every generation of a request goes through one Meter, however many a workflow makes. `generate` settles exactly once
per generation, on every way out: finished, failed, client gone, server draining. Limits are not enforced yet.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator

from engine.base import Delta, GenerationRequest, Prepared, Usage
from gateway.auth import Principal
from gateway.catalog import ModelSpec
from gateway.metrics import Metrics


class Meter:
    """See the module. `usage` is the sum over the request's generations so far."""

    def __init__(self, principal: Principal, model: ModelSpec, metrics: Metrics) -> None:
        self.principal = principal
        self.model = model
        self.usage = Usage()
        self._metrics = metrics

    async def prepare(self, request: GenerationRequest) -> Prepared:
        """Count the prompt. Raises what the engine raises."""
        return await self.model.engine.prepare(request)

    async def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        """Yield the engine's deltas, then settle."""
        started = time.perf_counter()
        waiting = True
        try:
            async with contextlib.aclosing(self.model.engine.generate(prepared)) as deltas:
                async for delta in deltas:
                    if waiting:
                        waiting = False
                        self._metrics.first_token(self.model.id, time.perf_counter() - started)
                    yield delta
        finally:
            self._settle(prepared)

    def _settle(self, prepared: Prepared) -> None:
        self.usage.add(prepared.usage)
        self._metrics.tokens(self.model.id, prepared.usage)
