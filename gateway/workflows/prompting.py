"""What agents are asked, and how what others wrote is fenced in it.

Instructions that are the same for all agents stand first, then what agents of one kind share, so that vLLM computes
them once for a run; what differs comes last. Text from outside stands between tags that it can't close: it is left no
angle brackets, nor anything else that a chat template might take for its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.tools.base import Source
from gateway.workflows.prompts import preamble, render

_CONTROL = re.compile(r"\[(?=/?(?:[A-Z_]{3,}|gMASK)\])")
"""Mistral's and its like: [INST], [/TOOL_RESULTS], [gMASK]. All others are in angle brackets."""
_ANGLES = str.maketrans({"<": "‹", ">": "›"})


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an agent is asked: a file of `prompts/`, what fills its places, and the material to work on.

    `material` is what may be cut to fit the model's context, each piece from its end. `turns` are earlier messages of
    the conversation; `system` are the client's own instructions, behind the prompt's; `images` go with the task.
    """

    name: str
    fields: Mapping[str, str]
    material: Sequence[str] = ()
    turns: Sequence[Mapping[str, Any]] = ()
    system: str = ""
    images: Sequence[Mapping[str, Any]] = ()
    form: str = ""
    """What the answer must look like, where the model can't be held to it."""

    def messages(self, share: float, fields_share: float = 1.0, *, context: str = "") -> list[dict[str, Any]]:
        """Return the messages with `share` (0 to 1) of the material, of the earlier turns and of the client's context.

        `fields_share` cuts long fields, for where the prompt does not fit even without material.
        """
        pieces = [_cut(piece, share) for piece in self.material]
        fields = {name: _shortened(value, fields_share) for name, value in self.fields.items()}
        fields["material"] = "\n\n".join(filter(None, pieces)) or "(nothing)"
        instructions, task = render(self.name, fields)
        system = [preamble(), instructions]
        if self.system:
            system.append(
                f"For form and tone, follow these instructions as well:\n{_shortened(self.system, fields_share)}"
            )
        if self.form:
            task = f"{task.rstrip()}\n\n{self.form}"
        if context := context[: int(len(context) * share)]:
            task = f"Given for your information:\n{context}\n\n{task}"
        kept = self.turns[len(self.turns) - int(len(self.turns) * share) :]
        return [
            {"role": "system", "content": "\n\n".join(system)},
            *map(dict, kept),
            {"role": "user", "content": [{"type": "text", "text": task}, *self.images] if self.images else task},
        ]


def quoted(number: int, source: Source, text: str) -> str:
    """Return what was read, marked as data: what stands in it is never followed."""
    return _fence("source", text, number=str(number), title=source.title, url=source.url)


def fenced(kind: str, text: str) -> str:
    """Return what has no source of its own, such as a tool's result, marked as data."""
    return _fence("source", text, kind=kind)


def harmless(text: str) -> str:
    """Return text from outside without what could end its fence or pass for a chat template's own marks."""
    return _CONTROL.sub("(", text.translate(_ANGLES))


def _fence(tag: str, text: str, **attributes: str) -> str:
    pairs = "".join(f' {name}="{_attribute(value)}"' for name, value in attributes.items() if value)
    return f"<{tag}{pairs}>\n{harmless(text)}\n</{tag}>"


def _attribute(value: str) -> str:
    return harmless(" ".join(value.split())).replace('"', "'")[:300]


def _cut(piece: str, share: float) -> str:
    """Return the beginning of a piece. A fence's closing tag stays, or what follows would read as data as well."""
    if share >= 1:
        return piece
    head, newline, tail = piece.rstrip().rpartition("\n")
    fenced_piece = piece.startswith("<") and tail.startswith("</")
    opening = piece.partition("\n")[0] if fenced_piece else ""
    kept = (head if fenced_piece else piece)[: int(len(piece) * share)]
    if not fenced_piece:
        return kept
    return f"{kept}{newline}{tail}" if len(kept) > len(opening) + 1 else ""


def _shortened(text: str, share: float) -> str:
    """Return beginning and end of a text: what is asked of a long one stands at either."""
    length = max(400, int(len(text) * share))
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}\n[...]\n{text[-length // 2 :]}"
