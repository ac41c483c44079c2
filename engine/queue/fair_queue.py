"""Order of service: a bounded queue, first in first out within a flow, fair across flows by the tokens they received.

Requests hold slots of the engine's batch, one per sequence. A free slot goes to the best class of priority, there to
the flow with the least counter, there to the request that came first. The counter is the virtual token counter of
Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): tokens served, those of the prompt charged on
admission and those of the completion as they are made. A flow that waits again after a pause is lifted to the least of
those that wait, so that no flow saves up a right to the whole engine.

A flow holds at most `flow_slots` at once and is passed over meanwhile. While others are about (they run, wait or have
left within the last minute) it leaves `spare_slots` free for them as well. It may have as many requests waiting as
there are free places (the dynamic threshold of Choudhury and Hahne, 1998): alone it fills half the queue, two flows a
third each, and a newcomer always finds a place. A request whose turn it is but which needs more slots than are free is
waited for: overtaken by small ones it might never run.

Knows no engine, and of the event loop only the future that it resolves. Raises EngineOverloaded.
"""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.base import EngineOverloaded, Prepared
from engine.queue.throughput import Pace

PROMPT_WEIGHT, COMPLETION_WEIGHT = 1, 2
"""Cost of a token, as in the paper and roughly as in price lists: prompt tokens are processed in parallel."""
_MAX_IDLE_FLOWS = 4096
"""Limit on idle flows whose counters are kept. Dropping one resets its counter."""
_ABOUT_S = 60.0
"""How long an idle flow counts as active: a conversation's next turn or an agent's next step may follow."""
_FORECAST_S = 0.25  # how old a forecast may be: with a thousand waiting, one takes a millisecond


@dataclass(slots=True, eq=False)
class _Flow:
    """A flow's requests. `base` is its counter without the completions of running requests."""

    priority: int
    name: str
    base: int = 0
    slots: int = 0
    running: set[Ticket] = field(default_factory=set)
    waiting: OrderedDict[Ticket, None] = field(default_factory=OrderedDict)
    left_at: float = -math.inf
    """Time at which it became idle."""

    def counter(self) -> int:
        """Return the weighted tokens served. Computed on demand, which is much rarer than new tokens."""
        return self.base + sum(ticket.completion_cost() for ticket in self.running)

    def head(self) -> Ticket:
        return next(iter(self.waiting))


@dataclass(slots=True, eq=False)
class Ticket:
    """A waiting or admitted request. Implements `QueuePosition`."""

    prepared: Prepared
    number: int
    """Order of arrival across all flows."""
    slots: int
    entered_at: float
    _queue: FairQueue
    _flow: _Flow
    admitted_at: float | None = None
    turn: asyncio.Future[None] | None = None
    """Resolved on admission. Set by the caller that waits for it."""
    place: int = 0
    index: int = 0
    """From the last forecast: `place` across all flows (1 is next) and `index` in its own flow (0 is next)."""

    @property
    def position(self) -> int:
        return self._queue.position(self)

    @property
    def wait_s(self) -> float:
        return self._queue.wait_s(self)

    def completion_cost(self) -> int:
        return COMPLETION_WEIGHT * self.prepared.usage.completion_tokens


