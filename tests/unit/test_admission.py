"""The queue in front of an engine: never over the slots, fair, in order within a flow, and nobody forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import math
import random
from collections.abc import AsyncGenerator
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.base import (
    Delta,
    EmbeddingRequest,
    EngineDied,
    EngineOverloaded,
    EngineUnavailable,
    GenerationRequest,
    Prepared,
)
from engine.mock import Fault, MockEngine
from engine.queue.admission import QueuedEngine, spare_slots
from engine.queue.fair_queue import FairQueue, Ticket
from tests.support.app import HELLO
from tests.support.waiting import FakeClock, until

pytestmark = pytest.mark.anyio


class Gated(MockEngine):
    """Generates one word per generation, when told to."""

    def __init__(self, **options: Any) -> None:
        super().__init__(reply="word", **options)
        self.started_ids: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    async def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        self.started_ids.append(prepared.request_id)
        gate = self.gates[prepared.request_id] = asyncio.Event()
        try:
            await gate.wait()
            async for delta in super().generate(prepared):
                yield delta
        finally:
            del self.gates[prepared.request_id]


class Front:
    """A queued engine, and the generations that were asked of it."""

    everyone: ClassVar[set[asyncio.Task[str]]] = set()
    """Holds what still runs when its test ends until the event loop cancels it; it holds tasks only weakly itself."""

    def __init__(self, inner: MockEngine, **options: Any) -> None:
        self.inner = inner
        self.engine = QueuedEngine(inner, **options)
        self.prepared: dict[str, Prepared] = {}
        self.tasks: dict[str, asyncio.Task[str]] = {}

    async def ask(self, request_id: str, **fields: Any) -> asyncio.Task[str]:
        """Ask for a generation of the flow that the id begins with, and let it come as far as it can."""
        given: dict[str, Any] = {"flow": request_id[0], "messages": HELLO, "stream": True} | fields
        prepared = await self.engine.prepare(GenerationRequest(request_id=request_id, **given))
        self.prepared[request_id] = prepared
        task = self.tasks[request_id] = asyncio.create_task(self._generate(prepared))
        self.everyone.add(task)
        task.add_done_callback(self.everyone.discard)
        await settle()
        return task

    async def _generate(self, prepared: Prepared) -> str:
        async with contextlib.aclosing(self.engine.generate(prepared)) as deltas:
            return "".join([delta.text async for delta in deltas])

    async def finish(self, request_id: str) -> None:
        assert isinstance(self.inner, Gated)
        self.inner.gates[request_id].set()
        await self.tasks[request_id]
        await settle()

    async def cancel(self, request_id: str) -> None:
        self.tasks[request_id].cancel()
        await settle()

    @property
    def running(self) -> list[str]:
        assert isinstance(self.inner, Gated)
        return list(self.inner.gates)


async def settle() -> None:
    """Let everything run that can run now."""
    for _ in range(8):
        await asyncio.sleep(0)


async def front(slots: int | None = 2, **options: Any) -> Front:
    """Return a started queue over an engine that answers when told to; no flow is held back unless the test says so."""
    over = Front(Gated(max_num_seqs=slots), **({"in_flight_per_flow": slots} | options))
    await over.engine.start()
    return over


def refusal(task: asyncio.Task[str]) -> EngineOverloaded:
    error = task.exception()
    assert isinstance(error, EngineOverloaded)
    return error


# Slots


async def test_request_passes_without_a_turn_of_the_loop_while_there_is_room() -> None:
    over = await front()
    prepared = await over.engine.prepare(GenerationRequest(request_id="a", messages=HELLO))
    deltas = over.engine.generate(prepared)
    step = deltas.__anext__()
    step.send(None)

    assert over.running == ["a"]
    with pytest.raises(asyncio.CancelledError):
        step.throw(asyncio.CancelledError())


async def test_requests_beyond_the_slots_wait_for_one_that_ends() -> None:
    over = await front(slots=2)
    for request_id in ("a1", "a2", "a3", "a4"):
        await over.ask(request_id)
    assert over.running == ["a1", "a2"]
    assert (over.engine.queued_requests, over.engine.unfinished_requests) == (2, 2)

    await over.finish("a1")

    assert over.running == ["a2", "a3"]
    assert over.tasks["a1"].result() == "word"


async def test_engine_of_unknown_size_is_never_waited_for() -> None:
    over = await front(slots=None)
    for number in range(100):
        await over.ask(f"a{number}")

    assert len(over.running) == 100


async def test_engine_of_unknown_size_may_still_have_a_cap_per_flow() -> None:
    over = await front(slots=None, in_flight_per_flow=1)
    for request_id in ("a1", "a2", "b1"):
        await over.ask(request_id)

    assert over.running == ["a1", "b1"]
    assert over.prepared["a2"].waiting is not None


async def test_max_in_flight_takes_the_place_of_the_engines_own() -> None:
    over = await front(slots=8, max_in_flight=1)
    await over.ask("a1")
    await over.ask("b1")

    assert over.running == ["a1"]


async def test_choices_take_a_slot_each() -> None:
    over = await front(slots=4)
    await over.ask("a1", n=3)
    await over.ask("a2", n=2)
    await over.ask("a3", n=1)
    assert over.running == ["a1"], "a2 is next and must not be overtaken for ever by smaller ones"

    await over.finish("a1")

    assert over.running == ["a2", "a3"]


async def test_request_for_more_choices_than_slots_runs_alone() -> None:
    over = await front(slots=2)
    await over.ask("a1")
    await over.ask("b1", n=9)
    await over.ask("a2")
    await over.finish("a1")
    assert over.running == ["b1"]

    await over.finish("b1")

    assert over.running == ["a2"]


@pytest.mark.parametrize(("slots", "spare"), [(1, 0), (2, 1), (8, 1), (16, 2), (32, 4), (256, 32)])
def test_an_eighth_is_spare(slots: int, spare: int) -> None:
    assert spare_slots(slots) == spare


async def test_flow_that_is_alone_may_have_the_whole_batch() -> None:
    over = await front(slots=8, in_flight_per_flow=None)
    for number in range(20):
        await over.ask(f"a{number}")

    assert len(over.running) == 8
    await over.finish("a0")
    assert len(over.running) == 8


async def test_flow_that_comes_back_need_not_wait_for_a_flood() -> None:
    clock = FakeClock()
    over = await front(slots=8, in_flight_per_flow=None, clock=clock)
    await over.ask("b1")
    await over.finish("b1")
    for number in range(20):
        await over.ask(f"a{number}")
    assert len(over.running) == 7, "one slot is left to those who were here within the last minute"

    await over.ask("b2")
    assert over.running[-1] == "b2"
    await over.finish("b2")
    assert len(over.running) == 7

    clock.advance(61)
    await over.finish("a0")
    assert len(over.running) == 8, "nobody else has been here for a minute"


async def test_slots_of_a_lone_flow_go_to_a_newcomer_as_they_become_free() -> None:
    over = await front(slots=8, in_flight_per_flow=None)
    for number in range(20):
        await over.ask(f"a{number}")
    await over.ask("b1")
    await over.ask("b2")
    assert len(over.running) == 8

    await over.finish("a0")
    assert over.running[-1] == "b1"
    await over.finish("a1")
    assert over.running[-1] == "b2"
    await over.finish("b1")
    await over.finish("b2")
    assert len(over.running) == 7, "the flow that was alone is now held to its share"


async def test_request_of_a_whole_batch_is_not_shut_out_by_others() -> None:
    """A lone flow's request may ask for more than its share; it must still run once others are about."""
    over = await front(slots=8, in_flight_per_flow=None)
    await over.ask("b1")
    await over.ask("a1", n=8)
    await over.ask("b2")

    await over.finish("b1")

    assert "a1" in over.running


