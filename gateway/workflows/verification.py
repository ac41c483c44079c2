"""Checks what a draft claims against the sources that it names, each claim by an agent of its own.

The draft is not repaired: another agent writes it again with the findings. A claim whose
check fails counts as unchecked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from gateway.exchange.events import ORCHESTRATOR
from gateway.workflows.agents import AGENT_FAILURES, Agent, Decision, Outside, Prompt, fenced
from gateway.workflows.researcher import Library
from gateway.workflows.run import Run

_SHARE = 0.85
"""Of a run's time, by which all checks must be done."""
_DRAFT_TOKENS = 500
_MOST_CLAIMS = 8
_SOURCE_CHARS = 3000
_LIMITATIONS = re.compile(r"^\W*limitations\W*$", re.I)
_HEADING = re.compile(r"^(?:#{1,6} .*|\*\*.*\*\*:?)$", re.M)


class Claim(Decision):
    claim: Annotated[str, Field(min_length=1, max_length=200)]
    sources: Annotated[list[Annotated[int, Field(ge=1, le=99)]], Field(max_length=4)]


class Claims(Decision):
    claims: Annotated[list[Claim], Field(max_length=_MOST_CLAIMS)]


class Verdict(Decision):
    verdict: Literal["supported", "contradicted", "not_found"]
    why: Annotated[str, Field(max_length=160)]


@dataclass(frozen=True, slots=True)
class Checked:
    """A claim, and what its sources say to it."""

    claim: str
    verdict: Literal["supported", "contradicted", "not_found"]


async def verify(run: Run, library: Library, notes: list[str]) -> list[Checked]:
    """Draft an answer from `notes`, list its claims, and check them side by side."""
    claims: list[Claim] = []
    try:
        async with Agent(run, "verification", "reviewer") as reviewer:
            reviewer.think("Drafting, to see what must be checked.")
            form = {"question": run.question, "form": "Answer in ten sentences at most."}
            draft = await reviewer.write(Prompt("answer", form, notes), _DRAFT_TOKENS)
            prompt = Prompt("claims", {"most": str(_MOST_CLAIMS)}, [fenced("draft", draft)])
            found = await reviewer.decide(prompt, Claims, 90 * _MOST_CLAIMS)
            claims = found.claims if found is not None else []
    except AGENT_FAILURES:
        pass  # reported by the agent; the answer says that nothing was checked
    outcomes = await run.gather([_check(run, library, claim) for claim in claims], share=_SHARE)
    checked = [outcome for outcome in outcomes if outcome is not None]
    supported = sum(outcome.verdict == "supported" for outcome in checked)
    run.emit(
        "DATA_PROCESSING",
        ORCHESTRATOR,
        f"{supported} of {len(claims)} claims are supported by their sources.",
        claims=[{"claim": outcome.claim, "verdict": outcome.verdict} for outcome in checked],
    )
    return checked


def _check(run: Run, library: Library, claim: Claim) -> Callable[[], Coroutine[Any, Any, Checked | None]]:
    agent = Agent(run, run.station(), "verifier")
    keys = [key for key, (source, _) in library.texts.items() if library.sources.number(source.url) in claim.sources]
    material = [library.quoted(key, claim.claim, _SOURCE_CHARS) for key in keys or list(library.texts)[:3]]

    async def check() -> Checked | None:
        try:
            async with agent:
                agent.think(claim.claim)
                verdict = await agent.decide(Prompt("verify", {"claim": Outside(claim.claim)}, material), Verdict, 120)
                return Checked(claim.claim, verdict.verdict) if verdict is not None else None
        except AGENT_FAILURES:
            return None

    return check


def findings(checked: list[Checked]) -> str:
    """Return the verdicts for the prompt of the answer."""
    return fenced("checked claims", "\n".join(f"- {one.verdict}: {one.claim}" for one in checked))


def limitations(text: str, checked: list[Checked], read: int) -> str:
    """The required text of an answer's section on limitations."""
    open_claims = [one for one in checked if one.verdict != "supported"]
    lines = [f"{read} sources were read by a program; no person has checked this answer."]
    if checked:
        lines.append(f"{len(checked) - len(open_claims)} of {len(checked)} checked claims were found in their sources.")
    else:
        lines.append("Its claims were not checked against the sources one by one.")
    lines += [f"{'Contradicted' if one.verdict == 'contradicted' else 'Not found'}: {one.claim}" for one in open_claims]
    headings = _HEADING.findall(text)
    heading = "" if headings and _LIMITATIONS.match(headings[-1]) else "## Limitations\n\n"
    return f"\n\n{heading}" + "\n".join(f"- {line}" for line in lines)
