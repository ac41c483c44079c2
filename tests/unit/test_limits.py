"""Limits: never more than the limit in any 60 s, all or nothing, and what is not used goes back where it came from.

The scripts run inside the bundled Valkey; the age of buckets is simulated by writing them into the window by hand.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from engine.base import GenerationRequest
from engine.mock import MockEngine
from gateway.access.allowance import DIMENSIONS, Standing, allowance_of, today
from gateway.access.auth import Principal
from gateway.access.catalog import ModelSpec
from gateway.access.ledger import Entry, Ledger
from gateway.access.limits import LEASE_S, Limits, Reservation
from gateway.errors import BadRequest, RateLimitExceeded, Unavailable
from gateway.meter import Meter
from gateway.settings.config import LimiterSettings, LimitSettings, ModelSettings, StoreSettings
from gateway.store.client import Store
from gateway.telemetry.metrics import Metrics
from tests.support.store_server import StoreServer

pytestmark = pytest.mark.anyio

MODEL = "shannon-chat"
KEY_ID = "TestKey00001"
CALLER = Principal(KEY_ID)
HEAD = f"sh:{{k:{KEY_ID}}}:"
WINDOW = f"{HEAD}w:{MODEL}"
RUNNING = f"{HEAD}run:{MODEL}"
RUNNING_OF_KEY = f"{HEAD}run"
NOWHERE = {"SHANNON_REDIS_URL": "unix:///nowhere.sock"}


def model(model_id: str = MODEL, /, **limits: int) -> ModelSpec:
    return ModelSpec(
        model_id, ModelSettings(description="General chat completion", limits=LimitSettings(**limits)), MockEngine()
    )


@dataclass
class Bench:
    """Limits and a ledger over one store, and a client that looks into it."""

    limits: Limits
    ledger: Ledger
    store: Store
    raw: redis.Redis

    def now(self) -> int:
        """Return the second that the store's own clock shows."""
        answer: Any = self.raw.time()
        return int(answer[0])

    async def before_the_second_turns(self) -> int:
        """Return a second of the store's clock that lasts long enough for a few commands."""
        while True:
            answer: Any = self.raw.time()
            if answer[1] < 600_000:
                return int(answer[0])
            await asyncio.sleep(0.02)

    def put(self, ages: dict[int, tuple[int, int]], now: int) -> None:
        """Write buckets by hand: age in seconds -> (requests, tokens)."""
        self.raw.delete(WINDOW)
        for age, (requests, tokens) in ages.items():
            self.raw.hset(WINDOW, mapping={f"r{now - age}": requests, f"t{now - age}": tokens})

    def everything(self) -> dict[str, Any]:
        """Return the window, the leases and the day's budget as they stand in the store."""
        return {
            "window": self.raw.hgetall(WINDOW),
            "model": self.raw.zrange(RUNNING, 0, -1),
            "key": self.raw.zrange(RUNNING_OF_KEY, 0, -1),
            "day": self.raw.get(f"{HEAD}day:{today()}"),
        }

    async def reserve(
        self, spec: ModelSpec, *, member: str = "r1", requests: int = 1, tokens: int = 1, caller: Principal = CALLER
    ) -> Reservation:
        return await self.limits.reserve(caller, spec, member, {"requests": requests, "tokens": tokens})

    async def settle(
        self, spec: ModelSpec, reservation: Reservation, used: int, *, lease: str = "", caller: Principal = CALLER
    ) -> Standing:
        entry = Entry(
            key_id=caller.key_id,
            model_id=spec.id,
            allowance=allowance_of(caller, spec),
            requests=1,
            completion_tokens=used,
            lease=lease,
            bucket=reservation.bucket,
            reserved=reservation.amounts,
            counted=reservation.amounts | {"tokens": used},
        )
        standing = await self.ledger.settle(entry)
        assert standing is not None
        return standing


@pytest.fixture
async def bench(store_url: str, store_server: StoreServer, tmp_path: Path) -> AsyncIterator[Bench]:
    store = Store(StoreSettings(command_timeout_ms=2000), {"SHANNON_REDIS_URL": store_url}, Metrics())
    await store.start()
    ledger = Ledger(store, tmp_path)
    with store_server.client() as raw:
        yield Bench(Limits(LimiterSettings(), store, store.metrics), ledger, store, raw)
    await ledger.close()
    await store.close()


