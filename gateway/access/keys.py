"""API keys in the store: their form, their records, and every change to them.

A key is `sk-shannon-<id>-<secret>`, id of 12 and secret of 43 URL-safe characters. The id is public; of the secret
only the SHA-256 is kept, so a key is shown once, when it is made.

A record is only ever replaced by a change to what it was when it was read, so that of two changes at once neither is
lost. After every change a counter is raised that gateways watch. It is raised when the record has been written, never
together with it: in a cluster the two are on different servers, and a gateway that saw the counter first would keep the
old record. Raises NotFound, Conflict, and StoreUnavailable: keys are never changed on a guess.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gateway.errors import Conflict, NotFound
from gateway.settings.config import Priority
from gateway.store import layout
from gateway.store.client import Lane
from gateway.store.script import Script

_CREATE = Script("key_create")
# A key that leaked must be revoked in a full store as well.
_CHANGE = Script("key_change", when_full=True)
_RAISE = Script("raise", when_full=True)
_ATTEMPTS = 20
_LISTED_AT_ONCE = 64
_KEY = re.compile(r"sk-shannon-([A-Za-z0-9_-]{12})-([A-Za-z0-9_-]{43})")
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

_MAX_MODELS = 1024


def _with_one_unknown_field(cls: type[BaseModel], data: Any) -> Any:
    """Return `data` with at most one unknown field, because pydantic creates an error for each."""
    if not isinstance(data, dict):
        return data
    known = {name: value for name, value in data.items() if name in cls.model_fields}
    unknown = next((name for name in data if name not in known), None)
    return known if unknown is None else known | {unknown: data[unknown]}


Positive = Annotated[int, Field(ge=1)]


class KeyLimits(BaseModel):
    """Limits of one key on one model, which replace the model's."""

    model_config = ConfigDict(extra="forbid")

    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    concurrent_requests: Positive | None = None

    _drop_unknown_fields = model_validator(mode="before")(_with_one_unknown_field)


class KeySpec(BaseModel):
    """The fields of a key that an operator sets."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: Annotated[str, Field(min_length=1, max_length=128)]
    tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "default"
    """Sessions and cached prompts are never shared between tenants."""
    models: Annotated[list[str], Field(fail_fast=True, max_length=_MAX_MODELS)] | None = None
    """Model ids that the key may use; null means all."""
    limits: dict[str, KeyLimits] = Field(default_factory=dict)
    """By model id."""
    max_concurrent_requests: Positive | None = None
    """Over all models."""
    tokens_per_day: Positive | None = None
    """Over all models, per UTC day."""
    admin: bool = False
    """May manage keys and see the usage of all keys."""
    metrics: bool = False
    """May read /metrics, as admin keys may."""
    priority: Priority = "normal"
    """Keys of a better priority are served first while requests wait for an engine."""
    expires_at: int | None = None
    """Unix seconds; null means never."""

    _drop_unknown_fields = model_validator(mode="before")(_with_one_unknown_field)

    @field_validator("limits", mode="before")
    @classmethod
    def _limits_must_be_few(cls, limits: Any) -> Any:
        if isinstance(limits, dict) and len(limits) > _MAX_MODELS:
            raise ValueError(f"must have at most {_MAX_MODELS} entries")
        return limits


class KeyRecord(KeySpec):
    """A key's record in the store."""

    id: str
    secret_sha256: str
    created_at: int
    rotated_at: int | None = None
    revoked_at: int | None = None

    def usable(self, now: float) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    def public(self) -> dict[str, Any]:
        """Return the fields that may be shown."""
        return self.model_dump(exclude={"secret_sha256"})


def digest(secret: str) -> str:
    """Return the SHA-256 of a secret, in hex."""
    return hashlib.sha256(secret.encode()).hexdigest()


def make_key(key_id: str | None = None) -> str:
    """Return a new random key, with `key_id` or a new id. Ids don't contain `-`, which separates the parts."""
    key_id = key_id or "".join(secrets.choice(_ALPHABET) for _ in range(12))
    return f"sk-shannon-{key_id}-{secrets.token_urlsafe(32)}"


def split_key(key: str) -> tuple[str, str]:
    """Return (id, secret) of a key. A key of another format gets an id from its hash."""
    match = _KEY.fullmatch(key)
    return (match[1], match[2]) if match else (digest(key)[:12], key)


