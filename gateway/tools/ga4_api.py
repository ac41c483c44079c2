"""Google Analytics' Data API (v1beta) over REST: what a property can report, and reports as plain values.

https://developers.google.com/analytics/devguides/reporting/data/v1/rest. Does not handle funnels, cohorts, pivots and
exports. Raises ToolError, and Refused if the request is wrong, so that an agent can correct it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from gateway.settings.config import Ga4Settings
from gateway.tools.base import ToolError
from gateway.tools.google_account import ServiceAccount
from gateway.tools.json_client import Answer, JsonClient

log = logging.getLogger(__name__)

SCOPE = "https://www.googleapis.com/auth/analytics.readonly"
CURRENT, PREVIOUS = "current", "previous"
"""Names of date ranges in requests and responses."""
_METADATA_S = 3600.0
"""Custom definitions rarely change, and the response is large."""
_MAX_REFUSAL_CHARS = 300
_NEAR = 3

Kind = Literal["metric", "dimension"]


class Refused(Exception):
    """The request is invalid. The message says what would be valid."""


@dataclass(frozen=True, slots=True)
class Field:
    """A metric or dimension: the API's `name`, the display `label`, and a metric's type (`TYPE_INTEGER`)."""

    name: str
    label: str
    description: str
    type: str = ""
    custom: bool = False


@dataclass(frozen=True, slots=True)
class Metadata:
    """Metrics and dimensions of a property, by name."""

    metrics: Mapping[str, Field]
    dimensions: Mapping[str, Field]

    def check(self, kind: Kind, names: list[str]) -> None:
        """Raise Refused on an unknown name, with similar names."""
        known = self.metrics if kind == "metric" else self.dimensions
        check_names(kind, names, known)


def check_names(kind: Kind, names: list[str], known: Mapping[str, Field]) -> None:
    """Raise Refused on a name that is not in `known`, with similar names."""
    for name in names:
        if name not in known:
            near = _near(name, known)
            hint = f" Near are: {', '.join(near)}." if near else " ga4_metadata lists all."
            raise Refused(f"There is no {kind} {name[:60]!r}.{hint}")


def _near(name: str, known: Mapping[str, Field]) -> list[str]:
    """Return the names most similar to `name`, by name or by label: users type either."""
    wanted = name.casefold()
    by_spelling = {field.casefold(): field for field in known}
    by_label = {field.label.casefold(): field.name for field in known.values()}
    both = by_label | by_spelling
    inside = sorted((text for text in both if wanted and (wanted in text or text in wanted)), key=len)
    close = get_close_matches(wanted, both, n=_NEAR)
    return list(dict.fromkeys(both[text] for text in (*close, *inside)))[:_NEAR]


class Ga4Api:
    """One property. Requests share one token and one connection pool."""

    def __init__(
        self, settings: Ga4Settings, account: ServiceAccount, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.clock = clock
        self.timeout_s = 2 * settings.timeout_s + 1
        """For tools: a report may need a token or the metadata first."""
        self._account = account
        self._property_id = settings.property_id
        self._url = f"{settings.url.rstrip('/')}/v1beta/properties/{settings.property_id}"
        self._client = JsonClient("Google Analytics", settings.timeout_s)
        self._metadata: Metadata | None = None
        self._metadata_until = 0.0
        self._asking = asyncio.Lock()

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        await self._client.close()

    async def metadata(self) -> Metadata:
        """Return the metrics and dimensions of the property. Raises ToolError."""
        async with self._asking:
            if self._metadata is None or self.clock() >= self._metadata_until:
                answer = await self._ask("GET", "/metadata")
                self._metadata = Metadata(_fields(answer.get("metrics")), _fields(answer.get("dimensions")))
                self._metadata_until = self.clock() + _METADATA_S
            return self._metadata

    async def report(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a RunReportResponse. Raises Refused, ToolError."""
        return await self._ask("POST", ":runReport", body)

    async def realtime(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a RunRealtimeReportResponse. Raises Refused, ToolError."""
        return await self._ask("POST", ":runRealtimeReport", body)

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        token = await self._account.token(self._client)
        headers = {"Authorization": f"Bearer {token}"}
        answer = await self._client.ask(method, self._url + path, body=body, headers=headers)
        if answer.status == 200:
            return answer.body
        if answer.status == 401:
            self._account.forget(token)
        raise self._failure(answer)

    def _failure(self, answer: Answer) -> Exception:
        status = answer.status
        if status == 400:
            # Says which metrics and dimensions don't go together, which nothing else does.
            return Refused(f"Google Analytics refuses the request: {_message(answer.body)}")
        if status in (403, 404):
            log.error("Google Analytics: no access to property %s (status %d)", self._property_id, status)
            message = "The service account may not read this property, which only the operator can fix."
            return ToolError(message, out_of_order=True)
        if status == 401:
            return ToolError("Google Analytics refuses the access token.", may_pass=True)
        if status == 429:
            message = "The property's quota of requests is used up for now."
            return ToolError(message, may_pass=True, retry_after_s=answer.retry_after_s)
        return ToolError("Google Analytics failed.", may_pass=status >= 500, out_of_order=True)


def _message(body: Mapping[str, Any]) -> str:
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    return str(message or "it gives no reason")[:_MAX_REFUSAL_CHARS]


def _fields(entries: Any) -> dict[str, Field]:
    return {
        entry["apiName"]: Field(
            entry["apiName"],
            entry.get("uiName") or entry["apiName"],
            entry.get("description") or "",
            entry.get("type") or "",
            bool(entry.get("customDefinition")),
        )
        for entry in entries or []
        if isinstance(entry, dict) and entry.get("apiName")
    }


def parse_report(answer: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """Return a report response as plain values; see `gateway.tools.ga4` for the form.

    With two date ranges, each row of the current one is paired with the values of the previous one.
    """
    dimensions = [header["name"] for header in answer.get("dimensionHeaders") or []]
    headers = answer.get("metricHeaders") or []
    current: dict[tuple[str, ...], dict[str, Any]] = {}
    previous: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in answer.get("rows") or []:
        key, values, in_previous = _row(row, dimensions, headers)
        (previous if in_previous else current)[key] = values
    named = [name for name in dimensions if name != "dateRange"]
    keys = list(current)[:limit] or list(previous)[:limit]
    totals, previous_totals = _totals(answer.get("totals") or [], dimensions, headers)
    metadata = answer.get("metadata") or {}
    return {
        "metrics": [header["name"] for header in headers],
        "dimensions": named,
        "types": {header["name"]: header.get("type", "") for header in headers},
        "rows": [dict(zip(named, key, strict=True)) | current.get(key, {}) for key in keys],
        "previous_rows": [previous.get(key) for key in keys] if previous else None,
        "totals": totals,
        "previous_totals": previous_totals,
        "row_count": None if "dateRange" in dimensions else int(answer.get("rowCount") or 0),
        "time_zone": metadata.get("timeZone") or "",
        "currency": metadata.get("currencyCode") or "",
        "notes": _notes(metadata),
    }


def _row(
    row: Mapping[str, Any], dimensions: list[str], headers: list[dict[str, Any]]
) -> tuple[tuple[str, ...], dict[str, Any], bool]:
    """Return a row's dimension values without the date range, its metric values, and whether it is of `previous`."""
    values = [str(cell.get("value", "")) for cell in row.get("dimensionValues") or []]
    metrics = [_number(cell.get("value", "")) for cell in row.get("metricValues") or []]
    named = dict(zip(dimensions, values, strict=False))
    in_previous = named.pop("dateRange", CURRENT) == PREVIOUS
    key = tuple(named.get(name, "") for name in dimensions if name != "dateRange")
    return key, dict(zip((header["name"] for header in headers), metrics, strict=False)), in_previous


def _totals(
    rows: list[Any], dimensions: list[str], headers: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    both: list[dict[str, Any]] = [{}, {}]
    for number, row in enumerate(rows[:2]):
        _, values, in_previous = _row(row, dimensions, headers)
        # One row per date range, in the order of the request, which is said again where the range is named.
        both[1 if in_previous else number] = values
    return both[0], both[1] or None


def _number(text: Any) -> int | float | str:
    """Return a metric value as a number. The API does not promise one; other values stay strings."""
    try:
        return int(text)
    except (TypeError, ValueError):
        pass
    try:
        value = float(text)
    except (TypeError, ValueError):
        return str(text)
    return value if math.isfinite(value) else str(text)


def _notes(metadata: Mapping[str, Any]) -> list[str]:
    """Return the API's notes on the accuracy of its figures."""
    notes = []
    if metadata.get("samplingMetadatas"):
        notes.append("The figures are estimates from a sample.")
    if metadata.get("subjectToThresholding"):
        notes.append("Rows of few users are withheld.")
    if metadata.get("dataLossFromOtherRow"):
        notes.append("Rare values are lumped together as (other).")
    return notes
