"""Findings as people and machines read them: a list with marks, or JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gateway.doctor.finding import Finding, Verdict

_COLOURS: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "dim"}


def show(findings: Sequence[Finding], *, as_json: bool) -> None:
    """Print to stdout."""
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
        return
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        subject = f"[bold]{escape(finding.subject)}[/bold]: " if finding.subject else ""
        lines = [Text.from_markup(subject + escape(finding.text))]
        if finding.next_step:
            lines.append(Text.from_markup(f"[cyan]->[/cyan] {escape(finding.next_step)}"))
        colour = _COLOURS[finding.verdict]
        name = finding.check.replace("_", " ")
        table.add_row(f"[{colour}]{finding.verdict}[/{colour}]", name, Text("\n").join(lines))
    console.print(table)
    counts = Counter(finding.verdict for finding in findings)
    plural = {"warning": "warnings"} if counts["warning"] > 1 else {}
    told = [f"{counts[verdict]} {plural.get(verdict, verdict)}" for verdict in _COLOURS if counts[verdict]]
    console.print(f"\n{', '.join(told)}.")
