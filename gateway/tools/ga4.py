"""Tools for Google Analytics 4: `ga4_report`, `ga4_realtime`, and `ga4_metadata`, which lists metrics and dimensions.

Arguments are checked against the property's metadata before a request is sent; for an unknown name the observation
suggests similar ones. A report's `Observation.data` is the result of `ga4_api.parse_report`, with

    kind             "report" or "realtime"
    date_range       {"start_date", "end_date"}, absolute, in the property's time zone; None for the last minutes
    previous_date_range, previous_rows, previous_totals    the same of the range compared with, or None
    minutes          of a realtime report
    rows             one mapping per row, dimensions and metrics by name, metrics as numbers
    row_count        number of all rows; None where two ranges make that unclear

Invalid arguments give an observation that is not `ok`; failures of Google raise ToolError.
"""

from __future__ import annotations

import asyncio
import datetime
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from gateway.settings.config import ConfigError, Ga4Settings
from gateway.tools.base import Observation, Tool
from gateway.tools.ga4_api import CURRENT, PREVIOUS, SCOPE, Ga4Api, Metadata, Refused, check_names, parse_report
from gateway.tools.ga4_api import Field as Ga4Field
from gateway.tools.ga4_names import REALTIME_DIMENSIONS, REALTIME_METRICS
from gateway.tools.google_account import ServiceAccount

MAX_ROWS = 100
MAX_METRICS = 10  # the API's own limits
MAX_DIMENSIONS = 6
_MAX_LISTED = 120
"""Entries of metadata in an observation's text; `data` holds all."""
TIMES = frozenset(
    {"minutesAgo", "dateHourMinute", "dateHour", "hour", "date", "day", "dayOfWeek", "week", "yearWeek", "month"}
    | {"yearMonth", "year", "isoWeek", "isoYearIsoWeek", "nthDay", "nthWeek", "nthMonth"}
)
"""Dimensions whose rows are sorted by the dimension, not by size."""
_RELATIVE = re.compile(r"([0-9]{1,4})daysAgo")


def _day(text: str) -> str:
    if text in ("today", "yesterday") or _RELATIVE.fullmatch(text):
        return text
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise ValueError("must be YYYY-MM-DD, today, yesterday or NdaysAgo") from None


Name = Annotated[str, Field(min_length=1, max_length=120)]
Day = Annotated[str, Field(max_length=12), AfterValidator(_day)]


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class DateRange(_Arguments):
    start_date: Day
    """YYYY-MM-DD, `today`, `yesterday` or `NdaysAgo`."""
    end_date: Day
    """Same format as `start_date`."""


class DimensionFilter(_Arguments):
    dimension: Name
    """A dimension, which need not be in the report."""
    match: Literal["exact", "contains", "begins_with"] = "exact"
    """How `value` is compared, ignoring case."""
    value: Annotated[str, Field(min_length=1, max_length=200)]
    """What the dimension must be, contain or begin with."""


class ReportArguments(_Arguments):
    metrics: Annotated[list[Name], Field(min_length=1, max_length=MAX_METRICS)]
    """API names of metrics, such as `sessions`."""
    dimensions: Annotated[list[Name], Field(max_length=MAX_DIMENSIONS)] = []
    """API names of dimensions to split by, such as `country`; none gives one row of totals."""
    date_ranges: Annotated[list[DateRange], Field(min_length=1, max_length=2)] = [
        DateRange(start_date="28daysAgo", end_date="yesterday")
    ]
    """The days to report on, and optionally earlier ones to compare with."""
    filters: Annotated[list[DimensionFilter], Field(max_length=4)] = []
    """All of them must hold."""
    order_by: Annotated[str, Field(max_length=120)] = ""
    """A metric or dimension of the report. Default: times ascending, other rows by the first metric, descending."""
    descending: bool = True
    """For `order_by`."""
    limit: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 20
    """Most rows to return."""

    @model_validator(mode="after")
    def _order_must_be_in_the_report(self) -> ReportArguments:
        if self.order_by and self.order_by not in (*self.metrics, *self.dimensions):
            raise ValueError("order_by must be one of the report's metrics or dimensions")
        return self


class RealtimeArguments(_Arguments):
    metrics: Annotated[list[Name], Field(min_length=1, max_length=len(REALTIME_METRICS))] = ["activeUsers"]
    """Any of activeUsers, eventCount, keyEvents, screenPageViews."""
    dimensions: Annotated[list[Name], Field(max_length=4)] = []
    """API names of realtime dimensions, such as `country` or `unifiedScreenName`."""
    minutes: Annotated[int, Field(ge=1, le=30)] = 30
    """How many minutes back."""
    limit: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 20
    """Most rows to return."""


class MetadataArguments(_Arguments):
    search: Annotated[str, Field(max_length=120)] = ""
    """Words to search in names and descriptions. Default: list everything."""


