"""Which reports of Google Analytics a model may choose: a menu out of the property's metadata, and a schema of it.

The schema names every metric and dimension on the menu, so that a model, however small, can only choose what there
is. The menu is short: what is usual, what the property has defined itself, and what the question has words of. Does not
handle metrics and dimensions that do not go together; Google says so, and the plan is made again.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from gateway.tools.ga4_names import REALTIME_DIMENSIONS, REALTIME_METRICS
from gateway.workflows.agents import Decision

MOST_REPORTS = 4
_MAX_METRICS = 36
"""On the menu."""
_MAX_DIMENSIONS = 48
_USUAL_METRICS = (
    *("activeUsers", "newUsers", "totalUsers", "sessions", "engagedSessions", "engagementRate", "bounceRate"),
    *("averageSessionDuration", "screenPageViews", "screenPageViewsPerSession", "eventCount", "keyEvents"),
    *("sessionKeyEventRate", "totalRevenue", "purchaseRevenue", "transactions", "ecommercePurchases", "addToCarts"),
    *("checkouts", "itemsPurchased", "advertiserAdCost", "advertiserAdClicks", "returnOnAdSpend"),
)
_USUAL_DIMENSIONS = (
    *("date", "week", "yearMonth", "dayOfWeekName", "hour", "country", "region", "city", "language"),
    *("deviceCategory", "operatingSystem", "browser", "platform", "newVsReturning", "sessionDefaultChannelGroup"),
    *("sessionSource", "sessionMedium", "sessionSourceMedium", "sessionCampaignName", "firstUserDefaultChannelGroup"),
    *("landingPage", "pagePath", "pageTitle", "pageReferrer", "eventName", "itemName", "itemCategory"),
)
_DAY = r"^(today|yesterday|[0-9]{1,3}daysAgo|20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01]))$"
_USUAL_DAYS = ("28daysAgo", "yesterday")
_FIRST_DAY = datetime.date(2015, 8, 14)
"""Earliest that the Data API takes."""
_RELATIVE = re.compile(r"([0-9]{1,3})daysAgo")
_WORD = re.compile(r"[^\W\d_]{4,}")
_MAX_QUESTION_CHARS = 2000
"""Each of its words is looked for in each name."""
_FIRST_METRICS = ("activeUsers", "sessions", "screenPageViews")

Compare = Literal["nothing", "previous_period", "previous_year"]


class ReportPlan:
    """One report to run."""

    def __init__(
        self,
        metrics: list[str],
        dimensions: list[str],
        *,
        days: tuple[str, str] = _USUAL_DAYS,
        compare_with: Compare = "nothing",
        filter_dimension: str = "",
        filter_value: str = "",
        rows: int = 20,
        realtime: bool = False,
    ) -> None:
        self.tool = "ga4_realtime" if realtime else "ga4_report"
        self._metrics = metrics
        self._dimensions = dimensions
        self._days = days
        self._compare_with: Compare = compare_with
        self._filter = (filter_dimension, filter_value) if filter_dimension and filter_value else None
        self._rows = rows

    @property
    def title(self) -> str:
        """The report in words, for events and for what failed."""
        by = f" by {', '.join(self._dimensions)}" if self._dimensions else ""
        when = "in the last minutes" if self.tool == "ga4_realtime" else f"{self._days[0]} to {self._days[1]}"
        return f"{', '.join(self._metrics)}{by}, {when}"

    def arguments(self, today: datetime.date) -> dict[str, Any]:
        """Return the tool's arguments."""
        arguments: dict[str, Any] = {"metrics": self._metrics, "dimensions": self._dimensions, "limit": self._rows}
        if self.tool == "ga4_realtime":
            return arguments
        ranges = [self._days]
        if self._compare_with != "nothing" and (before := earlier(*self._days, self._compare_with, today)):
            ranges.append(before)
        arguments["date_ranges"] = [{"start_date": start, "end_date": end} for start, end in ranges]
        if self._filter:
            arguments["filters"] = [{"dimension": self._filter[0], "match": "contains", "value": self._filter[1]}]
        return arguments


