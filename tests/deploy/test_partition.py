"""A network that falls silent between one replica and the store: nobody waits for it, and the books agree after it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.deploy.cluster import Cluster, Replica, run_cluster
from tests.support.gateway_process import UNLIMITED, wait_until

pytestmark = pytest.mark.slow

TREE: dict[str, Any] = {
    "engines": {"main": {"kind": "mock", "args": {"token_s": 0.01}}},
    "models": {"shannon-chat": {"limits": UNLIMITED}},
    # The first requests of a partition wait this long, the others not at all. Much longer than what a loaded machine
    # makes of a healthy store, and much shorter than the client's patience.
    "store": {"command_timeout_ms": 1000},
}
BODY = {"messages": [{"role": "user", "content": "hello there"}]}
PATIENCE_S = 8.0
"""A client that waits longer for an answer has found something that hangs; TCP itself gives up after minutes."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with run_cluster(tmp_path, TREE) as cluster:
        yield cluster


class Clients:
    """Four clients of one replica, past nginx, who ask one after the other."""

    def __init__(self, replica: Replica, key: str) -> None:
        self._replica = replica
        self._headers = {"Authorization": f"Bearer {key}"}
        self.standing: Counter[str] = Counter()
        """Answers by X-Shannon-Limits, which is `shared` here where there is none."""
        self.answers: list[httpx.Response] = []

    async def ask(self, until: asyncio.Event) -> None:
        async with httpx.AsyncClient(base_url=self._replica.gateway.url, timeout=PATIENCE_S) as client:
            await asyncio.gather(*(self._keep_asking(client, until) for _ in range(4)))

    async def _keep_asking(self, client: httpx.AsyncClient, until: asyncio.Event) -> None:
        while not until.is_set():
            response = await client.post("/v1/chat/completions", json=BODY, headers=self._headers)
            assert response.status_code == 200, response.text
            self.standing[response.headers.get("x-shannon-limits", "shared")] += 1
            self.answers.append(response)

    async def have(self, standing: str, more: int) -> None:
        """Wait until so many more answers were of that kind."""
        wanted = self.standing[standing] + more
        async with asyncio.timeout(60):
            while self.standing[standing] < wanted:
                await asyncio.sleep(0.02)


def journals(replica: Replica) -> list[Path]:
    return [path for path in replica.data_dir.glob("ledger-*.jsonl") if path.stat().st_size]


def test_replica_cut_off_from_the_store_goes_on_and_loses_nothing(cluster: Cluster) -> None:
    cut_off, other = (Clients(replica, cluster.key) for replica in cluster.replicas)
    replica = cluster.replicas[0]

    async def plan(done: asyncio.Event) -> None:
        try:
            await asyncio.gather(cut_off.have("shared", 20), other.have("shared", 20))
            cluster.network.cut(replica.host, cluster.store)
            await asyncio.gather(cut_off.have("local", 100), other.have("shared", 100))
            ready = [replica.gateway.ready() for replica in cluster.replicas]
            assert ready == [True, True], "nothing is won by taking it out: it serves"
            assert journals(replica)
            cluster.network.heal(replica.host, cluster.store)
            await cut_off.have("shared", 20)
        finally:
            done.set()

    async def run() -> None:
        done = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for clients in (cut_off, other):
                group.create_task(clients.ask(done))
            group.create_task(plan(done))

    with cluster.clients.inside():
        asyncio.run(run())

    print(f"\ncut off: {dict(cut_off.standing)}; the other: {dict(other.standing)}")
    assert other.standing.keys() == {"shared"}, "the other replica never noticed"
    answers = cut_off.answers + other.answers
    told = {
        name: sum(answer.json()["usage"][name] for answer in answers) for name in ("prompt_tokens", "completion_tokens")
    }
    key_id = cluster.key.split("-")[2]
    wait_until(lambda: not journals(replica), "the journal is not replayed")
    wait_until(lambda: cluster.usage()[key_id] == told | {"requests": len(answers)}, "the ledger is not what was told")
