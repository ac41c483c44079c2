"""One run of a workflow: its agents, its budget, and the stream of events that a client follows.

A workflow is a coroutine over a `Run`; `conduct` turns it into the generator of events that routes know. Everything
that it starts is a task below it: when the client leaves, the generator is closed, the tasks are cancelled, and each
generation leaves the engine and is settled. Every generation goes through the meter. What workflows do is in their
modules.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Coroutine, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import orjson

from engine.base import Delta, GenerationRequest
from engine.messages import ImagePart, Message, images_of
from gateway.clock import Clock
from gateway.conversations.sessions import Session, text_of
from gateway.errors import BadRequest, Overloaded, Unavailable
from gateway.exchange.events import ORCHESTRATOR, Event, EventType, ShannonEvent
from gateway.fair_slots import working_for
from gateway.meter import Meter
from gateway.tools.base import Toolbox
from gateway.workflows.addresses import Addresses
from gateway.workflows.budget import Budget, OutOfBudget
from gateway.workflows.earlier_answers import listed_addresses, without_sources
from gateway.workflows.links import LinkFilter
from gateway.workflows.prompting import Outside
from gateway.workflows.stations import stations

__all__ = ["AGENTS_SHARE", "Budget", "OutOfBudget", "Run", "Workflow", "check_for_agents", "conduct"]

T = TypeVar("T")

AGENTS_SHARE = 0.85
"""Of a run's time, for everything but the answer."""
_GRACE_S = 0.25
"""For agents whose time is up to hand on what they have, before they are stopped."""
_LEAST_S = 0.01
"""With less, no agent begins; timers may fire a millisecond early, when those before it give up."""
_CONVERSATION_CHARS = 2000
"""Of the earlier turns, for prompts that only need to know of them."""
_MOST_CHARS_AT_ONCE = 65_536
"""Of what the user wrote; addresses in more are looked for beside the event loop."""
_AS_THEY_ARE = frozenset({"model", "role", "tool", "sources"})
"""Fields of payloads that hold our own words, or addresses and titles that were filtered where they come from."""
_ARGUMENTS = "params"
"""What a model calls a tool with: addresses in it may be of the model's making."""
_DATA = frozenset({"ads", "reports"})
"""What tools brought, in machine form: addresses stay, links and pictures of Markdown and HTML do not."""


