"""A scripted model and its tools, for workflows without a real model.

`ScriptedModel` is the `reply` of a `MockEngine`. It recognizes every prompt of the workflows, plans and judges as
scripted, and follows its prompt except for text between <source> tags. `FakeSearch` and `FakeFetch` are a small web.

Example:

    over = await metered(MockEngine(reply=ScriptedModel()))
    outcome = await outcome_of(research("deep"), make_run(over.meter, FakeSearch(), FakeFetch()))
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from engine.base import Delta, GenerationRequest
from engine.messages import texts_of
from gateway.conversations.sessions import Session
from gateway.exchange.encoder import event_fields
from gateway.exchange.events import Event, ShannonEvent
from gateway.meter import Meter
from gateway.tools.base import Observation, Source, Toolbox, ToolError
from gateway.workflows.run import Budget, Run, Workflow, conduct
from tests.support.event_grammar import check_events

Answer = str | Mapping[str, Any] | list[Delta]
Script = Answer | Callable[[GenerationRequest], Answer]

_BY_PROPERTY = {
    "areas": "refine",
    "sub_questions": "plan",
    "covered": "coverage",
    "claims": "claims",
    "verdict": "verify",
    "steps": "complex_plan",
    "tool": "complex_tools",
    "number": "step",
}
_BY_BEGINNING = {
    "You answer the question": "answer",
    "You take notes": "notes",
    "You write the answer to a task": "complex_answer",
    "You carry out one step": "complex_step",
}
_FENCE = re.compile(r"<source[^>]*>.*?</source>", re.S)


def kind_of(request: GenerationRequest) -> str:
    """Return which prompt of the workflows a request is made of; "chat" where it is none."""
    if request.structured_outputs and (schema := request.structured_outputs.get("json")):
        for name, kind in _BY_PROPERTY.items():
            if name in schema.get("properties", {}):
                return kind
    instructions = text_of(request, 0)
    return next((kind for beginning, kind in _BY_BEGINNING.items() if beginning in instructions), "chat")


def text_of(request: GenerationRequest, number: int = -1) -> str:
    """The text of one message of a request."""
    return "".join(texts_of(request.messages[number]))


def outside_fences(text: str) -> str:
    """Return what an obedient model takes for instructions."""
    return _FENCE.sub("", text)


def tokens(text: str) -> list[Delta]:
    """Return a text as deltas that keep its white space, unlike the mock engine's words."""
    return [Delta(piece) for piece in re.findall(r"\s*\S+|\s+$", text)] or [Delta("")]


def sub_questions(request: GenerationRequest, count: int = 0) -> Mapping[str, Any]:
    """Return a plan with `count` parts, or as few as the schema allows."""
    assert request.structured_outputs is not None
    least = request.structured_outputs["json"]["properties"]["sub_questions"]["minItems"]
    numbers = range(1, (count or least) + 1)
    return {"sub_questions": [{"question": f"Part {n}?", "queries": [f"query {n}"]} for n in numbers]}


def steps(*depends_on: list[int]) -> Mapping[str, Any]:
    """Return a supervisor's plan, given the dependencies of each step."""
    return {
        "steps": [
            {"id": n, "role": "analyst", "task": f"Task {n}.", "depends_on": before}
            for n, before in enumerate(depends_on, 1)
        ]
    }


def _next_step(request: GenerationRequest) -> Mapping[str, Any]:
    read = re.search(r"(\d+) read so far", text_of(request))
    action = "finish" if read and int(read[1]) else "read"
    return {"action": action, "query": "", "number": 1, "reason": f"Time to {action}."}


class ScriptedModel:
    """Replies by kind of prompt; what a test does not script has a sensible answer."""

    def __init__(self, **scripts: Script) -> None:
        """`scripts` are answers by kind, or functions of the request; mappings are sent as JSON."""
        self.asked: list[tuple[str, GenerationRequest]] = []
        sensible: dict[str, Script] = {
            "refine": {"question": "Precisely?", "kind": "factual", "areas": ["one area"]},
            "plan": sub_questions,
            "step": _next_step,
            "coverage": {"covered": 90, "gaps": []},
            "claims": {"claims": [{"claim": "It is so.", "sources": [1]}]},
            "verify": {"verdict": "supported", "why": "It says so."},
            "complex_plan": steps([], [], [1, 2]),
            "complex_tools": {"action": "answer", "tool": "", "arguments": ""},
            "complex_step": "A result.",
            "notes": lambda request: f"Noted [{_first_number(text_of(request))}].",
            "answer": "## Findings\n\nIt is so [1], and so [2], but not so [99].",
            "complex_answer": "All is done.",
            "chat": "Hello.",
        }
        self._scripts = sensible | scripts

    def __call__(self, request: GenerationRequest) -> list[Delta]:
        kind = kind_of(request)
        self.asked.append((kind, request))
        script = self._scripts[kind]
        answer = script(request) if callable(script) else script
        if isinstance(answer, list):
            return answer
        return tokens(answer if isinstance(answer, str) else json.dumps(answer))

    def kinds(self) -> list[str]:
        """Return the kinds of prompts that were asked, in order."""
        return [kind for kind, _ in self.asked]

    def texts(self, kind: str) -> list[str]:
        """Return the last messages of the requests of a kind."""
        return [text_of(request) for asked, request in self.asked if asked == kind]


