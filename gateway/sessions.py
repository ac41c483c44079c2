"""Conversations that the gateway remembers.

An id belongs to the tenant that used it first; whoever else sends it gets a fresh one. Stored turns come before a
request's messages only when the client names the session and brings no history (an assistant message) of its own;
history that it brings replaces what is stored. Without an id one is derived from the conversation's beginning, and
brings nothing back. Turns are stored when they complete, in the order in which their requests came. While the store
is away conversations go on without history, and say so. Fails with BadRequest and NotFound.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from engine.base import Delta, GenerationRequest, InvalidRequest, Prepared
from gateway.auth import Principal
from gateway.config import SessionSettings
from gateway.errors import BadRequest, NotFound, StoreUnavailable
from gateway.events import Event
from gateway.metrics import Metrics
from gateway.store import Script, Store

Message = dict[str, Any]

_ID = re.compile(r"[A-Za-z0-9._:@/+=|~-]{1,128}")
_OPEN = Script("session_open")
_APPEND = Script("session_append")


@dataclass(slots=True)
class Session:
    """One request's view of its conversation. `history` is what is stored, a list of turns, oldest first."""

    id: str = ""
    tenant: str = ""
    number: int = 0
    """This request's turn; 0 where nothing will be stored."""
    announce: bool = False
    """New or collided: the client must be told the id."""
    unavailable: bool = False
    replaces: bool = False
    """The request brings its own history, which takes the place of what is stored."""
    history: list[list[Message]] = field(default_factory=list)
    opening: asyncio.Task[None] | None = None
    """The question to the store, while it is under way."""

    def headers(self) -> dict[str, str]:
        headers = {"X-Session-ID": self.id} if self.announce else {}
        return headers | ({"X-Shannon-Session": "unavailable"} if self.unavailable else {})

    def messages(self, request: list[Message], turns: int) -> list[Message]:
        """Return the request's messages behind the last `turns` stored ones.

        One system prompt leads, the request's own or else the last that was stored: chat templates commonly refuse
        one in any other place.
        """
        if not turns:
            return request
        leading = [message for message in request if message["role"] == "system"]
        for turn in reversed(self.history):
            leading = leading or [message for message in turn if message["role"] == "system"]
        both = [*self.history[-turns:], request]
        return leading + [message for turn in both for message in turn if message["role"] != "system"]