async def test_share_that_was_set_holds_for_a_flow_that_is_alone() -> None:
    over = await front(slots=8, in_flight_per_flow=3)
    for number in range(20):
        await over.ask(f"a{number}")

    assert len(over.running) == 3


async def test_embeddings_wait_in_the_same_line_and_take_a_slot_per_input() -> None:
    over = await front(slots=2)
    await over.ask("a1")
    prepared = await over.engine.prepare(EmbeddingRequest(request_id="e", inputs=["x y", "z"], flow="e"))
    embedding = asyncio.create_task(over.engine.pool(prepared))
    await settle()
    assert prepared.waiting is not None
    await over.ask("b1")

    await over.finish("a1")

    assert len(await embedding) == 2
    assert prepared.usage.prompt_tokens == 3
    await settle()
    assert over.running == ["b1"]


# Order


async def test_flow_that_was_served_least_is_next() -> None:
    over = await front(slots=1)
    await over.ask("z1")
    await over.ask("a1", messages=[{"role": "user", "content": "many words " * 50}])
    for request_id in ("a2", "b1", "b2", "b3"):
        await over.ask(request_id)
    order = []
    for _ in range(6):
        order += over.running
        await over.finish(over.running[0])

    assert order == ["z1", "a1", "b1", "b2", "b3", "a2"], "a has been served a long prompt already"


