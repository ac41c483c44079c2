"""`shannon-ads-research`: who advertises for a query, with what offers and claims, compared in a table.

Agents type queries into a search engine and note the ads that it shows; the pages that these lead to are read side by
side; of each advertiser a model notes offer, price, claims and call to action, and code keeps what is in the ads or
on the page. Both tables are made by code; the analysis behind them names no price, page or domain that was not seen.
Without a tool for ads it says so, and shows none. Raises GatewayError.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from pydantic import Field

from engine.base import Delta
from gateway.exchange.events import ORCHESTRATOR
from gateway.tools.base import Observation
from gateway.workflows.agents import AGENT_FAILURES, Agent, Decision, Outside, Prompt, fenced, quoted
from gateway.workflows.checked_answer import check_unbound, checked_answer
from gateway.workflows.citations import Sources
from gateway.workflows.excerpts import excerpt, one_line
from gateway.workflows.figures import Figures
from gateway.workflows.offer_filter import OfferFilter
from gateway.workflows.offers import Advertiser, Profile, ads_table, advertisers_of, checked, comparison
from gateway.workflows.run import Run
from gateway.workflows.tables import cell

MOST_QUERIES = 3
MOST_ADVERTISERS = 6
"""Whose pages are read; the ads of all are listed."""
_PAGE_CHARS = 6000
"""Of a page, for its advertiser's profile."""
_SHOWN_PAGE_CHARS = 1200
"""Of a page, for the analysis."""
_NO_TOOL = (
    "No ads were consulted: this gateway has no service configured that shows ads on results pages "
    "(`tools.serp_ads`). Nothing can be said about competitors' ads without it."
)


class Queries(Decision):
    queries: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=80)]], Field(min_length=1, max_length=MOST_QUERIES)
    ]
    country: Annotated[str, Field(pattern=r"^([a-z]{2})?$")]
    language: Annotated[str, Field(pattern=r"^([a-z]{2})?$")]


async def ads(run: Run) -> None:
    """Find ads, read what they lead to, compare, explain."""
    check_unbound(run)
    if "serp_ads" not in run.tools:
        run.emit("PROGRESS", ORCHESTRATOR, "No tool for ads is configured: no ads are consulted.")
        run.send(Delta(_NO_TOOL, finish_reason="stop"))
        return
    await _AdsResearch(run).run_through()