class FairQueue:
    """The queue of one engine. The caller of `enter` must call `leave`, however the request ends."""

    def __init__(
        self,
        *,
        slots: int | None,
        flow_slots: int | None,
        spare_slots: int = 0,
        max_waiting: int,
        max_wait_s: float,
        clock: Callable[[], float],
        fair: bool = True,
    ) -> None:
        """`slots` or `flow_slots` None means no bound.

        Unless `fair`, all requests are of one flow, which may fill the queue.
        """
        self.waiting = 0
        """Number of waiting requests."""
        self.slots_held = 0
        self._slots = math.inf if slots is None else slots
        self._flow_slots = min(self._slots, math.inf if flow_slots is None or not fair else flow_slots)
        self._shared_flow_slots = min(self._flow_slots, self._slots - spare_slots if fair else math.inf)
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._pace = Pace(clock)
        self._fair = fair
        self._number = 0
        self._flows: dict[tuple[int, str], _Flow] = {}
        self._idle: OrderedDict[tuple[int, str], _Flow] = OrderedDict()
        self._backlog: dict[tuple[int, str], _Flow] = {}
        """Flows with waiting requests."""
        self._last: dict[int, _Flow] = {}
        """Flow of the latest admission, by priority."""
        self._line: list[tuple[int, float]] = []
        """Forecast: priority and counter at which each waiting request will be admitted, in order."""
        self._line_at = -math.inf

    def enter(self, prepared: Prepared) -> Ticket:
        """Admit a request or add it to the queue.

        Raises EngineOverloaded if the queue is full or the predicted wait exceeds `max_wait_s`.
        """
        key = (prepared.priority, prepared.flow) if self._fair else (0, "")
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = self._idle.pop(key) if key in self._idle else _Flow(*key)
        # What asks for more than it could ever have gets all there is; the engine runs the rest behind.
        slots = int(max(1, min(prepared.n, self._shared_flow_slots)))
        self._number += 1
        ticket = Ticket(prepared, self._number, slots, self._clock(), self, flow)
        if not flow.waiting:
            self._lift(flow)
        if not self._backlog and self._fits(ticket):
            self._admit(ticket)
            return ticket
        flow.waiting[ticket] = None
        self._backlog[key] = flow
        self.waiting += 1
        self._admit_waiting()
        if ticket.admitted_at is None and (refusal := self._refusal(ticket)):
            self.leave(ticket)
            raise refusal
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Release a request's slots or its place in the queue. Idempotent."""
        flow = ticket._flow
        if ticket in flow.running:
            self._release(ticket)
        elif ticket in flow.waiting:
            self._unqueue(ticket)
        self._admit_waiting()
        key = flow.priority, flow.name
        if not flow.running and not flow.waiting and self._flows.get(key) is flow:
            flow.left_at = self._clock()
            self._idle[key] = self._flows.pop(key)
            if len(self._idle) > _MAX_IDLE_FLOWS:
                self._idle.popitem(last=False)

    def waiting_since(self) -> float | None:
        """Return the arrival time of the oldest waiting request."""
        return min((flow.head().entered_at for flow in self._backlog.values()), default=None)

    def waiters(self) -> list[Ticket]:
        """Return all waiting requests."""
        return [ticket for flow in self._backlog.values() for ticket in flow.waiting]

    def _lift(self, flow: _Flow) -> None:
        """Raise an idle flow's counter to the lowest waiting one of its class, otherwise to the last admitted one."""
        rivals = [other for other in self._backlog.values() if other.priority == flow.priority]
        if rivals:
            flow.base += max(0, min(rival.counter() for rival in rivals) - flow.counter())
        elif last := self._last.get(flow.priority):
            # Without contention what runs now is left out: summing it up for every request would be its main cost.
            flow.base = max(flow.base, last.base)

    def _most_slots(self) -> float:
        """Return the number of slots that a flow may hold now."""
        if len(self._flows) > 1:
            return self._shared_flow_slots
        last = next(reversed(self._idle.values()), None)
        about = last is not None and self._clock() - last.left_at < _ABOUT_S
        return self._shared_flow_slots if about else self._flow_slots

    def _fits(self, ticket: Ticket) -> bool:
        flow = ticket._flow
        return self.slots_held + ticket.slots <= self._slots and flow.slots + ticket.slots <= self._most_slots()

    def _admit_waiting(self) -> None:
        while self._backlog and self.slots_held < self._slots:
            ticket = self._next()
            if ticket is None:
                return
            self._unqueue(ticket)
            if ticket.turn is not None:
                if ticket.turn.done():  # cancelled or failed: it is about to leave
                    continue
                ticket.turn.set_result(None)
            self._admit(ticket)

    def _next(self) -> Ticket | None:
        """Return the next request if there are enough slots for it."""
        heads = [(flow, flow.head()) for flow in self._backlog.values()]
        most_slots = self._most_slots()
        ready = [(flow, head) for flow, head in heads if flow.slots + head.slots <= most_slots]
        if not ready:
            return None
        _, ticket = min(ready, key=lambda pair: (pair[0].priority, pair[0].counter(), pair[1].number))
        return ticket if self.slots_held + ticket.slots <= self._slots else None

    def _admit(self, ticket: Ticket) -> None:
        flow = ticket._flow
        ticket.admitted_at = self._pace.start(ticket.slots)
        flow.base += PROMPT_WEIGHT * ticket.prepared.prompt_tokens
        flow.running.add(ticket)
        flow.slots += ticket.slots
        self.slots_held += ticket.slots
        self._last[flow.priority] = flow

    def _release(self, ticket: Ticket) -> None:
        flow = ticket._flow
        assert ticket.admitted_at is not None
        flow.running.remove(ticket)
        flow.base += ticket.completion_cost()
        flow.slots -= ticket.slots
        self.slots_held -= ticket.slots
        cost = PROMPT_WEIGHT * ticket.prepared.prompt_tokens + ticket.completion_cost()
        self._pace.finish(ticket.slots, ticket.admitted_at, cost)

    def _unqueue(self, ticket: Ticket) -> None:
        flow = ticket._flow
        del flow.waiting[ticket]
        self.waiting -= 1
        if not flow.waiting:
            del self._backlog[flow.priority, flow.name]

    # The methods below only predict. No request's turn depends on them.

    def position(self, ticket: Ticket) -> int:
        """Return the position of a waiting request, 1 being next, at most `_FORECAST_S` old."""
        if not ticket.place or self._clock() - self._line_at >= _FORECAST_S:
            self._forecast()
        return max(1, ticket.place)

    def wait_s(self, ticket: Ticket) -> float:
        """Predict the seconds until a waiting request is admitted."""
        return self._predict_s(self.position(ticket), ticket.index)

    def _predict_s(self, place: int, index: int) -> float:
        """Predict the seconds until every request ahead of this one has finished, in the whole queue or in its flow."""
        return self._pace.slot_s() * max(place / self._slots, (index + 1) / self._most_slots())

    def _forecast(self) -> None:
        """Play the queue forward, as if every request cost what the last ones cost on average."""
        cost = self._pace.cost()
        line = sorted(
            (flow.priority, flow.counter() + index * cost, ticket.number, index, ticket)
            for flow in self._backlog.values()
            for index, ticket in enumerate(flow.waiting)
        )
        for place, (*_, index, ticket) in enumerate(line, 1):
            ticket.place, ticket.index = place, index
        self._line = [(priority, tag) for priority, tag, *_ in line]
        self._line_at = self._clock()

    def _refusal(self, ticket: Ticket) -> EngineOverloaded | None:
        """Return why a request that has just joined the queue can't stay, if so."""
        flow = ticket._flow
        index = len(flow.waiting) - 1
        free = self._max_waiting - self.waiting + 1
        wait_s = self._predict_s(self.waiting, index)
        if wait_s > self._max_wait_s:  # were it the last of all; only now is it worth to look closer
            if self._clock() - self._line_at >= _FORECAST_S:
                self._forecast()
            tag = flow.priority, flow.counter() + index * self._pace.cost()
            wait_s = self._predict_s(bisect_left(self._line, tag) + 1, index)
        until_hope_s = wait_s - self._max_wait_s
        if free <= 0:
            next_s = self._pace.slot_s() / min(self._slots, self._most_slots() * len(self._backlog))
            return _overloaded("full", max(next_s, until_hope_s))
        if self._fair and index >= free:
            return _overloaded("share", max(self.wait_s(flow.head()), until_hope_s))
        return _overloaded("hopeless", until_hope_s) if until_hope_s > 0 else None

    def overdue(self, ticket: Ticket) -> EngineOverloaded:
        """Return the error for a request that has waited for `max_wait_s`."""
        return _overloaded("timeout", self.wait_s(ticket))


def _overloaded(reason: str, retry_after_s: float) -> EngineOverloaded:
    return EngineOverloaded("There is no room in the queue.", retry_after_s, reason)
