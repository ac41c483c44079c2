"""Reservations: whatever becomes of the command that makes one, its answer, and its gateway, the window and the day
hold what was spent and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.base import GenerationRequest
from engine.mock import MockEngine
from gateway.access.allowance import Allowance, day_number, day_of, limit_keys
from gateway.access.auth import Principal
from gateway.access.catalog import ModelSpec
from gateway.access.ledger import Entry, Ledger
from gateway.access.limits import Limits, Reservation
from gateway.access.local_limits import LocalWindow
from gateway.errors import RateLimitExceeded, Unavailable
from gateway.meter import Meter
from gateway.settings.config import LimiterSettings, LimitSettings, ModelSettings, StoreSettings
from gateway.store.client import Store
from gateway.store.script import Script
from gateway.telemetry.metrics import Metrics
from tests.support.store_server import StoreServer, run_store
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

MODEL = "shannon-chat"
KEY_ID = "TestKey00001"
HEAD = f"sh:{{k:{KEY_ID}}}:"
BUDGET = 100_000
CALLER = Principal(KEY_ID, tokens_per_day=BUDGET)
RESERVE = Script("window", "reservation", "reserve", when_full=True)
HOLD = Script("window", "reservation", "hold", when_full=True)
ALLOWANCE = Allowance.of(requests_per_minute=60, tokens_per_minute=1000)


def spec(**limits: int) -> ModelSpec:
    return ModelSpec(MODEL, ModelSettings(description="d", limits=LimitSettings(**limits)), MockEngine())


@dataclass
class Bench:
    """Limits and a ledger over one store, wired as the app wires them, and a client that looks into the store."""

    store: Store
    limits: Limits
    ledger: Ledger
    raw: redis.Redis
    left: list[Reservation] = field(default_factory=list)

    def held(self) -> dict[str, int]:
        """Return what the store's window, day and open reservations hold."""
        window: Any = self.raw.hgetall(f"{HEAD}w:{MODEL}")
        day: Any = self.raw.get(f"{HEAD}day:{day_of(self.store.state.time_s())}")
        notes: Any = self.raw.hvals(f"{HEAD}open")
        return {
            "tokens": sum(int(value) for name, value in window.items() if name[0] == "t"),
            "requests": sum(int(value) for name, value in window.items() if name[0] == "r"),
            "day": int(day or 0),
            "open": len([note for note in notes if note != "closed"]),
        }

    def end_leases(self) -> None:
        """Let the leases of all reservations run out."""
        ids: Any = self.raw.hkeys(f"{HEAD}open")
        self.raw.zadd(f"{HEAD}open:until", dict.fromkeys(ids, 1))

    async def reserve(self, model: ModelSpec, member: str = "r1", tokens: int = 900, **more: Any) -> Reservation:
        options: dict[str, Any] = {"caller": CALLER, "requests": 1} | more
        wanted = {"requests": options["requests"], "tokens": tokens}
        return await self.limits.reserve(options["caller"], model, member, wanted, left=self.left.append)

    def settle(self, model: ModelSpec, reservation: Reservation, spent: int, lease: str = "") -> asyncio.Future[Any]:
        """Settle a reservation as the meter does."""
        meter = Meter(lease or "r", CALLER, model, self.limits, self.ledger, self.store.metrics)
        entry = meter.account._entry(None)
        entry.completion_tokens = spent
        meter.account._release(reservation, entry, ran=not reservation.refused)
        entry.lease = lease
        if lease:
            self.limits.end(lease)
        return self.ledger.settle(entry)


@contextlib.asynccontextmanager
async def bench_on(url: str, folder: Path, raw: redis.Redis, **limiter: Any) -> AsyncGenerator[Bench]:
    store = Store(
        StoreSettings(command_timeout_ms=limiter.pop("timeout_ms", 100), breaker_s=0.02),
        {"SHANNON_REDIS_URL": url},
        Metrics(),
    )
    await store.start()
    limits, ledger = Limits(LimiterSettings(**limiter), store, store.metrics), Ledger(store, folder)
    ledger.on_charged = limits.charged
    try:
        yield Bench(store, limits, ledger, raw)
    finally:
        limits.close()
        await ledger.close()
        await store.close()