class _AdsResearch:
    """One run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._sources = Sources()
        self._pages: dict[str, str] = {}
        """Addresses of results pages, by query."""
        self._advertisers: list[Advertiser] = []

    async def run_through(self) -> None:
        run = self._run
        wanted = await self._plan()
        shown: dict[str, list[dict[str, Any]]] = {}
        await run.gather([self._search_job(query, wanted, shown) for query in wanted.queries])
        # In the order of the plan, whichever came first.
        self._advertisers = advertisers_of((query, shown[query]) for query in wanted.queries if query in shown)
        count = sum(len(one.ads) for one in self._advertisers)
        message = f"{count} ads of {len(self._advertisers)} advertisers."
        run.emit("PROGRESS", ORCHESTRATOR, message, done=len(shown), total=len(wanted.queries))
        if not self._advertisers:
            run.send(Delta(_nothing(wanted, shown), finish_reason="stop"))
            return
        await run.gather([self._profile_job(one) for one in self._advertisers[:MOST_ADVERTISERS]])
        await self._answer()

    async def _plan(self) -> Queries:
        run = self._run
        plan: Queries | None = None
        try:
            async with Agent(run, "planner", "planner") as planner:
                planner.think("Choosing what to search for.")
                fields = {"question": run.question, "conversation": run.conversation, "most": str(MOST_QUERIES)}
                plan = await planner.decide(Prompt("ads_plan", fields), Queries, 160)
                if plan is not None:
                    planner.think("; ".join(plan.queries))
        except AGENT_FAILURES:
            pass  # reported by the agent itself
        if plan is None:
            return Queries(queries=[one_line(run.question, 80) or "?"], country="", language="")
        return plan.model_copy(update={"queries": list(dict.fromkeys(plan.queries))})

    def _search_job(
        self, query: str, wanted: Queries, shown: dict[str, list[dict[str, Any]]]
    ) -> Callable[[], Coroutine[Any, Any, None]]:
        async def job() -> None:
            try:
                async with Agent(self._run, self._run.station(), "searcher") as agent:
                    agent.think(query)
                    found = await agent.use("serp_ads", query=query, country=wanted.country, language=wanted.language)
            except AGENT_FAILURES:
                return  # reported by the agent itself; the others continue
            if found.ok:
                shown[query] = found.data
                self._sources.add(found.sources)
                self._pages[query] = next((source.url for source in found.sources if source.fetched), "")

        return job

    def _profile_job(self, one: Advertiser) -> Callable[[], Coroutine[Any, Any, None]]:
        async def job() -> None:
            try:
                async with Agent(self._run, self._run.station(), "analyst") as agent:
                    agent.think(f"{one.name} ({one.domain}): {len(one.ads)} ads.")
                    await self._read(agent, one)
                    profile = await agent.decide(self._profile_prompt(one), Profile, 420)
                    if profile is not None:
                        one.profile = checked(profile, one.text)
            except AGENT_FAILURES:
                pass  # the ads are in the first table anyway

        return job

    async def _read(self, agent: Agent, one: Advertiser) -> None:
        if not one.url or "web_fetch" not in self._run.tools:
            return
        found: Observation = await agent.use("web_fetch", url=one.url)
        self._sources.add(found.sources)
        read = next((source for source in found.sources if source.fetched), None)
        if found.ok and read is not None:
            one.page, one.page_text = read, found.text

    def _profile_prompt(self, one: Advertiser) -> Prompt:
        material = [fenced(f"ads of {one.domain}", one.ad_text)]
        if one.page is not None:
            number = self._sources.number(one.page.url) or 0
            material.append(quoted(number, one.page, excerpt(one.page_text, self._run.question, _PAGE_CHARS)))
        return Prompt("ads_profile", {"advertiser": Outside(one.domain)}, material)

    def _numbers(self, one: Advertiser) -> list[int | None]:
        """Return the numbers of an advertiser's sources: the results pages that showed it, and its own page."""
        pages = [self._sources.number(self._pages.get(ad["query"], "")) for ad in one.ads]
        return [*pages, self._sources.number(one.page.url) if one.page else None]

    def _material(self, one: Advertiser) -> str:
        """The facts about an advertiser, for the analysis."""
        profile = one.profile
        noted = (
            f"Offer: {profile.offer or '-'}\nPrice: {profile.price or '-'}\n"
            f"Claims: {'; '.join(profile.claims) or '-'}\nCall to action: {profile.call_to_action or '-'}\n"
            if profile
            else ""
        )
        numbers = ", ".join(str(number) for number in dict.fromkeys(self._numbers(one)) if number)
        page = excerpt(one.page_text, self._run.question, _SHOWN_PAGE_CHARS) if one.page else "The page was not read."
        return fenced(f"{one.domain}, sources {numbers}", f"{noted}{one.ad_text}\n\n{page}")

    async def _answer(self) -> None:
        run = self._run
        page_numbers = {query: self._sources.number(url) or 0 for query, url in self._pages.items()}
        compared = self._advertisers[:MOST_ADVERTISERS]
        opening = (
            f"## Ads\n\n{ads_table(self._advertisers, page_numbers)}\n\n## Comparison\n\n"
            f"{comparison(compared, {one.domain: self._numbers(one) for one in compared})}\n\n"
        )
        figures = Figures()
        said = run.said
        for text in (*(one.text for one in self._advertisers), said):
            await asyncio.to_thread(figures.add_all, text)
        domains = [one.domain for one in self._advertisers]
        seen = await asyncio.to_thread(OfferFilter, figures, domains, said)
        prompt = Prompt(
            "ads_answer",
            {"question": run.question},
            [self._material(one) for one in compared],
            turns=run.earlier_turns,
            system=run.system_prompt,
        )
        await checked_answer(run, prompt, self._sources, [seen], opening)
        run.result["ads"] = [
            {
                "advertiser": one.name,
                "domain": one.domain,
                "ads": one.ads,
                "page_read": one.page is not None,
                "profile": one.profile.model_dump() if one.profile else None,
            }
            for one in self._advertisers
        ]


def _nothing(wanted: Queries, shown: dict[str, list[dict[str, Any]]]) -> str:
    """The answer if there are no ads to report."""
    failed = [cell(query) for query in wanted.queries if query not in shown]
    without = [cell(query) for query in wanted.queries if query in shown]
    lines = ["No ads were found, so there is nothing to compare."]
    if without:
        lines.append(f"No ads were shown for: {'; '.join(without)}.")
    if failed:
        lines.append(f"The search failed for: {'; '.join(failed)}.")
    return "\n\n".join(lines)