def away(**settings: Any) -> Limits:
    """Return limits whose store can't be reached."""
    store = Store(StoreSettings(breaker_s=60), NOWHERE, Metrics())
    return Limits(LimiterSettings(**settings), store, store.metrics)


async def test_reserve_takes_one_request_and_its_tokens(bench: Bench) -> None:
    reservation = await bench.reserve(model(), tokens=12)

    assert bench.raw.hgetall(WINDOW) == {f"r{reservation.bucket}": "1", f"t{reservation.bucket}": "12"}
    assert reservation.standing.remaining["requests"] == 59
    assert reservation.standing.remaining["tokens"] == 200_000 - 12


async def test_further_generations_of_a_request_take_tokens_only(bench: Bench) -> None:
    await bench.reserve(model(requests_per_minute=1), tokens=5)
    reservation = await bench.reserve(model(requests_per_minute=1), requests=0, tokens=5)

    assert reservation.standing.remaining["requests"] == 0
    assert reservation.standing.remaining["tokens"] == 200_000 - 10


@pytest.mark.parametrize(
    ("kind", "limits", "caller", "before", "tokens"),
    [
        ("requests", {"requests_per_minute": 2}, CALLER, 1, 1),
        ("tokens", {"tokens_per_minute": 100}, CALLER, 48, 5),
        ("concurrent", {"concurrent_requests": 2}, CALLER, 1, 1),
        ("concurrent", {}, Principal(KEY_ID, max_concurrent_requests=2), 1, 1),
        ("daily_tokens", {}, Principal(KEY_ID, tokens_per_day=100), 48, 5),
    ],
)
async def test_refused_reserve_takes_nothing_of_any_kind(
    bench: Bench, kind: str, limits: dict[str, int], caller: Principal, before: int, tokens: int
) -> None:
    # Every other kind of limit is set as well, and has room: what a refusal took of it would show.
    spec = model(**({"requests_per_minute": 50, "tokens_per_minute": 1000, "concurrent_requests": 50} | limits))
    caller = Principal(
        KEY_ID,
        max_concurrent_requests=caller.max_concurrent_requests or 50,
        tokens_per_day=caller.tokens_per_day or 1000,
    )
    for number in range(2):
        await bench.reserve(spec, member=f"r{number}", tokens=before, caller=caller)
    before_refusal = bench.everything()
    with pytest.raises(RateLimitExceeded):
        await bench.reserve(spec, member="r2", tokens=tokens, caller=caller)

    assert bench.everything() == before_refusal
    rejections = bench.store.metrics.render().decode()
    assert f'shannon_limit_rejections_total{{kind="{kind}",model="{MODEL}"}} 1.0' in rejections


async def test_refund_goes_to_the_bucket_that_it_came_from(bench: Bench) -> None:
    reservation = await bench.reserve(model(), tokens=100)
    # The reservation is 30 s old when it is settled, and another bucket has been filled since.
    then = reservation.bucket - 30
    bench.put({30: (1, 100), 10: (1, 7)}, reservation.bucket)
    standing = await bench.settle(model(), Reservation(reservation.standing, then, {"tokens": 100}), used=40)

    assert bench.raw.hget(WINDOW, f"t{then}") == "40"
    assert bench.raw.hget(WINDOW, f"t{reservation.bucket - 10}") == "7"
    assert standing.remaining["tokens"] == 200_000 - 47
    assert standing.remaining["requests"] == 58


async def test_refund_of_a_bucket_that_has_left_the_window_gives_nothing(bench: Bench) -> None:
    reservation = await bench.reserve(model(), tokens=100)
    bench.put({0: (1, 7)}, reservation.bucket)
    standing = await bench.settle(
        model(), Reservation(reservation.standing, reservation.bucket - 90, {"tokens": 100}), used=1
    )

    assert standing.remaining["tokens"] == 200_000 - 7
    assert bench.raw.hgetall(WINDOW) == {f"r{reservation.bucket}": "1", f"t{reservation.bucket}": "7"}