async def test_flow_that_was_away_does_not_come_back_with_a_claim() -> None:
    over = await front(slots=1)
    long = [{"role": "user", "content": "many words " * 50}]
    await over.ask("b1")
    await over.finish("b1")
    await over.ask("a1", messages=long)
    for number in range(2, 5):
        await over.ask(f"a{number}", messages=long)
    await over.finish("a1")
    for number in range(2, 5):
        await over.ask(f"b{number}", messages=long)
    order = []
    for _ in range(6):
        order += over.running
        await over.finish(over.running[0])

    assert [request_id[0] for request_id in order] == ["a", "b", "a", "b", "a", "b"]


async def test_better_priority_goes_first() -> None:
    over = await front(slots=1)
    await over.ask("a1")
    for request_id, priority in (("l1", 1), ("n1", 0), ("h1", -1), ("h2", -1), ("n2", 0)):
        await over.ask(request_id, priority=priority)
    order = []
    for _ in range(6):
        order += over.running
        await over.finish(over.running[0])

    assert order == ["a1", "h1", "h2", "n1", "n2", "l1"]


async def test_fifo_knows_no_flows() -> None:
    over = await front(slots=8, policy="fifo", in_flight_per_flow=None, max_queued_requests=2)
    for number in range(10):
        await over.ask(f"a{number}", priority=number)
    assert len(over.running) == 8, "no slot is spared"
    assert over.engine.queued_requests == 2, "nor a place"

    await over.finish("a3")
    await over.ask("b1", priority=-1)
    await over.finish("a1")
    await over.finish("a2")

    assert over.running[-3:] == ["a8", "a9", "b1"]


# Places


async def test_full_queue_refuses_at_once() -> None:
    over = await front(slots=1, max_queued_requests=2)
    for request_id in ("a1", "b1", "c1"):
        await over.ask(request_id)

    error = refusal(await over.ask("d1"))

    assert error.reason == "full"
    assert error.retry_after_s is not None
    assert "d1" not in over.running
    assert over.engine.queued_requests == 2


async def test_flow_may_have_as_many_waiting_as_there_are_places_free() -> None:
    over = await front(slots=1, max_queued_requests=9)
    await over.ask("z1")
    for flow, places in (("a", 5), ("b", 2), ("c", 1), ("d", 1)):
        for number in range(places):
            assert not (await over.ask(f"{flow}{number}")).done()
        assert refusal(await over.ask(f"{flow}x")).reason in ("share", "full")


