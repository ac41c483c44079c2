"""Which callers may share cached prompt prefixes in an engine.

vLLM serves a prefix from its cache only under an equal salt. Each tenant has its own, so that no other tenant can time
a request to learn what another tenant has sent (CVE-2025-46570); the configuration may let groups of tenants share one.
Salts come from a secret in the store, so that all gateways in front of one upstream use the same; while the store is
away, from one of this process. Does not handle sharing between models: engines keep their caches apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets

from gateway.errors import StoreUnavailable
from gateway.settings.config import PrefixCacheSettings
from gateway.store import layout
from gateway.store.client import Lane


class CacheSalts:
    """The salts of all tenants."""

    def __init__(self, settings: PrefixCacheSettings, store: Lane) -> None:
        self._store = store
        self._secret = secrets.token_hex(32)
        self.share(settings)

    def share(self, settings: PrefixCacheSettings) -> None:
        """Let the groups of `settings` share, and no other tenants."""
        self._group_of = {tenant: f"group:{group}" for group, tenants in settings.shared.items() for tenant in tenants}

    async def start(self) -> None:
        """Agree on a secret with the other gateways of this store."""
        with contextlib.suppress(StoreUnavailable):
            # Read first: a full store takes no SET, not even of what is there.
            if (secret := await self._store.run("GET", layout.CACHE_SALT)) is None:
                await self._store.run("SET", layout.CACHE_SALT, self._secret, "NX")
                secret = await self._store.run("GET", layout.CACHE_SALT)
            self._secret = secret or self._secret

    def salt_of(self, tenant: str) -> str:
        """Return the salt of a tenant: equal within its group, unguessable from outside."""
        owner = self._group_of.get(tenant, f"tenant:{tenant}")
        return hmac.new(self._secret.encode(), owner.encode(), hashlib.sha256).hexdigest()[:32]