class Menu:
    """What a model may choose from. `text` says it in words, `schema` in JSON schema."""

    def __init__(self, metadata: Mapping[str, Any], question: str, *, realtime: bool) -> None:
        """`metadata` is what `ga4_metadata` brings, with at least one metric."""
        metrics = _shortlist(metadata["metrics"], _USUAL_METRICS, question, _MAX_METRICS)
        dimensions = _shortlist(metadata["dimensions"], _USUAL_DIMENSIONS, question, _MAX_DIMENSIONS)
        self._metrics = [entry["name"] for entry in metrics]
        self._dimensions = [entry["name"] for entry in dimensions]
        self._has_realtime = realtime
        self.text = "\n".join(
            ["Metrics:", *map(_line, metrics), "Dimensions:", *map(_line, dimensions)]
            + (["In the last minutes:", ", ".join((*REALTIME_METRICS, *REALTIME_DIMENSIONS))] if realtime else [])
        )
        self.realtime_rule = (
            "- when is `days`, or `last_minutes` for what happens right now; then days do not matter."
            if realtime
            else ""
        )
        self.schema = self._schema()

    def _schema(self) -> type[Decision]:
        metrics, dimensions = [*self._metrics], [*self._dimensions]
        if self._has_realtime:
            metrics += [name for name in REALTIME_METRICS if name not in metrics]
            dimensions += [name for name in REALTIME_DIMENSIONS if name not in dimensions]
        metric: Any = Literal[tuple(metrics)]
        dimension: Any = Literal[tuple(dimensions)] if dimensions else Literal["(none)"]
        fields: dict[str, Any] = {
            "metrics": (Annotated[list[metric], Field(min_length=1, max_length=4)], ...),
            "dimensions": (Annotated[list[dimension], Field(max_length=2 if dimensions else 0)], ...),
            "filter_dimension": (Literal[("", *dimensions)], ...),
            "filter_value": (Annotated[str, Field(max_length=80)], ...),
            "start_date": (Annotated[str, Field(pattern=_DAY)], ...),
            "end_date": (Annotated[str, Field(pattern=_DAY)], ...),
            "compare_with": (Compare, ...),
            "rows": (Annotated[int, Field(ge=1, le=50)], ...),
        }
        if self._has_realtime:
            fields = {"when": (Literal["days", "last_minutes"], ...)} | fields
        choice = create_model("Choice", __base__=Decision, **fields)
        several: Any = Annotated[list[choice], Field(min_length=1, max_length=MOST_REPORTS)]
        return create_model("Choices", __base__=Decision, reports=(several, ...))

    def plans(self, decision: Decision | None, today: datetime.date) -> list[ReportPlan]:
        """Return the reports that a decision of `schema` chose, none twice."""
        chosen = [self._chosen(choice, today) for choice in getattr(decision, "reports", [])]
        return list({f"{plan.tool} {plan.arguments(today)}": plan for plan in chosen}.values())

    def usual(self) -> list[ReportPlan]:
        """Return the reports for a question that nothing could be chosen for."""
        metrics = [name for name in _FIRST_METRICS if name in self._metrics] or self._metrics[:1]
        dimensions = [name for name in ("date",) if name in self._dimensions]
        return [ReportPlan(metrics, dimensions, rows=28)]

    def _chosen(self, choice: Any, today: datetime.date) -> ReportPlan:
        metrics, dimensions = list(dict.fromkeys(choice.metrics)), list(dict.fromkeys(choice.dimensions))
        if getattr(choice, "when", "days") == "last_minutes":
            metrics = [name for name in metrics if name in REALTIME_METRICS] or ["activeUsers"]
            dimensions = [name for name in dimensions if name in REALTIME_DIMENSIONS]
            return ReportPlan(metrics, dimensions, rows=choice.rows, realtime=True)
        return ReportPlan(
            [name for name in metrics if name in self._metrics] or self._metrics[:1],
            [name for name in dimensions if name in self._dimensions],
            days=sensible(choice.start_date, choice.end_date, today),
            compare_with=choice.compare_with,
            filter_dimension=choice.filter_dimension if choice.filter_dimension in self._dimensions else "",
            filter_value=choice.filter_value,
            rows=choice.rows,
        )


def sensible(start: str, end: str, today: datetime.date) -> tuple[str, str]:
    """Return a range that can be reported on: as it is, turned round, cut at today, or else the usual one."""
    try:
        first, last = _absolute(start, today), _absolute(end, today)
    except ValueError:
        return _USUAL_DAYS
    if first > last:
        start, end, first, last = end, start, last, first
    if first < _FIRST_DAY or first > today:
        return _USUAL_DAYS
    return start, "today" if last > today else end


def earlier(start: str, end: str, how: Compare, today: datetime.date) -> tuple[str, str] | None:
    """Return the range to compare with, or None if there is none.

    Relative days stay relative: when a day begins is the property's to know.
    """
    ago = _ago(start), _ago(end)
    if ago[0] is not None and ago[1] is not None:
        back = 365 if how == "previous_year" else ago[0] - ago[1] + 1
        return (f"{ago[0] + back}daysAgo", f"{ago[1] + back}daysAgo") if back > 0 else None
    try:
        first, last = _absolute(start, today), _absolute(end, today)
        if how == "previous_year":
            return _year_before(first).isoformat(), _year_before(last).isoformat()
        length = (last - first).days + 1
        if length < 1:
            return None
        return (first - datetime.timedelta(days=length)).isoformat(), (first - datetime.timedelta(days=1)).isoformat()
    except (ValueError, OverflowError):
        return None


def _ago(day: str) -> int | None:
    relative = _RELATIVE.fullmatch(day)
    return {"today": 0, "yesterday": 1}.get(day, int(relative[1]) if relative else None)


def _absolute(day: str, today: datetime.date) -> datetime.date:
    ago = _ago(day)
    return datetime.date.fromisoformat(day) if ago is None else today - datetime.timedelta(days=ago)


def _year_before(day: datetime.date) -> datetime.date:
    try:
        return day.replace(year=day.year - 1)
    except ValueError:  # the 29th of February
        return day.replace(year=day.year - 1, day=28)


def _shortlist(entries: list[dict[str, Any]], usual: tuple[str, ...], question: str, most: int) -> list[dict[str, Any]]:
    """Return the entries for the menu: those the question has words of, those of the property's own, the usual ones."""
    words = set(_WORD.findall(question[:_MAX_QUESTION_CHARS].casefold()))
    by_name = {entry["name"]: entry for entry in entries}

    def weight(entry: dict[str, Any]) -> int:
        text = f"{entry['name']} {entry['label']}".casefold()
        return sum(word in text or word.rstrip("s") in text for word in words)

    asked = sorted((entry for entry in entries if weight(entry)), key=lambda entry: -weight(entry))[: most // 3]
    own = [entry for entry in entries if entry["custom"]][: most // 6]
    chosen = [*asked, *own, *(by_name[name] for name in usual if name in by_name), *entries]
    return list({entry["name"]: entry for entry in chosen}.values())[:most]


def _line(entry: Mapping[str, Any]) -> str:
    return f"- {entry['name']}: {entry['label']}"