async def test_default_holds_five_hundred_of_one_flow() -> None:
    over = await front(slots=4, in_flight_per_flow=None)
    for number in range(504):
        await over.ask(f"a{number}")

    assert over.engine.queued_requests == 500


async def test_free_slot_is_had_even_when_all_places_are_taken() -> None:
    over = await front(slots=8, in_flight_per_flow=None, max_queued_requests=0)
    await over.ask("b1")
    for number in range(7):
        await over.ask(f"a{number}")
    assert refusal(await over.ask("a7")).reason == "full"
    await over.finish("b1")

    await over.ask("b2")

    assert len(over.running) == 8


async def test_wait_without_hope_is_refused_at_once_and_told_when_to_come_back() -> None:
    clock = FakeClock()
    over = await front(slots=1, max_wait_s=25, clock=clock)
    await over.ask("a1")
    clock.advance(10)
    await over.finish("a1")
    for request_id in ("a2", "a3", "a4"):
        await over.ask(request_id)

    error = refusal(await over.ask("a5"))

    assert error.reason == "hopeless"
    assert error.retry_after_s == pytest.approx(5), "3 x 10 s of waiting are 5 s more than anybody may"
    assert over.engine.queued_requests == 2


async def test_nobody_is_without_hope_before_anything_was_measured() -> None:
    over = await front(slots=1, max_wait_s=1, clock=FakeClock())
    for number in range(200):
        await over.ask(f"a{number}")

    assert over.engine.queued_requests == 199


async def test_request_that_has_waited_too_long_is_refused() -> None:
    over = await front(slots=1, max_wait_s=0.01)
    await over.ask("a1")
    waiting = await over.ask("a2")
    await until(waiting.done)

    assert refusal(waiting).reason == "timeout"
    assert over.engine.queued_requests == 0


# Ways out


async def test_cancelled_waiting_request_costs_nothing() -> None:
    over = await front(slots=1)
    for request_id in ("a1", "a2", "a3"):
        await over.ask(request_id)

    await over.cancel("a2")

    assert over.tasks["a2"].cancelled()
    assert over.prepared["a2"].usage.prompt_tokens == 0
    assert over.prepared["a2"].waiting is None
    await over.finish("a1")
    assert over.running == ["a3"]
    assert isinstance(over.inner, Gated)
    assert over.inner.started_ids == ["a1", "a3"]


@pytest.mark.parametrize("cancelled_first", [True, False])
async def test_slot_given_to_one_who_is_leaving_is_passed_on(cancelled_first: bool) -> None:
    over = await front(slots=1)
    for request_id in ("a1", "a2", "a3"):
        await over.ask(request_id)
    assert isinstance(over.inner, Gated)

    if cancelled_first:
        over.tasks["a2"].cancel()
    over.tasks["a1"].cancel()
    await asyncio.sleep(0)  # a1 leaves, and a2 is granted its slot if it still waits
    over.tasks["a2"].cancel()
    await settle()

    assert over.running == ["a3"]
    assert over.inner.started_ids == ["a1", "a3"]


async def test_failed_generation_gives_its_slot_back() -> None:
    inner = MockEngine(reply="one", max_num_seqs=1)
    over = Front(inner)
    await over.engine.start()
    inner.faults.append(Fault(error=EngineDied("boom")))
    first = await over.ask("a1")

    assert isinstance(first.exception(), EngineDied)
    assert await (await over.ask("a2")) == "one"


async def test_generation_left_before_its_first_step_takes_nothing() -> None:
    over = await front(slots=1)
    prepared = await over.engine.prepare(GenerationRequest(request_id="a", messages=HELLO))
    await over.engine.generate(prepared).aclose()
    await over.ask("b1")

    assert over.running == ["b1"]


