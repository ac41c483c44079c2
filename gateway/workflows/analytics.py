"""`shannon-analytics`: questions about a site or an app, answered from reports and from nothing else.

For Google Analytics, a planner chooses metrics and dimensions from those that the property has, the reports run side
by side, and what failed is planned once more. Tools of MCP servers (PTEngine's, or any other's) are called step by
step by an agent of their own. Tables are made by code; the analysis behind them passes `FigureFilter`, so that no
figure is in it that no report holds. Without an analytics tool it says so, and gives no figures. Raises
GatewayError.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field

from engine.base import Delta
from gateway.clock import Clock
from gateway.conversations.turns import text_of
from gateway.exchange.events import ORCHESTRATOR
from gateway.tools.base import Observation, nested_deeper
from gateway.tools.mcp_servers import MAX_DEPTH, SEPARATOR
from gateway.tools.server_toolbox import server_of, stocked
from gateway.workflows.agents import AGENT_FAILURES, Agent, Decision, Outside, Prompt, fenced
from gateway.workflows.checked_answer import check_unbound, checked_answer
from gateway.workflows.citations import Sources
from gateway.workflows.figure_filter import FigureFilter
from gateway.workflows.figures import Figures
from gateway.workflows.report_plans import MOST_REPORTS, Menu, ReportPlan
from gateway.workflows.reports import Report, ga4_report, other_report
from gateway.workflows.run import Run

_STEPS = 6
"""Calls of one agent to the tools of MCP servers."""
_MAX_FAILURES = 2
"""In a row, after which it stops."""
_MAX_OFFERED_TOOLS = 24
_OBSERVATION_CHARS = 6000
"""Of one call's result, for the step behind it."""
_MAX_RESULT_BYTES = 60_000
"""Of all reports in machine form, in the last event."""
_NO_TOOLS = (
    "No analytics tool is configured on this gateway, so there are no reports and no figures to answer from. "
    "An operator can configure Google Analytics (`tools.ga4`) or another analytics server (`tools.mcp`)."
)
_NO_REPORTS = "No report could be had, so there are no figures to answer from."


Call = tuple[str, dict[str, Any], Observation]
"""A tool of a server, the arguments that it was called with, and what it brought."""


async def analytics(run: Run) -> None:
    """Choose reports, run them, show them, explain them."""
    check_unbound(run)
    await _Analysis(run, time.time).run_through()


