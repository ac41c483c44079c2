"""Requests per minute of each client address, for routes that ask for no key.

A token bucket per address, in this process alone: several gateways allow as many times more. Of very many addresses
those not heard of for longest are forgotten. Fails with RateLimitExceeded.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from gateway.clock import Clock
from gateway.errors import RateLimitExceeded

_MAX_ADDRESSES = 10_000


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_at: float


class AddressLimit:
    """The buckets. Each holds `burst` requests at most and gains `per_minute`."""

    def __init__(self, per_minute: int, burst: int, clock: Clock) -> None:
        self._rate = per_minute / 60
        self._burst = burst
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, address: str) -> None:
        """Take one request from an address's bucket. Raises RateLimitExceeded."""
        now = self._clock()
        bucket = self._buckets.setdefault(address, _Bucket(self._burst, now))
        self._buckets.move_to_end(address)
        if len(self._buckets) > _MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        gained = max(0.0, now - bucket.filled_at) * self._rate  # clocks are set back at times
        bucket.tokens = min(self._burst, bucket.tokens + gained)
        bucket.filled_at = now
        if bucket.tokens < 1:
            wait_s = (1 - bucket.tokens) / self._rate
            raise RateLimitExceeded(
                f"Too many requests from this address. Try again in {wait_s:.1f} s.",
                code="rate_limited",
                retry_after_s=wait_s,
            )
        bucket.tokens -= 1