@pytest.mark.parametrize(("age", "counts"), [(0, True), (59, True), (60, True), (61, False), (62, False)])
async def test_bucket_counts_until_the_second_61_after_its_own(bench: Bench, age: int, counts: bool) -> None:
    now = await bench.before_the_second_turns()
    bench.put({age: (3, 30)}, now)
    standing = await bench.limits.peek(CALLER, model())

    assert standing is not None
    assert (60 - standing.remaining["requests"], 200_000 - standing.remaining["tokens"]) == (
        (3, 30) if counts else (0, 0)
    )


async def test_buckets_that_have_left_are_deleted(bench: Bench) -> None:
    now = bench.now()
    bench.put({500: (3, 30), 100: (3, 30)}, now)
    await bench.reserve(model())

    assert len(bench.everything()["window"]) == 2
    assert 0 < int(str(bench.raw.ttl(WINDOW))) <= 62


@pytest.mark.parametrize(
    ("ages", "tokens", "frees"),
    [
        ({50: (1, 40), 20: (1, 60)}, 30, 50),  # the oldest is enough
        ({50: (1, 10), 20: (1, 60), 5: (1, 30)}, 60, 20),  # two must leave
        ({50: (1, 10), 20: (1, 60), 5: (1, 30)}, 100, 5),  # all must leave
        ({50: (5, 0), 20: (5, 0)}, 1, 50),  # out of requests
    ],
)
async def test_waiting_as_long_as_told_is_enough_and_no_longer_than_needed(
    bench: Bench, ages: dict[int, tuple[int, int]], tokens: int, frees: int
) -> None:
    spec = model(requests_per_minute=10, tokens_per_minute=100)
    now = await bench.before_the_second_turns()
    bench.put(ages, now)
    with pytest.raises(RateLimitExceeded) as caught:
        await bench.reserve(spec, tokens=tokens)
    told_s = caught.value.retry_after_s

    assert told_s is not None
    assert 61 - frees - 1 < told_s <= 61 - frees
    # As it will look when the client comes back: everything is older by what it was told, in whole seconds.
    now = await bench.before_the_second_turns()
    waited = 61 - frees
    bench.put({age + waited: spent for age, spent in ages.items()}, now)
    await bench.reserve(spec, tokens=tokens)

    bench.put({age + waited - 1: spent for age, spent in ages.items()}, bench.now())
    with pytest.raises(RateLimitExceeded):
        await bench.reserve(spec, tokens=tokens)


async def test_told_wait_is_the_longest_of_all_kinds(bench: Bench) -> None:
    now = await bench.before_the_second_turns()
    bench.put({50: (10, 0), 5: (0, 100)}, now)
    with pytest.raises(RateLimitExceeded, match="tokens per minute") as caught:
        await bench.reserve(model(requests_per_minute=10, tokens_per_minute=100))

    assert caught.value.retry_after_s == pytest.approx(56, abs=1)


async def test_resets_tell_when_everything_has_left(bench: Bench) -> None:
    now = await bench.before_the_second_turns()
    bench.put({40: (1, 0), 20: (0, 9)}, now)
    standing = await bench.limits.peek(CALLER, model())

    assert standing is not None
    assert standing.resets["requests"] == now - 40 + 61
    assert standing.resets["tokens"] == now - 20 + 61


async def test_resets_of_an_empty_window_are_now(bench: Bench) -> None:
    now = await bench.before_the_second_turns()
    standing = await bench.limits.peek(CALLER, model())

    assert standing is not None
    assert (standing.resets["requests"], standing.resets["tokens"]) == (now, now)


async def test_peek_takes_nothing(bench: Bench) -> None:
    caller = Principal(KEY_ID, max_concurrent_requests=1, tokens_per_day=10)
    for _ in range(3):
        standing = await bench.limits.peek(caller, model(requests_per_minute=1, concurrent_requests=1))
        assert standing is not None
        assert standing.remaining["requests"] == 1

    assert bench.everything() == {"window": {}, "model": [], "key": [], "day": None}


async def test_own_limits_of_a_key_override_the_models(bench: Bench) -> None:
    caller = Principal(KEY_ID, limits={MODEL: {"requests_per_minute": 2}})
    reservation = await bench.reserve(model(requests_per_minute=60, tokens_per_minute=500), caller=caller)

    assert reservation.standing.allowance.per_minute == (("requests", 2), ("tokens", 500))
    other = await bench.reserve(model("other", requests_per_minute=60), caller=caller)
    assert dict(other.standing.allowance.per_minute)["requests"] == 60


