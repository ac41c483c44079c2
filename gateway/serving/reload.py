"""The configuration read again while requests run: models, limits and keys change, and no stream is cut.

A file that can't be used changes nothing. Of one that can, what may change is put in place in one step of the event
loop, so that no request sees half of it: new requests find it, running ones keep the model, the limits and the key
that they started with. The rest of the file (engines, store, server, tools, ...) needs a restart: it is named in a
warning and stays as it was, because refusing all of it would keep a key from being revoked. A model on an engine that
does not run is refused with the whole file: a catalog is taken as written or not at all.
"""

from __future__ import annotations

import asyncio
import json
import logging
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from gateway.access.auth import OwnKeys
from gateway.access.catalog import Catalog
from gateway.access.configured_keys import own_keys
from gateway.services import Services
from gateway.settings.config import Config, ConfigError, load_config

log = logging.getLogger(__name__)

RELOADABLE = ("models", "default_model", "keys", "limits", "prefix_cache")
"""Top-level settings that a running gateway takes on."""
_ABSENT = object()

Difference = tuple[str, Any, Any]
"""The path of a setting, its value before and after; `_ABSENT` where there is none."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to put in place, and what to say about it."""

    config: Config
    catalog: Catalog
    own: OwnKeys
    changes: list[str]
    needs_restart: list[str]


class Reload:
    """Call it to read `path` again, with the environment of the start. One call ends before the next begins."""

    def __init__(self, app: FastAPI, path: Path, environment: Mapping[str, str]) -> None:
        self._app = app
        self._path = path
        self._environment = environment

    async def __call__(self) -> None:
        """Apply the file, or log why not. Never raises."""
        services: Services = self._app.state.services
        try:
            plan = await asyncio.to_thread(self._plan, services)
        except ConfigError as error:
            log.error("the configuration was not reloaded, all is as before: %s", error)
            services.metrics.reloaded("refused")
            return
        except Exception:  # whatever is in the file, the gateway continues, and listens to the next signal
            log.exception("the configuration was not reloaded, all is as before: %s", self._path)
            services.metrics.reloaded("refused")
            return
        self._put_in_place(services, plan)
        services.metrics.reloaded("applied")
        services.metrics.restart_pending.set(bool(plan.needs_restart))
        log.info("reloaded %s: %s", self._path, "; ".join(plan.changes) or "nothing has changed")
        if plan.needs_restart:
            names = ", ".join(plan.needs_restart)
            log.warning("%s: needs a restart, and stays as it was until then: %s", self._path, names)

    def _plan(self, services: Services) -> _Plan:
        """Read and check everything. Runs in a thread: a large file takes longer than streams should wait."""
        running, read = services.config, load_config(self._path, self._environment)
        for model_id, model in read.models.items():
            if model.engine not in services.engines:
                raise ConfigError(
                    f"{self._path}: models.{model_id}.engine: the engine {model.engine!r} is not running; "
                    "a new engine needs a restart"
                )
        own = own_keys(read.keys, self._environment)
        config = running.model_copy(update={name: getattr(read, name) for name in RELOADABLE})
        changes = [_sentence(*difference) for difference in differences(_tree(running), _tree(config))]
        changes += _key_changes(services.authenticator.own, own)
        needs_restart = [path for path, _, _ in differences(_tree(config), _tree(read))]
        return _Plan(config, Catalog(config, services.engines), own, changes, needs_restart)

    def _put_in_place(self, services: Services, plan: _Plan) -> None:
        """Let new requests find the plan. Nothing here awaits: that makes it one step."""
        config = plan.config
        services.authenticator.accept(plan.own, failed_per_minute=config.limits.failed_auth_per_minute)
        services.limits.enforce(config.limits)
        services.cache_salts.share(config.prefix_cache)
        self._app.state.services = replace(services, config=config, catalog=plan.catalog)


def differences(old: Any, new: Any, path: str = "") -> Iterator[Difference]:
    """Yield where two trees of plain values differ: mappings name by name, anything else as a whole."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield path, old, new
        return
    for name in old | new:
        yield from differences(old.get(name, _ABSENT), new.get(name, _ABSENT), f"{path}.{name}" if path else name)


def _tree(config: Config) -> dict[str, Any]:
    """Return the settings as plain values, but for the keys, which are compared by what they let in."""
    return config.model_dump(mode="json", exclude={"keys"})


def _sentence(path: str, old: Any, new: Any) -> str:
    if old is _ABSENT:
        return f"{path} added"
    if new is _ABSENT:
        return f"{path} removed"
    return f"{path} {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    return textwrap.shorten(json.dumps(value, ensure_ascii=False), 60, placeholder="...")


def _key_changes(old: OwnKeys, new: OwnKeys) -> list[str]:
    """Say which keys came, went or changed, by id: of secrets only the fact that they differ."""
    changes = []
    for key_id in {**old, **new}:
        principal = (new.get(key_id) or old[key_id])[1]
        if key_id not in old:
            what = "added"
        elif key_id not in new:
            what = "removed"
        elif old[key_id] == new[key_id]:
            continue
        else:
            what = "changed" if old[key_id][0] == new[key_id][0] else "has a new secret"
        changes.append(f"key {key_id} ({principal.name}) {what}")
    return changes
