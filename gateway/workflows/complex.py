"""A supervisor that splits a task into steps with dependencies, runs them, and writes one answer.

Steps that depend on nothing unfinished run side by side; each sees the results of those it depends on. A failed step is
tried once more, and then left out: the answer says so, and the steps behind it do without. Raises GatewayError
where nothing can be answered.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field

from gateway.errors import BadRequest
from gateway.exchange.events import ORCHESTRATOR
from gateway.tools.base import Observation
from gateway.tools.mcp_servers import SEPARATOR
from gateway.tools.server_toolbox import stocked
from gateway.workflows.agents import AGENT_FAILURES, Agent, Decision, Outside, Prompt, fenced, quoted
from gateway.workflows.citations import Sources
from gateway.workflows.excerpts import excerpt
from gateway.workflows.run import OutOfBudget, Run
from gateway.workflows.synthesis import answer

MOST_STEPS = 8
_GATHER_SHARE = 0.75
_TOOL_CALLS = 3
"""Of one step."""
_STEP_TOKENS = 500
_OBSERVATION_CHARS = 4000
"""Of what a tool brought, for the step that called it."""
_RETRIES = 1


class PlanStep(Decision):
    id: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    role: Literal["researcher", "analyst", "writer", "engineer", "critic", "generalist"]
    task: Annotated[str, Field(min_length=1, max_length=240)]
    depends_on: Annotated[list[Annotated[int, Field(ge=1, le=MOST_STEPS)]], Field(max_length=MOST_STEPS)]


class Plan(Decision):
    steps: Annotated[list[PlanStep], Field(min_length=1, max_length=MOST_STEPS)]


class ToolUse(Decision):
    """The next tool call of a step, or none."""

    action: Literal["call", "answer"]
    tool: Annotated[str, Field(max_length=64)]
    arguments: Annotated[str, Field(max_length=400)]
    """A JSON object, as text."""


@dataclass(frozen=True, slots=True)
class Result:
    step: PlanStep
    text: str

    def fenced(self) -> str:
        """Return the result for a prompt: it may repeat what a tool's result would have agents do."""
        return fenced(f"result of step {self.step.id}: {self.step.task}", self.text)


def ordered(plan: Plan) -> list[PlanStep]:
    """Return the plan's steps with ids that differ and dependencies that exist and come earlier.

    A model may write any numbers; a dependency on a later step, on itself or on nothing is dropped, so there is no
    circle left.
    """
    kept: dict[int, PlanStep] = {}
    for step in plan.steps:
        if step.id not in kept:
            kept[step.id] = step.model_copy(update={"depends_on": sorted({d for d in step.depends_on if d in kept})})
    return list(kept.values())


async def supervise(run: Run) -> None:
    """Plan, run the steps, answer."""
    run.tools = await stocked(run.tools)
    run.has_outside = run.has_outside or _from_servers(run)
    turns = len(run.earlier_turns)
    run.emit("DATA_PROCESSING", ORCHESTRATOR, "Gathering context.", turns=turns, tools=run.tools.names)
    steps = await _plan(run)
    sources = Sources()
    results = await _Execution(run, steps, sources).run_through()
    failed = [step for step in steps if step.id not in results]
    await _answer(run, list(results.values()), failed, sources)


def _from_servers(run: Run) -> bool:
    """Whether some of the tools, and what they say about themselves, come from MCP servers."""
    return any(SEPARATOR in name for name in run.tools.names)


async def _plan(run: Run) -> list[PlanStep]:
    """Return the steps, or the whole task as one where no plan can be had."""
    alone = PlanStep(id=1, role="generalist", task=run.question[:240] or "?", depends_on=[])
    try:
        async with Agent(run, "planner", "supervisor") as planner:
            planner.think("Splitting the task into steps.")
            tools = ", ".join(run.tools.names) or "none"
            fields = {"question": run.question, "conversation": run.conversation, "most": str(MOST_STEPS)}
            fields["tools"] = Outside(tools) if _from_servers(run) else tools
            prompt = Prompt("complex_plan", fields, images=run.images)
            plan = await planner.decide(prompt, Plan, 110 * MOST_STEPS)
            steps = ordered(plan) if plan is not None else [alone]
            planner.think(
                f"{len(steps)} steps.",
                steps=[{"id": s.id, "role": s.role, "task": s.task, "depends_on": s.depends_on} for s in steps],
            )
            return steps
    except AGENT_FAILURES as error:
        if not run.begun and isinstance(error, BadRequest):
            raise  # nothing else will be admitted either
        return [alone]