async def test_models_and_keys_have_windows_of_their_own(bench: Bench) -> None:
    spec = model(requests_per_minute=1)
    await bench.reserve(spec)
    await bench.reserve(model("other", requests_per_minute=1))
    await bench.reserve(spec, caller=Principal("OtherKey0001"))
    with pytest.raises(RateLimitExceeded):
        await bench.reserve(spec)


async def test_settled_request_frees_its_lease(bench: Bench) -> None:
    spec = model(concurrent_requests=1)
    reservation = await bench.reserve(spec)
    with pytest.raises(RateLimitExceeded, match="concurrent requests"):
        await bench.reserve(spec, member="r2")
    await bench.settle(spec, reservation, 1, lease="r1")
    await bench.reserve(spec, member="r2")

    assert bench.raw.zrange(RUNNING, 0, -1) == ["r2"]


async def test_concurrent_limit_of_a_key_spans_models(bench: Bench) -> None:
    caller = Principal(KEY_ID, max_concurrent_requests=1)
    await bench.reserve(model(), caller=caller)
    with pytest.raises(RateLimitExceeded, match="concurrent requests"):
        await bench.reserve(model("other"), member="r2", caller=caller)


async def test_lease_that_nobody_settled_expires(bench: Bench) -> None:
    spec = model(concurrent_requests=1)
    await bench.reserve(spec)
    leases: Any = bench.raw.zrange(RUNNING, 0, -1, withscores=True)
    assert [member for member, _ in leases] == ["r1"]
    assert leases[0][1] / 1000 == pytest.approx(bench.now() + LEASE_S, abs=2)
    bench.raw.zadd(RUNNING, {"r1": bench.now() * 1000 - 1})
    await bench.reserve(spec, member="r2")

    assert bench.raw.zrange(RUNNING, 0, -1) == ["r2"]


async def test_further_generation_is_not_refused_for_its_own_request(bench: Bench) -> None:
    spec = model(concurrent_requests=1)
    await bench.reserve(spec)
    await bench.reserve(spec, requests=0)

    assert bench.raw.zcard(RUNNING) == 1


async def test_daily_budget_counts_what_was_used_over_all_models(bench: Bench) -> None:
    caller = Principal(KEY_ID, tokens_per_day=100)
    reservation = await bench.reserve(model(), tokens=80, caller=caller)
    await bench.settle(model(), reservation, 30, caller=caller)
    await bench.reserve(model("other"), tokens=70, caller=caller)
    with pytest.raises(RateLimitExceeded, match="tokens per day") as caught:
        await bench.reserve(model(), tokens=1, caller=caller)

    assert bench.raw.get(f"{HEAD}day:{today()}") == "100"
    assert caught.value.retry_after_s == pytest.approx(86_400 - bench.now() % 86_400, abs=2)


async def test_refund_after_midnight_leaves_the_new_days_budget_alone(bench: Bench) -> None:
    caller = Principal(KEY_ID, tokens_per_day=100)
    bucket = bench.now() // 86_400 * 86_400 - 1  # the last second of yesterday
    bench.raw.set(f"{HEAD}day:{today()}", 10)
    reservation = await bench.reserve(model(), tokens=1, caller=caller)
    await bench.settle(model(), Reservation(reservation.standing, bucket, {"tokens": 50}), 20, caller=caller)

    assert bench.raw.get(f"{HEAD}day:{today()}") == "11"


@pytest.mark.parametrize(
    ("caller", "most"), [(CALLER, 100), (Principal(KEY_ID, tokens_per_day=50), 50)], ids=["minute", "day"]
)
async def test_tokens_that_could_never_fit_are_a_bad_request(bench: Bench, caller: Principal, most: int) -> None:
    spec = model(tokens_per_minute=100)
    with pytest.raises(BadRequest, match=f"needs {most + 1} tokens.*is {most}") as caught:
        await bench.reserve(spec, tokens=most + 1, caller=caller)

    assert caught.value.code == "tokens_exceed_limit"
    await bench.reserve(spec, tokens=most, caller=caller)


