"""Conversations that the gateway remembers.

An id belongs to the tenant that used it first; other tenants that send it get a fresh one. Stored turns come before a
request's messages only when the client names the session and brings no history (an assistant message) of its own;
history that it brings replaces what is stored. Requests that name no session get one of derived_sessions.py. Turns are
stored when they complete, in the order in which their requests came, and only in the incarnation of the session in
which the request began: what was deleted stays deleted. While the store is away conversations continue without
history, and say so. Raises BadRequest and NotFound.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from engine.base import Delta
from engine.messages import Message
from gateway.access.auth import Principal
from gateway.conversations.derived_sessions import DerivedSessions, belongs_to, derive_id, is_derived
from gateway.conversations.retention import Retention
from gateway.conversations.turns import Piece, least_bytes, pieces_of, text_of, turns_of, without_images
from gateway.errors import BadRequest, NotFound, StoreUnavailable, WritesRefused
from gateway.exchange.answers import Answer
from gateway.settings.config import SessionSettings
from gateway.store import layout
from gateway.store.client import Lane, Script
from gateway.store.pieces import PIECE_BYTES
from gateway.telemetry.metrics import Metrics

__all__ = ["Session", "Sessions", "derive_id", "text_of", "without_images"]

_ID = re.compile(r"[A-Za-z0-9._:@/+=|~-]{1,128}")
_OPEN, _READ = Script("session_turns", "session_open"), Script("session_turns", "session_read", reads=True)
_APPEND, _DELETE = Script("session_append"), Script("session_delete", when_full=True)
_DELETED_S = 60
"""How long a derived session that was deleted can't become an ordinary one: longer than a request takes to begin."""
IMAGES_SHARE = 4
"""A turn is stored with its images while it takes at most one part in this many of a session's bytes."""


@dataclass(slots=True)
class Session:
    """One request's view of its conversation. `history` is what is stored, a list of turns, oldest first."""

    id: str = ""
    tenant: str = ""
    key_id: str = ""
    number: int = 0
    """This request's turn; 0 where nothing will be stored."""
    incarnation: str = ""
    """Differs from that of a session that was deleted and begun again under the same id."""
    derived: bool = False
    """The request named no session."""
    prompt: str = ""
    """Digest of a derived session's prompt."""
    affinity: str = ""
    """Where the conversation's prefix may be cached, if the id does not say."""
    may_store: Callable[[], Awaitable[bool]] | None = None
    """Asked before the turn is stored: whether the work was not handed to another gateway meanwhile."""
    announce: bool = False
    """New or collided: the client must get the id."""
    unavailable: bool = False
    read_only: bool = False
    """The store takes no writes: there is a history, and this request's turn will not be stored."""
    replaces: bool = False
    """The request brings its own history, which takes the place of what is stored."""
    history: list[list[Message]] = field(default_factory=list)
    newest: list[Piece] = field(default_factory=list)
    """Stored turns that came with the answer of the store, as it has them, newest first."""
    more: int = 0
    """Whether there are more (0 or 1)."""
    opening: asyncio.Task[None] | None = None
    """The question to the store, while it is under way."""
    answer: Answer = field(default_factory=Answer)
    """The answer to this request, as far as it was generated."""
    keep: Callable[[Session, list[Message]], Awaitable[None]] | None = None
    """Stores a turn."""

    async def opened(self) -> None:
        """Wait until the id is known, which is sent ahead of the answer."""
        if self.opening is not None:
            await self.opening
            self.opening = None

    def note(self, delta: Delta) -> None:
        """Add to the answer. Only the first choice is stored."""
        if delta.index == 0:
            self.answer.add(delta)

    async def end_turn(self, messages: list[Message]) -> None:
        """Store the request's `messages` and the complete answer as one turn."""
        if self.number and self.keep is not None:
            await self.keep(self, messages)

    def headers(self) -> dict[str, str]:
        headers = {"X-Session-ID": self.id} if self.announce else {}
        state = "unavailable" if self.unavailable else "read-only" if self.read_only else ""
        return headers | ({"X-Shannon-Session": state} if state else {})

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

    def drop_images(self) -> bool:
        """Put words in place of the images in the history. Returns whether there were any."""
        history = [[without_images(message) for message in turn] for turn in self.history]
        changed = history != self.history
        self.history = history
        return changed