class _Analysis:
    """One run."""

    def __init__(self, run: Run, clock: Clock) -> None:
        self._run = run
        self._today = datetime.datetime.fromtimestamp(clock(), datetime.UTC).date()
        self._figures = Figures()
        self._reports: list[Report] = []
        self._failed: list[str] = []
        """What could not be had, in words of ours."""

    async def run_through(self) -> None:
        run = self._run
        wanted = run.tools.names
        run.tools = await stocked(run.tools)
        missing = [name for name in wanted if not any(name in (tool, server_of(tool)) for tool in run.tools.names)]
        self._failed += [f"the server {name!r}, which can't be reached" for name in missing]
        has_ga4 = {"ga4_report", "ga4_metadata"} <= set(run.tools.names)
        servers = [name for name in run.tools.names if SEPARATOR in name][:_MAX_OFFERED_TOOLS]
        if not has_ga4 and not servers:
            if missing:
                return await self._answer()
            run.emit("PROGRESS", ORCHESTRATOR, "No analytics tool is configured: there are no figures.")
            run.send(Delta(_NO_TOOLS, finish_reason="stop"))
            return None
        menu = await self._look_up() if has_ga4 else None
        plans = await self._plan(menu, []) if menu else []
        explored: list[Call] = []
        failures = await self._run_plans(plans, [self._explorer(servers, explored)] if servers else [])
        if menu and failures:
            failures = await self._run_plans(await self._plan(menu, failures), [])
        if menu and failures and not self._reports:
            failures += await self._run_plans(menu.usual(), [])
        self._failed += [title for title, _ in failures]
        for tool, arguments, found in explored:
            if found.ok:
                number = len(self._reports) + 1
                self._reports.append(other_report(number, tool, arguments, found.text, found.data, self._figures))
        worked = {server_of(tool) for tool, _, found in explored if found.ok}
        self._failed += sorted({server_of(tool) for tool, _, _ in explored} - worked)
        return await self._answer()

    async def _look_up(self) -> Menu | None:
        """The metrics and dimensions of the property, None if they are not available."""
        found = Observation("", ok=False)
        try:
            async with Agent(self._run, "planner", "planner") as planner:
                planner.think("Looking up what can be reported.")
                found = await planner.use("ga4_metadata")
        except AGENT_FAILURES:
            pass  # reported by the agent itself
        if found.ok and found.data["metrics"]:
            return Menu(found.data, self._run.question, realtime="ga4_realtime" in self._run.tools)
        self._failed.append("Google Analytics")
        return None

    async def _plan(self, menu: Menu, failures: list[tuple[str, str]]) -> list[ReportPlan]:
        run = self._run
        fields = {
            "question": run.question,
            "conversation": run.conversation,
            "most": str(MOST_REPORTS),
            "today": self._today.isoformat(),
            "realtime": menu.realtime_rule,
            "failures": fenced("errors", "\n".join(map(": ".join, failures))) if failures else "(nothing)",
        }
        plans: list[ReportPlan] = []
        try:
            async with Agent(run, "planner", "planner") as planner:
                planner.think("Choosing metrics and dimensions." if not failures else "Choosing again.")
                prompt = Prompt("analytics_plan", fields, [fenced("what can be reported", menu.text)])
                decision = await planner.decide(prompt, menu.schema, 170 * MOST_REPORTS, schema_is_outside=True)
                plans = menu.plans(decision, self._today)
                planner.think("; ".join(plan.title for plan in plans) or "No reports.")
        except AGENT_FAILURES:
            pass  # reported by the agent itself; there is a report that suits most questions
        return plans or ([] if failures else menu.usual())

    async def _run_plans(
        self, plans: list[ReportPlan], others: list[Callable[[], Coroutine[Any, Any, None]]]
    ) -> list[tuple[str, str]]:
        """Run reports side by side, and others' jobs beside them. Returns the title and the error of those failed."""
        found: dict[int, Observation] = {}
        jobs = [self._job(number, plan, found) for number, plan in enumerate(plans)]
        await self._run.gather([*jobs, *others])
        failures: list[tuple[str, str]] = []
        for number, plan in enumerate(plans):
            observation = found.get(number) or Observation("it was not run", ok=False)
            if observation.ok:
                self._reports.append(ga4_report(len(self._reports) + 1, plan.tool, observation.data, self._figures))
            else:
                failures.append((plan.title, observation.text))
        done = len(plans) - len(failures)
        if plans:
            message = f"{done} of {len(plans)} reports have come."
            self._run.emit("PROGRESS", ORCHESTRATOR, message, done=done, total=len(plans))
        return failures

    def _job(
        self, number: int, plan: ReportPlan, found: dict[int, Observation]
    ) -> Callable[[], Coroutine[Any, Any, None]]:
        async def job() -> None:
            agent = Agent(self._run, self._run.station(), "analyst")
            try:
                async with agent:
                    agent.think(plan.title)
                    found[number] = await agent.use(plan.tool, **plan.arguments(self._today))
            except AGENT_FAILURES:
                pass  # reported by the agent itself; the others continue

        return job

    def _explorer(self, tools: list[str], explored: list[Call]) -> Callable[[], Coroutine[Any, Any, None]]:
        async def job() -> None:
            agent = Agent(self._run, self._run.station(), "analyst")
            try:
                async with agent:
                    await _explore(agent, tools, explored, self._today)
            except AGENT_FAILURES:
                pass  # what was brought until then counts

        return job

    async def _answer(self) -> None:
        run = self._run
        if not self._reports:
            run.emit("PROGRESS", ORCHESTRATOR, "No report could be had: there are no figures.")
            tried = f" Tried: {run.shown('; '.join(self._failed))}." if self._failed else ""
            run.send(Delta(_NO_REPORTS + tried, finish_reason="stop"))
            return
        users = [text_of(turn) for turn in run.earlier_turns if turn["role"] == "user"]
        said = "\n".join((run.question, run.system_prompt, run.context, *users))
        await asyncio.to_thread(self._figures.add_all, said)
        titles = "; ".join(f"[R{report.number}] {report.title}" for report in self._reports)
        run.emit("DATA_PROCESSING", ORCHESTRATOR, f"Reports to answer from: {titles}.")
        prompt = Prompt(
            "analytics_answer",
            {"question": run.question, "failed": Outside("; ".join(self._failed)) if self._failed else "none"},
            [fenced(f"report R{report.number}", report.text) for report in self._reports],
            turns=run.earlier_turns,
            system=run.system_prompt,
        )
        opening = "## Reports\n\n" + "\n\n".join(report.markdown for report in self._reports) + "\n\n"
        checked = FigureFilter(self._figures)
        await checked_answer(run, prompt, Sources(), [checked], opening)
        if checked.removed:
            message = f"{checked.removed} figures were taken out: no report holds them."
            run.emit("DATA_PROCESSING", ORCHESTRATOR, message)
        run.result |= {"reports": self._machine_form(), "figures_removed": checked.removed}

    def _machine_form(self) -> list[dict[str, Any]]:
        """Return the reports for the last event, without data where they are too large for one."""
        whole = [
            {"number": report.number, "tool": report.tool, "title": report.title, "data": report.data}
            for report in self._reports
        ]
        if len(orjson.dumps(whole, default=str)) <= _MAX_RESULT_BYTES:
            return whole
        return [{name: value for name, value in report.items() if name != "data"} for report in whole]


