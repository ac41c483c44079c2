"""Keys: their form, what is kept of them, and who is let in."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from gateway.access.auth import MIN_KEY_LENGTH, Authenticator
from gateway.access.keys import Keys, KeySpec, digest, make_key, split_key
from gateway.components import build_authenticator, build_store
from gateway.errors import InvalidApiKey
from gateway.settings.config import Config, ConfigError, parse_config
from gateway.store.client import Store
from tests.support.app import KEY, KEY_ID, SECRET

pytestmark = pytest.mark.anyio

BY_HAND = "correct-horse-battery-staple"
VARIABLES = {"CI_KEY": KEY, "SHANNON_BOOTSTRAP_KEY": BY_HAND}


def request_with(**headers: str | bytes) -> HTTPConnection:
    """Return a connection that sends `headers`; underscores in their names stand for dashes."""
    raw = [
        (name.replace("_", "-").encode(), value if isinstance(value, bytes) else value.encode("latin-1"))
        for name, value in headers.items()
    ]
    return HTTPConnection({"type": "http", "headers": raw, "client": ("203.0.113.7", 50_000)})


def config(*keys: dict[str, Any], **store: Any) -> Config:
    return parse_config(
        {
            "engines": {"main": {"kind": "mock"}},
            "models": {"shannon-chat": {"description": "General chat completion"}},
            "keys": list(keys),
            "store": store,
        }
    )


@pytest.fixture
async def store(store_url: str, tmp_path: Path) -> AsyncIterator[Store]:
    """A store without keys."""
    store = build_store(config(data_dir=str(tmp_path), command_timeout_ms=2000), {"SHANNON_REDIS_URL": store_url})
    await store.start()
    yield store
    await store.close()


@pytest.fixture
async def authenticator(store: Store) -> Authenticator:
    """Accepts KEY for one model, and a bootstrap key chosen by hand for all."""
    settings = config({"name": "ci", "key_env": "CI_KEY", "tenant": "acme", "models": ["shannon-chat"]})
    return build_authenticator(settings, store, VARIABLES)


def test_new_key_has_the_documented_form() -> None:
    assert re.fullmatch(r"sk-shannon-[A-Za-z0-9]{12}-[A-Za-z0-9_-]{43}", make_key())


def test_new_keys_differ_in_id_and_secret() -> None:
    parts = [split_key(make_key()) for _ in range(100)]

    assert len({key_id for key_id, _ in parts}) == len({secret for _, secret in parts}) == 100


def test_new_secret_may_keep_the_id() -> None:
    assert split_key(make_key(KEY_ID))[0] == KEY_ID


def test_split_key_returns_id_and_secret() -> None:
    assert split_key(KEY) == (KEY_ID, SECRET)


def test_split_key_derives_the_id_of_a_key_chosen_by_hand_from_its_hash() -> None:
    assert split_key(BY_HAND) == (hashlib.sha256(BY_HAND.encode()).hexdigest()[:12], BY_HAND)


@given(st.text(st.characters(codec="latin-1"), min_size=MIN_KEY_LENGTH))
def test_id_never_equals_nor_shows_the_secret(key: str) -> None:
    key_id, secret = split_key(key)

    assert key_id != secret
    assert key_id not in secret
    assert secret not in key_id


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer {KEY}"},
        {"authorization": f"Bearer   {KEY} "},
        {"x_api_key": KEY},
        {"authorization": "Basic dXNlcjpwYXNz", "x_api_key": KEY},
        {"authorization": "Bearer ", "x_api_key": KEY},
    ],
)
async def test_key_is_taken_from_either_header(authenticator: Authenticator, headers: dict[str, str]) -> None:
    principal = await authenticator.authenticate(request_with(**headers))

    assert (principal.key_id, principal.name, principal.tenant) == (KEY_ID, "ci", "acme")
    assert principal.models == frozenset({"shannon-chat"})


async def test_bearer_token_is_preferred_to_x_api_key(authenticator: Authenticator) -> None:
    with pytest.raises(InvalidApiKey):
        await authenticator.authenticate(request_with(authorization="Bearer wrong-key-wrong-key-wrong", x_api_key=KEY))


async def test_bootstrap_key_chosen_by_hand_may_use_every_model(authenticator: Authenticator) -> None:
    principal = await authenticator.authenticate(request_with(x_api_key=BY_HAND))

    assert (principal.name, principal.tenant, principal.models) == ("bootstrap", "default", None)


@pytest.mark.parametrize(
    "key",
    [
        f"sk-shannon-{KEY_ID}-{'A' * 43}",
        f"sk-shannon-{'B' * 12}-{SECRET}",
        KEY[:-1],
        KEY + "x",
        KEY.swapcase(),
        SECRET,
        KEY_ID,
        f"sk-shannon-{KEY_ID}-",
        digest(SECRET),
        digest(KEY),
        BY_HAND.upper(),
        BY_HAND[:-1],
        split_key(BY_HAND)[0],
    ],
)
async def test_wrong_key_is_refused_without_being_repeated(authenticator: Authenticator, key: str) -> None:
    with pytest.raises(InvalidApiKey) as caught:
        await authenticator.authenticate(request_with(authorization=f"Bearer {key}"))

    assert str(caught.value) == "Incorrect API key provided."


async def test_stored_key_is_let_in_by_its_secret_not_by_its_id(authenticator: Authenticator, store: Store) -> None:
    record, key = await Keys(store).create(KeySpec(name="stored"))

    assert (await authenticator.authenticate(request_with(x_api_key=key))).key_id == record.id
    with pytest.raises(InvalidApiKey):
        await authenticator.authenticate(request_with(x_api_key=f"sk-shannon-{record.id}-{'A' * 43}"))


@pytest.mark.parametrize("headers", [{}, {"authorization": ""}, {"authorization": KEY}, {"x_api_key": "  "}])
async def test_missing_key_is_refused_with_the_way_to_send_one(
    authenticator: Authenticator, headers: dict[str, str]
) -> None:
    with pytest.raises(InvalidApiKey, match=r"No API key provided.*Authorization.*X-API-Key"):
        await authenticator.authenticate(request_with(**headers))


async def test_key_of_odd_bytes_is_refused(authenticator: Authenticator) -> None:
    with pytest.raises(InvalidApiKey, match="Incorrect API key"):
        await authenticator.authenticate(request_with(authorization=b"Bearer \xff\xfe\x80"))


async def test_known_and_unknown_ids_are_compared_alike(
    authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, int]] = []
    constant_time = hmac.compare_digest

    def compare_digest(given: str, expected: str) -> bool:
        compared.append((len(given), len(expected)))
        return constant_time(given, expected)

    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    for key_id in (KEY_ID, "UnknownKey01"):
        with pytest.raises(InvalidApiKey):
            await authenticator.authenticate(request_with(x_api_key=f"sk-shannon-{key_id}-{'A' * 43}"))

    known, unknown = compared[: len(compared) // 2], compared[len(compared) // 2 :]
    assert known
    assert known == unknown
    assert all(given == expected for given, expected in compared), "hashes are compared, not keys"


async def test_only_hashes_of_a_secret_are_kept(authenticator: Authenticator) -> None:
    for key in (KEY, BY_HAND):
        await authenticator.authenticate(request_with(x_api_key=key))
    kept = repr([value for value in vars(authenticator).values() if isinstance(value, dict)])

    assert KEY_ID in kept
    assert digest(SECRET) in kept
    assert SECRET not in kept
    assert BY_HAND not in kept


@pytest.mark.parametrize("environment", [{}, {"CI_KEY": ""}, {"CI_KEY": "hunter2"}, {"CI_KEY": "x" * 19}])
def test_unusable_key_variable_is_refused_by_name_and_without_the_key(
    environment: dict[str, str], tmp_path: Path
) -> None:
    settings = config({"name": "ci", "key_env": "CI_KEY"}, data_dir=str(tmp_path))
    store = build_store(settings, {"SHANNON_REDIS_URL": "unix:///nowhere.sock"})
    with pytest.raises(ConfigError, match="CI_KEY") as caught:
        build_authenticator(settings, store, environment)

    assert f"at least {MIN_KEY_LENGTH} characters" in str(caught.value)
    assert not any(key and key in str(caught.value) for key in environment.values())
