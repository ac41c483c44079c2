"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "failed", "skipped"]
"""`failed`: the gateway would not start, or not serve what was asked of it. `warning`: it would, with a risk."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One verdict of one check. `subject` is what it is about, where there are several: an engine, a key, a tool."""

    check: str
    verdict: Verdict
    text: str
    """One line, with figures."""
    next_step: str = ""
    """What to do about it; empty where nothing need be done."""
    subject: str = ""
