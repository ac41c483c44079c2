"""Both replicas replaced under load, behind nginx as the chart's Ingress sets it up: nothing fails, nothing is cut.

As Kubernetes does it, a replica that is to go first loses its endpoint, and gets SIGTERM once the proxy knows: the
time between is the chart's `drain.preStopSeconds`. Here it is as long as it takes, and not longer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.deploy.cluster import Cluster, Replica, run_cluster
from tests.support.deploy.load import Load, Request, most_in_a_minute
from tests.support.gateway_process import UNLIMITED, wait_until

pytestmark = pytest.mark.slow

PER_MINUTE = 30
TREE: dict[str, Any] = {
    "engines": {"main": {"kind": "mock", "args": {"token_s": 0.05}}},
    "models": {"shannon-chat": {"limits": UNLIMITED}},
    # Two cores are shared by all of this here; being slow is not being away.
    "store": {"command_timeout_ms": 2000},
}


def replace_told(cluster: Cluster, replica: Replica, load: Load) -> None:
    """Replace one replica as Kubernetes does."""
    cluster.ingress.route([other.endpoint for other in cluster.replicas if other is not replica])
    told = time.monotonic()
    wait_until(lambda: not load.on_the_way(since=told), "requests are still on their way through nginx", 30)
    replica.restart()
    cluster.ingress.route([other.endpoint for other in cluster.replicas])


def replace_untold(cluster: Cluster, replica: Replica, load: Load) -> None:
    """Replace one replica with a proxy that hears of it when all is over."""
    replica.restart()
    cluster.ingress.route([other.endpoint for other in cluster.replicas])


def limited_key(cluster: Cluster) -> str:
    """Make a key with few requests per minute."""
    spec = {"name": "limited", "limits": {"shannon-chat": {"requests_per_minute": PER_MINUTE}}}
    made = httpx.post(f"{cluster.url}/admin/keys", json=spec, headers=cluster.authorization)
    return str(made.raise_for_status().json()["key"])


def restart_under_load(
    cluster: Cluster, replicas: list[Replica], replace: Callable[[Cluster, Replica, Load], None]
) -> Load:
    """Replace replicas one after the other while 40 clients ask, who also ask before, between and after."""

    async def plan(load: Load) -> None:
        await moved_on(load)
        for replica in replicas:
            await asyncio.to_thread(replace, cluster, replica, load)
            await moved_on(load)

    async def moved_on(load: Load) -> None:
        ended = sum(request.ended > 0 for request in load.requests)
        while sum(request.ended > 0 for request in load.requests) < ended + 30:
            await asyncio.sleep(0.05)

    async def run() -> Load:
        load = Load(cluster.url, cluster.key)
        key = await asyncio.to_thread(limited_key, cluster)
        clients = [load.stream() for _ in range(20)] + [load.whole() for _ in range(8)]
        clients += [load.sdk() for _ in range(8)] + [load.limited(key, 0.3) for _ in range(4)]
        await load.run(plan(load), clients)
        return load

    with cluster.clients.inside():
        return asyncio.run(run())


def spent(requests: list[Request]) -> dict[str, dict[str, int]]:
    """Return by key what the clients were told that they spent."""
    totals: dict[str, dict[str, int]] = {}
    for request in requests:
        total = totals.setdefault(request.key_id, {"prompt_tokens": 0, "completion_tokens": 0})
        for name in total:
            total[name] += request.usage.get(name, 0)
    return totals


def booked(cluster: Cluster) -> dict[str, dict[str, int]]:
    """Return by key what the ledger says."""
    return {key: {name: row[name] for name in row if name != "requests"} for key, row in cluster.usage().items()}


def report(load: Load) -> None:
    answered = [request for request in load.requests if request.status == 200]
    gap_s = max(request.longest_gap_s for request in answered)
    again = sum("," in request.replicas for request in answered)
    took_s = max(request.ended for request in load.requests) - load.requests[0].started
    print(
        f"\n{len(load.requests)} requests in {took_s:.0f} s, {len(load.failed)} failed, {len(answered)} answered, "
        f"longest gap {gap_s * 1000:.0f} ms, {again} sent to a second replica"
    )


def test_replacing_both_replicas_fails_no_request(tmp_path: Path) -> None:
    with run_cluster(tmp_path, TREE) as cluster:
        load = restart_under_load(cluster, cluster.replicas, replace_told)

        report(load)
        assert load.failed == []
        assert not any("," in request.replicas for request in load.requests), "no second try was needed"
        limited = [request for request in load.requests if request.key_id != cluster.key.split("-")[2]]
        assert 429 in {request.status for request in limited}
        assert most_in_a_minute([request for request in limited if request.status == 200]) == PER_MINUTE
        wait_until(lambda: booked(cluster) == spent(load.requests), "the ledger is not what the clients were told")


def test_proxy_that_is_told_too_late_finds_the_other_replica(tmp_path: Path) -> None:
    """A replica that drains, or is gone, costs its requests a second try, which the chart's Ingress asks for."""
    with run_cluster(tmp_path, TREE) as cluster:
        load = restart_under_load(cluster, cluster.replicas[:1], replace_untold)

        report(load)
        assert load.failed == []
        assert any("," in request.replicas for request in load.requests)
        wait_until(lambda: booked(cluster) == spent(load.requests), "the ledger is not what the clients were told")
