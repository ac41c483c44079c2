"""Base of engines that wrap another engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from engine.base import Delta, Engine, GenerationRequest, Prepared, Request, Task


class EngineWrapper:
    """Delegates every method to `wrapped`. A subclass overrides the methods that it changes.

    The subclass owns the wrapped engine, and implements `start` and `close`.
    """

    @property
    def wrapped(self) -> Engine:
        """The engine that receives requests now. Raises EngineUnavailable if there is none."""
        raise NotImplementedError

    @property
    def tasks(self) -> tuple[Task, ...]:
        return self.wrapped.tasks

    @property
    def max_model_len(self) -> int:
        return self.wrapped.max_model_len

    @property
    def max_num_seqs(self) -> int | None:
        return self.wrapped.max_num_seqs

    @property
    def takes_images(self) -> bool:
        return self.wrapped.takes_images

    @property
    def unfinished_requests(self) -> int:
        return self.wrapped.unfinished_requests

    async def prepare(self, request: Request) -> Prepared:
        return await self.wrapped.prepare(request)

    def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        return self.wrapped.generate(prepared)

    async def pool(self, prepared: Prepared) -> list[list[float]]:
        return await self.wrapped.pool(prepared)

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        return await self.wrapped.tokenize(request)

    async def detokenize(self, token_ids: list[int]) -> str:
        return await self.wrapped.detokenize(token_ids)

    async def check_health(self) -> None:
        await self.wrapped.check_health()

    def cpu_time_s(self) -> float | None:
        return self.wrapped.cpu_time_s()
