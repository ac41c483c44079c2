"""Keys in the store: what a record keeps, when it is usable, and that every change is announced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.access.auth import Authenticator
from gateway.access.keys import _CHANGE, _RAISE, KeyLimits, KeyRecord, Keys, KeySpec, digest, split_key
from gateway.errors import Conflict, InvalidApiKey, NotFound, RateLimitExceeded, StoreUnavailable, Unavailable
from gateway.settings.config import StoreSettings
from gateway.store import layout
from gateway.store.client import Script, Store
from gateway.telemetry.metrics import Metrics
from tests.support.key_requests import sending

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
    versions = [await store.run("GET", layout.API_KEYS_VERSION)]
    record, _ = await keys.create(KeySpec(name="ci"))
    versions.append(await store.run("GET", layout.API_KEYS_VERSION))
    await keys.rotate(record.id)
    versions.append(await store.run("GET", layout.API_KEYS_VERSION))
    await keys.revoke(record.id)
    versions.append(await store.run("GET", layout.API_KEYS_VERSION))

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


class Interleaved(Keys):
    """Lets something happen between the reading of a record and its replacement."""

    def __init__(self, store: Store, *meanwhile: Callable[[], Awaitable[Any]]) -> None:
        super().__init__(store)
        self._meanwhile = list(meanwhile)

    async def _read(self, key_id: str) -> tuple[str, KeyRecord]:
        found = await super()._read(key_id)
        if self._meanwhile:
            await self._meanwhile.pop(0)()
        return found


async def test_key_that_is_revoked_while_it_is_rotated_stays_revoked(store: Store, keys: Keys) -> None:
    record, _ = await keys.create(KeySpec(name="ci"))
    with pytest.raises(Conflict) as caught:
        await Interleaved(store, lambda: keys.revoke(record.id)).rotate(record.id)

    assert caught.value.code == "key_revoked"
    assert (await keys.get(record.id)).revoked_at is not None


async def test_key_that_is_rotated_while_it_is_revoked_is_revoked_with_its_new_secret(store: Store, keys: Keys) -> None:
    record, _ = await keys.create(KeySpec(name="ci"))
    rotated: list[str] = []

    async def rotate() -> None:
        rotated.append((await keys.rotate(record.id))[1])

    await Interleaved(store, rotate).revoke(record.id)
    found = await keys.get(record.id)

    assert found.revoked_at is not None
    assert found.secret_sha256 == digest(split_key(rotated[0])[1])
    with pytest.raises(InvalidApiKey):
        await Authenticator(store).authenticate(sending(rotated[0]))


async def test_of_two_rotations_at_once_one_wins_and_its_key_is_good(store: Store, keys: Keys) -> None:
    record, _ = await keys.create(KeySpec(name="ci"))
    won: list[str] = []

    async def rotate() -> None:
        won.append((await keys.rotate(record.id))[1])

    with pytest.raises(Conflict) as caught:
        await Interleaved(store, rotate).rotate(record.id)

    assert caught.value.code == "key_changed"
    assert (await Authenticator(store).authenticate(sending(won[0]))).name == "ci"


@pytest.mark.parametrize("round_", range(5))
async def test_changes_in_a_heap_leave_a_revoked_key(store: Store, keys: Keys, round_: int) -> None:
    record, _ = await keys.create(KeySpec(name="ci"))
    changes = [keys.rotate(record.id) if number % 4 else keys.revoke(record.id) for number in range(12)]
    outcomes = await asyncio.gather(*changes, return_exceptions=True)

    assert all(not isinstance(one, Exception) or isinstance(one, Conflict) for one in outcomes)
    assert (await keys.get(record.id)).revoked_at is not None
    for outcome in outcomes:
        if isinstance(outcome, tuple):
            with pytest.raises(InvalidApiKey):
                await Authenticator(store).authenticate(sending(outcome[1]))


@pytest.mark.parametrize(
    ("fields", "code"), [({"revoked_at": 1}, "key_revoked"), ({"expires_at": 1}, "key_expired")], ids=str
)
async def test_dead_key_is_not_rotated(store: Store, keys: Keys, fields: dict[str, int], code: str) -> None:
    record, _ = await keys.create(KeySpec(name="ci"))
    dead = record.model_copy(update=fields)
    await store.run("SET", f"sh:{{k:{record.id}}}:key", dead.model_dump_json())
    with pytest.raises(Conflict) as caught:
        await keys.rotate(record.id)

    assert caught.value.code == code
    assert not caught.value.should_retry, "a client that tries again by itself would void the key that it got"
    assert await keys.get(record.id) == dead


async def test_revoking_again_announces_it_again(store: Store, keys: Keys) -> None:
    """The first announcement may not have reached the store."""
    record, _ = await keys.create(KeySpec(name="ci"))
    await keys.revoke(record.id)
    before = await store.run("GET", layout.API_KEYS_VERSION)
    await keys.revoke(record.id)

    assert int(await store.run("GET", layout.API_KEYS_VERSION)) == int(before) + 1


async def test_change_is_announced_after_it_is_written(store: Store, keys: Keys) -> None:
    """In a cluster they go to two servers: a gateway that polls between them must find the new record."""
    record, _ = await keys.create(KeySpec(name="ci"))
    seen: list[tuple[Any, bool]] = []
    done = asyncio.Event()

    async def poll() -> None:
        while not done.is_set():
            version = await store.run("GET", layout.API_KEYS_VERSION)
            seen.append((version, (await keys.get(record.id)).revoked_at is not None))

    polling = asyncio.create_task(poll())
    send = store._send
    order: list[Any] = []

    async def watch(commands: list[Any]) -> Any:
        answers = await send(commands)
        order.extend(command[0] for command in commands)
        return answers

    store._send = watch  # type: ignore[method-assign]
    await keys.revoke(record.id)
    done.set()
    await polling

    scripts = [command for command in order if isinstance(command, Script)]
    assert scripts == [_CHANGE, _RAISE]
    before = seen[0][0]
    assert all(revoked for version, revoked in seen if version != before)


async def test_lost_announcement_is_made_up_for_by_reading_again(
    store: Store, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, key = await keys.create(KeySpec(name="ci"))
    authenticator = Authenticator(store)
    await authenticator.authenticate(sending(key))
    dead = record.model_copy(update={"revoked_at": 1})
    await store.run("SET", f"sh:{{k:{record.id}}}:key", dead.model_dump_json())  # and nothing is raised
    assert (await authenticator.authenticate(sending(key))).name == "ci"
    now = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: now)
    authenticator._confirmed_at = now
    with pytest.raises(InvalidApiKey):
        await authenticator.authenticate(sending(key))


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
    store._breaker.open()

    assert (await authenticator.authenticate(sending(key))).name == "ci"
    with pytest.raises(Unavailable):
        await authenticator.authenticate(sending(unseen))
    store._breaker.succeed()


async def test_cached_key_is_good_for_its_time_to_live_only(
    store: Store, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = await keys.create(KeySpec(name="ci"))
    authenticator = Authenticator(store, cache_ttl_s=300)
    await authenticator.authenticate(sending(key))
    store._breaker.open()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 299)
    await authenticator.authenticate(sending(key))
    monkeypatch.setattr(time, "monotonic", lambda: now + 301)
    with pytest.raises(Unavailable):
        await authenticator.authenticate(sending(key))
    store._breaker.succeed()


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
