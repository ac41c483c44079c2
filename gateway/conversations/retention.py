"""Sessions and stored responses of each API key, held to a number of bytes together: the oldest go to make room.

A member of a key's account is `s:<session id>` or `r:<response id>`. Raises StoreUnavailable.
"""

from __future__ import annotations

from gateway.store import layout
from gateway.store.client import Lane, Script
from gateway.store.stored_bytes import MEMBER_BYTES, StoredBytes

_EVICT = Script("kept_evict")


class Retention(StoredBytes):
    """The accounts of all keys."""

    def __init__(self, store: Lane, most_bytes: int) -> None:
        super().__init__(store, "kept", most_bytes)

    async def keep(self, key_id: str, member: str, size_bytes: int, ttl_s: float) -> None:
        """Set the size of a member, and remove as many of those that were not used for longest as must go."""
        leaving = ["-"]
        while leaving:
            _, leaving = await self._charge(key_id, member, size_bytes + MEMBER_BYTES, ttl_s, "evict")
            for other, expiry in zip(leaving[::2], leaving[1::2], strict=True):
                await self._store.run(*_EVICT.call(_keys_of(other), [key_id]))
                await self.release(key_id, other, expiry)
        if await self._store.run("HGET", _keys_of(member)[0], "payer") != key_id:
            await self.release(key_id, member)  # it was deleted before it was counted


def _keys_of(member: str) -> list[str]:
    """Return the store's keys of a member, first the hash that names the API key that pays."""
    kind, _, id_ = member.partition(":")
    if kind == "s":
        return layout.session(id_)
    response, state, *rest = layout.response(id_)
    return [state, response, *rest]
