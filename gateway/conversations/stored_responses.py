"""Responses that can be fetched and continued: what the store keeps of each, and the conversation behind it.

A response belongs to the tenant whose key made it; to others it does not exist. It keeps its own turn and the ids of
those before it, so a conversation costs what was said in it, can be continued from any of its responses, and any
number of times. It is forgotten after the sessions' time to live, and a conversation is bounded as theirs are: the
oldest turns go first. A deleted turn takes those before it out of the conversation. One that is being made holds a
lease: without it, the gateway that made it is gone. What was deleted does not come back, whatever that gateway still
does. Raises NotFound, BadRequest and StoreUnavailable.
"""

from __future__ import annotations

import re
import secrets
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import orjson

from engine.messages import Message
from gateway.access.auth import Principal
from gateway.conversations.retention import Retention
from gateway.conversations.sessions import IMAGES_SHARE
from gateway.conversations.turns import least_bytes, without_images
from gateway.errors import BadRequest, NotFound, WritesRefused
from gateway.exchange.frames.responses import RUNNING
from gateway.settings.config import SessionSettings
from gateway.store import layout, pieces
from gateway.store.client import Command, Lane, Script
from gateway.telemetry.metrics import Metrics

LEASE_S = 60
_ID = re.compile(r"resp_[A-Za-z0-9]{1,96}")
_CANCELLED_S = 60  # far longer than it takes any gateway to look
_CANCELLED_AT_ONCE = 1000
_DELETED_S = 3600
"""How long the deletion of a response is remembered whose gateway may only be slow: longer than one is made."""
_CONTINUABLE = ("completed", "incomplete")
_PUBLISH, _FIND = Script("response_publish"), Script("response_find", reads=True)
_DELETE = Script("response_delete", when_full=True)
_CANCEL, _RENEW = Script("list", when_full=True), Script("response_renew", when_full=True)


Path = list[tuple[str, int]]
"""Responses by id, oldest first, each with the size of what was said in it."""


