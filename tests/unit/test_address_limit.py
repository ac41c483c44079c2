"""Requests per minute of an address: a burst at once, then no faster than the rate."""

from __future__ import annotations

import pytest

from gateway.access.address_limit import AddressLimit
from gateway.errors import RateLimitExceeded
from tests.support.waiting import FakeClock


def test_burst_passes_and_then_the_rate() -> None:
    clock = FakeClock(100.0)
    limit = AddressLimit(per_minute=10, burst=3, clock=clock)
    for _ in range(3):
        limit.take("10.0.0.1")
    with pytest.raises(RateLimitExceeded) as caught:
        limit.take("10.0.0.1")

    assert caught.value.code == "rate_limited"
    assert caught.value.retry_after_s == pytest.approx(6.0)
    clock.advance(5.9)
    with pytest.raises(RateLimitExceeded):
        limit.take("10.0.0.1")
    clock.advance(0.2)
    limit.take("10.0.0.1")


def test_addresses_do_not_share() -> None:
    limit = AddressLimit(per_minute=1, burst=1, clock=FakeClock())
    limit.take("10.0.0.1")
    limit.take("10.0.0.2")
    with pytest.raises(RateLimitExceeded):
        limit.take("10.0.0.1")


def test_long_pause_gives_no_more_than_the_burst() -> None:
    clock = FakeClock()
    limit = AddressLimit(per_minute=60, burst=2, clock=clock)
    limit.take("a")
    clock.advance(3600)
    limit.take("a")
    limit.take("a")
    with pytest.raises(RateLimitExceeded):
        limit.take("a")


def test_clock_that_is_set_back_takes_nothing_away() -> None:
    clock = FakeClock(1000.0)
    limit = AddressLimit(per_minute=60, burst=2, clock=clock)
    limit.take("a")
    clock.advance(-500)
    limit.take("a")
    clock.advance(1.1)
    limit.take("a")


def test_crowd_of_addresses_takes_bounded_memory() -> None:
    limit = AddressLimit(per_minute=1, burst=1, clock=FakeClock())
    limit.take("first")
    for number in range(10_000):
        limit.take(f"{number}")

    limit.take("first")  # forgotten meanwhile
    assert len(limit._buckets) == 10_000
