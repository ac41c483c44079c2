"""Reports: what an analytics tool brought, as a table, as text for a model, and as the figures that it holds.

Figures that a reader may want and a report does not hold (shares, changes, means, rates in per cent) are worked out
here, by code, and offered to the model beside the report: it is instructed not to count itself. Does not handle charts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.workflows.figures import Figures
from gateway.workflows.tables import cell, table

MAX_TABLE_ROWS = 20
"""Shown in an answer; the model and the client's machine see all that were asked for."""
_MAX_TABLE_COLUMNS = 8
_MAX_DERIVED_ROWS = 12
_MAX_TEXT_CHARS = 1500
_MAX_VALUES = 5000
_ADDITIVE = ("TYPE_INTEGER", "TYPE_CURRENCY")
_NOT_ADDITIVE = ("users", "dau", "wau")
"""In names: a user who came on two days is one user, so the parts are more than the whole."""

Number = int | float


@dataclass(frozen=True, slots=True)
class Report:
    """One report. `title` says what was asked, in words of ours."""

    number: int
    tool: str
    title: str
    table: str
    text: str
    """For the model: the table's rows in plain values, and what was worked out."""
    data: Any
    """In machine form, as the tool gave it."""
    notes: list[str] = field(default_factory=list)

    @property
    def markdown(self) -> str:
        """The report in an answer."""
        notes = "".join(f"\n\n*{note}*" for note in self.notes)
        return f"### Report {self.number}: {cell(self.title, 400)}\n\n{self.table}{notes}"


def ga4_report(number: int, tool: str, data: Mapping[str, Any], figures: Figures) -> Report:
    """The result of `gateway.tools.ga4` as a report. Records its figures."""
    figures.reports.add(number)
    figures.most_rows = max(figures.most_rows, len(data["rows"]))
    dimensions = list(data["dimensions"])
    for period in filter(None, (data["date_range"], data["previous_date_range"])):
        figures.add_days(period["start_date"], period["end_date"], number)
    if data.get("minutes"):
        figures.spans.add(data["minutes"])
    derived = _Derived(data, number, figures)
    befores = data["previous_rows"] or [None] * len(data["rows"])
    rows: list[list[str]] = []
    lines: list[str] = []
    for row, before in zip(data["rows"], befores, strict=True):
        for name in dimensions:
            figures.add_text(str(row.get(name, "")), number)
        values = derived.cells(row, before)
        rows.append([*(cell(row.get(name, "")) for name in dimensions), *values])
        lines.append(" | ".join([*(str(row.get(name, "")) for name in dimensions), *values]))
    notes = _rows_left_out(data, number, figures)
    del rows[MAX_TABLE_ROWS:]
    if data["totals"] and dimensions:
        values = derived.cells(data["totals"], data["previous_totals"])
        rows.append(["**Total**", *[""] * (len(dimensions) - 1), *values])
        lines.append(" | ".join(["total", *values]))
    header = [cell(name) for name in (*dimensions, *derived.columns)]
    whole = table(header, rows, len(dimensions)) if data["rows"] else "(no data)"
    for name in filter(None, (data["time_zone"], data["currency"])):
        figures.add_text(name, number)
    title = _ga4_title(data)
    figures.add_name(title, number)
    lines = [title, " | ".join((*dimensions, *derived.columns)), *lines, *notes, *derived.lines()]
    return Report(number, tool, title, whole, "\n".join(lines), dict(data), notes)


def _rows_left_out(data: Mapping[str, Any], number: int, figures: Figures) -> list[str]:
    """The report's notes, and the numbers of shown and of all rows."""
    shown, there = min(len(data["rows"]), MAX_TABLE_ROWS), data["row_count"] or len(data["rows"])
    if there <= shown:
        return list(data["notes"])
    figures.add(there, number)
    return [f"{shown} rows of {there}.", *data["notes"]]


def _ga4_title(data: Mapping[str, Any]) -> str:
    by = f" by {', '.join(data['dimensions'])}" if data["dimensions"] else ""
    period, earlier = data["date_range"], data["previous_date_range"]
    when = f"{period['start_date']} to {period['end_date']}" if period else f"the last {data.get('minutes')} minutes"
    if earlier:
        when += f", compared with {earlier['start_date']} to {earlier['end_date']}"
    only = "".join(f", {f['dimension']} {f['match']} {f['value']!r}" for f in data.get("filters") or [])
    return f"{', '.join(data['metrics'])}{by}{only}, {when} (Google Analytics 4)"


