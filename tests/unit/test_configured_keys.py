"""Keys that the configuration names: from variables and from files, refused by name and never repeated."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.access.auth import MIN_KEY_LENGTH
from gateway.access.configured_keys import own_keys
from gateway.access.keys import digest
from gateway.settings.config import ConfigError, KeySettings
from tests.support.app import KEY, KEY_ID, SECRET

BOOTSTRAP = "SHANNON_BOOTSTRAP_KEY"


def test_key_comes_from_its_variable() -> None:
    settings = KeySettings(name="ci", key_env="CI_KEY", tenant="acme", models=["shannon-chat"], priority="high")
    secret, principal = own_keys([settings], {"CI_KEY": f" {KEY}\n"})[KEY_ID]

    assert secret == digest(SECRET)
    assert (principal.name, principal.tenant, principal.priority) == ("ci", "acme", -1)
    assert principal.models == frozenset({"shannon-chat"})
    assert not principal.admin


def test_key_comes_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")

    assert own_keys([KeySettings(name="ci", key_file=file)], {}).keys() == {KEY_ID}


def test_bootstrap_key_is_admin(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)

    for environment in ({BOOTSTRAP: KEY}, {f"{BOOTSTRAP}_FILE": str(file)}, {BOOTSTRAP: "", f"{BOOTSTRAP}_FILE": file}):
        _, principal = own_keys([], {name: str(value) for name, value in environment.items()})[KEY_ID]
        assert (principal.name, principal.admin, principal.models) == ("bootstrap", True, None)


def test_there_need_be_no_key() -> None:
    assert own_keys([], {}) == {}


def test_bootstrap_key_from_two_places_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"{BOOTSTRAP} and {BOOTSTRAP}_FILE are both set"):
        own_keys([], {BOOTSTRAP: KEY, f"{BOOTSTRAP}_FILE": "/run/key"})


def test_two_keys_of_one_id_are_refused() -> None:
    settings = [KeySettings(name="ci", key_env="CI_KEY"), KeySettings(name="cd", key_env="CD_KEY")]
    with pytest.raises(ConfigError, match=r"CD_KEY: the keys 'cd' and 'ci' have the same id") as caught:
        own_keys(settings, {"CI_KEY": KEY, "CD_KEY": KEY})

    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"hunter2\n", f"must have at least {MIN_KEY_LENGTH} characters"),
        (b"", f"must have at least {MIN_KEY_LENGTH} characters"),
        (b"\xff" * 30, "is not text in UTF-8"),
        (None, "can't be read: No such file or directory"),
    ],
)
def test_unusable_file_is_refused_by_name_and_without_the_key(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        own_keys([KeySettings(name="ci", key_file=file)], {})

    assert str(caught.value) == f"{file}: the key 'ci' {problem}"
