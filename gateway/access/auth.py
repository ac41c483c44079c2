"""From a request's headers to a Principal.

Keys come from the configuration (own_keys.py) or from the store. Those from the store are cached; a change to any key
voids the cache within half a second, and while the store is away what was seen last stays good for `auth_cache_ttl_s`.
Secrets are compared by hash in constant time and the cache goes by the hash of the whole key. An address that keeps
guessing is made to wait, except for keys that it has used before. Raises InvalidApiKey, RateLimitExceeded and
Unavailable; no message repeats a key.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from starlette.requests import HTTPConnection

from gateway.access.keys import KeyRecord, Keys, digest, split_key
from gateway.access.token_bucket import ByAddress, TokenBucket
from gateway.errors import InvalidApiKey, RateLimitExceeded, StoreUnavailable, Unavailable
from gateway.settings.config import Priority
from gateway.store import layout
from gateway.store.client import Store

MIN_KEY_LENGTH = 20
"""Characters. Shorter keys could be guessed; 20 random URL-safe ones carry 120 bits."""
_WATCH_S = 0.5
_REREAD_S = 60.0
"""Age at which a cached key is read again, in case the announcement of a change was lost."""
_MAX_CACHED_KEYS = 10_000
_MAX_KNOWN = 1024
"""Keys remembered per address. Behind a proxy or a NAT many clients share one."""
_NO_DIGEST = digest("")
_UNCHECKED = "API keys can't be checked at the moment. Try again shortly."
_VOID = "The API key of this work was revoked or has expired before the work was done."
PRIORITIES: dict[Priority, int] = {"high": -1, "normal": 0, "low": 1}
"""Values for engines, lower first."""


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller. `models` are the model ids that the key may use; None means all."""

    key_id: str
    name: str = ""
    tenant: str = "default"
    models: frozenset[str] | None = None
    limits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Model id -> limits in place of the model's own."""
    max_concurrent_requests: int | None = None
    tokens_per_day: int | None = None
    admin: bool = False
    expires_at: int | None = None
    priority: int = 0
    """Priority for engines, lower first."""
    metrics: bool = False
    """May read /metrics, as admin keys may."""

    def may_use(self, model_id: str) -> bool:
        return self.models is None or model_id in self.models


OwnKeys = Mapping[str, tuple[str, Principal]]
"""Keys of this process only: id -> SHA-256 of the secret, and its principal."""


def _principal(record: KeyRecord) -> Principal:
    limits = {model: own.model_dump(exclude_none=True) for model, own in record.limits.items()}
    models = None if record.models is None else frozenset(record.models)
    return Principal(
        record.id,
        record.name,
        record.tenant,
        models,
        limits,
        record.max_concurrent_requests,
        record.tokens_per_day,
        record.admin,
        record.expires_at,
        PRIORITIES[record.priority],
        record.metrics,
    )


@dataclass(frozen=True, slots=True)
class _Cached:
    """A key of the store, and when it was read (time.monotonic())."""

    principal: Principal
    read_at: float


@dataclass(slots=True)
class _Address:
    """Record of a client address: its wrong keys, as a token bucket, and the valid keys that it has used."""

    guesses: TokenBucket
    known: dict[str, None] = field(default_factory=dict)
    """By hash, least recently used first."""

    def note_success(self, fingerprint: str) -> None:
        self.known.pop(fingerprint, None)
        self.known[fingerprint] = None
        if len(self.known) > _MAX_KNOWN:
            del self.known[next(iter(self.known))]

    def note_failure(self, fingerprint: str, least: float) -> None:
        """Count a wrong key. A key that was valid before is treated as a guess from now on."""
        self.known.pop(fingerprint, None)
        self.guesses.take(least)


