"""Bodies of requests: large ones are received a few at a time, and worked on beside the event loop.

A body that is longer than LARGE_BYTES takes one of the places of its key, and one of all keys, from there on until it
is parsed. A client that waits for a place is not read from, so that its body stays at the client. One thread parses:
parsers hold the GIL, and two of them could hold it in turn. Of each key one body at a time waits for the thread, so
that no key's queue comes before another's.

A large body of a key that was just refused by its limit is refused unparsed until the limit has room again.

How long a body may take is bounded by `gateway.serving.middleware`. Raises RateLimitExceeded and Overloaded.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeVar
from weakref import WeakValueDictionary

from starlette.requests import Request

from gateway.errors import GatewayError, Overloaded, RateLimitExceeded
from gateway.exchange.json_parser import LARGE_BYTES
from gateway.settings.config import ServerSettings

T = TypeVar("T")

_MODEL = re.compile(rb'"model"\s*:\s*"([^"\\]{1,256})"')
_MAX_BARS = 10_000


class Bodies:
    """Receives and parses bodies, within bounds for all of them together. One instance serves the whole process."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._places = asyncio.Semaphore(settings.max_large_bodies)
        self._places_of_key: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bodies")
        self._bars: dict[tuple[str, str], float] = {}
        """When a key's large requests to a model may be tried again, by the event loop's clock."""

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def receive(self, request: Request, key_id: str) -> AsyncGenerator[bytes]:
        """Receive a body, and hold its place while it is worked on."""
        async with AsyncExitStack() as places:
            yield await self._read(request, key_id, places)

    async def _read(self, request: Request, key_id: str, places: AsyncExitStack) -> bytes:
        body = bytearray()  # a list of pieces of two bytes would take twenty times their size
        placed = False
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGE_BYTES and not placed:
                placed = True
                await places.enter_async_context(self._place(key_id))
        return bytes(body)

    @asynccontextmanager
    async def _place(self, key_id: str) -> AsyncIterator[None]:
        """Wait for a place of the key, then for one of all, in the order of asking."""
        own = self._places_of_key.get(key_id)
        if own is None:
            own = self._places_of_key[key_id] = asyncio.Semaphore(self._settings.max_large_bodies_per_key)
        most = self._settings.max_large_bodies_per_key
        await self._take(
            own,
            RateLimitExceeded(
                f"This API key has {most} large requests on their way, which is as many as it may. Send fewer at once.",
                code="too_many_large_requests",
                retry_after_s=1.0,
            ),
        )
        try:
            await self._take(self._places, Overloaded("Too many large requests are on their way. Try again shortly."))
            try:
                yield
            finally:
                self._places.release()
        finally:
            own.release()

    async def _take(self, places: asyncio.Semaphore, refusal: GatewayError) -> None:
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                await places.acquire()
        except TimeoutError:
            raise refusal from None

    async def aside(self, key_id: str, work: Callable[[], T]) -> T:
        """The result of `work`, from the thread."""
        turn = self._turns.get(key_id)
        if turn is None:
            turn = self._turns[key_id] = asyncio.Lock()
        async with turn:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def bar(self, key_id: str, model_id: str, seconds: float) -> None:
        """Have large requests of a key to a model refused for a while, as they would be after all the work."""
        now = asyncio.get_running_loop().time()
        if len(self._bars) >= _MAX_BARS:
            self._bars = {key: until for key, until in self._bars.items() if until > now}
        self._bars[key_id, model_id] = now + seconds

    def check_bar(self, key_id: str, model_id: str) -> None:
        """Raise RateLimitExceeded while large requests of a key to a model are refused."""
        left_s = self._bars.get((key_id, model_id), 0.0) - asyncio.get_running_loop().time()
        if left_s > 0:
            raise RateLimitExceeded(
                f"Rate limit reached for {model_id!r}. Try again in {left_s:.3f} s.", retry_after_s=left_s
            )


def model_named_in(body: bytes) -> str | None:
    """Return the model that an unparsed body seems to be for: a guess, for bodies that may not even be JSON."""
    found = _MODEL.search(body)
    return found[1].decode(errors="replace") if found else None