async def _explore(agent: Agent, tools: list[str], calls: list[Call], today: datetime.date) -> None:
    """Let the agent decide on calls of `tools`, one at a time, and note them with what they brought."""
    run = agent.run

    class ReportMove(Decision):
        why: Annotated[str, Field(max_length=160)]
        action: Literal["call", "finish"]
        tool: Literal[tuple(tools)]  # type: ignore[valid-type]
        arguments: Annotated[str, Field(max_length=1000)]

    described = [tool for tool in run.tools.describe() if tool["name"] in tools]
    material = [fenced("tools", "\n".join(json.dumps(tool, ensure_ascii=False) for tool in described))]
    failures = 0
    for number in range(1, _STEPS + 1):
        fields = {
            "question": run.question,
            "conversation": run.conversation,
            "today": today.isoformat(),
            "step": str(number),
            "steps": str(_STEPS),
        }
        step = await agent.decide(Prompt("analytics_step", fields, material), ReportMove, 420, schema_is_outside=True)
        message = f"Thinking step {number} of {_STEPS}."
        run.emit("PROGRESS", agent.id, message, role=agent.role, step=number, steps=_STEPS)
        if step is None or step.action == "finish" or failures >= _MAX_FAILURES:
            return
        agent.think(step.why or f"Calling {step.tool}.")
        arguments = _arguments(step.arguments)
        if arguments is None:
            found = Observation("The arguments are not a JSON object.", ok=False)
        elif any(call[:2] == (step.tool, arguments) for call in calls):
            found = Observation("This was called already, with the same arguments.", ok=False)
        else:
            found = await agent.use(step.tool, **arguments)
            calls.append((step.tool, arguments, found))
        failures = 0 if found.ok else failures + 1
        material.append(fenced(f"result of {step.tool} {step.arguments}", found.text[:_OBSERVATION_CHARS]))


def _arguments(text: str) -> dict[str, Any] | None:
    """Return a call's arguments, None where the text is no JSON object."""
    try:
        arguments = orjson.loads(text or "{}")
    except ValueError:
        return None
    return arguments if isinstance(arguments, dict) and not nested_deeper(arguments, MAX_DEPTH) else None
