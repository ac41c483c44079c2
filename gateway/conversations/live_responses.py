"""Responses that are being made by this process: kept in the store as they go, and ended when they are cancelled.

A response that failed before its id was sent leaves no trace. One in the background continues
when its client leaves, and counts as a running exchange for the drain. While anything is being made, the leases of
all of it are renewed and cancellations asked of other gateways are looked up, with one pipeline every half second.
While the store is away responses are made all the same, but not kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.messages import Message
from gateway.access.auth import Principal
from gateway.conversations.sessions import Session
from gateway.conversations.stored_responses import Path, StoredResponse, StoredResponses
from gateway.errors import (
    BadRequest,
    Cancelled,
    GatewayError,
    Overloaded,
    StoreUnavailable,
    Unavailable,
    from_store,
)
from gateway.exchange.background import Background, Detached, told
from gateway.exchange.drain import Drain
from gateway.exchange.frames.responses import RUNNING, ResponseFrames
from gateway.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

MAX_BACKGROUND = 1024
"""Responses in the background at once. Most wait in the engine's queue, which has its own limit."""
_WATCH_S = 0.5
_RENEW_EVERY = 40  # looks, so that a lease lives through two failures
_EARLY_S = 0.5
"""How long a response in the background may take to fail with a status of its own."""
_CONFIRM_S = 5.0


class Exchange(Protocol):
    """What carries a response: the client's stream, or a task in the background."""

    @property
    def reason(self) -> GatewayError | None: ...

    def interrupt(self, reason: GatewayError) -> None: ...


