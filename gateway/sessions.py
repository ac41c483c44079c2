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
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from engine.base import Delta, Engine, GenerationRequest, InvalidRequest, Prepared
from gateway.answers import Answer
from gateway.auth import Principal
from gateway.config import SessionSettings
from gateway.errors import BadRequest, NotFound, StoreUnavailable
from gateway.events import Event
from gateway.metrics import Metrics
from gateway.store import Lane, Script

Message = dict[str, Any]

_ID = re.compile(r"[A-Za-z0-9._:@/+=|~-]{1,128}")
_OPEN = Script("session_open")
_APPEND = Script("session_append")
IMAGES_SHARE = 4
"""A turn is stored with its images while it takes at most one part in this many of a session's bytes."""


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

    def drop_images(self) -> bool:
        """Put words in place of the images in the history. Returns whether there were any."""
        history = [[without_images(message) for message in turn] for turn in self.history]
        changed = history != self.history
        self.history = history
        return changed


async def prepare_with_history(
    engine: Engine, request: GenerationRequest, session: Session, max_input_tokens: int | None = None
) -> Prepared:
    """Prepare `request` behind as many of the newest stored turns as fit and leave room for an answer.

    `max_input_tokens` bounds the prompt, and then the request's own oldest turns go where they must. System prompts
    and the last turn stay, and a tool's result is never parted from its call. Raises what `Engine.prepare` raises,
    about what can't be left out: that the history is too long is never the reason.
    """
    cuts = _cuts(request.messages, session.history, drops_own=max_input_tokens is not None)
    least, most = 0, len(cuts) - 1
    best: Prepared | None = None
    at = most
    while best is None or least < most:
        start, turns = cuts[at]
        own = [message for i, message in enumerate(request.messages) if i >= start or message["role"] == "system"]
        shortened = replace(request, messages=session.messages(own, turns))
        try:
            prepared: Prepared | None = await _prepare_within(
                engine, shortened, max_input_tokens, alone=at == 0 and len(cuts) > 1
            )
        except InvalidRequest as error:
            if turns and session.drop_images():
                continue  # too long, too many, or for a model that takes none: they are not what was asked for
            if at == 0 or error.code != "context_length_exceeded" or (turns == 0 and error.param != "messages"):
                raise
            prepared = None
        if prepared is not None and (at == 0 or turns == 0 or _leaves_room(prepared, request, engine.max_model_len)):
            best, least = prepared, at
        else:
            most = at - 1
        # All turns first, then the fewest, then bisect: most histories fit, and the search needs a result that does.
        at = 0 if best is None else (least + most + 1) // 2
    return best


def _cuts(request: list[Message], history: list[list[Message]], *, drops_own: bool) -> list[tuple[int, int]]:
    """Return what may be sent, from least to most, as (first of the request's messages, number of stored turns).

    A turn begins with what a user says. Nothing may begin with the result of a tool: its call would be missing.
    """
    starts: list[int] = []
    before = ""
    for index, message in enumerate(request):
        if message["role"] != "system":
            if not starts or (message["role"] == "user" and before != "user"):
                starts.append(index)
            before = message["role"]
    if not starts:
        return [(0, 0)]
    cuts = [(start, 0) for start in (reversed(starts) if drops_own else starts[:1])]
    cuts += [(starts[0], turns) for turns in range(1, len(history) + 1)]
    first = {turns: next((m for m in history[-turns] if m["role"] != "system"), {}) for _, turns in cuts if turns}
    whole = [cut for cut in cuts if (first[cut[1]] if cut[1] else request[cut[0]]).get("role") != "tool"]
    return whole or cuts[-1:]


async def _prepare_within(
    engine: Engine, request: GenerationRequest, max_input_tokens: int | None, *, alone: bool
) -> Prepared:
    """Prepare `request` if its prompt is within the bound. `alone`: nothing can be left out of it any more."""
    try:
        prepared = await engine.prepare(request)
    except InvalidRequest as error:
        if max_input_tokens is None or error.param != request.max_tokens_param or request.max_tokens is None:
            raise
        # What the client wants to hear is too long. Whether the prompt is as well shows only without it.
        prepared = await engine.prepare(replace(request, max_tokens=None))
        if prepared.prompt_tokens <= max_input_tokens:
            raise
    if max_input_tokens is None or prepared.prompt_tokens <= max_input_tokens:
        return prepared
    param = request.prompt_param
    what = "system prompt and last turn alone are" if alone else "messages are" if request.messages else "prompt is"
    raise InvalidRequest(
        f"This model takes prompts of at most {max_input_tokens} tokens, but the {what} {prepared.prompt_tokens} "
        f"tokens long. Shorten the {param}.",
        param,
        "context_length_exceeded",
    )


def _leaves_room(prepared: Prepared, request: GenerationRequest, max_model_len: int) -> bool:
    wanted = request.max_tokens or request.default_max_tokens or max_model_len
    return prepared.max_tokens >= min(wanted, max_model_len // 4)


def derive_id(tenant: str, messages: list[Message]) -> str:
    """Return the id of a conversation that names none: by tenant and by how it begins."""

    def first(role: str, characters: int) -> str:
        texts = (text_of(message) for message in messages if message["role"] == role)
        return next((text[:characters] for text in texts if text), "")

    # JSON keeps the three apart, whatever is in them.
    seed = orjson.dumps([tenant, first("system", 200), first("user", 100)])
    return f"oai-{hashlib.sha256(seed).hexdigest()[:16]}"


class Sessions:
    """All sessions."""

    def __init__(self, settings: SessionSettings, store: Lane, metrics: Metrics) -> None:
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
        answer = Answer()
        async with aclosing(events):
            async for event in events:
                if session.opening is not None:
                    await session.opening
                    session.opening = None
                if isinstance(event, Delta) and event.index == 0:
                    answer.add(event)
                yield event
        if session.number:
            await self._append(session, [*messages, answer.remembered()])

    async def _append(self, session: Session, turn: list[Message]) -> None:
        # The number makes equal turns different members of the set.
        text = orjson.dumps([session.number, turn]).decode()
        if len(text) > self._settings.max_bytes // IMAGES_SHARE:
            text = orjson.dumps([session.number, [without_images(message) for message in turn]]).decode()
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


def text_of(message: Message) -> str:
    """Return what a message says, without its images."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def without_images(message: Message) -> Message:
    """Return the message with words in place of its images."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    image = {"type": "text", "text": "[image]"}
    return message | {"content": [image if part["type"] == "image_url" else part for part in content]}


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
