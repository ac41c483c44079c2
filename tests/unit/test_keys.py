"""Keys in the store: what a record keeps, when it is usable, and that every change is announced."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pydantic import ValidationError
from starlette.requests import HTTPConnection

from gateway.auth import Authenticator
from gateway.config import StoreSettings
from gateway.errors import InvalidApiKey, NotFound, RateLimitExceeded, StoreUnavailable, Unavailable
from gateway.keys import VERSION_KEY, KeyLimits, KeyRecord, Keys, KeySpec, digest, split_key
from gateway.metrics import Metrics
from gateway.store import Store

pytestmark = pytest.mark.anyio


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    store = Store(StoreSettings(command_timeout_ms=2000), {"SHANNON_REDIS_URL": store_url}, Metrics())
    await store.start()
    yield store
    await store.close()


@pytest.fixture
def keys(store: Store) -> Keys:
    return Keys(store)


def sending(key: str, host: str = "203.0.113.7") -> HTTPConnection:
    return HTTPConnection({"type": "http", "headers": [(b"x-api-key", key.encode())], "client": (host, 50_000)})


async def test_record_keeps_everything_but_the_secret(keys: Keys) -> None:
    spec = KeySpec(
        name="ci",
        tenant="acme",
        models=["shannon-chat"],
        limits={"shannon-chat": KeyLimits(requests_per_minute=5)},
        max_concurrent_requests=3,
        tokens_per_day=1000,
        admin=True,
        expires_at=2_000_000_000,
    )
    record, key = await keys.create(spec)
    found = await keys.get(record.id)

    assert found == record
    assert found.model_dump(include=set(KeySpec.model_fields)) == spec.model_dump()
    assert found.secret_sha256 == digest(split_key(key)[1])
    assert split_key(key)[1] not in found.model_dump_json()
    assert "secret_sha256" not in found.public()


async def test_every_change_raises_the_version(store: Store, keys: Keys) -> None:
    versions = [await store.run("GET", VERSION_KEY)]
    record, _ = await keys.create(KeySpec(name="ci"))
    versions.append(await store.run("GET", VERSION_KEY))
    await keys.rotate(record.id)
    versions.append(await store.run("GET", VERSION_KEY))
    await keys.revoke(record.id)
    versions.append(await store.run("GET", VERSION_KEY))

    assert versions == [None, "1", "2", "3"]


async def test_list_is_oldest_first(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for second in (300, 100, 200):
        monkeypatch.setattr(time, "time", lambda now=second: now)
        ids.append((await keys.create(KeySpec(name=str(second))))[0].id)

    assert [record.name for record in await keys.list()] == ["100", "200", "300"]


async def test_rotation_changes_the_secret_alone(keys: Keys) -> None:
    record, key = await keys.create(KeySpec(name="ci", tenant="acme"))
    rotated, fresh = await keys.rotate(record.id)

    assert split_key(fresh)[0] == record.id
    assert split_key(fresh)[1] != split_key(key)[1]
    assert rotated.rotated_at is not None
    assert rotated.model_copy(update={"secret_sha256": record.secret_sha256, "rotated_at": None}) == record


@pytest.mark.parametrize("change", ["get", "rotate", "revoke"])
async def test_unknown_id_is_not_found(keys: Keys, change: str) -> None:
    with pytest.raises(NotFound, match="UnknownKey01"):
        await getattr(keys, change)("UnknownKey01")


async def test_keys_are_not_changed_on_a_guess_while_the_store_is_away(tmp_path: Path) -> None:
    store = Store(StoreSettings(), {"SHANNON_REDIS_URL": f"unix://{tmp_path}/none.sock"}, Metrics())
    with pytest.raises(StoreUnavailable):
        await Keys(store).create(KeySpec(name="ci"))
    await store.close()


@pytest.mark.parametrize(
    ("expires_at", "revoked_at", "usable"),
    [(None, None, True), (101, None, True), (100, None, False), (99, None, False), (None, 50, False), (101, 50, False)],
)
def test_record_is_usable_until_it_expires_or_is_revoked(
    expires_at: int | None, revoked_at: int | None, usable: bool
) -> None:
    record = KeyRecord(
        name="ci", id="TestKey00001", secret_sha256="", created_at=0, expires_at=expires_at, revoked_at=revoked_at
    )

    assert record.usable(100.0) is usable


@pytest.mark.parametrize(
    "fields",
    [{"name": ""}, {"name": "x", "tenant": "a/b"}, {"name": "x", "tenant": ""}, {"name": "x", "tokens_per_day": 0}],
)
def test_bad_spec_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        KeySpec.model_validate(fields)


async def test_principal_carries_what_the_record_says(store: Store, keys: Keys) -> None:
    spec = KeySpec(
        name="ci",
        tenant="acme",
        models=["a"],
        limits={"a": KeyLimits(tokens_per_minute=9)},
        max_concurrent_requests=2,
        tokens_per_day=5,
        admin=True,
        expires_at=4_000_000_000,
    )
    record, key = await keys.create(spec)
    principal = await Authenticator(store).authenticate(sending(key))

    assert (principal.key_id, principal.name, principal.tenant) == (record.id, "ci", "acme")
    assert (principal.models, principal.limits) == (frozenset({"a"}), {"a": {"tokens_per_minute": 9}})
    assert (principal.max_concurrent_requests, principal.tokens_per_day) == (2, 5)
    assert (principal.admin, principal.expires_at) == (True, 4_000_000_000)


@pytest.mark.parametrize("wrong", ["{}x", "sk-shannon-{id}-" + "A" * 43])
async def test_right_id_with_a_wrong_secret_is_refused(store: Store, keys: Keys, wrong: str) -> None:
    record, key = await keys.create(KeySpec(name="ci"))
    authenticator = Authenticator(store)
    await authenticator.authenticate(sending(key))  # cached now
    with pytest.raises(InvalidApiKey):
        await authenticator.authenticate(sending(wrong.format(key, id=record.id)))


async def test_cached_key_needs_no_store(store: Store, keys: Keys) -> None:
    _, key = await keys.create(KeySpec(name="ci"))
    _, unseen = await keys.create(KeySpec(name="other"))
    authenticator = Authenticator(store)
    await authenticator.authenticate(sending(key))
    store.available = False

    assert (await authenticator.authenticate(sending(key))).name == "ci"
    with pytest.raises(Unavailable):
        await authenticator.authenticate(sending(unseen))
    store.available = True


async def test_cached_key_is_good_for_its_time_to_live_only(
    store: Store, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = await keys.create(KeySpec(name="ci"))
    authenticator = Authenticator(store, cache_ttl_s=300)
    await authenticator.authenticate(sending(key))
    store.available = False
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 299)
    await authenticator.authenticate(sending(key))
    monkeypatch.setattr(time, "monotonic", lambda: now + 301)
    with pytest.raises(Unavailable):
        await authenticator.authenticate(sending(key))
    store.available = True


async def test_guesses_of_one_address_do_not_slow_another(store: Store, keys: Keys) -> None:
    _, key = await keys.create(KeySpec(name="ci"))
    authenticator = Authenticator(store, failed_per_minute=2)
    for _ in range(2):
        with pytest.raises(InvalidApiKey):
            await authenticator.authenticate(sending("wrong-wrong-wrong-wrong"))
    with pytest.raises(RateLimitExceeded):
        await authenticator.authenticate(sending(key))

    await authenticator.authenticate(sending(key, host="203.0.113.8"))


async def test_address_that_waits_as_told_may_try_again(
    store: Store, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = await keys.create(KeySpec(name="ci"))
    authenticator = Authenticator(store, failed_per_minute=2)
    for _ in range(2):
        with pytest.raises(InvalidApiKey):
            await authenticator.authenticate(sending("wrong-wrong-wrong-wrong"))
    with pytest.raises(RateLimitExceeded) as caught:
        await authenticator.authenticate(sending(key))
    assert caught.value.retry_after_s == pytest.approx(30, abs=1)
    now = time.monotonic() + 30.001
    monkeypatch.setattr(time, "monotonic", lambda: now)

    await authenticator.authenticate(sending(key))