async def prepare_with_history(
    prepare: Callable[[GenerationRequest], Awaitable[Prepared]],
    request: GenerationRequest,
    session: Session,
    max_model_len: int,
) -> Prepared:
    """Prepare `request` behind as many of the newest stored turns as fit and leave room for an answer.

    Raises what `prepare` raises; that the history is too long is never the reason.
    """
    wanted = min(request.max_tokens or request.default_max_tokens or max_model_len, max_model_len // 4)
    best: Prepared | None = None
    most, least = len(session.history), 0
    turns = most
    while best is None or least < most:
        try:
            prepared: Prepared | None = await prepare(
                replace(request, messages=session.messages(request.messages, turns))
            )
        except InvalidRequest as error:
            if turns == 0 or error.code != "context_length_exceeded":
                raise
            prepared = None
        if prepared is not None and (prepared.max_tokens >= wanted or turns == 0):
            best, least = prepared, turns
        else:
            most = turns - 1
        # All turns first, then none, then bisect: most histories fit, and the search needs a result that does.
        turns = 0 if best is None else (least + most + 1) // 2
    return best


def derive_id(tenant: str, messages: list[Message]) -> str:
    """Return the id of a conversation that names none: by tenant and by how it begins."""

    def first(role: str, characters: int) -> str:
        return next((m["content"][:characters] for m in messages if m["role"] == role and m["content"]), "")

    # JSON keeps the three apart, whatever is in them.
    seed = orjson.dumps([tenant, first("system", 200), first("user", 100)])
    return f"oai-{hashlib.sha256(seed).hexdigest()[:16]}"


class Sessions:
    """All sessions."""

    def __init__(self, settings: SessionSettings, store: Store, metrics: Metrics) -> None:
        self._settings = settings
        self._store = store
        self._metrics = metrics

    async def open(self, principal: Principal, given: str | None, messages: list[Message]) -> Session:
        """Return the session of a request. Raises BadRequest on an id that can't be one."""
        if given is not None:
            _check_id(given)
        if not self._settings.enabled:
            return Session()
        replaces = any(message["role"] == "assistant" for message in messages)
        session = Session(given or derive_id(principal.tenant, messages), principal.tenant, replaces=replaces)
        if given is None:
            # Nothing of it is needed before the first token, so it need not wait for the store.
            session.opening = asyncio.create_task(self._open(session, wants_history=False))
        else:
            await self._open(session, wants_history=not replaces)
        return session

    async def _open(self, session: Session, *, wants_history: bool) -> None:
        try:
            outcome, number, turns = await self._claim(session.id, session.tenant, wants_history)
            collided = outcome == "taken"
            while outcome == "taken":
                session.id = f"oai-{secrets.token_hex(4)}"
                outcome, number, turns = await self._claim(session.id, session.tenant, False)
                if outcome == "owned":
                    outcome = "taken"  # ours, but another conversation
        except StoreUnavailable:
            self._metrics.session("unavailable")
            session.unavailable = True
            return
        session.number = int(number)
        session.announce = collided or outcome == "new"
        session.history = [orjson.loads(turn)[1] for turn in turns]
        if session.announce:
            self._metrics.session("collided" if collided else "created")

    async def _claim(self, session_id: str, tenant: str, wants_history: bool) -> tuple[str, int, list[str]]:
        arguments = [tenant, self._settings.ttl_s, int(wants_history)]
        outcome, number, turns = await self._store.run(*_OPEN.call(_keys(session_id), arguments))
        return outcome, number, turns

    async def record(
        self, events: AsyncGenerator[Event, None], session: Session, messages: list[Message]
    ) -> AsyncGenerator[Event, None]:
        """Pass `events` on; when they have ended well, store `messages` and the answer as one turn."""
        answer: list[str] = []
        async with aclosing(events):
            async for event in events:
                if session.opening is not None:
                    await session.opening
                    session.opening = None
                if isinstance(event, Delta) and event.index == 0:
                    answer.append(event.text)
                yield event
        if session.number:
            await self._append(session, [*messages, {"role": "assistant", "content": "".join(answer)}])

    async def _append(self, session: Session, turn: list[Message]) -> None:
        # The number makes equal turns different members of the set.
        text = orjson.dumps([session.number, turn]).decode()
        bounds = [self._settings.max_turns, self._settings.max_bytes]
        arguments = [session.tenant, self._settings.ttl_s, session.number, text, int(session.replaces), *bounds]
        try:
            await self._store.run(*_APPEND.call(_keys(session.id), arguments))
        except StoreUnavailable:
            self._metrics.session("unavailable")

    async def show(self, principal: Principal, session_id: str) -> dict[str, Any]:
        """Return a session to its owner. Raises NotFound, for another tenant's just as for none."""
        owner_key, turns_key = _keys(_check_id(session_id))
        owner, created, turns = await self._store.run_in_order(
            [("HGET", owner_key, "tenant"), ("HGET", owner_key, "created"), ("ZRANGE", turns_key, 0, -1)]
        )
        if owner != principal.tenant:
            raise _not_found(session_id)
        messages = [message for turn in turns for message in orjson.loads(turn)[1]]
        return {"id": session_id, "object": "session", "created": int(created), "messages": messages}

    async def delete(self, principal: Principal, session_id: str) -> dict[str, Any]:
        """Forget a session. Raises NotFound, as `show` does."""
        await self.show(principal, session_id)
        await self._store.run("DEL", *_keys(session_id))
        return {"id": session_id, "object": "session.deleted", "deleted": True}


def _keys(session_id: str) -> list[str]:
    head = f"sh:{{s:{session_id}}}"
    return [head, f"{head}:t"]


def _check_id(session_id: str) -> str:
    if not _ID.fullmatch(session_id):
        raise BadRequest(
            "X-Session-ID must be 1 to 128 characters out of letters, digits and . _ : @ / + = | ~ -", "X-Session-ID"
        )
    return session_id


def _not_found(session_id: str) -> NotFound:
    return NotFound(f"There is no session {session_id!r}.", "session_id", "session_not_found")
