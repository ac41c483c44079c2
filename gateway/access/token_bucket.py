"""Token buckets by client address: how often an address may do something that asks for no API key, or a wrong one.

In this process alone: several gateways allow as many times more.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

_MAX_ADDRESSES = 10_000


@dataclass(slots=True)
class TokenBucket:
    """Tokens that are taken one at a time, and come back at a rate per second."""

    tokens: float
    filled_at: float

    def wait_s(self, size: float, per_second: float, now: float) -> float:
        """Refill up to `size`. Returns the seconds until there is a token, 0 if there is one."""
        gained = max(0.0, now - self.filled_at) * per_second  # clocks may be set back
        self.tokens = min(size, self.tokens + gained)
        self.filled_at = now
        return 0.0 if self.tokens >= 1 else (1 - self.tokens) / per_second

    def take(self, least: float = 0.0) -> None:
        """Take a token. The bucket may be overdrawn down to `least`."""
        self.tokens = max(least, self.tokens - 1)


T = TypeVar("T")


class ByAddress(OrderedDict[str, T], Generic[T]):
    """Records by address. Of very many addresses, those not seen for longest are forgotten."""

    def seen(self, address: str, new: T) -> T:
        """The record of an address, which is `new` for an unknown one."""
        record = self.setdefault(address, new)
        self.move_to_end(address)
        if len(self) > _MAX_ADDRESSES:
            self.popitem(last=False)
        return record