class _Derived:
    """What is worked out from a report of GA4, noted among the figures as it is."""

    def __init__(self, data: Mapping[str, Any], number: int, figures: Figures) -> None:
        self._data = data
        self._number = number
        self._figures = figures
        self._metrics: list[str] = list(data["metrics"])
        self._compares = data["previous_date_range"] is not None
        self.columns = [
            f"{name}{more}" for name in self._metrics for more in ([""] + [" before", " change"] * self._compares)
        ]

    def cells(self, row: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[str]:
        """Return a row's metrics as cells, with those before and the change where there are any."""
        cells: list[str] = []
        for name in self._metrics:
            value = row.get(name)
            cells.append(self._value(name, value))
            if self._compares:
                earlier = (before or {}).get(name)
                cells += [self._value(name, earlier), self._change(name, value, earlier)]
        return cells

    def lines(self) -> list[str]:
        """Return shares, means and longer units, one line each."""
        lines = [line for name in self._metrics for line in (*self._shares(name), *self._means(name))]
        return ["Worked out from it:", *lines] if lines else []

    def _value(self, name: str, value: Any) -> str:
        if not isinstance(value, int | float):
            return "-" if value is None else cell(value)
        self._figures.add(value, self._number)
        if self._is_rate(name):
            self._figures.add(100 * value, self._number, percent=True)
            return f"{100 * value:.2f} %"
        if self._data["types"].get(name) == "TYPE_SECONDS":
            self._figures.add(value / 60, self._number)
            return f"{value:,.1f} s ({int(value) // 60} min {int(value) % 60} s)"
        currency = f" {self._data['currency']}" if self._data["types"].get(name) == "TYPE_CURRENCY" else ""
        return f"{value:,}{currency}" if isinstance(value, int) else f"{value:,.2f}{currency}"

    def _change(self, name: str, value: Any, before: Any) -> str:
        if not isinstance(value, int | float) or not isinstance(before, int | float):
            return "-"
        if self._is_rate(name):
            points = 100 * (value - before)
            self._figures.add(points, self._number, percent=True)
            return f"{points:+.2f} pp"
        self._figures.add(value - before, self._number)
        if not before:
            return "-"
        change = 100 * (value - before) / before
        self._figures.add(change, self._number, percent=True)
        return f"{change:+.1f} %"

    def _shares(self, name: str) -> list[str]:
        total, rows = self._data["totals"].get(name), self._data["rows"]
        if not self._is_additive(name) or not self._data["dimensions"] or not total or len(rows) < 2:
            return []
        counted = [(row, row[name]) for row in rows if isinstance(row.get(name), int | float)]
        label = self._data["dimensions"]
        parts = [f"{_label(row, label)} {self._percent(value, total)}" for row, value in counted[:_MAX_DERIVED_ROWS]]
        if len(counted) > 3:
            first = sum(value for _, value in counted[:3])
            self._figures.add(first, self._number)
            parts.append(f"the first 3 rows together {first:,} or {self._percent(first, total)}")
        return [f"- share of {name}: {'; '.join(parts)}"]

    def _means(self, name: str) -> list[str]:
        total, rows = self._data["totals"].get(name), self._data["rows"]
        if not self._is_additive(name) or not total or len(rows) < 2 or self._data["row_count"] != len(rows):
            return []
        mean = total / len(rows)
        self._figures.add(mean, self._number)
        return [f"- mean {name} of the {len(rows)} rows: {mean:,.1f}"]

    def _percent(self, part: Number, whole: Number) -> str:
        share = 100 * part / whole
        self._figures.add(share, self._number, percent=True)
        return f"{share:.1f} %"

    def _is_rate(self, name: str) -> bool:
        """Whether a metric is a part of one, which people read in per cent."""
        return name.lower().endswith("rate")

    def _is_additive(self, name: str) -> bool:
        lower = name.lower()
        return self._data["types"].get(name) in _ADDITIVE and not any(word in lower for word in _NOT_ADDITIVE)


def _label(row: Mapping[str, Any], dimensions: list[str]) -> str:
    return " / ".join(" ".join(str(row.get(name, "")).split())[:60] for name in dimensions)


def other_report(
    number: int, tool: str, arguments: Mapping[str, Any], text: str, data: Any, figures: Figures
) -> Report:
    """The result of any other tool as a report. Records every figure in it."""
    figures.reports.add(number)
    asked = json.dumps(dict(arguments), ensure_ascii=False) if arguments else ""
    title = f"{tool} {asked[:200]}".strip()
    figures.add_name(title, number)
    figures.add_text(text[: _MAX_VALUES * 4], number)
    _note_values(data, number, figures, [_MAX_VALUES])
    rows = _rows(data)
    figures.most_rows = max(figures.most_rows, len(rows))
    columns = list(dict.fromkeys(name for row in rows for name in row))[:_MAX_TABLE_COLUMNS]
    notes = []
    if columns:
        shown = [[cell(row.get(name, "")) for name in columns] for row in rows[:MAX_TABLE_ROWS]]
        body = table([cell(name) for name in columns], shown)
        if len(rows) > MAX_TABLE_ROWS:
            notes.append(f"{MAX_TABLE_ROWS} rows of {len(rows)}.")
            figures.add(len(rows), number)
    else:
        body = "\n".join(
            f"> {cell(line, _MAX_TEXT_CHARS)}" for line in text[:_MAX_TEXT_CHARS].splitlines() if line.strip()
        )
    whole = text if data is None or len(text) > 40 else json.dumps(data, ensure_ascii=False)
    return Report(
        number, tool, title, body or "(no data)", f"{title}\n{whole}", data if data is not None else text, notes
    )


def _rows(data: Any, depth: int = 3) -> list[dict[str, Any]]:
    """Return the first list of flat mappings in `data`."""
    if isinstance(data, list):
        rows = [entry for entry in data if isinstance(entry, dict)]
        flat = all(not isinstance(value, dict | list) for row in rows for value in row.values())
        return rows if rows and flat else []
    if isinstance(data, dict) and depth:
        return next(filter(None, (_rows(value, depth - 1) for value in data.values())), [])
    return []


def _note_values(data: Any, number: int, figures: Figures, left: list[int]) -> None:
    """Note the numbers and texts in `data`, as many as are left."""
    if left[0] <= 0:
        return
    left[0] -= 1
    if isinstance(data, dict):
        for name, value in data.items():
            figures.add_text(str(name), number)
            _note_values(value, number, figures, left)
    elif isinstance(data, list):
        for value in data:
            _note_values(value, number, figures, left)
    elif isinstance(data, str):
        figures.add_text(data[:500], number)
    elif isinstance(data, int | float) and not isinstance(data, bool):
        figures.add(data, number)
        figures.add(data, number, percent=True)
        if abs(data) <= 1:  # perhaps a rate
            figures.add(100 * data, number, percent=True)
