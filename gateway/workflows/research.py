"""The four research models: plan, agents that search and read side by side, and an answer with numbered sources.

What differs between them is a `Strategy`. Every agent has its own sub-question; notes name sources by number; deep
strategies let agents decide step by step, judge what is covered, and go round again for the gaps; the academic one
checks its claims against the sources before it answers. One agent's failure is reported and left behind. Without a
search tool the models answer from what they know, and say so. Raises GatewayError where nothing can be answered.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from gateway.errors import BadRequest
from gateway.exchange.events import ORCHESTRATOR
from gateway.workflows.agents import AGENT_FAILURES, Agent, Decision, Prompt, fenced
from gateway.workflows.excerpts import one_line
from gateway.workflows.researcher import SEARCHES, Library, Notes, Researcher, SubQuestion, Thoroughness
from gateway.workflows.run import Run, Workflow
from gateway.workflows.synthesis import answer
from gateway.workflows.verification import Checked, findings, limitations, verify

_GATHER_SHARE = 0.7
"""Of a run's time; the rest is for checks and the answer."""
_COVERED = 85
"""Per cent at which another round is not worth it."""
_CHARS_PER_TOKEN = 3
_NOTES_SHARE = 0.4
"""Of a run's tokens, for what the first round's agents read."""
_SOURCE_CHARS = (1500, 8000)
"""Least and most that notes are taken from, of one source."""
_LEFT_OVER_CHARS = 1500
_NO_SOURCES = "No sources were consulted: no search is available to this model here.\n\n"
_NOTHING_READ = "No sources were consulted: nothing could be found or read.\n\n"


@dataclass(frozen=True, slots=True)
class Strategy:
    """How thorough a research run is. Figures follow the products that these models are known from."""

    least: int
    most: int
    """Sub-questions."""
    each: Thoroughness
    """What one agent does."""
    rounds: int = 0
    """Rounds of gap filling at most."""
    refine: bool = False
    verify: bool = False
    form: str = "Answer in a few sentences."


_DEEP = Strategy(
    5,
    8,
    Thoroughness(reads=4, steps=6),
    rounds=3,
    refine=True,
    form="Write an executive summary, then detailed findings under one heading per area, then open questions.",
)
STRATEGIES = {
    "quick": Strategy(1, 3, Thoroughness(reads=2, notes_tokens=0)),
    "standard": Strategy(
        3, 5, Thoroughness(reads=3), form="Begin with the answer; then the findings, under a few short headings."
    ),
    "deep": _DEEP,
    "academic": replace(
        _DEEP,
        verify=True,
        form="Write an abstract, then findings under one heading per area, then a section Limitations. Say which "
        "claims were contradicted or not found in their sources, or leave them out.",
    ),
}


class Refined(Decision):
    question: Annotated[str, Field(min_length=1, max_length=300)]
    kind: Literal["factual", "comparison", "company", "industry", "scientific", "timeline", "exploratory"]
    areas: Annotated[list[Annotated[str, Field(min_length=1, max_length=60)]], Field(min_length=1, max_length=7)]


class Coverage(Decision):
    covered: Annotated[int, Field(ge=0, le=100)]
    gaps: Annotated[list[SubQuestion], Field(max_length=3)]


class Plan(Decision):
    sub_questions: list[SubQuestion]


def plan_schema(least: int, most: int) -> type[Plan]:
    """Return the schema of a plan with that many sub-questions."""

    class BoundedPlan(Plan):
        sub_questions: Annotated[list[SubQuestion], Field(min_length=least, max_length=most)]

    return BoundedPlan


def research(strategy_name: str) -> Workflow:
    """Return the workflow of a research model."""

    async def workflow(run: Run) -> None:
        strategy = STRATEGIES[run.options.get("research_strategy") or strategy_name]
        rounds = run.options.get("max_iterations")
        if rounds is not None:
            strategy = replace(strategy, rounds=min(rounds, strategy.rounds))
        await _Research(run, strategy).run_through()

    return workflow


