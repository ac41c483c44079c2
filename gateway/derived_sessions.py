"""Sessions of requests that name none.

Each such request gets an id of its own, so that its client may name it later. The request's messages and their answer
are kept under it for some minutes, within a number of bytes per API key, until the id is named: then it becomes an
ordinary session (sessions.py). It belongs to the key, not to the tenant, and an id tells whose it is, so that other
keys can't use it first.

A request never continues the session of an earlier one, even if it repeats that one's messages and answer. The
messages alone do not show whose conversation it is: two users of one application may begin with the same words and get
the same answer.

Not handled: sessions in which more was said than PIECE_BYTES, which are not kept. Raises StoreUnavailable.
"""

from __future__ import annotations

import hashlib
import re
import secrets

import orjson

from gateway.config import SessionSettings
from gateway.pieces import PIECE_BYTES
from gateway.store import Lane, Script
from gateway.turns import Message, text_of

_OPEN, _KEEP, _TAKE = (Script("derived", f"derived_{name}") for name in ("open", "keep", "take"))
_ID = re.compile(r"oai-([0-9a-f]{22})([0-9a-f]{10})")
_MAX_SESSIONS = 256


def make_id(key_id: str) -> str:
    """Return a fresh id that belongs to a key. 88 bits of it are random."""
    chance = secrets.token_hex(11)
    return f"oai-{chance}{_mark(key_id, chance)}"


def is_derived(session_id: str) -> bool:
    """Return whether an id has the form of a derived session's."""
    return _ID.fullmatch(session_id) is not None


def belongs_to(session_id: str, key_id: str) -> bool:
    """Return whether the id is that of a derived session of this key."""
    match = _ID.fullmatch(session_id)
    return match is not None and match[2] == _mark(key_id, match[1])


def _mark(key_id: str, chance: str) -> str:
    return hashlib.sha256(f"{key_id} {chance}".encode()).hexdigest()[:10]


def derive_id(tenant: str, messages: list[Message]) -> str:
    """Return where the prefix of a conversation that names no session may be cached, by tenant and by how it begins.

    It is a hint for the choice of a replica. Nothing is stored under it.
    """

    def first(role: str, characters: int) -> str:
        texts = (text_of(message) for message in messages if message["role"] == role)
        return next((text[:characters] for text in texts if text), "")

    # JSON keeps the three apart, whatever is in them.
    seed = orjson.dumps([tenant, first("system", 200), first("user", 100)])
    return f"oai-{hashlib.sha256(seed).hexdigest()[:16]}"


class DerivedSessions:
    """The derived sessions of all keys."""

    def __init__(self, settings: SessionSettings, store: Lane) -> None:
        self._store = store
        self._ttl_ms = settings.derived_ttl_s * 1000
        self._most_bytes = settings.derived_bytes_per_key
        self.kept_bytes = min(settings.derived_bytes_per_key, PIECE_BYTES)
        """Most bytes of one session, as JSON."""

    async def open(self, key_id: str) -> str:
        """Begin a session and return its id."""
        arguments = [make_id(key_id), self._ttl_ms, _MAX_SESSIONS]
        session_id: str = await self._store.run(*_OPEN.call(_keys(key_id), arguments))
        return session_id

    async def keep(self, key_id: str, session_id: str, messages: list[Message], created: int) -> bool:
        """Store a conversation, or nothing of it where it is too large. Returns whether it was stored."""
        text = orjson.dumps([created, messages]).decode() if messages else ""
        if len(text.encode()) > self.kept_bytes:
            text = ""
        arguments = [session_id, text, self._ttl_ms, self._most_bytes]
        return bool(await self._store.run(*_KEEP.call(_keys(key_id), arguments)))

    async def take(self, key_id: str, session_id: str) -> list[Message] | None:
        """Return what was said and forget it here; None if there is nothing."""
        _, text = await self._run_take(key_id, session_id, forget=True)
        return orjson.loads(text)[1] if text else None

    async def show(self, key_id: str, session_id: str) -> tuple[int, list[Message]] | None:
        """Return when it was created and what was said; None if there is nothing."""
        _, text = await self._run_take(key_id, session_id, forget=False)
        return tuple(orjson.loads(text)) if text else None

    async def delete(self, key_id: str, session_id: str) -> bool:
        """Forget a session. Returns whether there was one."""
        there, _ = await self._run_take(key_id, session_id, forget=True)
        return there

    async def _run_take(self, key_id: str, session_id: str, *, forget: bool) -> tuple[bool, str]:
        there, text = await self._store.run(*_TAKE.call(_keys(key_id), [session_id, int(forget)]))
        return bool(there), text


def _keys(key_id: str) -> list[str]:
    head = f"sh:{{k:{key_id}}}:derived"
    return [head, f"{head}:at", f"{head}:bytes"]
