"""API keys in the store: their form, their records, and every change to them.

A key is `sk-shannon-<id>-<secret>`, id of 12 and secret of 43 URL-safe characters. The id is public; of the secret
only the SHA-256 is kept, so a key is shown once, when it is made. Every change raises a counter that gateways watch.
Fails with NotFound, and with StoreUnavailable: keys are never changed on a guess.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from gateway.config import Priority
from gateway.errors import NotFound
from gateway.store import Store

VERSION_KEY = "sh:keys:version"
_INDEX_KEY = "sh:keys"
_KEY = re.compile(r"sk-shannon-([A-Za-z0-9_-]{12})-([A-Za-z0-9_-]{43})")
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

Positive = Annotated[int, Field(ge=1)]


class KeyLimits(BaseModel):
    """Limits of one key on one model, in place of the model's own."""

    model_config = ConfigDict(extra="forbid")

    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    concurrent_requests: Positive | None = None


class KeySpec(BaseModel):
    """What an operator decides about a key."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: Annotated[str, Field(min_length=1, max_length=128)]
    tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "default"
    """Sessions and cached prompts are never shared between tenants."""
    models: list[str] | None = None
    """Model ids that the key may use; null means all."""
    limits: dict[str, KeyLimits] = Field(default_factory=dict)
    """By model id."""
    max_concurrent_requests: Positive | None = None
    """Over all models."""
    tokens_per_day: Positive | None = None
    """Over all models, per UTC day."""
    admin: bool = False
    """May manage keys and see everybody's usage."""
    metrics: bool = False
    """May read /metrics, as admin keys may."""
    priority: Priority = "normal"
    """Keys of a better priority are served first while requests wait for an engine."""
    expires_at: int | None = None
    """Unix seconds; null means never."""


class KeyRecord(KeySpec):
    """A key as the store holds it."""

    id: str
    secret_sha256: str
    created_at: int
    rotated_at: int | None = None
    revoked_at: int | None = None

    def usable(self, now: float) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    def public(self) -> dict[str, Any]:
        """Return what may be shown."""
        return self.model_dump(exclude={"secret_sha256"})


def digest(secret: str) -> str:
    """Return the SHA-256 of a secret, in hex."""
    return hashlib.sha256(secret.encode()).hexdigest()


def make_key(key_id: str | None = None) -> str:
    """Return a fresh random key, for `key_id` or under a fresh id. Ids keep clear of `-`, which separates the parts."""
    key_id = key_id or "".join(secrets.choice(_ALPHABET) for _ in range(12))
    return f"sk-shannon-{key_id}-{secrets.token_urlsafe(32)}"


def split_key(key: str) -> tuple[str, str]:
    """Return (id, secret) of a key. A key of another form, chosen by hand, gets an id from its hash."""
    match = _KEY.fullmatch(key)
    return (match[1], match[2]) if match else (digest(key)[:12], key)


class Keys:
    """The keys in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def create(self, spec: KeySpec) -> tuple[KeyRecord, str]:
        """Make a key. Returns its record and the key itself, which can't be had again."""
        key = make_key()
        key_id, secret = split_key(key)
        record = KeyRecord(**spec.model_dump(), id=key_id, secret_sha256=digest(secret), created_at=int(time.time()))
        await self._write(record)
        return record, key

    async def find(self, key_id: str) -> KeyRecord | None:
        """Return the record, or None."""
        text = await self._store.run("GET", f"sh:{{k:{key_id}}}:key")
        return KeyRecord.model_validate_json(text) if text else None

    async def get(self, key_id: str) -> KeyRecord:
        """Return the record. Raises NotFound."""
        record = await self.find(key_id)
        if record is None:
            raise NotFound(f"There is no API key with the id {key_id[:64]!r}.", "key_id")
        return record

    async def list(self) -> list[KeyRecord]:
        """Return all records, oldest first."""
        ids = await self._store.run("SMEMBERS", _INDEX_KEY)
        records = await asyncio.gather(*(self.find(key_id) for key_id in ids))
        return sorted((record for record in records if record), key=lambda record: (record.created_at, record.id))

    async def rotate(self, key_id: str) -> tuple[KeyRecord, str]:
        """Give a key a new secret; the old one is void at once. Raises NotFound."""
        record = await self.get(key_id)
        key = make_key(key_id)
        changed = record.model_copy(update={"secret_sha256": digest(split_key(key)[1]), "rotated_at": int(time.time())})
        await self._write(changed)
        return changed, key

    async def revoke(self, key_id: str) -> KeyRecord:
        """Void a key for good; its record and usage stay. Raises NotFound."""
        record = await self.get(key_id)
        changed = record.model_copy(update={"revoked_at": record.revoked_at or int(time.time())})
        await self._write(changed)
        return changed

    async def _write(self, record: KeyRecord) -> None:
        await self._store.run_in_order(
            [
                ("SET", f"sh:{{k:{record.id}}}:key", record.model_dump_json()),
                ("SADD", _INDEX_KEY, record.id),
                ("INCR", VERSION_KEY),
            ]
        )
