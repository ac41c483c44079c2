"""Prompts of agents, one Markdown file each: its instructions, a line `---`, and the task.

Places are `$name`, as in string.Template. `preamble.md` stands before the instructions of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache
from importlib.resources import files
from string import Template


@cache
def _load(name: str) -> tuple[Template, list[Template]]:
    """Return a prompt's instructions, and the lines of its task."""
    text = (files(__package__) / f"{name}.md").read_text(encoding="utf-8")
    instructions, _, task = text.partition("\n---\n")
    return Template(instructions.strip()), [Template(line) for line in task.strip().split("\n")]


def preamble() -> str:
    """The first instructions of all agents."""
    return _load("preamble")[0].template


def render(
    name: str, fields: Mapping[str, str], fence: Callable[[str], str] = str, outside: Collection[str] = ()
) -> tuple[str, str]:
    """Return the instructions and the task of prompt `name`, filled in.

    `fence` marks as data each line of the task that has a place for one of the fields named in `outside`. Raises
    KeyError on a place without a value, and ValueError where the instructions have a place for one of `outside`:
    they are the system message.
    """
    instructions, task = _load(name)
    if not set(instructions.get_identifiers()).isdisjoint(outside):
        raise ValueError(f"{name}: the instructions have a place for text from outside")
    if not outside:
        # At once: a question may have megabytes, and line by line they would be copied twice.
        whole = Template("\n".join(line.template for line in task))
        return instructions.substitute(fields), whole.substitute(fields)
    lines = []
    for line in task:
        filled = line.substitute(fields)
        lines.append(filled if set(line.get_identifiers()).isdisjoint(outside) else fence(filled))
    return instructions.substitute(fields), "\n".join(lines)
