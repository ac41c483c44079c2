"""Requests per minute of each client address, for routes that ask for no key. Raises RateLimitExceeded."""

from __future__ import annotations

from gateway.access.token_bucket import ByAddress, TokenBucket
from gateway.clock import Clock
from gateway.errors import RateLimitExceeded


class AddressLimit:
    """One token bucket per address, with `burst` requests at most and `per_minute` new ones."""

    def __init__(self, per_minute: int, burst: int, clock: Clock) -> None:
        self._rate = per_minute / 60
        self._burst = burst
        self._clock = clock
        self._buckets = ByAddress[TokenBucket]()

    def take(self, address: str) -> None:
        """Take one request from an address's bucket. Raises RateLimitExceeded."""
        now = self._clock()
        bucket = self._buckets.seen(address, TokenBucket(self._burst, now))
        if wait_s := bucket.wait_s(self._burst, self._rate, now):
            raise RateLimitExceeded(
                f"Too many requests from this address. Try again in {wait_s:.1f} s.",
                code="rate_limited",
                retry_after_s=wait_s,
            )
        bucket.take()
