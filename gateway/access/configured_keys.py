"""Keys of the configuration, and the bootstrap key. They belong to this process only and are not in the store.

Each is in an environment variable or in a file. The environment of a process never changes; files are read again when
the configuration is reloaded, so a mounted secret can be rotated. Raises ConfigError, which never contains a key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from engine.plain_file import read_plain_file
from gateway.access.auth import MIN_KEY_LENGTH, PRIORITIES, OwnKeys, Principal
from gateway.access.keys import digest, split_key
from gateway.settings.config import ConfigError, KeySettings

BOOTSTRAP = "SHANNON_BOOTSTRAP_KEY"
"""Environment variable with an admin key."""
BOOTSTRAP_FILE = "SHANNON_BOOTSTRAP_KEY_FILE"
"""Environment variable with the path of a file with an admin key."""


def own_keys(settings: Iterable[KeySettings], environment: Mapping[str, str]) -> OwnKeys:
    """Return the keys by id. Raises ConfigError, which names the variable or file of an invalid key."""
    own: dict[str, tuple[str, Principal]] = {}
    for key in (*settings, *_bootstrap(environment)):
        where = key.key_env or key.key_file
        text = _read(key, environment).strip()
        if len(text) < MIN_KEY_LENGTH:
            raise ConfigError(f"{where}: the key {key.name!r} must have at least {MIN_KEY_LENGTH} characters")
        key_id, secret = split_key(text)
        if key_id in own:
            other = own[key_id][1].name
            raise ConfigError(f"{where}: the keys {key.name!r} and {other!r} have the same id; make another")
        own[key_id] = digest(secret), _principal(key_id, key)
    return own


def _bootstrap(environment: Mapping[str, str]) -> list[KeySettings]:
    """Return the settings of the bootstrap key, if there is one."""
    file = environment.get(BOOTSTRAP_FILE)
    if environment.get(BOOTSTRAP):
        if file:
            raise ConfigError(f"{BOOTSTRAP} and {BOOTSTRAP_FILE} are both set; set one of them")
        return [KeySettings(name="bootstrap", key_env=BOOTSTRAP, admin=True)]
    return [KeySettings(name="bootstrap", key_file=Path(file), admin=True)] if file else []


def _read(key: KeySettings, environment: Mapping[str, str]) -> str:
    if key.key_file is None:
        return environment.get(key.key_env or "", "")
    try:
        return read_plain_file(key.key_file).decode()
    except OSError as error:
        raise ConfigError(f"{key.key_file}: the key {key.name!r} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key.key_file}: the key {key.name!r} is not text in UTF-8") from error


def _principal(key_id: str, key: KeySettings) -> Principal:
    return Principal(
        key_id,
        key.name,
        key.tenant,
        None if key.models is None else frozenset(key.models),
        admin=key.admin,
        priority=PRIORITIES[key.priority],
        metrics=key.metrics,
    )