@pytest.fixture
async def bench(store_url: str, store_server: StoreServer, tmp_path: Path) -> AsyncGenerator[Bench]:
    with store_server.client() as raw:
        async with bench_on(store_url, tmp_path, raw, timeout_ms=2000) as bench:
            yield bench


@pytest.fixture(params=["valkey", "redis"])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreServer]:
    """A server of the test's own, to freeze and kill."""
    with run_store(request.param, tmp_path / "s") as server:
        yield server


@contextlib.contextmanager
def frozen(server: StoreServer) -> Iterator[None]:
    server.send(signal.SIGSTOP)
    try:
        yield
    finally:
        server.send(signal.SIGCONT)


async def test_requests_in_flight_through_a_freeze_leave_only_what_they_spent(own: StoreServer, tmp_path: Path) -> None:
    model = spec()
    with own.client() as raw:
        async with bench_on(own.url, tmp_path, raw) as bench:
            before = await bench.reserve(model, "before")
            with frozen(own):
                during = await asyncio.gather(*(bench.reserve(model, f"r{number}") for number in range(5)))
                assert all(reservation.standing.local for reservation in during)
                early = bench.settle(model, during[0], 14)
                await bench.settle(model, before, 14)
            await early
            await until(lambda: bench.store.available and not bench.ledger.journal_bytes)
            await until(lambda: bench.held()["open"] == 4)  # what still runs is known to the store again
            assert bench.held()["tokens"] == 2 * 14 + 4 * 900
            await asyncio.gather(*(bench.settle(model, reservation, 14) for reservation in during[1:]))

            assert bench.held() == {"tokens": 84, "requests": 6, "day": 84, "open": 0}


@pytest.mark.parametrize("policy", ["local", "closed"])
async def test_reservation_whose_caller_was_refused_leaves_nothing(
    own: StoreServer, tmp_path: Path, policy: str
) -> None:
    model = spec(requests_per_minute=1)
    with own.client() as raw:
        async with bench_on(own.url, tmp_path, raw, on_store_failure=policy) as bench:
            await bench.settle(model, await bench.reserve(model, "first"), 5)
            with frozen(own), pytest.raises((RateLimitExceeded, Unavailable)):
                await bench.reserve(model, "second")
            for reservation in bench.left:  # as the meter does
                bench.settle(model, reservation, 0)
            assert [reservation.refused for reservation in bench.left] == [True]
            await until(lambda: bench.store.available and not bench.ledger.journal_bytes)

            assert bench.held() == {"tokens": 5, "requests": 1, "day": 5, "open": 0}


async def test_command_whose_connection_died_leaves_only_what_was_spent(own: StoreServer, tmp_path: Path) -> None:
    """The server runs the script, and the client never learns of it."""
    model = spec()
    with own.client() as raw:
        async with bench_on(own.url, tmp_path, raw) as bench:
            send = bench.store._send

            async def send_and_lose(commands: list[Any]) -> list[Any]:
                answers = await send(commands)
                if any(command[0] is not None and isinstance(command[0], Script) for command in commands):
                    raise ConnectionResetError("the connection died")
                return answers

            bench.store._send = send_and_lose  # type: ignore[method-assign]
            reservation = await bench.reserve(model)
            bench.store._send = send  # type: ignore[method-assign]
            assert reservation.standing.local
            assert bench.held()["tokens"] == 900, "the script ran"
            await bench.settle(model, reservation, 14)
            await until(lambda: bench.store.available and not bench.ledger.journal_bytes)

            assert bench.held() == {"tokens": 14, "requests": 1, "day": 14, "open": 0}


async def test_reservation_of_a_killed_gateway_is_given_back_to_the_day(bench: Bench, monkeypatch: Any) -> None:
    model = spec()
    await bench.reserve(model, "dead", 900)
    bench.end_leases()
    alive = await bench.reserve(model, "alive", 100)
    await bench.settle(model, alive, 7)

    assert bench.held()["day"] == 7
    assert bench.held()["open"] == 0


