"""One research agent: it searches for the answer to one sub-question, reads what it finds, and takes notes.

A thorough one decides step by step what to search for, what to read and when it is done; a quick one takes the plan's
queries and reads the first results. What is read is shared with the run's other agents, and fetched only once. An
agent that fails or runs out of budget still hands on what it has read.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from gateway.tools.base import Observation, Source
from gateway.workflows.agents import AGENT_FAILURES, Agent, Decision, Prompt, fenced, quoted
from gateway.workflows.citations import Sources, normal_url
from gateway.workflows.excerpts import excerpt, one_line
from gateway.workflows.run import OutOfBudget, Run

SEARCHES = ("web_search", "local_search")
_MAX_PER_DOMAIN = 2
"""Of one agent's sources."""
_MAX_SHOWN = 8
"""Search results that an agent chooses from."""
_SHOWN_CHARS = 160
_GLANCE_CHARS = 500
"""Of what was read, when the next step is decided."""
_MAX_FAILURES = 3
"""In a row, after which an agent stops reading."""

_TAGS = re.compile(r"^</?source.*>\n?", re.M)


class SubQuestion(Decision):
    question: Annotated[str, Field(min_length=1, max_length=200)]
    queries: Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(min_length=1, max_length=3)]


class ResearchMove(Decision):
    action: Literal["search", "read", "finish"]
    query: Annotated[str, Field(max_length=100)]
    number: Annotated[int, Field(ge=0, le=99)]
    reason: Annotated[str, Field(max_length=160)]


@dataclass(frozen=True, slots=True)
class Notes:
    """Result of one agent: its notes, or else the text it read, as fenced data."""

    task: str
    text: str
    material: str = ""

    def fenced(self) -> str:
        """Return the notes for a prompt: they may repeat what a page would have agents do."""
        return fenced(f"notes on: {self.task}", self.text) if self.text else self.material

    def plain(self) -> str:
        """Return the notes for people."""
        return self.text or _TAGS.sub("", self.material)


@dataclass(slots=True)
class Library:
    """What the agents of a run have found and read."""

    sources: Sources = field(default_factory=Sources)
    texts: dict[str, tuple[Source, str]] = field(default_factory=dict)
    """By normal URL of what was asked for, in order."""
    noted: set[str] = field(default_factory=set)
    """Normalized URLs of the sources in an agent's notes."""

    def quoted(self, key: str, question: str, most_chars: int) -> str:
        """The passages of a source about `question`, as data with its number."""
        source, text = self.texts[key]
        return quoted(self.sources.number(source.url) or 0, source, excerpt(text, question, most_chars))


@dataclass(frozen=True, slots=True)
class Thoroughness:
    """How much one agent does."""

    reads: int
    """Sources that it reads at most."""
    steps: int = 0
    """Steps that it decides on by itself; 0 searches and reads without deciding."""
    notes_tokens: int = 300
    """Completion tokens of its notes at most; 0 hands on what was read as it is."""
    chars: int = 6000
    """Of each source, for its notes."""