class _Execution:
    """The running of one plan."""

    def __init__(self, run: Run, steps: list[PlanStep], sources: Sources) -> None:
        self._run = run
        self._steps = steps
        self._sources = sources
        self._results: dict[int, Result] = {}
        self._tasks = {step.id: run.written(step.task) for step in steps}
        """For prompts, as the supervisor knew no more than the user when it planned, or did."""
        self._ended = {step.id: asyncio.Event() for step in steps}

    async def run_through(self) -> Mapping[int, Result]:
        """Return the results of the steps that worked, by id, in the plan's order."""
        # Each job waits for its dependencies before it takes a place, so waiting ones block no other.
        await self._run.gather([self._job(step) for step in self._steps], share=_GATHER_SHARE, ready=self._ready)
        return {step.id: self._results[step.id] for step in self._steps if step.id in self._results}

    async def _ready(self, number: int) -> None:
        for dependency in self._steps[number].depends_on:
            await self._ended[dependency].wait()

    def _job(self, step: PlanStep) -> Callable[[], Coroutine[Any, Any, None]]:
        async def job() -> None:
            try:
                for attempt in range(_RETRIES + 1):
                    if text := await self._attempt(step, attempt):
                        self._results[step.id] = Result(step, text)
                        break
            finally:
                self._ended[step.id].set()
            done = sum(event.is_set() for event in self._ended.values())
            self._run.emit(
                "PROGRESS",
                ORCHESTRATOR,
                f"{done} of {len(self._steps)} steps have ended.",
                done=done,
                total=len(self._steps),
                failed=done - len(self._results),
            )

        return job

    async def _attempt(self, step: PlanStep, attempt: int) -> str | None:
        """Return the step's result, None where it failed."""
        agent = Agent(self._run, self._run.station(), step.role)
        earlier = [self._results[number] for number in step.depends_on if number in self._results]
        material = [result.fenced() for result in earlier]
        missing = len(step.depends_on) - len(earlier)
        try:
            async with agent:
                agent.think(step.task, step=step.id, attempt=attempt + 1)
                material += await self._call_tools(agent, step, material)
                fields = {"role": step.role, "task": self._tasks[step.id], "question": self._run.question}
                fields["missing"] = f"{missing} results that your step needed are missing.\n" if missing else ""
                text = await agent.write(Prompt("complex_step", fields, material), _STEP_TOKENS)
                if not text:
                    raise OutOfBudget("it had nothing to say")
                return text
        except AGENT_FAILURES:
            return None  # reported by the agent itself

    async def _call_tools(self, agent: Agent, step: PlanStep, results: list[str]) -> list[str]:
        """Let the agent call tools, a few at most. Returns what they brought, marked as data."""
        read: list[str] = []
        tools = self._run.tools
        described = json.dumps(tools.describe())
        fields = {"task": self._tasks[step.id], "question": self._run.question}
        fields["tools"] = Outside(described) if _from_servers(self._run) else described
        for _ in range(_TOOL_CALLS if tools.names else 0):
            use = await agent.decide(Prompt("complex_tools", fields, results + read), ToolUse, 200)
            if use is None or use.action == "answer" or use.tool not in tools:
                break
            try:
                arguments = orjson.loads(use.arguments or "{}")
                observation = await agent.use(use.tool, **(arguments if isinstance(arguments, dict) else {}))
            except ValueError:
                agent.think("The tool's arguments can't be read; going on without it.")
                break
            except OutOfBudget as error:
                agent.think(f"No tool call: {error}.")
                break
            self._sources.add(observation.sources)
            read.append(self._quoted(step, use.tool, observation))
        return read

    def _quoted(self, step: PlanStep, tool: str, observation: Observation) -> str:
        text = excerpt(observation.text, step.task, _OBSERVATION_CHARS)
        fetched = [source for source in observation.sources if source.fetched]
        if len(fetched) != 1:
            return fenced(f"result of {tool}", text)
        return quoted(self._sources.number(fetched[0].url) or 0, fetched[0], text)


async def _answer(run: Run, results: list[Result], failed: list[PlanStep], sources: Sources) -> None:
    names = "; ".join(f"step {step.id} ({step.task})" for step in failed)
    missing = "".join(f"\n- {step.task}" for step in failed)
    run.result["steps_failed"] = [step.id for step in failed]
    await answer(
        run,
        Prompt(
            "complex_answer",
            {"question": run.question, "failed": run.written(names) if names else "none"},
            [result.fenced() for result in results],
            turns=run.earlier_turns,
            system=run.system_prompt,
            images=run.images,
        ),
        sources,
        closing=lambda text: f"\n\nNot done, and missing from this answer:\n{missing}" if failed else "",
        instead="\n\n".join(f"## {result.step.task}\n\n{result.text}" for result in results),
    )
