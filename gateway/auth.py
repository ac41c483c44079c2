"""API keys: from a request's headers to a Principal.

A key is `sk-shannon-<id>-<secret>`, id of 12 and secret of 43 URL-safe characters. The id is public and may be
logged; of the secret only the SHA-256 is kept, and comparison takes constant time. A key of another form (a bootstrap
key chosen by hand) gets an id from its hash. Fails with InvalidApiKey, whose message never repeats the key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from gateway.errors import InvalidApiKey

MIN_KEY_LENGTH = 20
"""Characters. Shorter keys could be guessed; 20 random URL-safe ones carry 120 bits."""

_KEY = re.compile(r"sk-shannon-([A-Za-z0-9_-]{12})-([A-Za-z0-9_-]{43})")
_UNKNOWN = hashlib.sha256(b"").digest()


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling. `models` limits the model ids the key may use; None means all."""

    key_id: str
    name: str = ""
    tenant: str = "default"
    models: frozenset[str] | None = None

    def may_use(self, model_id: str) -> bool:
        return self.models is None or model_id in self.models


def new_key() -> str:
    """Return a fresh random key. The id keeps clear of `-`, which separates the parts."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    key_id = "".join(secrets.choice(alphabet) for _ in range(12))
    return f"sk-shannon-{key_id}-{secrets.token_urlsafe(32)}"


def split_key(key: str) -> tuple[str, str]:
    """Return (id, secret) of a key."""
    match = _KEY.fullmatch(key)
    if match:
        return match[1], match[2]
    return hashlib.sha256(key.encode()).hexdigest()[:12], key


class Keyring:
    """The keys this process knows."""

    def __init__(self) -> None:
        self._by_id: dict[str, tuple[bytes, Principal]] = {}

    def add(self, key: str, *, name: str, tenant: str = "default", models: frozenset[str] | None = None) -> Principal:
        """Register a key. Raises ValueError when it is too short to be safe."""
        if len(key) < MIN_KEY_LENGTH:
            raise ValueError(f"the key {name!r} must have at least {MIN_KEY_LENGTH} characters")
        key_id, secret = split_key(key)
        principal = Principal(key_id, name, tenant, models)
        self._by_id[key_id] = (hashlib.sha256(secret.encode()).digest(), principal)
        return principal

    def authenticate(self, connection: HTTPConnection) -> Principal:
        """Return the caller's Principal. Raises InvalidApiKey."""
        key = _presented_key(connection)
        if not key:
            raise InvalidApiKey(
                "No API key provided. Send it in the Authorization header as 'Bearer sk-shannon-...', or in X-API-Key."
            )
        key_id, secret = split_key(key)
        expected, principal = self._by_id.get(key_id, (_UNKNOWN, None))
        # Compared even when the id is unknown, so that the time taken does not tell which ids exist.
        matches = hmac.compare_digest(hashlib.sha256(secret.encode()).digest(), expected)
        if principal is None or not matches:
            raise InvalidApiKey("Incorrect API key provided.")
        return principal


def _presented_key(connection: HTTPConnection) -> str:
    scheme, _, value = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return connection.headers.get("x-api-key", "").strip()
