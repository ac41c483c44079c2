"""The store killed and frozen under load: nothing hangs, and the ledger is complete once the store is back."""

from __future__ import annotations

import asyncio
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.gateway_process import UNLIMITED, GatewayProcess, serve, wait_until
from tests.support.store_server import StoreServer, run_store
from tests.support.waiting import until

COMMAND_TIMEOUT_S = 0.05
BODY = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 4}
TREE: dict[str, Any] = {
    "engines": {"main": {"kind": "mock", "args": {"token_s": 0.005}}},
    "models": {"shannon-chat": {"limits": UNLIMITED}},
}


@pytest.fixture(params=["valkey", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreServer]:
    with run_store(request.param, tmp_path / "store") as server:
        yield server


class Load:
    """Four clients that send one request after the other, and note how long each took."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self.gateway = gateway
        self.sent = 0
        self.responses: list[tuple[float, float, httpx.Response]] = []
        """(when it was sent, how long it took, the response)"""

    async def run(self, plan: asyncio.Task[None]) -> None:
        """Send requests until `plan` has ended."""
        async with httpx.AsyncClient(timeout=30) as client:
            await asyncio.gather(*(self._work(client, plan) for _ in range(4)))

    async def _work(self, client: httpx.AsyncClient, until: asyncio.Task[None]) -> None:
        url = f"{self.gateway.url}/v1/chat/completions"
        while not until.done():
            self.sent += 1
            started = time.monotonic()
            response = await client.post(url, json=BODY, headers=self.gateway.authorization)
            self.responses.append((started, time.monotonic() - started, response))

    async def more(self, count: int) -> None:
        """Wait until that many requests that are sent from now on are answered."""
        now = time.monotonic()
        await until(lambda: sum(at > now for at, _, _ in self.responses) >= count, within_s=60)

    def took(self, since: float, until: float) -> list[float]:
        """Return how long the requests took that were sent in a period."""
        return sorted(took for at, took, _ in self.responses if since <= at < until)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=lambda fault: fault.name)
def test_requests_go_on_without_the_store_and_usage_is_complete_after_it(
    store: StoreServer, store_url: str, tmp_path: Path, fault: signal.Signals
) -> None:
    """As fast as those of another gateway, which has its store, at the same moment on the same machine."""
    with (
        serve(tmp_path / "gateway", TREE, SHANNON_REDIS_URL=store.url) as gateway,
        serve(tmp_path / "control", TREE, SHANNON_REDIS_URL=store_url) as untouched,
    ):
        gateway.wait_until_ready()
        untouched.wait_until_ready()
        load, control = Load(gateway), Load(untouched)
        marks: list[float] = []
        counted: list[dict[str, float]] = []

        def books() -> dict[str, float]:
            """Return the sums of the metrics of both lanes to the store, by their last words."""
            names = ("available", "failures_total", "breaker_openings_total")
            page = gateway.metrics()
            return {name: sum(page["shannon_store" + lane + name,] for lane in ("_", "_bulk_")) for name in names}

        async def lanes(available: int) -> None:
            while (found := await asyncio.to_thread(books))["available"] != available:
                await asyncio.sleep(0.02)
            counted.append(found)
            marks.append(time.monotonic())

        async def plan() -> None:
            await load.more(100)
            await asyncio.to_thread(store.send, fault)
            await asyncio.wait_for(lanes(0), 60)
            await load.more(300)
            await control.more(1)
            await asyncio.wait_for(lanes(0), 60)
            await asyncio.to_thread(store.start if fault == signal.SIGKILL else lambda: store.send(signal.SIGCONT))
            await asyncio.wait_for(lanes(2), 60)
            await load.more(20)

        async def play() -> None:
            planned = asyncio.create_task(plan())
            await asyncio.gather(planned, load.run(planned), control.run(planned))

        asyncio.run(play())
        went, back, _ = marks
        alone, normal = load.took(went, back), control.took(went, back)
        for name, took in (("without the store", alone), ("with it", normal)):
            print(f"{fault.name}: {name} {len(took)} requests, median {statistics.median(took) * 1000:.0f} ms")
        assert all(response.status_code == 200 for _, _, response in load.responses)
        for at, _, response in load.responses:
            if went <= at < back:
                assert response.headers["x-shannon-limits"] == "local"
                assert response.headers["x-shannon-session"] == "unavailable"
        # Nobody waits for a store that is known to be away, but who asks for /metrics.
        before, after, _ = counted
        assert after["failures_total"] - before["failures_total"] <= 1
        assert after["breaker_openings_total"] - before["breaker_openings_total"] <= 1
        for part in (0.5, 0.9):
            assert alone[int(part * len(alone))] < 2 * normal[int(part * len(normal))] + COMMAND_TIMEOUT_S
        assert _rows(gateway, load.sent) == {
            "requests": load.sent,
            "prompt_tokens": load.sent * 3,
            "completion_tokens": load.sent * 4,
        }
        assert gateway.log.read_text().count("Traceback") == 0


def _rows(gateway: GatewayProcess, expected: int) -> dict[str, int]:
    """Wait for the journal to be replayed. Return the totals of the gateway's own key."""
    return _rows_of(gateway, gateway.authorization, expected)


def _rows_of(gateway: GatewayProcess, authorization: dict[str, str], expected: int) -> dict[str, int]:
    """Wait for the journal to be replayed. Return the key's totals."""
    deadline = time.monotonic() + 60
    while True:
        response = httpx.get(f"{gateway.url}/v1/usage", headers=authorization)
        rows = response.json()["data"] if response.status_code == 200 else []
        totals = {name: sum(row[name] for row in rows) for name in ("requests", "prompt_tokens", "completion_tokens")}
        if totals["requests"] >= expected or time.monotonic() > deadline:
            return totals
        time.sleep(0.1)


@pytest.mark.parametrize("frozen_s", [0.5, 2.0], ids=["shorter than commands live", "longer"])
def test_requests_in_flight_through_a_freeze_cost_what_they_spent(
    store: StoreServer, tmp_path: Path, frozen_s: float
) -> None:
    """Five of them, that reserve far more: the window and the day's budget hold nothing else when all is over."""
    tree = TREE | {"models": {"shannon-chat": {"limits": {"requests_per_minute": 10}}}}
    with serve(tmp_path / "gateway", tree, SHANNON_REDIS_URL=store.url) as gateway, store.client() as raw:
        gateway.wait_until_ready()
        spec = {"name": "ci", "tokens_per_day": 100_000}
        made = httpx.post(f"{gateway.url}/admin/keys", json=spec, headers=gateway.authorization).json()
        headers = {"Authorization": f"Bearer {made['key']}"}

        def polls() -> int:
            stats: Any = raw.info("commandstats")
            return int(stats["cmdstat_get"]["calls"])

        # A key that was made voids the cache of keys, when the gateway next looks: without the store it has none then.
        seen = polls()
        wait_until(lambda: polls() >= seen + 2, "the gateway does not look for keys that have changed")
        url = f"{gateway.url}/v1/chat/completions"
        body = BODY | {"max_tokens": 900}
        assert httpx.post(url, json=body, headers=headers).status_code == 200

        async def five() -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=10) as client:
                store.send(signal.SIGSTOP)
                asked = [asyncio.create_task(client.post(url, json=body, headers=headers)) for _ in range(5)]
                await asyncio.sleep(frozen_s)
                store.send(signal.SIGCONT)
                return await asyncio.gather(*asked)

        responses = asyncio.run(five())
        assert [response.status_code for response in responses] == [200] * 5, responses[0].text
        rows = _rows_of(gateway, headers, 6)
        spent = rows["prompt_tokens"] + rows["completion_tokens"]
        head = f"sh:{{k:{made['id']}}}:"

        def books() -> tuple[int, int, int, int]:
            window: Any = raw.hgetall(f"{head}w:shannon-chat")
            days: Any = [raw.get(day) for day in raw.keys(f"{head}day:*")]
            left: Any = [note for note in raw.hvals(f"{head}open") if note != "closed"]
            tokens = sum(int(value) for name, value in window.items() if name[0] == "t")
            requests = sum(int(value) for name, value in window.items() if name[0] == "r")
            return tokens, requests, sum(map(int, days)), len(left)

        wait_until(lambda: books() == (spent, 6, spent, 0), f"{spent} tokens were spent, and the store holds others")
        remaining = [httpx.post(url, json=BODY, headers=headers).status_code for _ in range(6)]
        assert remaining == [200] * 4 + [429] * 2, "the requests of the outage count"