class _Ga4Tool:
    """Base of the three tools: the property."""

    def __init__(self, api: Ga4Api) -> None:
        self._api = api
        self.timeout_s = api.timeout_s

    async def close(self) -> None:
        """Close the connections that the tools share."""
        await self._api.close()


class Ga4Report(_Ga4Tool):
    """A report over days."""

    name = "ga4_report"
    description = "Run a Google Analytics 4 report: metrics, split by dimensions, over one or two ranges of days."
    arguments: type[BaseModel] = ReportArguments

    async def run(self, arguments: ReportArguments) -> Observation:
        """Check the names, request the report, and return it as text and values. Raises ToolError."""
        try:
            metadata = await self._api.metadata()
            dimensions = [*arguments.dimensions, *(f.dimension for f in arguments.filters)]
            # Suggestions come from all existing names.
            await asyncio.to_thread(metadata.check, "metric", arguments.metrics)
            await asyncio.to_thread(metadata.check, "dimension", dimensions)
            answer = await self._api.report(_report_body(arguments))
        except Refused as error:
            return Observation(f"{self.name}: {error}", ok=False)
        data = {"kind": "report"} | parse_report(answer, arguments.limit)
        today = _today(self._api.clock, data["time_zone"])
        ranges = [_absolute(days, today) for days in arguments.date_ranges]
        data["date_range"] = ranges[0]
        data["previous_date_range"] = ranges[1] if len(ranges) > 1 else None
        data["filters"] = [filter_.model_dump() for filter_ in arguments.filters]
        return Observation(_text(data), data=data)


class Ga4Realtime(_Ga4Tool):
    """A report over the last minutes."""

    name = "ga4_realtime"
    description = "Report what is going on in Google Analytics 4 right now: the last 30 minutes."
    arguments: type[BaseModel] = RealtimeArguments

    async def run(self, arguments: RealtimeArguments) -> Observation:
        """As `Ga4Report.run`. Raises ToolError."""
        try:
            metrics, dimensions = realtime_fields(await self._api.metadata())
            await asyncio.to_thread(check_names, "metric", arguments.metrics, metrics)
            await asyncio.to_thread(check_names, "dimension", arguments.dimensions, dimensions)
            answer = await self._api.realtime(_realtime_body(arguments))
        except Refused as error:
            return Observation(f"{self.name}: {error}", ok=False)
        data = {"kind": "realtime"} | parse_report(answer, arguments.limit)
        data |= {"date_range": None, "previous_date_range": None, "minutes": arguments.minutes, "filters": []}
        return Observation(_text(data), data=data)


class Ga4Metadata(_Ga4Tool):
    """Lists metrics and dimensions."""

    name = "ga4_metadata"
    description = "List the metrics and dimensions that this Google Analytics 4 property can report."
    arguments: type[BaseModel] = MetadataArguments

    async def run(self, arguments: MetadataArguments) -> Observation:
        """List the matching names. Raises ToolError."""
        metadata = await self._api.metadata()
        words = arguments.search.casefold().split()
        found = {
            "metrics": [field for field in metadata.metrics.values() if _matches(field, words)],
            "dimensions": [field for field in metadata.dimensions.values() if _matches(field, words)],
        }
        lines = []
        for kind, fields in found.items():
            lines.append(f"{kind.capitalize()} ({len(fields)}):")
            lines += [f"- {field.name}: {field.label}" for field in fields[:_MAX_LISTED]]
        data: dict[str, Any] = {
            kind: [
                {"name": f.name, "label": f.label, "description": f.description, "type": f.type, "custom": f.custom}
                for f in fields
            ]
            for kind, fields in found.items()
        }
        return Observation("\n".join(lines), data=data)


def ga4_tools(settings: Ga4Settings, environment: Mapping[str, str]) -> list[Tool]:
    """Return the tools of one property. Raises ConfigError."""
    variable = settings.credentials_env
    path = environment.get(variable, "").strip()
    if not path:
        raise ConfigError(f"tools.ga4: {variable} is not set; it names the key file of a service account")
    try:
        api = Ga4Api(settings, ServiceAccount.from_file(Path(path), SCOPE))
    except ValueError as error:
        raise ConfigError(f"tools.ga4: the file that {variable} names: {error}") from error
    return [Ga4Report(api), Ga4Realtime(api), Ga4Metadata(api)]


def realtime_fields(metadata: Metadata) -> tuple[dict[str, Ga4Field], dict[str, Ga4Field]]:
    """Return the metrics and dimensions of realtime reports; a property's own user dimensions are among them."""
    metrics = {name: metadata.metrics.get(name) or Ga4Field(name, name, "") for name in REALTIME_METRICS}
    dimensions = {name: metadata.dimensions.get(name) or Ga4Field(name, name, "") for name in REALTIME_DIMENSIONS}
    own = {name: field for name, field in metadata.dimensions.items() if name.startswith("customUser:")}
    return metrics, dimensions | own