async def test_default_max_tokens_are_bounded_by_what_the_limit_could_admit(bench: Bench) -> None:
    spec = model(tokens_per_minute=50)
    await spec.engine.start()
    meter = Meter("r1", CALLER, spec, bench.limits, bench.ledger, bench.store.metrics)
    request = GenerationRequest(
        request_id="r1", messages=[{"role": "user", "content": "hello there"}], default_max_tokens=4096
    )
    prepared = await meter.prepare(request)

    assert (prepared.prompt_tokens, prepared.max_tokens) == (3, 47)
    assert [delta.text async for delta in meter.generate(prepared)]


async def test_limits_that_are_off_admit_what_could_never_fit(bench: Bench) -> None:
    limits = Limits(LimiterSettings(enabled=False), bench.store, bench.store.metrics)
    for _ in range(3):
        await limits.reserve(
            CALLER, model(requests_per_minute=1, tokens_per_minute=10), "r1", {"requests": 1, "tokens": 4096}
        )

    assert bench.raw.exists(WINDOW) == 0


@given(st.integers(1, 10**9), st.integers(0, 10**9), st.integers(-100, 10**6))
def test_headers_are_the_six_and_never_negative(limit: int, reset: int, remaining: int) -> None:
    allowance = allowance_of(Principal("k", limits={MODEL: {"requests_per_minute": limit}}), model())
    headers = Standing(allowance, dict.fromkeys(DIMENSIONS, remaining), dict.fromkeys(DIMENSIONS, reset)).headers()

    assert headers.keys() == {
        f"X-RateLimit-{kind}-{of}" for kind in ("Limit", "Remaining", "Reset") for of in ("Requests", "Tokens")
    }
    assert headers["X-RateLimit-Limit-Requests"] == str(limit)
    assert headers["X-RateLimit-Remaining-Tokens"] == str(max(0, remaining))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", headers["X-RateLimit-Reset-Requests"])


async def test_share_of_a_process_is_enforced_while_the_store_is_away() -> None:
    limits = away(replicas=3)
    spec = model(requests_per_minute=7)
    standings = [
        (await limits.reserve(CALLER, spec, f"r{number}", {"requests": 1, "tokens": 1})).standing for number in range(2)
    ]
    with pytest.raises(RateLimitExceeded) as caught:
        await limits.reserve(CALLER, spec, "r2", {"requests": 1, "tokens": 1})

    assert [standing.remaining["requests"] for standing in standings] == [1, 0]
    assert all(standing.headers()["X-Shannon-Limits"] == "local" for standing in standings)
    assert caught.value.extra_headers["X-Shannon-Limits"] == "local"
    assert caught.value.retry_after_s == pytest.approx(61, abs=1.5)


async def test_share_of_tokens_is_enforced_while_the_store_is_away() -> None:
    limits = away(replicas=2)
    spec = model(tokens_per_minute=100)
    await limits.reserve(CALLER, spec, "r1", {"requests": 1, "tokens": 40})
    with pytest.raises(RateLimitExceeded, match="tokens per minute"):
        await limits.reserve(CALLER, spec, "r2", {"requests": 1, "tokens": 20})
    await limits.reserve(CALLER, spec, "r3", {"requests": 1, "tokens": 10})


async def test_share_is_never_less_than_one_request() -> None:
    limits = away(replicas=10)
    await limits.reserve(
        CALLER, model(requests_per_minute=5, tokens_per_minute=50), "r1", {"requests": 1, "tokens": 50}
    )


async def test_local_decisions_are_counted() -> None:
    limits = away()
    await limits.reserve(CALLER, model(), "r1", {"requests": 1, "tokens": 1})

    assert b"shannon_limits_local_total 1.0" in limits._metrics.render()


async def test_nothing_is_let_in_while_the_store_is_away_if_so_configured() -> None:
    limits = away(on_store_failure="closed")
    with pytest.raises(Unavailable) as caught:
        await limits.reserve(CALLER, model(), "r1", {"requests": 1, "tokens": 1})

    assert caught.value.retry_after_s == 1.0


async def test_standing_while_the_store_is_away_is_this_processs_own() -> None:
    standing = await away().peek(CALLER, model())

    assert standing is not None
    assert standing.headers()["X-Shannon-Limits"] == "local"