class Researcher:
    """Agents that research sub-questions side by side. `work` is one agent's life."""

    def __init__(self, run: Run, library: Library, part: SubQuestion, thoroughness: Thoroughness) -> None:
        self._run = run
        self._library = library
        self._part = part
        self._task = run.written(part.question)
        """For prompts. The judge that finds gaps has read what the tools brought."""
        self._most = thoroughness
        self._agent = Agent(run, run.station(), "researcher")
        self._searches = [name for name in SEARCHES if name in run.tools]
        self._found: list[Source] = []
        self._read: list[str] = []
        """Keys of the library, in order."""
        self._searched: set[str] = set()
        self._failures = 0

    async def work(self) -> Notes | None:
        """Search, read and take notes. Returns None where nothing could be read; only the run's own failures raise."""
        try:
            async with self._agent as agent:
                agent.think(self._part.question)
                try:
                    await self._gather_sources()
                except OutOfBudget as error:
                    agent.think(f"Stopping here: {error}.")
                if not self._read:
                    agent.think("Nothing could be read.")
                    return None
                return await self._take_notes()
        except AGENT_FAILURES:
            return None  # reported by the agent; the others continue

    async def _gather_sources(self) -> None:
        await self._search(self._part.queries)
        if not self._found:
            await self._search([self._part.question, self._run.question])
        reads = self._most.reads
        if self._most.steps:
            await self._step_by_step()
            reads = 0 if self._read else 1  # what else to read it has chosen itself
        while self._failures < _MAX_FAILURES and (wanted := self._best(reads - len(self._read))):
            await self._fetch(wanted)

    async def _step_by_step(self) -> None:
        """Let the agent decide: search, read, or finish, which it may not do before it has read anything."""
        agent, steps = self._agent, self._most.steps
        for number in range(1, steps + 1):
            if len(self._read) >= self._most.reads or self._failures >= _MAX_FAILURES:
                return
            step = await agent.decide(self._step_prompt(number), ResearchMove, 160)
            message = f"Thinking step {number} of {steps}."
            self._run.emit("PROGRESS", agent.id, message, role=agent.role, step=number, steps=steps)
            if step is None:
                return
            if step.reason.strip():
                agent.think(step.reason, step=number)
            if step.action == "finish" and self._read:
                return
            shown = self._best(_MAX_SHOWN)
            if step.action == "search" and self._new([step.query]):
                await self._search([step.query])
            elif shown:
                chosen = step.number if 1 <= step.number <= len(shown) else 1
                await self._fetch([shown[chosen - 1]])
            else:
                return

    def _step_prompt(self, number: int) -> Prompt:
        shown = [
            f"{place}. {source.title} ({source.url}): {source.snippet[:_SHOWN_CHARS]}"
            for place, source in enumerate(self._best(_MAX_SHOWN), 1)
        ]
        material = [self._library.quoted(key, self._part.question, _GLANCE_CHARS) for key in self._read]
        material.append(fenced("search results, unread", "\n".join(shown) or "(none)"))
        fields = {"step": str(number), "steps": str(self._most.steps), "read": str(len(self._read))}
        return Prompt("step", {"task": self._task, "question": self._run.question, **fields}, material)

    def _new(self, queries: Sequence[str]) -> list[str]:
        """Return the queries that say something and were not searched for by this agent."""
        stripped = dict.fromkeys(one_line(query, 200) for query in queries)
        return [query for query in stripped if query and query.casefold() not in self._searched]

    async def _search(self, queries: Sequence[str]) -> None:
        wanted = self._new(queries)
        self._searched |= {query.casefold() for query in wanted}
        calls = [(name, {"query": query}) for query in wanted for name in self._searches]
        observations = await self._agent.use_all(calls) if calls else []
        # The first result of each, then the second of each: they were ranked among themselves only.
        for rank in itertools.zip_longest(*(observation.sources for observation in observations)):
            self._library.sources.add(source for source in rank if source is not None)
            known = {normal_url(source.url) for source in self._found}
            self._found += [s for s in rank if s is not None and normal_url(s.url) not in known]

    def _best(self, count: int) -> list[Source]:
        """Return up to `count` unread sources, as found, but few of one site and different documents first."""
        unread = [source for source in self._found if normal_url(source.url) not in self._read]
        taken = [_site(self._library.texts[key][0].url) for key in self._read]
        first: list[Source] = []
        for source in unread:
            site = _site(source.url)
            if taken.count(site) < (1 if site.startswith("local:") else _MAX_PER_DOMAIN):
                taken.append(site)
                first.append(source)
        return (first or unread)[: max(0, count)]

    async def _fetch(self, wanted: Sequence[Source]) -> None:
        """Read sources side by side; what another agent has read already is taken over."""
        calls: list[tuple[str, dict[str, str]]] = []
        for source in wanted:
            self._found.remove(source)
            tool = "local_read" if source.url.startswith("local:") else "web_fetch"
            if normal_url(source.url) in self._library.texts:
                self._read.append(normal_url(source.url))
            elif tool in self._run.tools:
                calls.append((tool, {"url": source.url}))
        for observation in await self._agent.use_all(calls) if calls else []:
            self._failures = 0 if self._keep(observation) else self._failures + 1

    def _keep(self, observation: Observation) -> bool:
        source = next((source for source in observation.sources if source.fetched), None)
        if not observation.ok or source is None:
            return False
        self._library.sources.add([source])
        key = normal_url(source.url)
        self._library.texts.setdefault(key, (source, observation.text))
        if key not in self._read:
            self._read.append(key)
        return True

    async def _take_notes(self) -> Notes:
        task, chars = self._part.question, self._most.chars
        material = [self._library.quoted(key, task, chars) for key in self._read]
        self._library.noted |= set(self._read)
        text = ""
        if self._most.notes_tokens:
            try:
                text = await self._agent.write(Prompt("notes", {"task": self._task}, material), self._most.notes_tokens)
            except AGENT_FAILURES as error:
                self._agent.think(f"No notes, handing on what was read: {error}.")
        return Notes(task, text, "\n\n".join(material))


def _site(url: str) -> str:
    source = Source(url)
    return source.domain or url.partition("#")[0]