async def test_closing_fails_those_who_wait() -> None:
    over = await front(slots=1)
    await over.ask("a1")
    waiting = [await over.ask("a2"), await over.ask("b1")]

    await over.engine.close()
    await settle()

    for task in waiting:
        assert isinstance(task.exception(), EngineUnavailable)
    over.tasks["a1"].cancel()
    await settle()
    assert isinstance(over.inner, Gated)
    assert over.inner.started_ids == ["a1"]
    with pytest.raises(EngineUnavailable):
        await anext(over.engine.generate(over.prepared["a1"]))


# What is told


async def test_position_counts_from_one_and_moves_up() -> None:
    clock = FakeClock()
    over = await front(slots=1, clock=clock)
    for request_id in ("a1", "a2", "a3"):
        await over.ask(request_id)
    assert over.prepared["a1"].waiting is None
    second, third = over.prepared["a2"].waiting, over.prepared["a3"].waiting
    assert second is not None
    assert third is not None
    assert (second.position, third.position) == (1, 2)

    clock.advance(10)
    assert (second.wait_s, third.wait_s) == (10, 20), "what runs has taken 10 s so far"
    await over.finish("a1")

    assert over.prepared["a2"].waiting is None
    clock.advance(1)
    assert third.position == 1
    assert third.wait_s == 10


async def test_position_of_a_newcomer_is_ahead_of_a_flood() -> None:
    clock = FakeClock()
    over = await front(slots=1, clock=clock)
    for number in range(10):
        await over.ask(f"a{number}")
        clock.advance(1)
    await over.ask("b1")
    waiting = over.prepared["b1"].waiting
    assert waiting is not None

    assert waiting.position <= 2


async def test_wait_for_admission_is_part_of_the_time_in_the_queue() -> None:
    clock = FakeClock()
    over = await front(slots=1, clock=clock)
    await over.ask("a1")
    await over.ask("a2")
    clock.advance(3)
    assert over.engine.longest_wait_s == 3
    await over.finish("a1")

    assert over.prepared["a1"].queue_s == 0
    assert over.prepared["a2"].queue_s == 3
    assert over.engine.longest_wait_s == 0


async def test_queue_speaks_for_its_engine() -> None:
    engine = QueuedEngine(MockEngine(max_model_len=77, max_num_seqs=5, takes_images=True))
    assert (engine.max_model_len, engine.max_num_seqs, engine.takes_images) == (77, 5, True)
    assert engine.queued_requests == 0
    with pytest.raises(EngineUnavailable):
        await engine.check_health()
    await engine.start()
    await engine.check_health()
    request = GenerationRequest(request_id="a", prompt="x y")
    assert await engine.detokenize(await engine.tokenize(request)) == "x y"


# The queue by itself, in simulated time