def _matches(field: Ga4Field, words: list[str]) -> bool:
    text = f"{field.name} {field.label} {field.description}".casefold()
    return all(word in text for word in words)


def _report_body(arguments: ReportArguments) -> dict[str, Any]:
    names = (CURRENT, PREVIOUS)
    body: dict[str, Any] = {
        "metrics": [{"name": name} for name in arguments.metrics],
        "dimensions": [{"name": name} for name in arguments.dimensions],
        "dateRanges": [
            {"startDate": days.start_date, "endDate": days.end_date, "name": name}
            for days, name in zip(arguments.date_ranges, names, strict=False)
        ],
        # Each range has its own rows, and the two need not have the same ones.
        "limit": str(arguments.limit if len(arguments.date_ranges) == 1 else 4 * arguments.limit),
        "metricAggregations": ["TOTAL"],
        "orderBys": [_order(arguments.metrics, arguments.dimensions, arguments.order_by, arguments.descending)],
    }
    if arguments.filters:
        body["dimensionFilter"] = {"andGroup": {"expressions": [_expression(f) for f in arguments.filters]}}
    return body


def _realtime_body(arguments: RealtimeArguments) -> dict[str, Any]:
    return {
        "metrics": [{"name": name} for name in arguments.metrics],
        "dimensions": [{"name": name} for name in arguments.dimensions],
        "minuteRanges": [{"startMinutesAgo": arguments.minutes - 1, "endMinutesAgo": 0}],
        "limit": str(arguments.limit),
        "metricAggregations": ["TOTAL"],
        "orderBys": [_order(arguments.metrics, arguments.dimensions, "", True)],
    }


def _order(metrics: list[str], dimensions: list[str], order_by: str, descending: bool) -> dict[str, Any]:
    if not order_by:
        times = [name for name in dimensions if name in TIMES]
        order_by, descending = (times[0], False) if times else (metrics[0], True)
    if order_by in metrics:
        return {"metric": {"metricName": order_by}, "desc": descending}
    return {"dimension": {"dimensionName": order_by}, "desc": descending}


def _expression(filter_: DimensionFilter) -> dict[str, Any]:
    match = {"exact": "EXACT", "contains": "CONTAINS", "begins_with": "BEGINS_WITH"}[filter_.match]
    condition = {"matchType": match, "value": filter_.value, "caseSensitive": False}
    return {"filter": {"fieldName": filter_.dimension, "stringFilter": condition}}


def _today(clock: Callable[[], float], time_zone: str) -> datetime.date:
    try:
        zone: datetime.tzinfo = ZoneInfo(time_zone or "UTC")
    except (OSError, ValueError):  # not in this machine's database
        zone = datetime.UTC
    return datetime.datetime.fromtimestamp(clock(), zone).date()


def _absolute(days: DateRange, today: datetime.date) -> dict[str, str]:
    """Return a range as calendar days, as Google interprets it."""

    def day(text: str) -> str:
        relative = _RELATIVE.fullmatch(text)
        ago = {"today": 0, "yesterday": 1}.get(text, int(relative[1]) if relative else None)
        return text if ago is None else (today - datetime.timedelta(days=ago)).isoformat()

    return {"start_date": day(days.start_date), "end_date": day(days.end_date)}


def _text(data: dict[str, Any]) -> str:
    """Return a report as lines: heading, rows, totals and Google's notes."""
    columns = [*data["dimensions"], *data["metrics"]]
    period = data["date_range"]
    lines = [f"{period['start_date']} to {period['end_date']}" if period else f"the last {data['minutes']} minutes"]
    if earlier := data["previous_date_range"]:
        lines[0] += f", in brackets {earlier['start_date']} to {earlier['end_date']}"
    lines.append(" | ".join(columns))
    befores = data["previous_rows"] or [None] * len(data["rows"])
    for row, before in zip(data["rows"], befores, strict=True):
        cells = [str(row.get(name, "")) for name in data["dimensions"]]
        lines.append(" | ".join([*cells, *_cells(data["metrics"], row, before)]))
    if data["totals"]:
        lines.append(" | ".join(["total", *_cells(data["metrics"], data["totals"], data["previous_totals"])]))
    if (data["row_count"] or 0) > len(data["rows"]):
        lines.append(f"{len(data['rows'])} rows of {data['row_count']}.")
    if not data["rows"]:
        lines.append("No data.")
    return "\n".join([*lines, *data["notes"]])


def _cells(metrics: list[str], row: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    return [
        f"{row.get(name, '-')} ({before.get(name, '-')})" if before else str(row.get(name, "-")) for name in metrics
    ]
