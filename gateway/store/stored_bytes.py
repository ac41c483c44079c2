"""How many bytes each API key keeps in the store, and what goes when it is too much.

An account is kept per key and kind. Values lie in other cluster slots than the account, so it is brought up to date
right after they are written: a gateway that dies in between leaves one value uncounted until that is used again or
expires. Raises StoreUnavailable.
"""

from __future__ import annotations

from gateway.store import layout
from gateway.store.client import Command, Lane, Script

MEMBER_BYTES = 1024
"""What the store needs for a member besides its values: names, expiries, hash tables. Measured on Valkey 8, where a
session of one word takes 0.8 KiB with its part of the account."""
_CHARGE = Script("stored_charge")
_NOTE = Script("stored_charge", when_full=True)
"""For calls that store nothing more: renewals, and sizes of values that are already stored."""
_RELEASE = Script("stored_release", when_full=True)


class StoredBytes:
    """The accounts of all keys for one kind of values."""

    def __init__(self, store: Lane, kind: str, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._store = store
        self._kind = kind

    async def charge(self, key_id: str, member: str, size_bytes: int, ttl_s: float) -> bool:
        """Set the size of a member. Returns False if the key has no room for it."""
        granted, _ = await self._charge(key_id, member, size_bytes + MEMBER_BYTES, ttl_s, "refuse")
        return granted

    async def add(self, key_id: str, member: str, size_bytes: int, ttl_s: float) -> bool:
        """Add to the size of a member. Returns False if the key has no room for it."""
        granted, _ = await self._charge(key_id, member, f"{size_bytes:+d}", ttl_s, "refuse")
        return granted

    async def take(self, key_id: str, member: str, size_bytes: int, ttl_s: float) -> None:
        """Take from the size of a member, in a full store as well."""
        arguments = [member, f"{-size_bytes:+d}", round(ttl_s * 1000), self.most_bytes, "note"]
        await self._store.run(*_NOTE.call(layout.stored_bytes(key_id, self._kind), arguments))

    async def note(self, key_id: str, member: str, size_bytes: int, ttl_s: float) -> None:
        """Set the size of a member to that of what is stored of it, in a full store as well."""
        arguments = [member, size_bytes + MEMBER_BYTES, round(ttl_s * 1000), self.most_bytes, "note"]
        await self._store.run(*_NOTE.call(layout.stored_bytes(key_id, self._kind), arguments))

    async def _charge(
        self, key_id: str, member: str, size_bytes: int | str, ttl_s: float, how: str
    ) -> tuple[bool, list[str]]:
        arguments = [member, size_bytes, round(ttl_s * 1000), self.most_bytes, how]
        granted, _, leaving = await self._store.run(*_CHARGE.call(layout.stored_bytes(key_id, self._kind), arguments))
        return bool(granted), leaving

    def renewal(self, key_id: str, member: str, ttl_s: float) -> Command:
        """Return the command that renews the expiry of a member, if the account has it."""
        return _NOTE.call(
            layout.stored_bytes(key_id, self._kind), [member, "", round(ttl_s * 1000), self.most_bytes, "refuse"]
        )

    async def release(self, key_id: str, member: str, expiry: str = "") -> None:
        """Take a member out of the account; with `expiry`, only if it was not renewed since it had that one."""
        await self._store.run(*_RELEASE.call(layout.stored_bytes(key_id, self._kind), [member, expiry]))

    async def total(self, key_id: str) -> int:
        """Return the bytes that a key keeps."""
        return int(await self._store.run("HGET", layout.stored_bytes(key_id, self._kind)[1], "") or 0)