def test_closed_limits_refuse_while_the_store_is_away(tmp_path: Path) -> None:
    with run_store("valkey", tmp_path / "store") as store:
        tree = TREE | {"limits": {"on_store_failure": "closed"}}
        with serve(tmp_path / "gateway", tree, SHANNON_REDIS_URL=store.url) as gateway:
            gateway.wait_until_ready()
            assert gateway.chat(**BODY).status_code == 200
            store.send(signal.SIGKILL)
            refused = gateway.chat(**BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
            assert refused.headers["retry-after"] == "1"
            store.start()
            wait_until(lambda: gateway.chat(**BODY).status_code == 200, "the store is back, and still refused")


def test_usage_of_a_killed_gateway_is_replayed_by_the_next(tmp_path: Path) -> None:
    """Store away, usage journalled, gateway killed, store back, new gateway: nothing is lost, nothing counted twice."""
    with run_store("valkey", tmp_path / "store") as store:
        tree = TREE | {"store": {"data_dir": str(tmp_path / "data")}}
        with serve(tmp_path / "first", tree, SHANNON_REDIS_URL=store.url) as first:
            first.wait_until_ready()
            key = first.key
            assert first.chat(**BODY).status_code == 200
            store.send(signal.SIGKILL)
            for _ in range(5):
                assert first.chat(**BODY).status_code == 200
            first.process.kill()
        store.start()
        with serve(tmp_path / "second", tree, key, SHANNON_REDIS_URL=store.url) as second:
            second.wait_until_ready()
            assert _rows(second, 6)["requests"] == 6
        with serve(tmp_path / "third", tree, key, SHANNON_REDIS_URL=store.url) as third:
            third.wait_until_ready()
            assert _rows(third, 6)["requests"] == 6