async def test_reservation_that_was_given_back_is_charged_when_it_is_settled_after_all(bench: Bench) -> None:
    """A gateway that did not run for longer than a lease."""
    model = spec()
    late = await bench.reserve(model, "late", 900)
    bench.end_leases()
    await bench.limits.peek(CALLER, model)
    assert bench.held()["day"] == 0
    await bench.settle(model, late, 14)

    assert bench.held()["day"] == 14


async def test_parts_of_one_reservation_are_settled_one_by_one(bench: Bench) -> None:
    model = spec()
    await model.engine.start()
    meter = Meter("r1", CALLER, model, bench.limits, bench.ledger, bench.store.metrics)
    prepared = []
    for number in range(3):
        request = GenerationRequest(
            request_id=f"r1-{number}", messages=[{"role": "user", "content": "hello there"}], max_tokens=50
        )
        prepared.append(await meter.prepare(request))
    async with meter.reserved(prepared):
        assert bench.held()["tokens"] == 3 * 53
        for one in prepared[:2]:
            async for _ in meter.generate(one):
                pass

    spent = 2 * 3 + sum(one.usage.completion_tokens for one in prepared)
    assert bench.held() == {"tokens": spent, "requests": 1, "day": spent, "open": 0}


async def test_request_without_tokens_counts_and_leaves_nothing_to_settle(bench: Bench) -> None:
    meter = Meter("r1", CALLER, spec(), bench.limits, bench.ledger, bench.store.metrics)
    async with meter.counted():
        await meter.count()

    assert bench.held() == {"tokens": 0, "requests": 1, "day": 0, "open": 0}
    assert not bench.limits._leases._held


async def test_late_question_is_refused_and_asked_again_by_whom_still_waits(bench: Bench) -> None:
    bench.store.state.set_clock(time.time() - 3600)  # the server's clock has been put forward since
    reservation = await bench.reserve(spec())

    assert not reservation.standing.local
    assert bench.held() == {"tokens": 900, "requests": 1, "day": 900, "open": 1}
    assert bench.store.state.time_s() == pytest.approx(time.time(), abs=5)


async def test_day_is_that_of_the_stores_clock(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    today = day_of(bench.store.state.time_s())
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86_400)  # this gateway believes that it is tomorrow
    reservation = await bench.reserve(spec())
    assert bench.raw.get(f"{HEAD}day:{today}") == "900"
    await bench.settle(spec(), reservation, 14)

    assert bench.raw.get(f"{HEAD}day:{today}") == "14"
    assert bench.raw.keys(f"{HEAD}day:*") == [f"{HEAD}day:{today}"]


def _reserve(id_: str, now: float, tokens: int, *, late: bool = False, lease_ms: int = 120_000) -> Any:
    arguments = [id_, "member", f"r1 t{tokens}", f"r1000 t{10**6}", "r0 t0", 0, 0, BUDGET, lease_ms]
    return RESERVE.call(limit_keys(KEY_ID, MODEL, now), [*arguments, 1 if late else 0, day_number(now), 0])


def _hold(id_: str, now: float, tokens: int) -> Any:
    arguments = [120_000, day_number(now), BUDGET, 0, 0, 1, 1, id_, int(now), f"r1 t{tokens}"]
    return HOLD.call(limit_keys(KEY_ID, MODEL, now), arguments)


Steps = st.lists(st.sampled_from(["made", "made again", "late", "held", "settled", "settled again"]), max_size=12)


