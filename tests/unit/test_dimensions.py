"""Limits per minute are a list of dimensions: whatever it names is limited by the store, and by a process alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.mock import MockEngine
from gateway.access import limits as limits_module
from gateway.access.allowance import DIMENSIONS, Allowance, Amounts
from gateway.access.auth import Principal
from gateway.access.catalog import ModelSpec
from gateway.access.keys import KeyLimits
from gateway.access.ledger import Entry, Ledger
from gateway.access.limits import Limits, Reservation
from gateway.errors import BadRequest, RateLimitExceeded
from gateway.settings.config import LimiterSettings, LimitSettings, ModelSettings, StoreSettings
from gateway.store.client import Store
from gateway.telemetry.metrics import Metrics
from tests.support.store_server import StoreServer
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

CALLER = Principal("TestKey00001")
MODEL = ModelSpec("m", ModelSettings(description="m"), MockEngine())
WINDOW = "sh:{k:TestKey00001}:w:m"
OPEN = "sh:{k:TestKey00001}:open"
ALLOWANCE = Allowance((("requests", 60), ("tokens", 1000), ("images", 5)))


@pytest.fixture(autouse=True)
def images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit images per minute as well."""
    monkeypatch.setattr(limits_module, "allowance_of", lambda principal, model: ALLOWANCE)
    monkeypatch.setitem(limits_module._NAMES, "i", "images")
    monkeypatch.setitem(limits_module._WORDS, "images", "images per minute")


@pytest.fixture
async def store(store_url: str, store_server: StoreServer) -> AsyncIterator[Store]:
    opened = Store(StoreSettings(command_timeout_ms=2000), {"SHANNON_REDIS_URL": store_url}, Metrics())
    await opened.start()
    yield opened
    await opened.close()


def wanted(images: int) -> Amounts:
    return {"requests": 1, "tokens": 100, "images": images}


def entry(reservation: Reservation, counted: Amounts) -> Entry:
    fields = {"bucket": reservation.bucket, "reservation": reservation.id, "second": reservation.second}
    amounts = {"reserved": reservation.amounts, "counted": counted}
    return Entry(key_id=CALLER.key_id, model_id="m", allowance=ALLOWANCE, requests=1, **fields, **amounts)  # type: ignore[arg-type]


def test_dimensions_are_the_settings_per_minute() -> None:
    assert DIMENSIONS == ("requests", "tokens")
    assert len({name[0] for name in DIMENSIONS}) == len(DIMENSIONS), "the store knows them by the first letter"


def test_key_can_have_every_limit_that_a_model_has() -> None:
    assert KeyLimits.model_fields.keys() == LimitSettings.model_fields.keys()


async def test_dimension_without_a_limit_is_not_counted(store: Store, store_server: StoreServer) -> None:
    limits = Limits(LimiterSettings(), store, store.metrics)
    await limits.reserve(CALLER, MODEL, "r1", wanted(2) | {"videos": 9})
    with store_server.client() as raw:
        assert {field[0] for field in raw.hkeys(WINDOW)} == {"r", "t", "i"}


async def test_dimension_is_limited_settled_and_shown(store: Store, tmp_path: Path, store_server: StoreServer) -> None:
    limits, ledger = Limits(LimiterSettings(), store, store.metrics), Ledger(store, tmp_path)
    reservation = await limits.reserve(CALLER, MODEL, "r1", wanted(3))
    with pytest.raises(RateLimitExceeded, match="images per minute"):
        await limits.reserve(CALLER, MODEL, "r2", wanted(3))
    await ledger.settle(entry(reservation, {"requests": 1, "tokens": 40, "images": 1}))
    standing = await limits.peek(CALLER, MODEL)
    await ledger.close()

    assert standing is not None
    assert standing.remaining == {"requests": 59, "tokens": 960, "images": 4}
    assert standing.headers()["X-RateLimit-Remaining-Images"] == "4"


async def test_amount_that_could_never_fit_is_refused(store: Store) -> None:
    limits = Limits(LimiterSettings(), store, store.metrics)
    with pytest.raises(BadRequest, match="needs 6 images, but the API key's limit for 'm' is 5") as error:
        await limits.reserve(CALLER, MODEL, "r1", wanted(6))
    assert error.value.code == "images_exceed_limit"


async def test_dimension_is_limited_while_the_store_is_away() -> None:
    away = Store(StoreSettings(breaker_s=60), {"SHANNON_REDIS_URL": "redis://127.0.0.1:1"}, Metrics())
    limits = Limits(LimiterSettings(), away, away.metrics)
    reservation = await limits.reserve(CALLER, MODEL, "r1", wanted(3))
    assert reservation.standing.remaining["images"] == 2
    with pytest.raises(RateLimitExceeded, match="images per minute"):
        await limits.reserve(CALLER, MODEL, "r2", wanted(3))
    await limits.reserve(CALLER, MODEL, "r2", wanted(2))


async def test_reservations_are_reported_with_every_dimension(store: Store, store_server: StoreServer) -> None:
    limits = Limits(LimiterSettings(), store, store.metrics)
    await limits.reserve(CALLER, MODEL, "r1", wanted(3))
    with store_server.client() as raw:
        raw.flushall()
        limits._leases._report_all()
        await until(lambda: not limits._leases._renewals)
        standing = await limits.peek(CALLER, MODEL)
    limits.close()

    assert standing is not None
    assert standing.remaining == {"requests": 59, "tokens": 900, "images": 2}


async def test_reservation_of_an_older_gateway_is_settled(
    store: Store, tmp_path: Path, store_server: StoreServer
) -> None:
    limits, ledger = Limits(LimiterSettings(), store, store.metrics), Ledger(store, tmp_path)
    reservation = await limits.reserve(CALLER, MODEL, "r1", wanted(0))
    with store_server.client() as raw:
        raw.hset(OPEN, reservation.id, f"{reservation.second} 100 1")
        await ledger.settle(entry(reservation, {"requests": 1, "tokens": 40}))
        assert not raw.hexists(OPEN, reservation.id)
    standing = await limits.peek(CALLER, MODEL)
    await ledger.close()

    assert standing is not None
    assert standing.remaining == {"requests": 59, "tokens": 960, "images": 5}
