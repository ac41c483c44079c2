"""What agents are told, one Markdown file per prompt: its instructions, a line `---`, and the task.

Places are `$name`, as in string.Template. `preamble.md` stands before the instructions of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from string import Template


@cache
def _load(name: str) -> tuple[Template, Template]:
    text = (files(__package__) / f"{name}.md").read_text(encoding="utf-8")
    instructions, _, task = text.partition("\n---\n")
    return Template(instructions.strip()), Template(task.strip())


def preamble() -> str:
    """Return what all agents are told first."""
    return _load("preamble")[0].template


def render(name: str, fields: Mapping[str, str]) -> tuple[str, str]:
    """Return the instructions and the task of prompt `name`, filled in. Raises KeyError on a place without a value."""
    instructions, task = _load(name)
    return instructions.substitute(fields), task.substitute(fields)