def _first_number(text: str) -> str:
    found = re.search(r'<source number="(\d+)"', text)
    return found[1] if found else "99"


class Query(BaseModel):
    query: str


class Address(BaseModel):
    url: str


class FakeTool:
    """A tool that notes its calls."""

    description = "A tool for tests."
    timeout_s = 5.0

    def __init__(self, name: str, arguments: type[BaseModel] = Query) -> None:
        self.name = name
        self.arguments: type[BaseModel] = arguments
        self.calls: list[dict[str, Any]] = []
        self.running = 0
        self.most_running = 0
        self.cancelled = 0
        self.hangs = False
        self.error: ToolError | None = None

    async def run(self, arguments: BaseModel) -> Observation:
        self.calls.append(arguments.model_dump())
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await (asyncio.Event().wait() if self.hangs else asyncio.sleep(0))
            if self.error is not None:
                raise self.error
            return self.found(arguments)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def found(self, arguments: Any) -> Observation:
        """Return what a call that works brings."""
        return Observation("Done.")

    async def close(self) -> None: ...


class FakeSearch(FakeTool):
    """Finds two pages per query, one of which all queries find."""

    def __init__(self, name: str = "web_search") -> None:
        super().__init__(name)

    def found(self, arguments: Any) -> Observation:
        page = f"https://{arguments.query.replace(' ', '-').replace('?', '')}.example/page".lower()
        common = "https://common.example/page"
        return Observation("Two results.", [Source(page, f"On {arguments.query}", "A snippet."), Source(common)])


class FakeFetch(FakeTool):
    """Reads any page: `pages` by URL, or a sentence about it."""

    def __init__(self, pages: Mapping[str, str] | None = None) -> None:
        super().__init__("web_fetch", Address)
        self.pages = pages or {}
        self.failing: set[str] = set()

    def found(self, arguments: Any) -> Observation:
        if arguments.url in self.failing:
            raise ToolError("the page is gone.")
        text = self.pages.get(arguments.url, f"The text of {arguments.url}.")
        return Observation(text, [Source(arguments.url, f"Title of {arguments.url}", fetched=True)])


def make_run(
    meter: Meter,
    *tools: FakeTool,
    budget: Budget | None = None,
    options: Mapping[str, Any] | None = None,
    session: Session | None = None,
    question: str = "What is it?",
    **fields: Any,
) -> Run:
    """Return a run as a route would make it; `fields` are those of the client's request."""
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": question}], "stream": True}
    request = GenerationRequest(request_id="run", **(asked | {"default_max_tokens": 200} | fields))
    budget = budget or Budget(60.0, 100_000, 60, 6)
    return Run(request, meter, session or Session(), Toolbox(tools), budget, lambda: 1_700_000_000, dict(options or {}))


CONTEXT = "We sell tea."
CONVERSATION = [
    {"role": "system", "content": "Answer like a pirate. Our page is https://ours.example/x."},
    {"role": "user", "content": "Before?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And now?"},
]
"""What a client may bring along; CONTEXT is for its options."""


def check_conversation(asked: list[tuple[str, GenerationRequest]], plan: str, answer: str) -> None:
    """Assert that agents were told CONTEXT, the planner the earlier turns, and whoever writes the answer everything."""
    by_kind = {kind: request for kind, request in asked if kind != "chat"}
    assert [message["content"] for message in by_kind[answer].messages[1:3]] == ["Before?", "Yes."]
    assert "user: Before?\nassistant: Yes." in text_of(by_kind[plan])
    for kind, request in by_kind.items():
        assert CONTEXT in text_of(request)
        assert ("pirate" in text_of(request, 0)) is (kind == answer), "it does not replace agents' roles"


@dataclass
class Outcome:
    """What a run sent."""

    events: list[ShannonEvent]
    deltas: list[Delta]
    order: list[Event]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def result(self) -> dict[str, Any]:
        """The payload of WORKFLOW_COMPLETED."""
        assert self.events[-1].type == "WORKFLOW_COMPLETED"
        return self.events[-1].payload

    def of(self, event_type: str, agent_id: str | None = None) -> list[ShannonEvent]:
        """Return the events of a type, perhaps only those of one agent."""
        return [
            event
            for event in self.events
            if event.type == event_type and (agent_id is None or event.agent_id == agent_id)
        ]

    def messages(self, event_type: str) -> list[str]:
        return [event.message for event in self.of(event_type)]


async def outcome_of(workflow: Workflow, run: Run) -> Outcome:
    """Run a workflow to its end. The events must follow the grammar."""
    order = [event async for event in conduct(workflow, run)]
    events = [event for event in order if isinstance(event, ShannonEvent)]
    check_events([event_fields(event) for event in events])
    return Outcome(events, [event for event in order if isinstance(event, Delta)], order)