@dataclass(slots=True)
class LiveResponse:
    """One response on its way, and what will be kept of it."""

    id: str
    principal: Principal
    frames: ResponseFrames
    session: Session
    """Reports to the client that the store is away."""
    store: bool
    known: bool
    """The client learns the id before the response is complete: as soon as it has `started`, or is `announced`."""
    input: list[dict[str, Any]]
    path: Path
    turn: list[Message] = field(default_factory=list)
    """What the request said."""
    refine: Callable[[GatewayError], GatewayError] = lambda error: error
    """Puts an error into the words of the request."""
    exchange: Exchange | None = None
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """The engine has begun to answer."""
    announced: bool = False
    """The client knows the id of a response in the background."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    failure: GatewayError | None = None
    kept: bool = False
    """The store has it, unless it was deleted since."""
    keeping: asyncio.Task[None] | None = None
    """Writes the newest state to the store. Cancelling a caller stops no command that is on its way, so the next state
    waits for this one: it could otherwise arrive first."""
    unkept: StoreUnavailable = field(default_factory=StoreUnavailable)
    """Why the store does not have it."""

    def interrupt(self, reason: GatewayError) -> None:
        if self.exchange is not None:
            self.exchange.interrupt(reason)

    def record(self) -> StoredResponse:
        principal = self.principal
        return StoredResponse(
            principal.tenant, self.frames.response(), self.input, self.path, key_id=principal.key_id, known=self.kept
        )


class LiveResponses:
    """The responses that this process is making."""

    def __init__(self, stored: StoredResponses, drain: Drain, metrics: Metrics) -> None:
        self.stored = stored
        self._metrics = metrics
        self._live: dict[str, LiveResponse] = {}
        self._background = Background(drain)
        self._watcher: asyncio.Task[None] | None = None

    async def run(self, live: LiveResponse, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """Pass the response's bytes on, and keep its state in step: what clients see last is stored before it."""
        opening = self._open(live)
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    if not live.started.is_set():
                        await self._begin(live, opening)
                    if live.frames.finished:
                        await self._keep(live)
                    yield chunk
        except Exception as error:
            live.failure = live.refine(told(error))
            await self._stop(live, opening)
            if live.failure is error:
                raise
            raise live.failure from error
        except BaseException:  # the client left, the response was cancelled, or the server shuts down
            live.failure = live.exchange.reason if live.exchange is not None else None
            await asyncio.shield(self._stop(live, opening))
            raise
        finally:
            self._live.pop(live.id, None)
            live.ended.set()

    def _open(self, live: LiveResponse) -> asyncio.Task[None] | None:
        if not (live.store and live.known):
            return None
        self._live[live.id] = live
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())
        # Nothing of it is needed before the first token, so it need not wait for the store.
        return self._start_keeping(live)

    async def _begin(self, live: LiveResponse, opening: asyncio.Task[None] | None) -> None:
        live.started.set()
        if opening is None:
            return
        queued = live.frames.status == "queued"
        if queued:
            live.frames.status = "in_progress"
        await asyncio.shield(opening)
        if queued:
            await self._keep(live)

    async def _stop(self, live: LiveResponse, opening: asyncio.Task[None] | None) -> None:
        """Note how a response ended that is not complete."""
        if live.keeping is not None:
            await live.keeping
        if opening is None or live.frames.finished:
            return
        live.frames.stop(live.failure)
        if live.started.is_set() or live.announced:
            await self._keep(live)
        else:
            with suppress(StoreUnavailable):
                await self.stored.forget(live.record())

    async def _keep(self, live: LiveResponse) -> None:
        await asyncio.shield(self._start_keeping(live))

    def _start_keeping(self, live: LiveResponse) -> asyncio.Task[None]:
        live.keeping = asyncio.create_task(self._write(live))
        return live.keeping

    async def _write(self, live: LiveResponse) -> None:
        if not live.store:
            return
        turn = [*live.turn, live.frames.message()] if live.frames.finished else None
        try:
            if await self.stored.keep(live.record(), turn):
                live.kept = True
            else:
                live.session.unavailable = True
        except StoreUnavailable as error:
            self._metrics.session("unavailable")
            live.session.unavailable = True
            live.unkept = error

    async def detach(self, live: LiveResponse, chunks: AsyncGenerator[bytes, None]) -> dict[str, Any]:
        """Make the response in the background, and return its object. Raises the error that ends it at the start."""
        if len(self._background) >= MAX_BACKGROUND:
            raise Overloaded("Too many responses are being made in the background. Try again shortly.")
        live.frames.status = "queued"
        live.exchange = exchange = Detached()
        self._background.start(exchange, lambda: self._run_detached(live, chunks))
        waiters = [asyncio.create_task(event.wait()) for event in (live.started, live.ended)]
        try:
            await asyncio.wait(waiters, timeout=_EARLY_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiter in waiters:
                waiter.cancel()
        if live.failure is not None and not live.started.is_set():
            raise live.failure
        if live.keeping is not None:  # the engine may be faster than the store
            await asyncio.wait([live.keeping])
        live.announced = True
        if live.session.unavailable:
            live.interrupt(Cancelled("The response could not be kept."))
            raise from_store(live.unkept, "Responses in the background can't be kept at the moment.")
        return live.frames.response()

    async def _run_detached(self, live: LiveResponse, chunks: AsyncGenerator[bytes, None]) -> None:
        try:
            async with aclosing(self.run(live, chunks)) as kept:
                async for _ in kept:
                    pass
        except GatewayError as error:
            if live.announced or live.started.is_set():  # otherwise it is the request's error, and counted as such
                self._metrics.error(error.code)
                log.log(error.log_level, "background response ended with %s: %s", error.code, error)

    async def cancel(self, principal: Principal, response_id: str) -> dict[str, Any]:
        """End a response, on whichever gateway it is being made, and return it.

        Raises NotFound, BadRequest on one that was not made in the background and is complete, and Unavailable when
        the gateway that makes it does not confirm.
        """
        live = self._live.get(response_id)
        if live is not None and live.principal.tenant == principal.tenant:
            live.interrupt(Cancelled("The response was cancelled."))
            with suppress(TimeoutError):
                async with asyncio.timeout(_CONFIRM_S):
                    await live.ended.wait()
            return live.frames.response()
        record = await self.stored.find(principal, response_id)
        if record.status in RUNNING:
            await self.stored.ask_to_cancel(response_id)
            record = await self._wait_for_end(principal, response_id)
        elif not record.response.get("background") and record.status != "cancelled":
            raise BadRequest(
                f"The response {response_id!r} can't be cancelled any more: its status is {record.status!r}.",
                "response_id",
            )
        return record.response

    async def _wait_for_end(self, principal: Principal, response_id: str) -> StoredResponse:
        with suppress(TimeoutError):
            async with asyncio.timeout(_CONFIRM_S):
                while (record := await self.stored.find(principal, response_id)).status in RUNNING:
                    await asyncio.sleep(_WATCH_S / 4)
                return record
        raise Unavailable("The gateway that is making this response did not confirm in time.", retry_after_s=1.0)

    async def close(self) -> None:
        """End what is still being made in the background."""
        reason = Unavailable()
        for live in list(self._live.values()):
            live.interrupt(reason)
        if self._watcher is not None:
            self._watcher.cancel()
        await self._background.close(reason)

    async def _watch(self) -> None:
        looks = 0
        while self._live:
            await asyncio.sleep(_WATCH_S)
            if not self._live:
                return
            looks += 1
            renewed = list(self._live) if looks % _RENEW_EVERY == 0 else []
            try:
                asked = await self.stored.renew(renewed)
            except StoreUnavailable:
                continue
            for response_id in asked & self._live.keys():
                self._live[response_id].interrupt(Cancelled("The response was cancelled."))
