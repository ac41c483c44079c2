"""Sessions of requests that name none.

Such a request gets an id of its own, so that its client may name it later. What was said is kept for some minutes,
within a number of bytes per API key, until the id is named: then it becomes an ordinary session (sessions.py). It
belongs to the key, not to the tenant, and an id shows its key, so that other keys can't use it first.

A request that brings a session's whole conversation continues it, if that is certain: the prompt of the last answer
must be known to have been asked in this session alone, and to have received exactly this answer. Two conversations that
began alike are never taken for each other: from the second on, those that continue either get a session of their own.
So does every request of a key of which a prompt was forgotten or could not be recorded in the last 24 hours.

Not handled: sessions in which more was said than PIECE_BYTES, which are not kept. Raises StoreUnavailable.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

import orjson

from engine.messages import Message
from gateway.conversations.turns import least_bytes, text_of
from gateway.errors import StoreUnavailable
from gateway.settings.config import SessionSettings
from gateway.store import layout
from gateway.store.client import Lane, Script
from gateway.store.pieces import PIECE_BYTES

_OPEN, _KEEP = Script("derived", "derived_open"), Script("derived", "derived_keep")
_SHOW = Script("derived", "derived_show", reads=True)
_DELETE = Script("derived", "derived_delete", when_full=True)
_ID = re.compile(r"oai-([0-9a-f]{22})([0-9a-f]{10})")
_REMEMBERED_S = 86_400
"""How long prompts are remembered, as digests: longer than the sessions, so that a conversation that was put aside is
not taken for a later one that began alike."""
_MAX_PROMPTS = 2_000
"""Per API key: their digests, sessions and answers take at most 256 KiB."""
_MAX_SESSIONS = 256


@dataclass(frozen=True, slots=True)
class Transcript:
    """Digests of a conversation, each 16 hexadecimal digits."""

    prompt: str
    """All of it."""
    before: str
    """What came before its last answer; empty if there is none."""
    answered: str
    """The same with that answer."""

    @classmethod
    def of(cls, key_id: str, messages: Iterable[Message]) -> Transcript:
        """Read a conversation. Images don't count."""
        digest = hashlib.sha256(key_id.encode())
        before = answered = ""
        for message in messages:
            if message["role"] == "assistant":
                before = digest.hexdigest()[:16]
            digest.update(_essence(message))
            if message["role"] == "assistant":
                answered = digest.hexdigest()[:16]
        return cls(digest.hexdigest()[:16], before, answered)


def _essence(message: Message) -> bytes:
    parts = [message["role"], text_of(message), message.get("tool_calls"), message.get("tool_call_id")]
    return orjson.dumps(parts) + b"\n"


def make_id(key_id: str) -> str:
    """Return a fresh id that belongs to a key. 88 bits of it are random."""
    chance = secrets.token_hex(11)
    return f"oai-{chance}{_mark(key_id, chance)}"


def is_derived(session_id: str) -> bool:
    """Whether an id has the form of a derived session's."""
    return _ID.fullmatch(session_id) is not None


def belongs_to(session_id: str, key_id: str) -> bool:
    """Whether the id is that of a derived session of this key."""
    match = _ID.fullmatch(session_id)
    return match is not None and match[2] == _mark(key_id, match[1])


def _mark(key_id: str, chance: str) -> str:
    return hashlib.sha256(f"{key_id} {chance}".encode()).hexdigest()[:10]


def derive_id(tenant: str, messages: list[Message]) -> str:
    """The affinity of a conversation without a session, from its tenant and its beginning.

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
        self._kept_bytes = min(settings.derived_bytes_per_key, PIECE_BYTES)
        self._unrecorded: set[str] = set()
        """Keys of which a prompt could not be recorded, until the store has taken note."""

    async def open(self, key_id: str, messages: list[Message]) -> tuple[str, bool, str]:
        """Return the session that a request continues, or a new one: its id, whether it is new, and the prompt's
        digest, which is empty where the conversation is too large to be kept."""
        prompt, before, answered = "", "", ""
        if sum(map(least_bytes, messages)) <= self._kept_bytes:
            transcript = Transcript.of(key_id, messages)
            prompt, before, answered = transcript.prompt, transcript.before, transcript.answered
        times = [self._ttl_ms, max(self._ttl_ms, _REMEMBERED_S * 1000)]
        unrecorded = key_id in self._unrecorded
        arguments = [make_id(key_id), prompt, before, answered, *times, _MAX_PROMPTS, _MAX_SESSIONS, int(unrecorded)]
        try:
            how, session_id = await self._store.run(*_OPEN.call(layout.derived_sessions(key_id), arguments))
        except StoreUnavailable:
            self._unrecorded.add(key_id)
            raise
        if unrecorded:
            self._unrecorded.discard(key_id)
        return session_id, how == "new", prompt

    async def keep(self, key_id: str, session_id: str, prompt: str, messages: list[Message], created: int) -> bool:
        """Store a conversation whose last message is the answer. Returns whether it was."""
        text, answered = "", ""
        if prompt:
            text = orjson.dumps([created, messages]).decode()
            answered = Transcript.of(key_id, messages).prompt
        if len(text.encode()) > self._kept_bytes:
            text = ""
        arguments = [session_id, text, self._ttl_ms, self._most_bytes, prompt, answered]
        return bool(await self._store.run(*_KEEP.call(layout.derived_sessions(key_id)[:3], arguments)))

    async def show(self, key_id: str, session_id: str) -> tuple[int, list[Message]] | None:
        """Return when it was created and what was said, None if there is no such session.

        During its first turn nothing was said.
        """
        there, text = await self._store.run(*_SHOW.call(layout.derived_sessions(key_id)[:2], [session_id]))
        return tuple(orjson.loads(text)) if text else (0, []) if there else None

    async def delete(self, key_id: str, session_id: str) -> bool:
        """Forget a session. Returns whether there was one."""
        return bool(await self._store.run(*_DELETE.call(layout.derived_sessions(key_id)[:3], [session_id])))