@dataclass(slots=True)
class StoredResponse:
    """What is kept of a response. `response` is the object as clients see it, `input` its items."""

    tenant: str
    response: dict[str, Any]
    input: list[dict[str, Any]]
    path: Path = field(default_factory=list)
    """The responses before it in the conversation."""
    turn_bytes: int = 0
    """Size of what was said in it; 0 while nothing of it is kept."""
    key_id: str = ""
    """The API key that made it."""
    known: bool = False
    """It was kept before. If it is gone now, it was deleted."""

    @property
    def id(self) -> str:
        return str(self.response["id"])

    @property
    def status(self) -> str:
        return str(self.response["status"])

    def fields(self) -> dict[str, Any]:
        """The value in the store."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "known"}


@dataclass(slots=True)
class Conversation:
    """What came before a request: its responses and what was said in them, turn by turn, oldest first."""

    path: Path = field(default_factory=list)
    turns: list[list[Message]] = field(default_factory=list)


class _Found(NamedTuple):
    """What the store has of a response besides its object. See lua/response_find.lua."""

    status: str
    turn_bytes: int
    path: Path
    payer: str
    process: str
    made: bool
    """A gateway is making it."""
    text: str


class StoredResponses:
    """Responses in the store."""

    def __init__(self, settings: SessionSettings, store: Lane, metrics: Metrics) -> None:
        self._settings = settings
        self._store = store
        self._metrics = metrics
        self._kept = Retention(store, settings.max_bytes_per_key)
        self._process = secrets.token_hex(8)

    @property
    def enabled(self) -> bool:
        return self._settings.enabled

    async def conversation(self, principal: Principal, response_id: str) -> Conversation:
        """Return the conversation up to a response, and with it. Raises BadRequest where it can't be continued."""
        found = await self._find(principal, response_id)
        param = "previous_response_id"
        if found is None:
            message = f"Previous response with id {response_id!r} not found."
            raise BadRequest(message, param, "previous_response_not_found")
        status = found.status if found.made or found.status not in RUNNING else "failed"
        if status not in _CONTINUABLE:
            message = f"Previous response with id {response_id!r} can't be continued: its status is {status!r}."
            raise BadRequest(message, param)
        if not found.turn_bytes:
            raise BadRequest(f"What was said in the response {response_id!r} was too long to be kept.", param)
        path = self._bounded([*found.path, (response_id, found.turn_bytes)])
        turns = [orjson.loads(text) for text in _after_last_gap(await self._turn_texts(path))]
        while turns and turns[0][0]["role"] == "tool":
            del turns[0]  # its call is in a turn that is gone
        return Conversation(path, turns)

    async def _turn_texts(self, path: Path) -> list[str | None]:
        """The turns of the responses of a path, read a piece at a time."""
        texts: list[str | None] = []
        batch: list[str] = []
        size = 0
        for number, (response_id, turn_bytes) in enumerate(path):
            batch.append(response_id)
            size += turn_bytes
            if number + 1 < len(path) and size + path[number + 1][1] <= pieces.PIECE_BYTES:
                continue
            texts += await self._read_turns(batch)
            batch, size = [], 0
        return texts

    async def _read_turns(self, response_ids: list[str]) -> list[str | None]:
        """The turns of some responses. Reading them renews their expiry."""
        keys = [layout.response(response_id) for response_id in response_ids]
        look: list[Command] = [("GET", own[2]) for own in keys] + [("HGET", own[1], "payer") for own in keys]
        found = await self._store.run_in_order(look)
        payers = dict(zip(response_ids, found[len(keys) :], strict=True))
        await self._use([key for own in keys for key in (own[2], own[-1])], payers)
        texts = zip(keys, found[: len(keys)], strict=True)
        return [text and await pieces.read(self._store, own[2], text) for own, text in texts]

    async def _use(self, keys: list[str], payers: dict[str, str | None]) -> None:
        """Keep values for as long as if they were stored now. `payers` are the API keys that pay, by response."""
        ttl_s = self._settings.ttl_s
        use: list[Command] = [("EXPIRE", key, ttl_s) for key in keys]
        use += [self._kept.renewal(payer, f"r:{id_}", ttl_s) for id_, payer in payers.items() if payer]
        with suppress(WritesRefused):  # it is read all the same
            await self._store.run_in_order(use)

    def _bounded(self, path: Path) -> Path:
        """Return the newest of `path` that are within the bounds."""
        size = 0
        bounded: Path = []
        for response_id, turn_bytes in reversed(path[-self._settings.max_turns :]):
            size += turn_bytes
            if not turn_bytes or size > self._settings.max_bytes:
                break
            bounded.insert(0, (response_id, turn_bytes))
        return bounded

    async def keep(self, record: StoredResponse, turn: list[Message] | None = None) -> bool:
        """Store a response, and what was said in it once it is complete. Returns False if it is too large.

        Raises StoreUnavailable.
        """
        said = self._turn_text(turn) if turn is not None else None
        if said is not None:
            record.turn_bytes = len(said.encode())
        text = orjson.dumps(record.fields()).decode()
        size = len(text.encode()) + record.turn_bytes
        if size > self._settings.max_bytes_per_key:
            return False
        keys = layout.response(record.id)
        text = await pieces.write(self._store, keys[0], text, int(record.status == "in_progress"))
        said = None if said is None else await pieces.write(self._store, _turn_key(record.id), said)
        arguments = [record.tenant, self._process, int(not record.known), self._settings.ttl_s, record.status]
        arguments += [text, said or "", record.turn_bytes, orjson.dumps(record.path).decode(), record.key_id]
        arguments.append(LEASE_S if record.status in RUNNING else 0)
        stored = await self._store.run(*_PUBLISH.call(keys, arguments))
        if stored and record.key_id:
            await self._kept.keep(record.key_id, f"r:{record.id}", size, self._settings.ttl_s)
        return True

    def _turn_text(self, turn: list[Message]) -> str | None:
        if sum(map(least_bytes, turn)) > self._settings.max_bytes:
            return None
        text = orjson.dumps(turn)
        if len(text) > self._settings.max_bytes // IMAGES_SHARE:
            text = orjson.dumps([without_images(message) for message in turn])
        return text.decode() if len(text) <= self._settings.max_bytes else None

    async def find(self, principal: Principal, response_id: str) -> StoredResponse:
        """Return a response to its owner. Raises NotFound, for another tenant's just as for none."""
        found = await self._find(principal, response_id, whole=True)
        text = found and await pieces.read(self._store, layout.response(response_id)[0], found.text)
        if found is None or text is None:
            raise _not_found(response_id)
        record = StoredResponse(**orjson.loads(text))
        if record.status in RUNNING and not found.made:
            gone = {"code": "server_error", "message": "The server that was making this response is gone."}
            record.response |= {"status": "failed", "error": gone}
        return record

    async def _find(self, principal: Principal, response_id: str, *, whole: bool = False) -> _Found | None:
        if not _ID.fullmatch(response_id):
            return None
        response, state, turn, lease, _, *places = layout.response(response_id)
        answer = await self._store.run(*_FIND.call([response, state, lease], [principal.tenant, int(whole)]))
        if not answer:
            return None
        status, turn_bytes, path, payer, process, made, text = answer
        await self._use([response, state, turn, *places], {response_id: payer})
        path = [(id_, size) for id_, size in orjson.loads(path)]
        return _Found(status, int(turn_bytes), path, payer, process, bool(made), text)

    async def delete(self, principal: Principal, response_id: str) -> None:
        """Forget a response and its turn. Raises NotFound, and BadRequest while it is being made."""
        if not _ID.fullmatch(response_id):
            raise _not_found(response_id)
        arguments = [principal.tenant, _DELETED_S, *RUNNING]
        outcome, payer = await self._store.run(*_DELETE.call(layout.response(response_id), arguments))
        if outcome == "absent":
            raise _not_found(response_id)
        if outcome == "running":
            raise BadRequest(f"The response {response_id!r} is still being made. Cancel it first.", "response_id")
        if payer:
            await self._kept.release(payer, f"r:{response_id}")

    async def forget(self, record: StoredResponse) -> None:
        """Remove a response whose id was not sent."""
        await self._store.run("DEL", *layout.response(record.id))
        await self._kept.release(record.key_id, f"r:{record.id}")

    async def ask_to_cancel(self, response_id: str) -> None:
        """Have the gateway that is making a response end it."""
        process = await self._store.run("HGET", layout.response(response_id)[1], "process")
        if process is not None:
            key = layout.process(process, "cancelled")
            await self._store.run_in_order([_CANCEL.call([key], [response_id]), ("EXPIRE", key, _CANCELLED_S)])

    async def renew(self, response_ids: list[str]) -> set[str]:
        """Renew the leases of responses that are being made here. Returns those that are to be cancelled."""
        leases = [_RENEW.call([layout.response(id_)[3]], [LEASE_S]) for id_ in response_ids]
        look = ("SPOP", layout.process(self._process, "cancelled"), _CANCELLED_AT_ONCE)
        asked, *_ = await self._store.run_in_order([look, *leases])
        return set(asked)


def _not_found(response_id: str) -> NotFound:
    return NotFound(f"Response with id {response_id[:128]!r} not found.", "response_id", "response_not_found")


def _after_last_gap(texts: list[str | None]) -> list[str]:
    after: list[str] = []
    for text in texts:
        if text is None:
            after.clear()
        else:
            after.append(text)
    return after


def _turn_key(response_id: str) -> str:
    return layout.response(response_id)[2]