class Authenticator:
    """The keys this process accepts. `start` watches the store for changes."""

    def __init__(
        self,
        store: Store,
        own: OwnKeys = MappingProxyType({}),
        *,
        cache_ttl_s: float = 300.0,
        failed_per_minute: int = 30,
    ) -> None:
        self._store = store
        self._keys = Keys(store)
        self._cache_ttl_s = cache_ttl_s
        self._failed_per_minute = failed_per_minute
        self.own = own
        self._cache: OrderedDict[str, _Cached] = OrderedDict()
        self._generation = 0
        self._version: str | None = None
        self._confirmed_at = time.monotonic()
        self._addresses = ByAddress[_Address]()
        self._watch: asyncio.Task[None] | None = None

    def accept(self, own: OwnKeys, *, failed_per_minute: int) -> None:
        """Replace the keys of the configuration."""
        self.own = own
        self._failed_per_minute = failed_per_minute

    async def start(self) -> None:
        self._watch = asyncio.create_task(self._watch_version())

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch

    async def _watch_version(self) -> None:
        """Void the cache when any key has changed, on whichever gateway."""
        while True:
            with contextlib.suppress(StoreUnavailable):
                version = await self._store.run("GET", layout.API_KEYS_VERSION)
                if version != self._version:
                    self._version = version
                    self._generation += 1
                    self._cache.clear()
                self._confirmed_at = time.monotonic()
            await asyncio.sleep(_WATCH_S)

    async def authenticate(self, connection: HTTPConnection) -> Principal:
        """Return the caller's Principal."""
        key = _presented_key(connection)
        if not key:
            raise InvalidApiKey(
                "No API key provided. Send it in the Authorization header as 'Bearer sk-shannon-...', or in X-API-Key."
            )
        host = connection.client.host if connection.client else ""
        fingerprint = digest(key)
        address = self._addresses.get(host)
        if address is not None and fingerprint not in address.known:
            self._refuse_guessing(address)
        principal = await self._identify(key, fingerprint)
        if principal is None or (principal.expires_at is not None and time.time() >= principal.expires_at):
            # Bounded, so that no number of failures at once locks the address out for longer than two minutes.
            self._address(host).note_failure(fingerprint, -self._failed_per_minute)
            raise InvalidApiKey("Incorrect API key provided.")
        if address is None:
            address = self._address(host)
        address.note_success(fingerprint)
        return principal

    async def renewed(self, principal: Principal) -> Principal:
        """Return the caller of work that was accepted earlier as it is now. Its secret may have been rotated meanwhile.

        Raises InvalidApiKey if the key was revoked, has expired or is gone, and Unavailable where a new request with
        this key could not be checked either.
        """
        own = self.own.get(principal.key_id)
        if own is not None:
            fresh = own[1]
        else:
            try:
                record = await self._keys.find(principal.key_id)
            except StoreUnavailable:
                fresh = self._last_seen(principal.key_id)
            else:
                if record is None or not record.usable(time.time()):
                    raise InvalidApiKey(_VOID)
                fresh = _principal(record)
        if fresh.expires_at is not None and time.time() >= fresh.expires_at:
            raise InvalidApiKey(_VOID)
        return fresh

    def _last_seen(self, key_id: str) -> Principal:
        """Return a key of the cache while that is good without the store. Raises Unavailable."""
        if time.monotonic() - self._confirmed_at <= self._cache_ttl_s:
            for cached in self._cache.values():
                if cached.principal.key_id == key_id:
                    return cached.principal
        raise Unavailable(_UNCHECKED, code="store_unavailable", retry_after_s=1.0)

    async def _identify(self, key: str, fingerprint: str) -> Principal | None:
        key_id, secret = split_key(key)
        # Compared even when the id is unknown, so that the time taken does not reveal which ids exist.
        expected, own = self.own.get(key_id, (_NO_DIGEST, None))
        if hmac.compare_digest(digest(secret), expected) and own is not None:
            return own
        if time.monotonic() - self._confirmed_at > self._cache_ttl_s:
            self._cache.clear()
        if (cached := self._cache.get(fingerprint)) is None:
            return await self._look_up(key_id, secret, fingerprint)
        self._cache.move_to_end(fingerprint)
        if time.monotonic() - cached.read_at > _REREAD_S:
            with contextlib.suppress(Unavailable):
                return await self._look_up(key_id, secret, fingerprint)
        return cached.principal

    async def _look_up(self, key_id: str, secret: str, fingerprint: str) -> Principal | None:
        generation = self._generation
        try:
            record = await self._keys.find(key_id)
        except StoreUnavailable:
            raise Unavailable(_UNCHECKED, retry_after_s=1.0) from None
        matches = hmac.compare_digest(digest(secret), record.secret_sha256 if record else _NO_DIGEST)
        if record is None or not matches or not record.usable(time.time()):
            self._cache.pop(fingerprint, None)
            return None
        principal = _principal(record)
        # The counter was read before the record, and is raised after a record is written: one that changed while it was
        # read does not enter the cache after the change voided it.
        if generation == self._generation:
            self._cache[fingerprint] = _Cached(principal, time.monotonic())
            if len(self._cache) > _MAX_CACHED_KEYS:
                self._cache.popitem(last=False)
        return principal

    def _refuse_guessing(self, address: _Address) -> None:
        rate = self._failed_per_minute / 60
        if wait_s := address.guesses.wait_s(self._failed_per_minute, rate, time.monotonic()):
            raise RateLimitExceeded("Too many requests with a wrong API key from this address.", retry_after_s=wait_s)

    def _address(self, host: str) -> _Address:
        """The record of an address, evicting the least recently seen one when full."""
        return self._addresses.seen(host, _Address(TokenBucket(self._failed_per_minute, time.monotonic())))


def _presented_key(connection: HTTPConnection) -> str:
    scheme, _, value = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return connection.headers.get("x-api-key", "").strip()
