"""A storm: thousands of requests that are read, cut off at every stage, wrong, over their limits or pipelined.

    python -m tests.chaos.storm --requests 10000           against the mock engine
    python -m tests.chaos.storm --requests 1000 --vllm     against vLLM with the demo model

They go to two gateways over one store (vLLM: to one). Meanwhile the store freezes, for shorter and for longer than the
gateways wait for it, and is killed and started again on its data. Afterwards the books must be exact: the ledger equals
the engines' counters, no reservation and no lease is left, the day's budget equals the ledger, and the processes hold
what they held before. Prints what happened, and ends with 1 if something is not so.

It runs in rounds of less than a minute, each with keys of its own: what a round reserved is then still in the window.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from gateway.access.keys import make_key
from tests.chaos.storm_clients import MODEL, Client, Seen
from tests.support.chaos.observed_gateway import ask
from tests.support.gateway_process import UNLIMITED, GatewayProcess, serve
from tests.support.store_server import StoreServer, run_store

CLIENTS = 64
ROUND_REQUESTS = 1000
_SETTLE_S = 30.0

LIMITS: dict[str, dict[str, Any]] = {
    "free": {},
    "few requests": {"limits": {MODEL: {"requests_per_minute": 40}}},
    "few tokens": {"limits": {MODEL: {"tokens_per_minute": 4000}}},
    "few at once": {"limits": {MODEL: {"concurrent_requests": 2}}},
    "few at once, all models": {"max_concurrent_requests": 2},
    "small budget": {"tokens_per_day": 6000},
}
"""The keys of a round, by name."""
FREEZES_S = (0.02, 0.08, 0.4, 1.5, 0.03, 0.2)
"""How long the store stands still, one after the other; the deadline is 0.1 s."""
KILLED_S = 0.3
"""How long it is gone once in each round."""


@dataclass
class Storm:
    """The gateways under test and their store."""

    gateways: list[GatewayProcess]
    store: StoreServer
    observed: list[Path]
    """Where each gateway tells of itself."""
    mock: bool
    seen: Seen = field(default_factory=Seen)
    faults: list[str] = field(default_factory=list)
    """What is not as it must be, in words."""

    @property
    def gateway(self) -> GatewayProcess:
        return self.gateways[0]

    def keys(self, number: int) -> dict[str, str]:
        """Make the keys of a round."""
        made = {}
        for name, fields in LIMITS.items():
            spec = {"name": f"{name} {number}", "tenant": f"t{number}"} | fields
            answer = httpx.post(f"{self.gateway.url}/admin/keys", json=spec, headers=self.gateway.authorization)
            made[name] = str(answer.raise_for_status().json()["key"])
        return made

    async def round(self, number: int, requests: int, rng: random.Random, *, freezes: bool) -> None:
        """Play one round, and look at the books when it is over."""
        keys = await asyncio.to_thread(self.keys, number)
        left = iter(range(requests))
        ports = [int(gateway.url.rpartition(":")[2]) for gateway in self.gateways]
        began = time.monotonic()
        clients = [
            Client(ports[place % len(ports)], keys, self.seen, random.Random(rng.random()), mock=self.mock).run(left)
            for place in range(CLIENTS)
        ]
        over = asyncio.Event()
        freezing = asyncio.create_task(self._freeze(over, rng)) if freezes else None
        await asyncio.gather(*clients)
        over.set()
        if freezing is not None:
            await freezing
        await asyncio.to_thread(self._judge, number, keys, began)

    async def _freeze(self, over: asyncio.Event, rng: random.Random) -> None:
        for place, frozen_s in enumerate(FREEZES_S):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), rng.uniform(0.1, 0.4))
            if over.is_set():
                return
            self.store.send(signal.SIGSTOP)
            try:
                await asyncio.sleep(frozen_s)
            finally:
                self.store.send(signal.SIGCONT)
            self.seen.freezes += 1
            if place == 1:
                self.store.send(signal.SIGKILL)
                await asyncio.sleep(KILLED_S)
                await asyncio.to_thread(self.store.start)
                self.seen.restarts += 1

    def _judge(self, number: int, keys: dict[str, str], began: float) -> None:
        """Wait until nothing runs any more, and note what is not as it must be then."""
        deadline = time.monotonic() + _SETTLE_S
        while (wrong := self._looked(keys)) and time.monotonic() < deadline:
            time.sleep(0.2)
        if time.monotonic() - began > 60:
            wrong.append("the round took longer than the window: make it smaller")
        self.faults += [f"round {number}: {fault}" for fault in wrong]

    def _looked(self, keys: dict[str, str]) -> list[str]:
        try:
            return self._wrong(keys)
        except httpx.HTTPError as error:
            return [f"the gateway can't be asked: {error!r}"]

    def _wrong(self, keys: dict[str, str]) -> list[str]:
        wrong = [fault for gateway in self.gateways for fault in _busy(gateway)]
        if "the store is not back" in wrong:
            return wrong
        wrong += self._wrong_books()
        for name, key in keys.items():
            wrong += [f"key {name!r}: {fault}" for fault in self._wrong_reservations(key.split("-")[2])]
        return wrong

    def _wrong_books(self) -> list[str]:
        """Compare the ledger with the engine's own counters."""
        if self.mock:
            facts = [ask(observed) for observed in self.observed]
            made = {
                "prompt_tokens": sum(of["prompt"] for of in facts),
                "completion_tokens": sum(of["completion"] for of in facts),
                "cached_tokens": 0,
            }
        else:
            self.gateway.chat(messages=[{"role": "user", "content": "Say hello."}], max_tokens=1)  # vLLM steps again
            made = {
                "prompt_tokens": self.gateway.metric("vllm:prompt_tokens_total"),
                "completion_tokens": self.gateway.metric("vllm:generation_tokens_total"),
                "cached_tokens": self.gateway.metric("vllm:prompt_tokens_cached_total"),
            }
        url = f"{self.gateway.url}/v1/usage?key_id=all"
        rows = httpx.get(url, headers=self.gateway.authorization).raise_for_status().json()["data"]
        booked = {name: sum(row[name] for row in rows) for name in made}
        return [
            f"ledger minus engine, {name}: {booked[name] - made[name]:+g}"
            for name in made
            if booked[name] != made[name]
        ]

    def _wrong_reservations(self, key_id: str) -> list[str]:
        client: Any = self.store.client()
        head = f"sh:{{k:{key_id}}}:"
        now = time.time()
        spent = 0
        for name in client.scan_iter(f"{head}u:*"):
            row = {field: int(value) for field, value in client.hgetall(name).items() if not field.startswith("error")}
            spent += row.get("prompt_tokens", 0) + row.get("completion_tokens", 0)
        window = client.hgetall(f"{head}w:{MODEL}")
        held = sum(int(value) for name, value in window.items() if name[0] == "t" and int(name[1:]) > now - 61)
        wrong = [f"the window holds {held} tokens, {spent} were spent"] if held != spent else []
        for place in ("run", f"run:{MODEL}"):
            if running := client.zcount(f"{head}{place}", now * 1000, "+inf"):
                wrong.append(f"{running} leases are left in {place}")
        # An id that must not be made any more is kept for two minutes, should its command still be on the way.
        reservations = client.hgetall(f"{head}open")
        if waiting := [reservation for reservation in reservations.values() if reservation != "closed"]:
            wrong.append(f"{len(waiting)} reservations are not settled, the first holds {waiting[0]}")
        if endless := reservations.keys() - set(client.zrange(f"{head}open:until", 0, -1)):
            wrong.append(f"{len(endless)} ids of reservations are kept for ever")
        for name in client.scan_iter(f"{head}day:*"):
            if (day := int(client.get(name) or 0)) != spent:
                wrong.append(f"the day's budget has {day} tokens, {spent} were spent")
        return wrong

    def compare(self, before: list[dict[str, Any]]) -> None:
        """Note what the processes still hold after a while, and did not before, and what their logs tell."""
        deadline = time.monotonic() + _SETTLE_S
        for observed, held in zip(self.observed, before, strict=True):
            while (more := _more(held, ask(observed))) and time.monotonic() < deadline:
                time.sleep(0.2)
            self.faults += more
        for gateway in self.gateways:
            for error, count in tracebacks(gateway.log.read_text()).items():
                self.faults.append(f"{count} tracebacks in the log end in {error}")

    def table(self) -> str:
        """Return what happened, for people."""
        rows = [("requests", self.seen.requests), ("freezes of the store", self.seen.freezes)]
        rows += [("restarts of the store", self.seen.restarts), ("gateways", len(self.gateways))]
        rows += sorted(self.seen.kinds.items(), key=lambda row: -row[1])
        rows += [(f"status {status}", count) for status, count in sorted(self.seen.statuses.items())]
        rows += [(f"unanswered, {name}", count) for name, count in sorted(self.seen.lost.items())]
        return "\n".join(f"{count:>8}  {name}" for name, count in rows)


