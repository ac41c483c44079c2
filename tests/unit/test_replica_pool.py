"""Replicas: when one is left alone, which one a request goes to, and where it is tried again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter

import pytest

from engine.base import EngineOverloaded, EngineUnavailable, InvalidRequest, not_offered
from engine.remote.pool import RULES, AttemptFailed, Attempts, Choice, Outcome, Pool, Replica, ReplicaBreaker, blame
from tests.support.waiting import FakeClock

pytestmark = pytest.mark.anyio

GONE = AttemptFailed("unreachable", "could not be reached")
FULL = AttemptFailed("overloaded", "answered 429", retry_after_s=7.0)


def breaker(clock: FakeClock | None = None) -> ReplicaBreaker:
    return ReplicaBreaker(failures=3, open_s=1.0, max_open_s=4.0, clock=clock or FakeClock())


def pool(count: int = 2, choice: Choice = "least_loaded", clock: FakeClock | None = None) -> Pool:
    return Pool([Replica(f"http://replica-{number}/v1", breaker(clock)) for number in range(count)], choice)


def opened(clock: FakeClock | None = None) -> ReplicaBreaker:
    one = breaker(clock)
    one.open()
    return one


def test_failures_in_a_row_ask_for_a_probe_and_open_nothing_by_themselves() -> None:
    one = breaker()
    for _ in range(2):
        one.doubt()
    one.succeed()
    for _ in range(2):
        one.doubt()
    assert not one.suspected

    one.doubt()

    assert (one.suspected, one.state) == (True, "closed")
    one.clear()
    for _ in range(2):
        one.doubt()
    assert (one.suspected, one.state) == (False, "closed"), "they are counted from the start again"


def test_requests_that_others_served_open_the_breaker_without_a_probe() -> None:
    one = breaker()
    for _ in range(2):
        one.fail()
    one.succeed()
    for _ in range(2):
        one.fail()
    assert one.state == "closed"

    one.fail()

    assert (one.state, one.suspected, one.needs_probe.is_set()) == ("open", False, True)


def test_open_time_doubles_up_to_its_most() -> None:
    clock = FakeClock()
    one = breaker(clock)
    waits_s = []
    for _ in range(4):
        one.open()
        waits_s.append(one.wait_s)

    assert waits_s == [1.0, 2.0, 4.0, 4.0]
    clock.advance(3.0)
    assert one.wait_s == 1.0
    clock.advance(3.0)
    assert one.wait_s == 0.0


def test_failures_of_an_open_breakers_past_do_not_prolong_it() -> None:
    one = opened()
    for _ in range(10):
        one.doubt()
        one.fail()

    assert one.wait_s == 1.0


def test_success_of_an_open_breakers_past_does_not_close_it() -> None:
    one = opened()
    one.answer()
    one.succeed()

    assert one.state == "open"


def test_half_open_breaker_acts_at_its_first_failure() -> None:
    one = opened()
    one.half_open()
    one.doubt()
    assert (one.state, one.suspected) == ("half_open", True)

    one.fail()

    assert (one.state, one.wait_s) == ("open", 2.0)


def test_first_token_closes_a_half_open_breaker_on_probation() -> None:
    one = opened()
    one.half_open()
    one.answer()
    assert one.state == "closed"

    one.doubt()
    assert one.suspected
    one.fail()

    assert (one.state, one.wait_s) == ("open", 2.0)


def test_served_request_ends_probation() -> None:
    one = opened()
    one.half_open()
    one.answer()
    one.succeed()
    for _ in range(2):
        one.fail()
    assert one.state == "closed"
    one.fail()

    assert (one.state, one.wait_s) == ("open", 1.0)


def test_probe_of_a_closed_breaker_changes_nothing() -> None:
    one = breaker()
    one.half_open()

    assert one.state == "closed"


def test_least_loaded_replica_is_chosen() -> None:
    replicas = pool(3)
    replicas.replicas[0].in_flight = 2
    replicas.replicas[1].in_flight = 1
    replicas.replicas[2].in_flight = 3

    assert replicas.choose() is replicas.replicas[1]


def test_requests_spread_evenly() -> None:
    replicas = pool(3)
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            chosen = replicas.choose()
            assert chosen is not None
            stack.enter_context(replicas.occupy(chosen))

        assert [replica.in_flight for replica in replicas.replicas] == [100, 100, 100]
    assert [replica.in_flight for replica in replicas.replicas] == [0, 0, 0]


def test_one_after_the_other_they_spread_too() -> None:
    replicas = pool(2)
    seen = Counter(replica.url for replica in (replicas.choose() for _ in range(400)) if replica)

    assert min(seen.values()) > 100


def test_open_and_excluded_replicas_are_not_chosen() -> None:
    replicas = pool(3)
    replicas.replicas[0].breaker.open()

    assert replicas.choose(excluded=[replicas.replicas[1]]) is replicas.replicas[2]
    assert replicas.choose(excluded=replicas.replicas[1:]) is None


def test_half_open_replica_gets_one_request_at_a_time_while_another_is_well() -> None:
    replicas = pool(2)
    mending, well = replicas.replicas
    mending.breaker.open()
    mending.breaker.half_open()
    well.in_flight = 50

    assert replicas.choose() is mending
    with replicas.occupy(mending):
        assert replicas.choose() is well
    assert replicas.choose() is mending


def test_suspected_replica_gets_no_request_while_another_is_well() -> None:
    replicas = pool(2)
    for _ in range(3):
        replicas.replicas[0].breaker.doubt()

    assert {replicas.choose() for _ in range(20)} == {replicas.replicas[1]}
    for _ in range(3):
        replicas.replicas[1].breaker.doubt()
    assert {replicas.choose() for _ in range(20)} == set(replicas.replicas)


def spread(replicas: Pool, requests: int) -> list[int]:
    """Return where so many requests at once go."""
    with contextlib.ExitStack() as stack:
        for _ in range(requests):
            chosen = replicas.choose()
            assert chosen is not None
            stack.enter_context(replicas.occupy(chosen))
        return [replica.in_flight for replica in replicas.replicas]


def test_load_of_a_busy_replica_is_shifted_by_steps_and_comes_back() -> None:
    clock = FakeClock()
    replicas = pool(2, clock=clock)
    busy = replicas.replicas[0]
    shares = []
    for _ in range(6):
        shares.append(spread(replicas, 300)[0])
        busy.note_busy(retry_after_s=10.0)

    assert shares[0] == 150
    assert shares[:5] == sorted(set(shares[:5]), reverse=True)
    assert shares[5] == shares[4] > 10, "never nothing: somebody has to notice that it has room again"
    clock.advance(10.0)
    assert shares[4] < spread(replicas, 300)[0] < 150
    clock.advance(60.0)
    assert spread(replicas, 300)[0] == 150


def test_load_stays_even_when_all_are_busy() -> None:
    replicas = pool(3)
    for replica in replicas.replicas:
        replica.note_busy(None)

    assert spread(replicas, 300) == [100, 100, 100]


def test_half_open_replica_gets_every_request_when_there_is_no_other() -> None:
    replicas = pool(1)
    only = replicas.replicas[0]
    only.breaker.open()
    only.breaker.half_open()
    with replicas.occupy(only):
        assert replicas.choose() is only


def test_conversation_keeps_its_replica() -> None:
    replicas = pool(4, "sticky")
    homes = {f"oai-{number}": replicas.choose(f"oai-{number}") for number in range(200)}

    assert all(replicas.choose(session) is home for session, home in homes.items())
    assert min(Counter(home.url for home in homes.values() if home).values()) > 20


def test_only_conversations_of_a_lost_replica_move_and_they_come_back() -> None:
    replicas = pool(4, "sticky")
    homes = {f"oai-{number}": replicas.choose(f"oai-{number}") for number in range(200)}
    lost = replicas.replicas[0]
    lost.breaker.open()
    elsewhere = {session: replicas.choose(session) for session in homes}

    assert all(elsewhere[session] is home for session, home in homes.items() if home is not lost)
    moved = Counter(elsewhere[session].url for session, home in homes.items() if home is lost)  # type: ignore[union-attr]
    assert len(moved) == 3
    lost.breaker.half_open()
    assert {session: replicas.choose(session) for session in homes} == homes


def test_conversation_leaves_a_replica_that_is_much_more_loaded() -> None:
    replicas = pool(2, "sticky")
    home = replicas.choose("oai-1")
    assert home is not None
    other = next(replica for replica in replicas.replicas if replica is not home)
    other.in_flight = 3
    home.in_flight = 14
    assert replicas.choose("oai-1") is home

    home.in_flight = 15

    assert replicas.choose("oai-1") is other


def test_request_without_a_session_goes_to_the_least_loaded() -> None:
    replicas = pool(2, "sticky")
    replicas.replicas[0].in_flight = 1

    assert all(replicas.choose("") is replicas.replicas[1] for _ in range(20))


async def test_no_replica_is_tried_twice() -> None:
    replicas = pool(2)
    attempts = Attempts(replicas, "", retries=5)
    tried = []
    for _ in range(2):
        tried.append(await attempts.next())
        attempts.fail(tried[-1], GONE)

    with pytest.raises(EngineUnavailable, match="No server of this model"):
        await attempts.next()
    assert set(tried) == set(replicas.replicas)


async def test_attempts_are_bounded() -> None:
    attempts = Attempts(pool(5), "", retries=1)
    for _ in range(2):
        attempts.fail(await attempts.next(), GONE)

    with pytest.raises(EngineUnavailable):
        await attempts.next()


async def test_only_replica_is_tried_again_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses_s: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses_s.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    attempts = Attempts(pool(1), "", retries=2)
    tried = []
    for _ in range(3):
        tried.append(await attempts.next())
        if len(tried) < 3:
            attempts.fail(tried[-1], GONE)

    assert len(set(tried)) == 1
    assert pauses_s == [0.1, 0.2]


@pytest.mark.parametrize("outcome", RULES)
async def test_rules_say_where_a_request_is_tried_again(outcome: Outcome) -> None:
    rule = RULES[outcome]
    alone = Attempts(pool(1), "", retries=1)
    alone.fail(await alone.next(), AttemptFailed(outcome, "x"))
    assert await _tries(alone, outcome) == (1 if rule.again else 0)

    among_five = Attempts(pool(5), "", retries=9)
    assert await _tries(among_five, outcome) == (5 if rule.others == "all" else 2)


async def _tries(attempts: Attempts, outcome: Outcome) -> int:
    """Return how many more replicas a request is sent to that fails everywhere alike."""
    tries = 0
    with contextlib.suppress(EngineUnavailable, EngineOverloaded):
        while True:
            replica = await attempts.next()
            tries += 1
            attempts.fail(replica, AttemptFailed(outcome, "x"))
    return tries


@pytest.mark.parametrize("outcome", RULES)
async def test_rules_say_what_is_held_against_a_replica(outcome: Outcome) -> None:
    rule = RULES[outcome]
    replicas = pool(2)
    bad, good = replicas.replicas
    for _ in range(3):
        attempts = Attempts(replicas, "", retries=1)
        attempts.fail(bad, AttemptFailed(outcome, "x"))
        assert bad.breaker.state == "closed"
        attempts.succeed(good)

    assert bad.breaker.state == ("open" if rule.evidence == "proof" else "closed")
    assert bad.breaker.suspected == (rule.evidence == "doubt")
    assert (bad.weight > 1) == rule.busy
    assert (good.breaker.state, good.breaker.suspected, good.weight) == ("closed", False, 1.0)


@pytest.mark.parametrize("outcome", RULES)
async def test_request_that_nobody_serves_proves_nothing(outcome: Outcome) -> None:
    replicas = pool(2)
    for _ in range(20):
        attempts = Attempts(replicas, "", retries=1)
        for replica in replicas.replicas:
            attempts.fail(replica, AttemptFailed(outcome, "x"))

    assert {replica.breaker.state for replica in replicas.replicas} == {"closed"}


async def test_replica_that_serves_at_the_second_try_is_not_held_guilty() -> None:
    replicas = pool(1)
    (only,) = replicas.replicas
    for _ in range(5):
        attempts = Attempts(replicas, "", retries=1)
        attempts.fail(only, GONE)
        attempts.succeed(only)
        only.breaker.succeed()

    assert (only.breaker.state, only.breaker.suspected) == ("closed", False)


async def test_error_for_clients_is_told_only_if_every_replica_says_it() -> None:
    missing = AttemptFailed("declined", "answered 404", error=not_offered("embed"))
    for others, kind in ((missing, InvalidRequest), (GONE, EngineUnavailable)):
        attempts = Attempts(pool(2), "", retries=1)
        attempts.fail(await attempts.next(), others)
        attempts.fail(await attempts.next(), missing)
        with pytest.raises(kind):
            await attempts.next()


async def test_overload_anywhere_is_told_as_overload_with_the_shortest_wait() -> None:
    attempts = Attempts(pool(3), "", retries=2)
    for failure in (FULL, GONE, AttemptFailed("overloaded", "answered 503", retry_after_s=3.0)):
        attempts.fail(await attempts.next(), failure)

    with pytest.raises(EngineOverloaded) as caught:
        await attempts.next()
    assert caught.value.retry_after_s == 3.0


async def test_nothing_is_tried_while_every_breaker_is_open() -> None:
    replicas = pool(2)
    for replica in replicas.replicas:
        replica.breaker.open()

    with pytest.raises(EngineUnavailable, match="No server of this model"):
        await Attempts(replicas, "", retries=2).next()
    with pytest.raises(EngineUnavailable, match="No server of this model"):
        replicas.check()


def test_fault_that_repeats_is_logged_once_a_minute_with_its_count(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    (replica,) = pool(1, clock=clock).replicas
    caplog.set_level(logging.WARNING)
    for _ in range(500):
        blame(replica, FULL)
        blame(replica, GONE)
    assert len(caplog.records) == 2

    clock.advance(61.0)
    blame(replica, FULL)

    assert "(499 more since the last such line)" in caplog.text