class _Research:
    """One research run."""

    def __init__(self, run: Run, strategy: Strategy) -> None:
        least, most = _SOURCE_CHARS
        fair = int(run.budget.tokens * _NOTES_SHARE * _CHARS_PER_TOKEN / (strategy.most * strategy.each.reads))
        self._run = run
        self._strategy = replace(strategy, each=replace(strategy.each, chars=max(least, min(fair, most))))
        self._library = Library()
        self._notes: list[Notes] = []
        self._searchable = any(name in run.tools for name in SEARCHES)

    async def run_through(self) -> None:
        run, strategy = self._run, self._strategy
        turns = len(run.earlier_turns)
        run.emit("DATA_PROCESSING", ORCHESTRATOR, "Gathering context.", turns=turns, tools=run.tools.names)
        if not self._searchable:
            run.emit("PROGRESS", ORCHESTRATOR, "No search is available: answering without sources.", sources=0)
        else:
            await self._explore(await self._plan())
            for number in range(1, strategy.rounds + 1):
                before = len(self._library.sources.fetched)
                gaps = await self._gaps(number)
                if not gaps:
                    break
                await self._explore(gaps)
                if len(self._library.sources.fetched) == before:
                    break  # a round that finds nothing new will not be followed by one that does
        await self._answer()

    async def _plan(self) -> list[SubQuestion]:
        run, strategy = self._run, self._strategy
        precisely: list[str] = []
        plan: Plan | None = None
        try:
            async with Agent(run, "planner", "planner") as planner:
                if strategy.refine:
                    planner.think("Sharpening the question.")
                    refined = await planner.decide(self._prompt("refine", question=run.question), Refined, 250)
                    if refined is not None:
                        areas = ", ".join(refined.areas)
                        asked = f"{refined.question} To cover: {areas}"
                        precisely = [fenced("refined question", asked) if run.has_outside else asked]
                planner.think("Splitting the question into parts.")
                bounds = {"least": str(strategy.least), "most": str(strategy.most)}
                schema = plan_schema(strategy.least, strategy.most)
                prompt = replace(self._prompt("plan", question=run.question, **bounds), material=precisely)
                plan = await planner.decide(prompt, schema, 120 * strategy.most)
                parts = plan.sub_questions if plan is not None else [_whole(run.question)]
                planner.think(f"{len(parts)} parts.", sub_questions=[part.question for part in parts])
                return parts
        except AGENT_FAILURES as error:
            if not run.begun and isinstance(error, BadRequest):
                raise  # nothing else will be admitted either
            return [_whole(run.question)]

    async def _explore(self, parts: list[SubQuestion]) -> None:
        """Let one agent per part search and read, side by side, and keep their notes."""
        run, sources = self._run, self._library.sources
        notes = await run.gather([self._job(part) for part in parts], share=_GATHER_SHARE)
        self._notes += [note for note in notes if note is not None]
        done = sum(note is not None for note in notes)
        run.emit(
            "PROGRESS",
            ORCHESTRATOR,
            f"{done} of {len(parts)} agents have brought notes; {len(sources.fetched)} sources were read.",
            done=done,
            total=len(parts),
            sources=len(sources.fetched),
        )

    def _job(self, part: SubQuestion) -> Callable[[], Coroutine[Any, Any, Notes | None]]:
        return Researcher(self._run, self._library, part, self._strategy.each).work

    async def _gaps(self, round_number: int) -> list[SubQuestion]:
        """The open questions, as judged by a reviewer."""
        run = self._run
        if run.budget.left_s(_GATHER_SHARE) <= 0 or not self._notes:
            return []
        try:
            async with Agent(run, "coverage", "reviewer") as reviewer:
                prompt = Prompt("coverage", {"question": run.question}, self._material())
                coverage = await reviewer.decide(prompt, Coverage, 400)
                if coverage is None:
                    return []
                gaps = coverage.gaps if coverage.covered < _COVERED else []
                reviewer.think(
                    f"{coverage.covered} % covered; {len(gaps)} questions are open.",
                    covered=coverage.covered,
                    gaps=[gap.question for gap in gaps],
                    round=round_number,
                )
                return gaps
        except AGENT_FAILURES:
            return []

    def _material(self) -> list[str]:
        """The notes of all agents, and what agents without notes have read."""
        library = self._library
        left_over = [key for key in library.texts if key not in library.noted]
        question = self._run.question
        return [note.fenced() for note in self._notes] + [
            library.quoted(key, question, _LEFT_OVER_CHARS) for key in left_over
        ]

    def _prompt(self, name: str, **fields: str) -> Prompt:
        return Prompt(name, {"conversation": self._run.conversation, **fields}, images=self._run.images)

    async def _answer(self) -> None:
        run, strategy, library = self._run, self._strategy, self._library
        read = len(library.sources.fetched)
        checked: list[Checked] = await verify(run, library, self._material()) if strategy.verify and read else []
        material = self._material()
        run.emit("DATA_PROCESSING", ORCHESTRATOR, f"Putting {len(material)} notes together.", sources=read)
        prompt = Prompt(
            "answer",
            {"question": run.question, "form": strategy.form},
            (material + ([findings(checked)] if checked else []))
            or ["(none: answer from what you know, name no sources, and say what you are not sure of)"],
            turns=run.earlier_turns,
            system=run.system_prompt,
            images=run.images,
        )
        await answer(
            run,
            prompt,
            library.sources,
            opening="" if read else _NOTHING_READ if self._searchable else _NO_SOURCES,
            closing=lambda text: limitations(text, checked, read) if strategy.verify and read else "",
            instead="\n\n".join(f"## {note.task}\n\n{note.plain()}" for note in self._notes),
        )


def _whole(question: str) -> SubQuestion:
    """Return the question as its only part."""
    said = one_line(question, 200) or "?"
    return SubQuestion(question=said, queries=[said[:100]])