def _busy(gateway: GatewayProcess) -> list[str]:
    """Return what a gateway still has to do."""
    metrics = gateway.metrics()
    total = {
        name: sum(value for key, value in metrics.items() if key[0] == name)
        for name in ("shannon_engine_unfinished_requests", "shannon_streams_open", "shannon_usage_journal_bytes")
    }
    busy = [f"{name} is {value:g}" for name, value in total.items() if value]
    busy += [] if gateway.metric("shannon_store_available") else ["the store is not back"]
    return busy + ([] if gateway.ready() else ["/ready is not 200"])


def _more(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what a process holds that it did not hold before."""
    more = []
    if tasks := Counter(after["tasks"]) - Counter(before["tasks"]):
        more.append(f"tasks that were not there before: {dict(tasks)}")
    if after["connections"] > before["connections"]:
        more.append(f"{after['connections']} connections are left")
    if after["files"] > before["files"] + 16:  # a pool of connections to the store may have grown
        more.append(f"{after['files']} files are open, {before['files']} were")
    if after["memory_bytes"] > before["memory_bytes"] + 100 * 2**20:
        more.append(f"{after['memory_bytes'] >> 20} MiB are used, {before['memory_bytes'] >> 20} were")
    return more


def tracebacks(log: str) -> Counter[str]:
    """Return what the tracebacks of a log end in and where, without ids and addresses."""
    found: Counter[str] = Counter()
    inside, place = False, ""
    for line in log.splitlines():
        if line.startswith("Traceback"):
            inside = True
        elif inside and line.startswith('  File "'):
            place = line.strip()
        elif inside and line and not line.startswith((" ", "|", "+")):
            found[f"{re.sub('0x[0-9a-f]+|[0-9a-f]{24,}', '...', line)[:200]}, {place}"] += 1
            inside = False
    return found


def tree(*, mock: bool) -> dict[str, Any]:
    """Return the deployment: few places in the engine, so that requests queue, and a short queue."""
    admission = {"max_in_flight": 24, "max_queued_requests": 48, "max_wait_s": 20}
    args = {"first_token_s": 0.004, "token_s": 0.001, "max_model_len": 4096}
    engine: dict[str, Any] = {"kind": "mock", "args": args, "admission": admission}
    if not mock:
        engine = {"kind": "embedded", "model": "demo", "args": {"max_model_len": 2048}, "admission": admission}
    return {
        "engines": {"main": engine},
        "models": {MODEL: {"limits": UNLIMITED}},
        "store": {"command_timeout_ms": 100},
        "limits": {"failed_auth_per_minute": 100_000},
    }


@contextlib.contextmanager
def prepared(folder: Path, *, mock: bool) -> Iterator[Storm]:
    """Run gateways and their store for a storm."""
    key, module = make_key(), "tests.support.chaos.observed_gateway"
    with run_store("valkey", folder / "store") as store, contextlib.ExitStack() as running:
        storm = Storm([], store, [], mock)
        for name in ("a", "b") if mock else ("a",):
            observed = folder / f"{name}.sock"
            environment = {"SHANNON_REDIS_URL": store.url, "OBSERVED_SOCKET": str(observed)}
            gateway = serve(folder / name, tree(mock=mock), key, module=module, **environment)
            storm.gateways.append(running.enter_context(gateway))
            storm.observed.append(observed)
        for started in storm.gateways:
            started.wait_until_ready()
        yield storm


def run(storm: Storm, requests: int, *, seed: int = 11, freezes: bool = True) -> None:
    """Play a storm, after a small one without freezes that opens what stays open."""
    rng = random.Random(seed)
    asyncio.run(storm.round(0, CLIENTS * 2, rng, freezes=False))
    before = [ask(observed) for observed in storm.observed]
    for number, begin in enumerate(range(0, requests, ROUND_REQUESTS), 1):
        asyncio.run(storm.round(number, min(ROUND_REQUESTS, requests - begin), rng, freezes=freezes))
    storm.compare(before)


def main() -> int:
    parser = argparse.ArgumentParser("storm", description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--vllm", action="store_true", help="vLLM with the demo model in place of the mock engine")
    parser.add_argument("--no-freezes", action="store_true", help="leave the store alone")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="storm-") as folder,
        prepared(Path(folder), mock=not args.vllm) as storm,
    ):
        began = time.monotonic()
        run(storm, args.requests, seed=args.seed, freezes=not args.no_freezes)
        print(storm.table())
        print(f"{time.monotonic() - began:8.1f}  seconds")
        for fault in storm.faults:
            print("WRONG", fault)
        return 1 if storm.faults else 0


if __name__ == "__main__":
    sys.exit(main())
