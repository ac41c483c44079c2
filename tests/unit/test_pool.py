"""Replicas: when one is left alone, which one a request goes to, and where it is tried again."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

import pytest

from engine.base import EngineOverloaded, EngineUnavailable
from engine.pool import AttemptFailed, Attempts, Breaker, Choice, Pool, Replica, blame
from tests.conftest import FakeClock

pytestmark = pytest.mark.anyio

GONE = AttemptFailed("could not be reached", again=True)
FULL = AttemptFailed("answered 429", overloaded=True, retry_after_s=7.0)


def breaker(clock: FakeClock | None = None) -> Breaker:
    return Breaker(failures=3, open_s=1.0, max_open_s=4.0, clock=clock or FakeClock())


def pool(count: int = 2, choice: Choice = "least_loaded") -> Pool:
    return Pool([Replica(f"http://replica-{number}/v1", breaker()) for number in range(count)], choice)


def opened(clock: FakeClock | None = None) -> Breaker:
    one = breaker(clock)
    one.open()
    return one


def test_breaker_opens_after_failures_in_a_row() -> None:
    one = breaker()
    for _ in range(2):
        one.fail()
    one.succeed()
    for _ in range(2):
        one.fail()
    assert not one.opened.is_set()

    one.fail()

    assert one.opened.is_set()
    assert one.state == "open"


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
        one.fail()

    assert one.wait_s == 1.0


def test_success_of_an_open_breakers_past_does_not_close_it() -> None:
    one = opened()
    one.answer()
    one.succeed()

    assert one.state == "open"


def test_half_open_breaker_opens_for_longer_at_its_first_failure() -> None:
    one = opened()
    one.half_open()
    one.fail()

    assert (one.state, one.wait_s) == ("open", 2.0)


def test_first_token_closes_a_half_open_breaker_on_probation() -> None:
    one = opened()
    one.half_open()
    one.answer()
    assert one.state == "closed"

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


@pytest.mark.parametrize("failure", [FULL, AttemptFailed("did not answer in time")])
async def test_only_replica_is_left_in_peace_when_it_is_slow_or_full(failure: AttemptFailed) -> None:
    attempts = Attempts(pool(1), "", retries=2)
    attempts.fail(await attempts.next(), failure)

    with pytest.raises((EngineUnavailable, EngineOverloaded)):
        await attempts.next()


async def test_failure_that_would_repeat_itself_is_tried_nowhere_else() -> None:
    attempts = Attempts(pool(3), "", retries=2)
    attempts.fail(await attempts.next(), AttemptFailed("sent something else than embeddings", elsewhere=False))

    with pytest.raises(EngineUnavailable):
        await attempts.next()


async def test_request_under_suspicion_is_tried_once_more_only() -> None:
    attempts = Attempts(pool(5), "", retries=9)
    for _ in range(2):
        attempts.fail(await attempts.next(), AttemptFailed("answered 500", suspicious=True))

    with pytest.raises(EngineUnavailable):
        await attempts.next()


async def test_overload_anywhere_is_told_as_overload_with_the_shortest_wait() -> None:
    attempts = Attempts(pool(3), "", retries=2)
    for failure in (FULL, GONE, AttemptFailed("answered 503", overloaded=True, retry_after_s=3.0)):
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


def test_blame_opens_at_once_for_what_an_operator_must_mend_and_never_for_overload() -> None:
    full, locked = pool(2).replicas
    for _ in range(10):
        blame(full, FULL)
    blame(locked, AttemptFailed("answered 401", misconfigured=True))

    assert (full.breaker.state, locked.breaker.state) == ("closed", "open")
