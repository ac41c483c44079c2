"""Reload: what may change is put in place at once, a bad file changes nothing, and the log tells which was which."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.access.auth import Principal
from gateway.access.keys import make_key, split_key
from gateway.services import Services
from gateway.serving.reload import Reload, differences
from gateway.settings.config import Config
from tests.support.app import build_app

pytestmark = pytest.mark.anyio

CALLER = Principal("TestKey00001")
MODELS = {
    "shannon-chat": {"description": "General chat completion", "limits": {"requests_per_minute": 60}},
    "shannon-complex": {"description": "Multi-agent orchestration"},
}


@dataclass
class Bench:
    """An app that is built but serves nobody, and the file that it reloads."""

    reload: Reload
    path: Path
    tree: dict[str, Any]
    app: Any
    log: pytest.LogCaptureFixture

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    async def read(self, **over: Any) -> list[str]:
        """Reload the file with top-level settings replaced by `over`. Returns what was logged."""
        self.path.write_text(yaml.safe_dump(self.tree | over), encoding="utf-8")
        return await self.read_again()

    async def read_again(self) -> list[str]:
        self.log.clear()
        await self.reload()
        return [record.getMessage() for record in self.log.records]

    def metric(self, name: str) -> str:
        """Return a sample of the metrics page, or "" where there is none yet."""
        lines = self.services.metrics.render().decode().splitlines()
        return next((line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")), "")


@pytest.fixture
def bench(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Bench:
    caplog.set_level(logging.INFO, "gateway.serving.reload")
    file = tmp_path / "ci.key"
    file.write_text(make_key("FileKey00001"))
    tree = {
        "engines": {"main": {"kind": "mock"}},
        "models": MODELS,
        "keys": [{"name": "ci", "key_file": str(file)}],
        "server": {"port": 0},
        "store": {"data_dir": str(tmp_path / "data")},
    }
    environment = {"SHANNON_REDIS_URL": "unix:///nowhere.sock", "SPARE_KEY": make_key("SpareKey0001")}
    app, _, _ = build_app(config=tree, environment=environment)
    path = tmp_path / "gateway.yaml"
    return Bench(Reload(app, path, environment), path, tree, app, caplog)


async def test_same_file_changes_nothing(bench: Bench) -> None:
    assert await bench.read() == [f"reloaded {bench.path}: key TestKey00001 (bootstrap) removed"]
    assert await bench.read() == [f"reloaded {bench.path}: nothing has changed"]


async def test_every_change_is_told_in_one_line(bench: Bench) -> None:
    await bench.read()
    models = {
        "shannon-chat": {"description": "General chat completion", "limits": {"requests_per_minute": 5}},
        "shannon-new": {"description": "New"},
    }
    (line,) = await bench.read(models=models, limits={"replicas": 2}, prefix_cache={"shared": {"sisters": ["a", "b"]}})

    assert line.partition(": ")[2].split("; ") == [
        "models.shannon-chat.limits.requests_per_minute 60 -> 5",
        "models.shannon-complex removed",
        "models.shannon-new added",
        "limits.replicas 1 -> 2",
        "prefix_cache.shared.sisters added",
    ]


async def test_changes_are_in_force_together(bench: Bench) -> None:
    before = bench.services
    models = {"shannon-new": {"description": "New"}}
    await bench.read(
        models=models,
        default_model="shannon-new",
        limits={"enabled": False},
        keys=[],
        prefix_cache={"shared": {"sisters": ["a", "b"]}},
    )
    after = bench.services

    assert after.catalog.resolve(None, CALLER).id == "shannon-new"
    assert after.config.models.keys() == {"shannon-new"}
    assert not after.limits.enabled
    assert after.authenticator.own == {}
    assert after.cache_salts.salt_of("a") == after.cache_salts.salt_of("b")
    assert before.catalog.resolve(None, CALLER).id == "shannon-chat", "what started before goes by what it started with"
    assert (after.engines, after.store, after.drain) == (before.engines, before.store, before.drain)


@pytest.mark.parametrize(
    ("over", "problem"),
    [
        ({"models": {"shannon-chat": {}}}, "models.shannon-chat.description: Field required"),
        ({"modles": {}}, "modles: unknown setting"),
        ({"default_model": "gone"}, "default_model: there is no model named 'gone'"),
        ({"limits": {"replicas": 0}}, "limits.replicas: must be greater than or equal to 1"),
        (
            {
                "engines": {"main": {"kind": "mock"}, "spare": {"kind": "mock"}},
                "models": MODELS | {"shannon-new": {"description": "New", "engine": "spare"}},
            },
            "models.shannon-new.engine: the engine 'spare' is not running; a new engine needs a restart",
        ),
    ],
)
async def test_bad_file_changes_nothing_and_is_told_by_file_and_setting(
    bench: Bench, over: dict[str, Any], problem: str
) -> None:
    await bench.read()
    before = bench.services
    told = await bench.read(**({"keys": []} | over))

    assert told == [f"the configuration was not reloaded, all is as before: {bench.path}: {problem}"]
    assert bench.services is before
    assert bench.services.authenticator.own.keys() == {"FileKey00001"}


async def test_file_that_is_no_yaml_changes_nothing(bench: Bench) -> None:
    before = bench.services
    bench.path.write_text("models: [", encoding="utf-8")
    (line,) = await bench.read_again()

    assert f"{bench.path}: not valid YAML" in line
    assert bench.services is before


async def test_file_that_is_gone_changes_nothing(bench: Bench) -> None:
    (line,) = await bench.read_again()

    assert line.endswith(f"{bench.path}: No such file or directory")


async def test_key_that_is_missing_changes_nothing(bench: Bench) -> None:
    await bench.read()
    before = bench.services
    (line,) = await bench.read(models={"shannon-chat": MODELS["shannon-chat"]}, keys=[{"name": "x", "key_env": "NONE"}])

    assert "NONE: the key 'x' must have at least" in line
    assert bench.services is before


async def test_failure_that_nobody_thought_of_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Config:
        raise RecursionError

    monkeypatch.setattr("gateway.serving.reload.load_config", fail)
    before = bench.services
    (line,) = await bench.read()

    assert "was not reloaded" in line
    assert bench.services is before
    assert bench.metric('shannon_config_reloads_total{result="refused"}') == "1.0"


async def test_what_needs_a_restart_is_named_and_the_rest_is_applied(bench: Bench) -> None:
    await bench.read()
    before = bench.services.config
    changed, pending = await bench.read(
        engines={"main": {"kind": "mock", "args": {"token_s": 1}}, "spare": {"kind": "mock"}},
        models={"shannon-chat": MODELS["shannon-chat"]},
        server={"port": 8081},
        sessions={"ttl_s": 5},
    )

    assert changed == f"reloaded {bench.path}: models.shannon-complex removed"
    names = "engines.main.args.token_s, engines.spare, sessions.ttl_s, server.port"
    assert pending == f"{bench.path}: needs a restart, and stays as it was until then: {names}"
    after = bench.services.config
    assert after.models.keys() == {"shannon-chat"}
    assert (after.engines, after.server, after.sessions) == (before.engines, before.server, before.sessions)


async def test_restart_stays_pending_until_the_file_is_as_the_gateway(bench: Bench) -> None:
    assert bench.metric("shannon_config_restart_pending") == "0.0"
    for _ in range(2):
        assert len(await bench.read(server={"port": 8081})) == 2
        assert bench.metric("shannon_config_restart_pending") == "1.0"

    await bench.read()
    assert bench.metric("shannon_config_restart_pending") == "0.0"


async def test_metrics_tell_how_reloads_end(bench: Bench) -> None:
    assert bench.metric("shannon_config_last_reload_successful") == "1.0"
    await bench.read()
    await bench.read(modles={})
    assert bench.metric("shannon_config_last_reload_successful") == "0.0"
    await bench.read()

    assert bench.metric("shannon_config_last_reload_successful") == "1.0"
    assert bench.metric('shannon_config_reloads_total{result="applied"}') == "2.0"
    assert bench.metric('shannon_config_reloads_total{result="refused"}') == "1.0"


async def test_keys_are_told_by_id_and_never_by_secret(bench: Bench) -> None:
    await bench.read()
    file = Path(bench.tree["keys"][0]["key_file"])
    (told_new_secret,) = await _with_key(bench, file, secret := make_key("FileKey00001"))
    (told_new_key,) = await _with_key(bench, file, make_key("FileKey00002"))
    (told_spare,) = await bench.read(keys=[{"name": "spare", "key_env": "SPARE_KEY"}])
    (told_admin,) = await bench.read(keys=[{"name": "spare", "key_env": "SPARE_KEY", "admin": True}])

    assert told_new_secret.endswith(": key FileKey00001 (ci) has a new secret")
    assert told_new_key.endswith(": key FileKey00001 (ci) removed; key FileKey00002 (ci) added")
    assert told_spare.endswith(": key FileKey00002 (ci) removed; key SpareKey0001 (spare) added")
    assert told_admin.endswith(": key SpareKey0001 (spare) changed")
    assert split_key(secret)[1] not in bench.log.text


async def _with_key(bench: Bench, file: Path, key: str) -> list[str]:
    file.write_text(key)
    return await bench.read()


async def test_environment_of_the_start_is_on_top(bench: Bench) -> None:
    reload = Reload(bench.app, bench.path, {"SHANNON_MAX_OUTPUT_TOKENS": "7"})
    await bench.read()
    await reload()

    assert bench.services.config.models["shannon-chat"].max_output_tokens == 7


async def test_included_file_is_read_again(bench: Bench) -> None:
    catalog = bench.path.with_name("models.yaml")
    bench.path.write_text(yaml.safe_dump({"include": catalog.name} | bench.tree | {"models": {}}), encoding="utf-8")
    for number in (1, 2):
        models = {"shannon-chat": {"description": "x", "limits": {"requests_per_minute": number}}}
        catalog.write_text(yaml.safe_dump({"models": models}), encoding="utf-8")
        await bench.reload()

        assert bench.services.config.models["shannon-chat"].limits.requests_per_minute == number


def test_differences_are_found_at_every_depth() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": {"f": {"g": 1}}}
    new = {"a": {"b": 2, "c": [2, 1]}, "d": None, "e": {}, "h": {"i": 1}}

    assert [path for path, _, _ in differences(old, new)] == ["a.b", "a.c", "e.f", "h"]
    assert list(differences(old, old)) == []