class Run:
    """What a workflow is given."""

    def __init__(
        self,
        request: GenerationRequest,
        meter: Meter,
        session: Session,
        tools: Toolbox,
        budget: Budget,
        clock: Clock,
        options: dict[str, Any],
        image_hosts: Collection[str] = (),
    ) -> None:
        """`image_hosts` are those whose pictures an answer may show."""
        self.request = request
        self.meter = meter
        self.session = session
        self.tools = tools
        self.budget = budget
        self.options = options
        self.image_hosts = image_hosts
        self.result: dict[str, Any] = {"sources": []}
        """The payload of WORKFLOW_COMPLETED."""
        self.begun = False
        """Something was generated or called. Until then the client may still be refused with a status of its own."""
        self.running = 0
        """Generations that the limits have let in."""
        self.settlements = 0
        """Generations that have ended, and gave back what they did not use."""
        self.numbers = itertools.count()
        """Numbers that identify the run's generations and tool calls."""
        self.effort = request.reasoning_effort
        """How much agents that plan and judge should think; lowered when a model is seen to think."""
        self.thought_tokens = 0
        """More completion tokens for each of them, where a model can't help thinking."""
        self.holds_to_schemas = True
        """The model's server takes JSON schemas, as far as is known."""
        self.has_outside = any(message["role"] not in ("user", "system", "developer") for message in self.messages)
        """Text from outside may be in a prompt by now, so what models write may repeat it. An earlier answer may."""
        self.private = self.has_outside or self._has_files
        """Agents may know something that is not public: a document, what an MCP server said, a file of the user's, or
        an earlier answer, which may rest on these. From then on they fetch only addresses that were given."""
        self._clock = clock
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._stations = stations()
        self._places = asyncio.Semaphore(budget.concurrency)
        self._share = AGENTS_SHARE
        self._settled = asyncio.Event()

    @property
    def messages(self) -> list[Message]:
        """The conversation: what the session remembers, then what the client sent."""
        return self.session.messages(self.request.messages, len(self.session.history))

    @property
    def system_prompt(self) -> str:
        """The client's own instructions; they shape the answer, not the agents' roles."""
        return "\n\n".join(text_of(message) for message in self.messages if message["role"] == "system")

    @property
    def question(self) -> str:
        """The last thing that the user said."""
        return text_of(self._last_message)

    @property
    def images(self) -> list[ImagePart]:
        """The images that came with the question."""
        return [image.content for image in images_of([self._last_message])]

    @property
    def _last_message(self) -> Message:
        users = [message for message in self.messages if message["role"] == "user"]
        return (users or self.messages)[-1]

    @cached_property
    def earlier_turns(self) -> list[Message]:
        """The conversation before the question, as text. Sources of earlier answers are left out: they are numbered
        otherwise."""
        turns = [message for message in self.messages if message["role"] in ("user", "assistant")]
        last = max((number for number, message in enumerate(turns) if message["role"] == "user"), default=0)
        return [{"role": turn["role"], "content": _said_in(turn)} for turn in turns[:last] if text_of(turn)]

    @property
    def conversation(self) -> str:
        """The end of the earlier turns as text, for prompts that only need to know of them."""
        text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.earlier_turns)
        return Outside(text[-_CONVERSATION_CHARS:]) if text else "(nothing)"

    @property
    def _has_files(self) -> bool:
        """Whether the user sent something other than text."""
        return any(images_of(self.messages))

    @cached_property
    def addresses(self) -> Addresses:
        """The addresses that this run may show, and fetch."""
        return self.find_addresses()

    def find_addresses(self) -> Addresses:
        """Return the addresses that the user named, and those that earlier answers list as their sources.

        Other addresses in an earlier answer are not the user's: what a page made a model write there, in a block of
        code for one, must not be fetched now.
        """
        addresses = Addresses("\n".join(self._texts({"tool", "assistant"})))
        answers = (text_of(message) for message in self.messages if message["role"] == "assistant")
        addresses.show(url for answer in answers for url in listed_addresses(answer))
        return addresses

    @property
    def said(self) -> str:
        """What the client wrote, earlier answers included."""
        return "\n".join(self._texts({"tool"}))

    def _texts(self, without: Collection[str]) -> list[str]:
        return [*(text_of(message) for message in self.messages if message["role"] not in without), self.context]

    async def read_along(self) -> None:
        """Look for addresses in what the client wrote, beside the event loop where it is long."""
        if sum(map(len, self._texts({"tool"}))) > _MOST_CHARS_AT_ONCE:
            self.addresses = await asyncio.to_thread(self.find_addresses)
            await asyncio.to_thread(lambda: self.earlier_turns)  # which is kept

    def written(self, text: str) -> str:
        """A model's text for a prompt, marked as outside text if it may repeat such."""
        return Outside(text) if self.has_outside else text

    @property
    def context(self) -> str:
        """What the client gives agents to go by, beside the conversation."""
        context = self.options.get("context") or ""
        return context if isinstance(context, str) else orjson.dumps(context).decode()

    @property
    def constrained(self) -> bool:
        """Whether the client binds the answer to a grammar: nothing may be added to it, or taken from it."""
        wanted = (self.request.response_format or {}).get("type", "text")
        return wanted != "text" or self.request.structured_outputs is not None

    def emit(
        self, event_type: EventType, agent_id: str, message: str, *, deferrable: bool = False, **payload: Any
    ) -> None:
        """Send an event to the client. One agent's events arrive in the order in which they were emitted.

        Texts in it are filtered as answers are: a page may show them as Markdown.
        """
        deferrable = deferrable or not self.begun
        message = self.shown(message)
        payload = {
            name: value if name in _AS_THEY_ARE else self._all_shown(name, value) for name, value in payload.items()
        }
        self._events.put_nowait(
            ShannonEvent(event_type, agent_id, message, int(self._clock()), payload, deferrable=deferrable)
        )

    def shown(self, text: str) -> str:
        """Return text for a page without links to what was not read or named."""
        links = LinkFilter(self.addresses, image_hosts=self.image_hosts, less_than="‹")
        return links(text) + links.flush()

    def _all_shown(self, field: str, value: Any) -> Any:
        """Return a value of a payload with each text in it filtered as suits its field."""
        if isinstance(value, str):
            return self._in_machine_form(value, field) if field == _ARGUMENTS or field in _DATA else self.shown(value)
        if isinstance(value, list):
            return [self._all_shown(field, entry) for entry in value]
        if isinstance(value, dict):
            return {self._all_shown(field, name): self._all_shown(field, entry) for name, entry in value.items()}
        return value

    def _in_machine_form(self, text: str, field: str) -> str:
        bare = field == _ARGUMENTS
        links = LinkFilter(self.addresses, image_hosts=self.image_hosts, less_than=None, prose=False, bare=bare)
        return links(text) + links.flush()

    def send(self, event: Event) -> None:
        """Send a delta of the answer to the client."""
        self._events.put_nowait(event)

    def station(self) -> str:
        """Return the next sub-agent's name."""
        return next(self._stations)

    def left_s(self) -> float:
        """Return the seconds that agents have left for what they are at."""
        return self.budget.left_s(self._share)

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Note that a generation runs in here; when it ends, what waits for a limit may try again."""
        self.running += 1
        ran = True
        try:
            yield
        except Overloaded:
            ran = False  # others that wait for the same engine would only wake each other in turns
            raise
        finally:
            self.running -= 1
            if ran:
                self.settlements += 1
                self._settled.set()

    async def wait_for_room(self, most_s: float) -> None:
        """Wait until the next generation of this run ends, which gives back what it did not use, or `most_s`."""
        self._settled.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                await self._settled.wait()

    async def gather(
        self,
        jobs: Sequence[Callable[[], Coroutine[Any, Any, T]]],
        *,
        share: float = AGENTS_SHARE,
        ready: Callable[[int], Awaitable[None]] | None = None,
    ) -> list[T | None]:
        """Run jobs side by side, as many at once as the budget allows, for at most `share` of the run's time.

        `ready` is awaited with a job's number before it takes one of the places; a job may not gather others.
        Returns their results in order, None for those that ran out of time.
        Raises the error of a job, and ends the others. Agents handle their own failures, so the error concerns the run.
        """
        before, self._share = self._share, share
        tasks = [asyncio.ensure_future(self._in_turn(job, number, ready)) for number, job in enumerate(jobs)]
        try:
            if tasks:
                timeout = max(0.0, self.left_s()) + _GRACE_S
                await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._share = before
        for task in tasks:
            if not task.cancelled():
                task.result()
        late = sum(task.cancelled() for task in tasks)
        if late:
            message = f"Out of time: going on without {late} of {len(tasks)} agents."
            self.emit("PROGRESS", ORCHESTRATOR, message, done=len(tasks) - late, total=len(tasks))
        return [None if task.cancelled() else task.result() for task in tasks]

    async def _in_turn(
        self, job: Callable[[], Coroutine[Any, Any, T]], number: int, ready: Callable[[int], Awaitable[None]] | None
    ) -> T:
        if ready is not None:
            await ready(number)
        async with self._places:
            if self.left_s() < _LEAST_S:
                raise asyncio.CancelledError  # too late to begin
            return await job()


Workflow = Callable[[Run], Awaitable[None]]


def check_for_agents(request: GenerationRequest) -> None:
    """Raise BadRequest where a request asks for what only a single generation can give."""
    for wanted, param in ((request.n > 1, "n"), (bool(request.tools), "tools"), (request.logprobs, "logprobs")):
        if wanted:
            raise BadRequest(f"'{param}' is for models without agents, such as shannon-chat. Leave it out.", param)


async def conduct(workflow: Workflow, run: Run) -> AsyncGenerator[Event, None]:
    """Yield the events of `workflow` as they happen, and store the turn. Raises what the workflow raises. Closing
    cancels all that it started."""
    model_id = run.meter.model.id

    async def to_the_end() -> None:
        try:
            with (
                working_for(run.meter.principal.key_id),
                run.meter.tracing.workflow(run.meter.model.settings.workflow, model_id) as span,
            ):
                try:
                    async with run.meter.counted(), run.meter.noting_refusal():
                        await _within_budget(workflow, run)
                        await run.meter.count()  # below it may still be on its way, and ends before it is settled
                finally:
                    span.spent(run.meter.usage)
            run.emit(
                "WORKFLOW_COMPLETED",
                ORCHESTRATOR,
                f"{model_id} has finished.",
                deferrable=True,
                model=model_id,
                **run.result,
            )
        finally:
            run._events.put_nowait(None)

    # What the engine would refuse of a single generation is refused before anything is spent on agents.
    async with run.meter.noting_refusal():
        check_for_agents(run.request)
    await run.meter.prepare(run.request, run.session)
    await run.read_along()
    run.emit("WORKFLOW_STARTED", ORCHESTRATOR, f"{model_id} has started.", deferrable=True, model=model_id)
    await run.session.opened()
    task = asyncio.create_task(to_the_end(), name=f"workflow {run.meter.request_id}")
    try:
        while (event := await run._events.get()) is not None:
            if isinstance(event, Delta):
                run.session.note(event)
                if not run.begun:
                    await run.meter.count()  # written without a model, but a request all the same
                    run.begun = True
            yield event
        await task
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # raised above, or of no interest because the client has left
    await run.session.end_turn(run.request.messages)


async def _within_budget(workflow: Workflow, run: Run) -> None:
    try:
        await workflow(run)
    except OutOfBudget as error:
        raise Unavailable(f"The request ended before it could be answered: {error}.") from error


def _said_in(turn: Message) -> str:
    text = text_of(turn)
    return text if turn["role"] == "user" else without_sources(text)