class Keys:
    """The keys in the store."""

    def __init__(self, store: Lane) -> None:
        self._store = store

    async def create(self, spec: KeySpec) -> tuple[KeyRecord, str]:
        """Make a key. Returns its record and the key itself, which can't be had again."""
        key = make_key()
        key_id, secret = split_key(key)
        record = KeyRecord(**spec.model_dump(), id=key_id, secret_sha256=digest(secret), created_at=int(time.time()))
        # Listed first: an id without a record is not shown, a record that is not listed could not be found and revoked.
        await self._store.run("SADD", layout.API_KEYS, key_id)
        await self._store.run(*_CREATE.call([layout.api_key(key_id)], [record.model_dump_json()]))
        await self._announce()
        return record, key

    async def find(self, key_id: str) -> KeyRecord | None:
        """Return the record, or None."""
        text = await self._store.run("GET", layout.api_key(key_id))
        return KeyRecord.model_validate_json(text) if text else None

    async def get(self, key_id: str) -> KeyRecord:
        """Return the record. Raises NotFound."""
        return (await self._read(key_id))[1]

    async def list(self) -> list[KeyRecord]:
        """Return all records, oldest first."""
        ids = list(await self._store.run("SMEMBERS", layout.API_KEYS))
        texts: list[str | None] = []
        for start in range(0, len(ids), _LISTED_AT_ONCE):
            part = ids[start : start + _LISTED_AT_ONCE]
            texts += await self._store.run_in_order([("GET", layout.api_key(key_id)) for key_id in part])
        records = [KeyRecord.model_validate_json(text) for text in texts if text]
        return sorted(records, key=lambda record: (record.created_at, record.id))

    async def rotate(self, key_id: str) -> tuple[KeyRecord, str]:
        """Give a key a new secret. The old one is invalid at once.

        Raises NotFound, and Conflict for a key that is revoked, has expired, or is changed at the same time: a second
        rotation must not invalidate the secret that the first one has just returned.
        """
        text, record = await self._read(key_id)
        self._refuse_dead(record)
        key = make_key(key_id)
        changed = record.model_copy(update={"secret_sha256": digest(split_key(key)[1]), "rotated_at": int(time.time())})
        if not await self._replace(text, changed):
            self._refuse_dead((await self._read(key_id))[1])
            message = f"The API key {key_id!r} was changed at the same time. Look at it before you rotate it again."
            raise Conflict(message, "key_id", "key_changed")
        return changed, key

    async def revoke(self, key_id: str) -> KeyRecord:
        """Revoke a key permanently. Its record and usage stay. Raises NotFound."""
        for _ in range(_ATTEMPTS):
            text, record = await self._read(key_id)
            changed = record.model_copy(update={"revoked_at": record.revoked_at or int(time.time())})
            if await self._replace(text, changed):
                return changed
        raise Conflict(f"The API key {key_id!r} is being changed all the time. Try again.", "key_id", "key_changed")

    async def _read(self, key_id: str) -> tuple[str, KeyRecord]:
        """Return the record as it is stored, and as it reads. Raises NotFound."""
        text = await self._store.run("GET", layout.api_key(key_id))
        if not text:
            raise NotFound(f"There is no API key with the id {key_id[:64]!r}.", "key_id")
        return text, KeyRecord.model_validate_json(text)

    async def _replace(self, text: str, record: KeyRecord) -> bool:
        """Write a record in place of the one that was read. Returns False if that is not there any more."""
        changed: int = await self._store.run(
            *_CHANGE.call([layout.api_key(record.id)], [text, record.model_dump_json()])
        )
        if changed:
            await self._announce()
        return bool(changed)

    async def _announce(self) -> None:
        await self._store.run(*_RAISE.call([layout.API_KEYS_VERSION], []))

    @staticmethod
    def _refuse_dead(record: KeyRecord) -> None:
        if record.revoked_at is not None:
            raise Conflict(f"The API key {record.id!r} is revoked. Make another one.", "key_id", "key_revoked")
        if not record.usable(time.time()):
            raise Conflict(f"The API key {record.id!r} has expired. Make another one.", "key_id", "key_expired")