class Load:
    """Requests of known length through a FairQueue, on a clock that jumps from event to event."""

    def __init__(self, **options: Any) -> None:
        self.clock = FakeClock()
        options = {"slots": 4, "flow_slots": None, "max_waiting": 10_000, "max_wait_s": math.inf} | options
        self.queue = FairQueue(clock=self.clock, **options)
        self.served: dict[str, int] = {}
        self.waits: dict[int, float] = {}
        self._ends: list[tuple[float, int, Ticket, int]] = []
        self._waiting: dict[Ticket, int] = {}
        self._numbers = itertools.count()

    def arrive(self, flow: str, tokens: int) -> Ticket:
        prepared = Prepared(request_id="", prompt_tokens=10, max_tokens=tokens, flow=flow)
        ticket = self.queue.enter(prepared)
        self._waiting[ticket] = tokens
        self._start()
        return ticket

    def _start(self) -> None:
        """Let those run that were admitted: a token takes a hundredth of a second."""
        for ticket, tokens in list(self._waiting.items()):
            if ticket.admitted_at is not None:
                del self._waiting[ticket]
                self.waits[ticket.number] = self.clock.now - ticket.entered_at
                heapq.heappush(self._ends, (self.clock.now + tokens / 100, next(self._numbers), ticket, tokens))

    def end_next(self) -> None:
        """Jump to the next end of a request."""
        self.clock.now, _, ticket, tokens = heapq.heappop(self._ends)
        ticket.prepared.usage.completion_tokens = tokens
        flow = ticket.prepared.flow
        self.served[flow] = self.served.get(flow, 0) + 10 + tokens
        self.queue.leave(ticket)
        self._start()

    def run_until(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            self.end_next()
        self.clock.now = now


def jain(values: list[int]) -> float:
    """Return Jain's index of fairness: 1 when all are equal, 1/n when one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


@pytest.mark.parametrize("fair", [True, False])
def test_equal_flows_get_equal_tokens_whatever_they_ask_for(fair: bool) -> None:
    load = Load(fair=fair)
    rng = random.Random(1)
    asked = (("a", 400, 600), ("b", 100, 400), ("c", 25, 1600))
    arrivals = [(flow, tokens) for flow, tokens, count in asked for _ in range(count)]
    rng.shuffle(arrivals)
    for flow, tokens in arrivals:
        load.arrive(flow, tokens)
    load.run_until(200)

    index = jain(list(load.served.values()))
    assert index > 0.99 if fair else index < 0.8, load.served


def test_prediction_comes_true() -> None:
    load = Load(slots=8, flow_slots=7)
    rng = random.Random(2)
    for _ in range(100):
        load.arrive(rng.choice("ab"), rng.randint(20, 400))
    load.run_until(5)
    predicted = {}
    for _ in range(60):
        ticket = load.arrive(rng.choice("ab"), rng.randint(20, 400))
        predicted[ticket.number] = ticket.wait_s
    while load.queue.waiting:
        load.end_next()

    ratios = sorted(load.waits[number] / wait_s for number, wait_s in predicted.items())
    assert ratios[0] > 0.7
    assert ratios[-1] < 1.4


@pytest.mark.parametrize("options", [{"max_waiting": 8}, {"max_wait_s": 4.0}])
def test_who_comes_back_after_retry_after_gets_in(options: dict[str, Any]) -> None:
    load = Load(slots=2, **options)
    for _ in range(40):  # measured: a second each, one ends every half second
        load.arrive("a", 100)
        load.run_until(load.clock.now + 0.5)
    error = None
    while error is None:
        try:
            load.arrive("a", 100)
        except EngineOverloaded as refused:
            error = refused
    assert error.retry_after_s is not None
    assert 0 < error.retry_after_s < 5

    load.run_until(load.clock.now + error.retry_after_s + 1e-6)

    load.arrive("a", 100)


def test_flows_that_went_away_are_forgotten() -> None:
    load = Load(slots=1)
    for number in range(10_000):
        load.arrive(f"flow {number}", 1)
        load.end_next()

    assert len(load.queue._flows) + len(load.queue._idle) < 5000


class Model:
    """A FairQueue, and what should be true of it after every step."""

    def __init__(self, slots: int, flow_slots: int, max_waiting: int) -> None:
        self.slots, self.flow_slots = slots, flow_slots
        self.clock = FakeClock()
        self.queue = FairQueue(
            slots=slots, flow_slots=flow_slots, max_waiting=max_waiting, max_wait_s=math.inf, clock=self.clock
        )
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []

    def arrive(self, flow: int, n: int, prompt_tokens: int) -> None:
        prepared = Prepared(request_id="", prompt_tokens=prompt_tokens, max_tokens=9, n=n, flow=str(flow))
        prepared.priority = flow % 2
        with contextlib.suppress(EngineOverloaded):
            self.waiting.append(self.queue.enter(prepared))

    def leave(self, number: int, among: list[Ticket]) -> None:
        if among:
            ticket = among.pop(number % len(among))
            ticket.prepared.usage.completion_tokens = number
            self.queue.leave(ticket)
            self.queue.leave(ticket)

    def check(self) -> None:
        for ticket in [ticket for ticket in self.waiting if ticket.admitted_at is not None]:
            ahead = self.waiting[: self.waiting.index(ticket)]
            assert all(other.prepared.flow != ticket.prepared.flow or other.admitted_at is not None for other in ahead)
            self.waiting.remove(ticket)
            self.running.append(ticket)
        held = sum(ticket.slots for ticket in self.running)
        assert held == self.queue.slots_held <= self.slots
        assert self.queue.waiting == len(self.waiting)
        heads: dict[str, Ticket] = {}
        for ticket in self.waiting:
            heads.setdefault(ticket.prepared.flow, ticket)
        ready = []
        for flow, head in heads.items():
            mine = sum(ticket.slots for ticket in self.running if ticket.prepared.flow == flow)
            assert mine <= self.flow_slots
            if mine + head.slots <= self.flow_slots:
                ready.append(head)
        # Nobody waits for nothing: if any could go, the one whose turn it is can't.
        assert not ready or any(held + head.slots > self.slots for head in ready)
        if all(head.slots == 1 for head in ready):
            assert not ready or held == self.slots
        self.clock.advance(1)
        positions = sorted(self.queue.position(ticket) for ticket in self.waiting)
        assert positions == list(range(1, len(self.waiting) + 1))


STEP = st.one_of(
    st.tuples(st.just("arrive"), st.integers(0, 4), st.integers(1, 3), st.integers(1, 50)),
    st.tuples(st.just("finish"), st.integers(0, 30)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
)


@settings(max_examples=300, deadline=None)
@given(
    slots=st.integers(1, 6),
    flow_slots=st.integers(1, 6),
    max_waiting=st.integers(0, 12),
    steps=st.lists(STEP, max_size=60),
)
def test_queue_keeps_its_promises(slots: int, flow_slots: int, max_waiting: int, steps: list[Any]) -> None:
    model = Model(slots, min(slots, flow_slots), max_waiting)
    for kind, *arguments in steps:
        if kind == "arrive":
            model.arrive(*arguments)
        else:
            model.leave(arguments[0], model.running if kind == "finish" else model.waiting)
        model.check()
    while model.running:
        model.leave(0, model.running)
        model.check()
    assert not model.waiting
    assert model.queue.slots_held == 0


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["ask", "ask", "finish", "cancel", "turn"]), st.integers(0, 30)), max_size=40
    )
)
def test_engine_behind_the_queue_is_never_overrun_and_nobody_is_forgotten(steps: list[tuple[str, int]]) -> None:
    """Several things may happen in the same turn of the event loop; only `turn` lets it go on."""

    async def play() -> None:
        over = await front(slots=3, in_flight_per_flow=2)
        assert isinstance(over.inner, Gated)
        tasks: dict[str, asyncio.Task[str]] = {}
        for number, (kind, which) in enumerate(steps):
            if kind == "ask":
                request_id = f"{which % 3}{number}"
                request = GenerationRequest(request_id=request_id, messages=HELLO, flow=request_id[0])
                tasks[request_id] = asyncio.create_task(over._generate(await over.engine.prepare(request)))
            elif kind == "finish" and over.running:
                over.inner.gates[over.running[which % len(over.running)]].set()
            elif kind == "cancel" and tasks:
                list(tasks.values())[which % len(tasks)].cancel()
            elif kind == "turn":
                await asyncio.sleep(0)
            assert len(over.running) <= 3
            assert all(sum(i[0] == flow for i in over.running) <= 2 for flow in "012")
        while not all(task.done() for task in tasks.values()):
            await settle()
            assert over.running or all(task.done() for task in tasks.values())
            for gate in over.inner.gates.values():
                gate.set()
        assert (over.engine.queued_requests, over.engine.unfinished_requests) == (0, 0)
        started = over.inner.started_ids
        for flow in "012":
            numbers = [int(i[1:]) for i in started if i[0] == flow]
            assert numbers == sorted(numbers)
        await asyncio.gather(*tasks.values(), return_exceptions=True)

    asyncio.run(play())