@given(st.lists(st.tuples(Steps, st.integers(1, 900), st.integers(0, 900)), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_order_of_commands_leaves_what_was_spent(
    bench: Bench, reservations: list[tuple[list[str], int, int]]
) -> None:
    """Whatever arrives in whatever order and number, each reservation is settled once and counts once."""
    bench.raw.flushall()
    now, spent_in_all = bench.store.state.time_s(), 0
    for index, (steps, tokens, wanted) in enumerate(reservations):
        id_, spent = f"p:{index}", min(tokens, wanted)
        entry = Entry(
            key_id=KEY_ID,
            model_id=MODEL,
            allowance=Allowance.of(requests_per_minute=1000, tokens_per_minute=10**6, tokens_per_day=BUDGET),
            completion_tokens=spent,
            reserved={"requests": 1, "tokens": tokens},
            counted={"requests": 1, "tokens": spent},
            reservation=id_,
            second=int(now),
            uncertain=True,
            number=index + 1,
        )
        commands = {
            "made": _reserve(id_, now, tokens),
            "made again": _reserve(id_, now, tokens),
            "late": _reserve(id_, now, tokens, late=True),
            "held": _hold(id_, now, tokens),
            "settled": entry.command("p"),
            "settled again": entry.command("p"),
        }
        for step in [*steps, "settled"]:
            await bench.store.run(*commands[step])
        spent_in_all += spent

    count = len(reservations)
    assert bench.held() == {"tokens": spent_in_all, "requests": count, "day": spent_in_all, "open": 0}


async def test_everything_a_key_holds_in_the_store_ends(bench: Bench) -> None:
    """But for its record: no limit or ledger key is without a time to live."""
    caller = Principal(KEY_ID, tokens_per_day=BUDGET, max_concurrent_requests=5)
    model = spec(concurrent_requests=5)
    for number in range(3):
        reservation = await bench.reserve(model, f"r{number}", caller=caller)
        await bench.settle(model, reservation, 5, lease=f"r{number}" if number else "")
    unsettled = [str(key) for key in bench.raw.keys(f"{HEAD}*") if int(str(bench.raw.ttl(str(key)))) < 0]

    assert unsettled == []


async def test_replay_of_a_journal_leaves_the_limits_their_lane(
    own: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of entries that took longer than the limits wait would call the store away, for ever."""
    with own.client() as raw:
        async with bench_on(own.url, tmp_path, raw) as bench:
            entry = Entry(
                key_id=KEY_ID,
                model_id=MODEL,
                allowance=ALLOWANCE,
                requests=1,
            )
            with frozen(own):
                await bench.ledger.settle(entry)
                for _ in range(300):
                    await bench.ledger.settle(dataclasses.replace(entry))
            largest = 0
            send = bench.store._send

            async def watched(commands: list[Any]) -> list[Any]:
                nonlocal largest
                largest = max(largest, len(commands))
                return await send(commands)

            monkeypatch.setattr(bench.store, "_send", watched)
            await until(lambda: bench.store.available and not bench.ledger.journal_bytes)
            assert largest <= 2
            assert (await bench.ledger.totals(KEY_ID))[0]["requests"] == 301


async def test_clock_that_was_set_back_locks_nobody_out(bench: Bench) -> None:
    """A store that fails over may find itself an hour earlier than what is in its windows."""
    model = spec(requests_per_minute=1, tokens_per_minute=1000)
    bench.raw.hset(f"{HEAD}w:{MODEL}", mapping={f"{kind}{int(time.time()) + 3600}": 1000 for kind in "rt"})
    reservation = await bench.limits.reserve(CALLER, model, "r", {"requests": 1, "tokens": 100})
    assert (reservation.standing.remaining["requests"], reservation.standing.remaining["tokens"]) == (0, 900)
    window = LocalWindow()
    window.add(int(time.time()) + 3600, {"requests": 1000, "tokens": 1000}, pending=False)
    assert window.wait_s("requests", 1, 1, 1, time.time()) == 0
    reservation.standing.resets["requests"] = int(time.time()) + 3600
    window.note(reservation.standing, time.time())
    assert window.wait_s("requests", 1, 1, 1, time.time()) <= 2 * 61


async def test_keys_with_usage_are_listed_again_by_a_store_that_lost_them(own: StoreServer, tmp_path: Path) -> None:
    with own.client() as raw:
        async with bench_on(own.url, tmp_path, raw) as bench:
            entry = Entry(
                key_id=KEY_ID,
                model_id=MODEL,
                allowance=ALLOWANCE,
                requests=1,
            )
            await bench.ledger.settle(entry)
            raw.flushall()
            own.send(signal.SIGKILL)
            await until(lambda: not bench.store.available or not bench.ledger.settle(entry))
            own.start()
            await until(lambda: bench.store.available and not bench.ledger.journal_bytes)
            assert await bench.ledger.key_ids() == [KEY_ID]


async def test_gateways_that_are_gone_are_forgotten(bench: Bench) -> None:
    """The record of what each gateway process has applied does not grow with every restart."""
    entry = Entry(key_id=KEY_ID, model_id=MODEL, allowance=ALLOWANCE, number=1)
    await bench.store.run(*entry.command("old"))
    bench.raw.zadd(f"{HEAD}applied:at", {"old": time.time() - 31 * 86_400})
    await bench.store.run(*entry.command("new"))

    assert bench.raw.hkeys(f"{HEAD}applied") == ["new"]


async def test_days_whose_usage_is_gone_leave_the_index(bench: Bench) -> None:
    bench.raw.sadd(f"{HEAD}days", "2019-01-01:shannon-chat")
    entry = Entry(
        key_id=KEY_ID,
        model_id=MODEL,
        allowance=ALLOWANCE,
        day="2026-02-03",
        number=1,
    )
    await bench.store.run(*entry.command("p"))

    assert bench.raw.smembers(f"{HEAD}days") == {"2026-02-03:shannon-chat"}


async def test_error_codes_of_a_day_are_bounded(bench: Bench) -> None:
    for number in range(1, 200):
        entry = Entry(
            key_id=KEY_ID,
            model_id=MODEL,
            allowance=ALLOWANCE,
            error=f"odd_{number}",
            number=number,
            day="d",
        )
        await bench.store.run(*entry.command("p"))

    row: Any = bench.raw.hgetall(f"{HEAD}u:d:{MODEL}")
    assert len(row) <= 65
    assert sum(map(int, row.values())) == 199


async def test_entry_behind_one_that_failed_waits_for_it(bench: Bench) -> None:
    """Of a pipeline the first command may fail where the second does not; numbers would then hide the first."""
    first, second = (
        Entry(
            key_id=KEY_ID,
            model_id=MODEL,
            allowance=ALLOWANCE,
            requests=1,
            number=number,
            day="d",
        )
        for number in (1, 2)
    )
    answer = await bench.store.run(*second.command("p", after=1))
    assert answer[0] == -1
    await bench.store.run(*first.command("p"))
    assert (await bench.store.run(*second.command("p", after=1)))[0] == 1

    assert bench.raw.hget(f"{HEAD}u:d:{MODEL}", "requests") == "2"


# Leases


async def test_long_generation_keeps_its_lease(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.access.limits.LEASE_S", 0.4)
    caller = Principal(KEY_ID, tokens_per_day=BUDGET, max_concurrent_requests=1)
    model = spec(concurrent_requests=1)
    reservation = await bench.reserve(model, "long", caller=caller)
    first: Any = bench.raw.zscore(f"{HEAD}run", "long")
    await until(lambda: (bench.raw.zscore(f"{HEAD}run", "long") or 0) > first + 400)
    with pytest.raises(RateLimitExceeded, match="concurrent"):
        await bench.reserve(model, "other", caller=caller)
    await bench.settle(model, reservation, 14, lease="long")

    assert bench.raw.zcard(f"{HEAD}run") == 0
    assert bench.held() == {"tokens": 14, "requests": 1, "day": 14, "open": 0}


async def test_renewal_is_one_command_for_many(bench: Bench) -> None:
    model = spec(requests_per_minute=100, tokens_per_minute=10**6)
    reservations = [await bench.reserve(model, f"r{number}", 10) for number in range(50)]
    sent: list[Any] = []
    send = bench.store._send

    async def watch(commands: list[Any]) -> list[Any]:
        sent.extend(commands)
        return await send(commands)

    bench.store._send = watch  # type: ignore[method-assign]
    bench.limits._leases._start(list(bench.limits._leases._held.values()), [], restore=False)
    await until(lambda: not bench.limits._leases._renewals)

    assert len(sent) == 1
    for reservation in reservations:
        await bench.settle(model, reservation, 1)


async def test_running_requests_count_again_after_the_store_lost_them(own: StoreServer, tmp_path: Path) -> None:
    caller = Principal(KEY_ID, max_concurrent_requests=2)
    model = spec(concurrent_requests=2)
    with own.client() as raw:
        async with bench_on(own.url, tmp_path, raw) as bench:
            for number in range(2):
                await bench.reserve(model, f"r{number}", caller=caller)
            own.send(signal.SIGKILL)
            with pytest.raises(RateLimitExceeded, match="concurrent"):
                await bench.reserve(model, "more", caller=caller)
            own.start()
            with own.client() as again:
                again.flushall()
                await until(lambda: bench.store.available)
                await until(lambda: again.zcard(f"{HEAD}run") == 2)


# The local window


@pytest.mark.parametrize(
    ("limits", "caller", "passes"),
    [
        ({"requests_per_minute": 5}, Principal(KEY_ID), 5),
        ({"tokens_per_minute": 500}, Principal(KEY_ID), 5),
        ({}, Principal(KEY_ID, tokens_per_day=500), 5),
        ({"concurrent_requests": 5}, Principal(KEY_ID), 5),
        ({}, Principal(KEY_ID, max_concurrent_requests=5), 5),
    ],
    ids=["requests", "tokens", "day", "concurrent", "concurrent of key"],
)
@pytest.mark.parametrize("before", [0, 2, 5])
async def test_freeze_lets_no_more_pass_than_the_limit(
    own: StoreServer, tmp_path: Path, limits: dict[str, int], caller: Principal, passes: int, before: int
) -> None:
    """Before, during and after it, all together."""
    model = spec(**limits)
    passed = 0

    async def attempt(bench: Bench, count: int) -> int:
        got = 0
        for _ in range(count):
            with contextlib.suppress(RateLimitExceeded):
                await bench.reserve(model, f"r{time.monotonic_ns()}", 100, caller=caller)
                got += 1
        return got

    with own.client() as raw:
        async with bench_on(own.url, tmp_path, raw) as bench:
            passed += await attempt(bench, before)
            with frozen(own):
                passed += await attempt(bench, 3)
            await until(lambda: bench.store.available)
            passed += await attempt(bench, 10)

            assert passed == passes


async def test_what_passed_locally_and_ended_counts_before_the_store_has_it(own: StoreServer, tmp_path: Path) -> None:
    """The journal may take a while: until it is replayed the gateway tells the store what it does not know."""
    model = spec(requests_per_minute=5)
    with own.client() as raw:
        async with bench_on(own.url, tmp_path, raw) as bench:
            with frozen(own):
                for number in range(5):
                    await bench.settle(model, await bench.reserve(model, f"r{number}"), 14)
                bench.ledger._replayer.cancel()  # type: ignore[union-attr]
            await until(lambda: bench.store.available)
            assert bench.held()["requests"] <= 1, "the first of them may have been on its way"
            with pytest.raises(RateLimitExceeded):
                await bench.reserve(model, "more")


async def test_other_gateways_usage_counts_locally_until_it_leaves_the_window(
    own: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = spec(requests_per_minute=5)
    with own.client() as raw:
        async with bench_on(own.url, tmp_path, raw) as bench:
            now = int(bench.store.state.time_s())
            raw.hset(f"{HEAD}w:{MODEL}", mapping={f"r{now - 30}": 3, f"t{now - 30}": 30})
            await bench.reserve(model, "r1", 10)
            with frozen(own):
                await bench.reserve(model, "r2", 10)
                with pytest.raises(RateLimitExceeded) as caught:
                    await bench.reserve(model, "r3", 10)
                assert caught.value.retry_after_s == pytest.approx(61, abs=2), (
                    "it can't tell which of them leaves first"
                )
                bench.store.state.set_clock(bench.store.state.time_s() + 62)
                await bench.reserve(model, "r3", 10)
