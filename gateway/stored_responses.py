"""Responses that can be fetched and continued: what the store keeps of each, and the conversation behind it.

A response belongs to the tenant whose key made it; to others it does not exist. It keeps its own turn and the ids of
those before it, so a conversation costs what was said in it, can be continued from any of its responses, and any
number of times. It is forgotten after the sessions' time to live, and a conversation is bounded as theirs are: the
oldest turns go first. A deleted turn takes those before it out of the conversation. One that is being made holds a
lease: without it, the gateway that made it is gone. Fails with NotFound, BadRequest and StoreUnavailable.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

from gateway.auth import Principal
from gateway.config import SessionSettings
from gateway.errors import BadRequest, NotFound, StoreUnavailable
from gateway.frames.responses import RUNNING
from gateway.metrics import Metrics
from gateway.sessions import IMAGES_SHARE, Message, without_images
from gateway.store import Command, Lane

LEASE_S = 60
_ID = re.compile(r"resp_[A-Za-z0-9]{1,96}")
_CANCELLED_KEY = "sh:responses:cancelled"
_CANCELLED_S = 60  # far longer than it takes any gateway to look
_CONTINUABLE = ("completed", "incomplete")


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

    @property
    def id(self) -> str:
        return str(self.response["id"])

    @property
    def status(self) -> str:
        return str(self.response["status"])


@dataclass(slots=True)
class Conversation:
    """What came before a request: its responses and what was said in them, turn by turn, oldest first."""

    path: Path = field(default_factory=list)
    turns: list[list[Message]] = field(default_factory=list)


class StoredResponses:
    """See the module."""

    def __init__(self, settings: SessionSettings, store: Lane, metrics: Metrics) -> None:
        self._settings = settings
        self._store = store
        self._metrics = metrics

    @property
    def enabled(self) -> bool:
        return self._settings.enabled

    async def conversation(self, principal: Principal, response_id: str) -> Conversation:
        """Return the conversation up to a response, and with it. Raises BadRequest where it can't be continued."""
        record = await self._load(principal, response_id)
        param = "previous_response_id"
        if record is None:
            message = f"Previous response with id {response_id!r} not found."
            raise BadRequest(message, param, "previous_response_not_found")
        if record.status not in _CONTINUABLE:
            message = f"Previous response with id {response_id!r} can't be continued: its status is {record.status!r}."
            raise BadRequest(message, param)
        if not record.turn_bytes:
            raise BadRequest(f"What was said in the response {response_id!r} was too long to be kept.", param)
        path = self._bounded([*record.path, (record.id, record.turn_bytes)])
        ttl_s = self._settings.ttl_s
        found = await self._store.run_in_order([("GETEX", _turn_key(id_), "EX", ttl_s) for id_, _ in path])
        turns = [orjson.loads(text) for text in _after_last_gap(found)]
        while turns and turns[0][0]["role"] == "tool":
            del turns[0]  # its call is in a turn that is gone
        return Conversation(path, turns)

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
        """Store a response, and what was said in it once it is complete. Returns whether it is stored."""
        ttl_s = self._settings.ttl_s
        commands: list[Command] = []
        if turn is not None and (text := self._turn_text(turn)) is not None:
            record.turn_bytes = len(text)
            commands.append(("SET", _turn_key(record.id), text, "EX", ttl_s))
        commands.append(("SET", _key(record.id), orjson.dumps(asdict(record)).decode(), "EX", ttl_s))
        if record.status in RUNNING:
            commands.append(("SET", _lease_key(record.id), "", "EX", LEASE_S))
        try:
            await self._store.run_in_order(commands)
        except StoreUnavailable:
            self._metrics.session("unavailable")
            return False
        return True

    def _turn_text(self, turn: list[Message]) -> str | None:
        text = orjson.dumps(turn).decode()
        if len(text) > self._settings.max_bytes // IMAGES_SHARE:
            text = orjson.dumps([without_images(message) for message in turn]).decode()
        return text if len(text) <= self._settings.max_bytes else None

    async def find(self, principal: Principal, response_id: str) -> StoredResponse:
        """Return a response to its owner. Raises NotFound, for another tenant's just as for none."""
        record = await self._load(principal, response_id)
        if record is None:
            raise NotFound(f"Response with id {response_id!r} not found.", "response_id", "response_not_found")
        return record

    async def _load(self, principal: Principal, response_id: str) -> StoredResponse | None:
        if not _ID.fullmatch(response_id):
            return None
        key = _key(response_id)
        text, lease = await self._store.run_in_order(
            [("GETEX", key, "EX", self._settings.ttl_s), ("EXISTS", _lease_key(response_id))]
        )
        if text is None:
            return None
        record = StoredResponse(**orjson.loads(text))
        if record.tenant != principal.tenant:
            return None
        if record.status in RUNNING and not lease:
            gone = {"code": "server_error", "message": "The server that was making this response is gone."}
            record.response |= {"status": "failed", "error": gone}
        return record

    async def delete(self, principal: Principal, response_id: str) -> None:
        """Forget a response and its turn. Raises NotFound, and BadRequest while it is being made."""
        record = await self.find(principal, response_id)
        if record.status in RUNNING:
            raise BadRequest(f"The response {response_id!r} is still being made. Cancel it first.", "response_id")
        await self.forget(response_id)

    async def forget(self, response_id: str) -> None:
        await self._store.run("DEL", _key(response_id), _turn_key(response_id), _lease_key(response_id))

    async def ask_to_cancel(self, response_id: str) -> None:
        """Tell the gateway that is making a response, whichever it is, to end it."""
        await self._store.run_in_order(
            [("SADD", _CANCELLED_KEY, response_id), ("EXPIRE", _CANCELLED_KEY, _CANCELLED_S)]
        )

    async def renew(self, response_ids: list[str]) -> set[str]:
        """Renew the leases of responses that are being made here. Returns those that are to be cancelled."""
        leases: list[Command] = [("SET", _lease_key(id_), "", "EX", LEASE_S) for id_ in response_ids]
        asked, *_ = await self._store.run_in_order([("SMEMBERS", _CANCELLED_KEY), *leases])
        return set(asked)


def _after_last_gap(texts: list[str | None]) -> list[str]:
    after: list[str] = []
    for text in texts:
        if text is None:
            after.clear()
        else:
            after.append(text)
    return after


def _key(response_id: str) -> str:
    return f"sh:{{r:{response_id}}}"


def _turn_key(response_id: str) -> str:
    return f"{_key(response_id)}:t"


def _lease_key(response_id: str) -> str:
    return f"{_key(response_id)}:l"