class Sessions:
    """All sessions."""

    def __init__(self, settings: SessionSettings, store: Lane, metrics: Metrics) -> None:
        self._settings = settings
        self._store = store
        self._metrics = metrics
        self._derived = DerivedSessions(settings, store)
        self._kept = Retention(store, settings.max_bytes_per_key)

    async def accept(self, principal: Principal, given: str | None) -> Session:
        """Return the session that a request names which is to be answered later. Raises BadRequest as `open` does."""
        session = Session()
        if given is not None and self._settings.enabled:
            session = Session(_check_id(given), principal.tenant, principal.key_id, keep=self._keep)
            await self._open(session, wants_history=False)
        return session

    async def open(
        self, principal: Principal, given: str | None, messages: list[Message], incarnation: str = ""
    ) -> Session:
        """Return the session of a request. Raises BadRequest on an id that can't be one.

        `incarnation` is that of the session when the request was accepted, if that was earlier. A session that was
        deleted since then is not begun again.
        """
        if given is not None:
            _check_id(given)
        if not self._settings.enabled:
            return Session()
        replaces = any(message["role"] == "assistant" for message in messages)
        session = Session(given or "", principal.tenant, principal.key_id, replaces=replaces, keep=self._keep)
        if given is not None:
            await self._open(session, wants_history=not replaces, incarnation=incarnation)
            return session
        session.affinity = derive_id(principal.tenant, messages)
        if self._settings.derived:
            session.derived = True
            # Nothing of it is needed before the first token, so it need not wait for the store.
            session.opening = asyncio.create_task(self._open_derived(session, messages))
        return session

    async def _open_derived(self, session: Session, messages: list[Message]) -> None:
        try:
            session.id, session.announce, session.prompt = await self._derived.open(session.key_id, messages)
        except StoreUnavailable:
            self._note_unavailable(session)
            return
        session.number = 1
        if session.announce:
            self._metrics.session("created")

    async def _open(self, session: Session, *, wants_history: bool, incarnation: str = "") -> None:
        derived: tuple[int, list[Message]] | None = None
        said: list[Message] = []
        try:
            seed, may_be_new = "", True
            if is_derived(session.id):
                may_be_new = belongs_to(session.id, session.key_id)
                if may_be_new and (derived := await self._derived.show(session.key_id, session.id)) is not None:
                    said = derived[1]
                seed = orjson.dumps([0, said]).decode() if said else ""
            outcome = await self._claim(session, wants_history, may_be_new, seed, incarnation)
            if derived is not None:  # it is an ordinary session by now
                await self._derived.delete(session.key_id, session.id)
            collided = outcome == "taken"
            while outcome == "taken":
                session.id = f"oai-{secrets.token_hex(4)}"
                outcome = await self._claim(session, False)
                if outcome == "owned":
                    outcome = "taken"  # ours, but another conversation
            if wants_history and session.number and not collided:
                await self._read(session.tenant, session.id, session.newest, session.more)
                session.history = [turn for _, turn in turns_of(session.newest)]
                session.newest = []
        except WritesRefused:
            await self._open_to_read(session, said, wants_history=wants_history)
            return
        except StoreUnavailable:
            self._note_unavailable(session)
            return
        session.announce = collided or (outcome == "new" and not seed)
        if session.announce:
            self._metrics.session("collided" if collided else "created")

    async def _open_to_read(self, session: Session, said: list[Message], *, wants_history: bool) -> None:
        """Give a session its history while the store takes no writes. `said` is what a derived one has."""
        found: list[Piece] = []
        try:
            there = await self._read(session.tenant, session.id, found) is not None or bool(said)
        except StoreUnavailable:
            there = False
        self._note_unavailable(session)
        if there:
            session.unavailable, session.read_only = False, True
            if wants_history:
                turns = [turn for _, turn in turns_of(found)]
                session.history = turns or ([said] if said else [])

    def _note_unavailable(self, session: Session) -> None:
        self._metrics.session("unavailable")
        session.unavailable = True
        session.number = 0

    async def _claim(
        self, session: Session, wants_history: bool, may_be_new: bool = True, seed: str = "", incarnation: str = ""
    ) -> str:
        arguments = [session.tenant, self._settings.ttl_s, int(wants_history), secrets.token_hex(8), int(may_be_new)]
        arguments += [seed, PIECE_BYTES, session.key_id, incarnation]
        keys = [*layout.session(session.id), layout.deleted_session(session.id)]
        answer = await self._store.run(*_OPEN.call(keys, arguments))
        outcome, session.number, session.incarnation, found, session.more, payer = answer
        member, ttl_s = f"s:{session.id}", self._settings.ttl_s
        if outcome == "new":
            # Counted from here on, whether or not anything comes to be said in it: ids cost nothing to make up.
            await self._kept.keep(payer, member, len(seed.encode()), ttl_s)
        elif payer:
            await self._store.run(*self._kept.renewal(payer, member, ttl_s))
        session.newest = list(zip(found[::2], found[1::2], strict=True))
        return str(outcome)

    async def _read(self, tenant: str, session_id: str, found: list[Piece], more: int = 1) -> int | None:
        """Add to `found` the turns of a session that are older, newest first, if there are more.

        Returns when the session was created, None if there is none of the tenant's.
        """
        created = None
        while more:
            last = found[-1][1] if found else "+inf"
            skip = sum(number == last for _, number in found)
            answer = await self._store.run(*_READ.call(layout.session(session_id), [tenant, last, skip, PIECE_BYTES]))
            if not answer:
                return None
            created, pieces, more = answer
            found += zip(pieces[::2], pieces[1::2], strict=True)
        return created if created is None else int(created)

    async def _keep(self, session: Session, messages: list[Message]) -> None:
        """Store `messages` and the answer as one turn."""
        try:
            if session.may_store is None or await session.may_store():
                await self._append(session, [*messages, session.answer.remembered()])
        except StoreUnavailable:
            self._metrics.session("unavailable")

    async def _append(self, session: Session, turn: list[Message]) -> None:
        if session.derived:
            if session.prompt and len(orjson.dumps(turn)) > self._settings.derived_bytes_per_key // IMAGES_SHARE:
                turn = [without_images(message) for message in turn]
            await self._derived.keep(session.key_id, session.id, session.prompt, turn, int(time.time()))
            return
        most = self._settings.max_bytes
        pieces = [""]
        if sum(map(least_bytes, turn)) <= most:
            # The number makes equal turns different members of the set.
            text = orjson.dumps([session.number, turn])
            if len(text) > most // IMAGES_SHARE:
                text = orjson.dumps([session.number, [without_images(message) for message in turn]])
            if len(text) <= most:
                pieces = pieces_of(session.number, text.decode())
        for number, piece in enumerate(pieces):
            arguments = [session.tenant, session.incarnation, self._settings.ttl_s, session.number, piece]
            arguments += [int(session.replaces), int(number == 0), self._settings.max_turns, most, session.key_id]
            stored, size_bytes, payer = await self._store.run(*_APPEND.call(layout.session(session.id), arguments))
            if not stored:
                return
        await self._kept.keep(session.key_id, f"s:{session.id}", size_bytes, self._settings.ttl_s)
        if payer not in ("", session.key_id):
            await self._kept.release(payer, f"s:{session.id}")

    async def show(self, principal: Principal, session_id: str) -> dict[str, Any]:
        """Return a session to its owner. Raises NotFound, for another tenant's just as for none."""
        _check_id(session_id)
        if belongs_to(session_id, principal.key_id):
            derived = await self._derived.show(principal.key_id, session_id)
            if derived is not None and derived[1]:
                return _shown(session_id, *derived)
        found: list[Piece] = []
        created = await self._read(principal.tenant, session_id, found)
        if created is None:
            raise _not_found(session_id)
        return _shown(session_id, created, [message for _, turn in turns_of(found) for message in turn])

    async def delete(self, principal: Principal, session_id: str) -> dict[str, Any]:
        """Forget a session. Raises NotFound, as `show` does."""
        _check_id(session_id)
        derived = belongs_to(session_id, principal.key_id) and await self._derived.delete(principal.key_id, session_id)
        keys = [*layout.session(session_id), layout.deleted_session(session_id)]
        there, payer = await self._store.run(*_DELETE.call(keys, [principal.tenant, _DELETED_S if derived else 0]))
        there = there or derived
        if payer:
            await self._kept.release(payer, f"s:{session_id}")
        if not there:
            raise _not_found(session_id)
        return {"id": session_id, "object": "session.deleted", "deleted": True}


def _shown(session_id: str, created: int, messages: list[Message]) -> dict[str, Any]:
    return {"id": session_id, "object": "session", "created": created, "messages": messages}


def _check_id(session_id: str) -> str:
    if not _ID.fullmatch(session_id):
        raise BadRequest(
            "X-Session-ID must be 1 to 128 characters out of letters, digits and . _ : @ / + = | ~ -", "X-Session-ID"
        )
    return session_id


def _not_found(session_id: str) -> NotFound:
    return NotFound(f"There is no session {session_id!r}.", "session_id", "session_not_found")
