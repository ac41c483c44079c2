"""Prompts of agents: the only place where text from outside is put into one.

Instructions that are the same for all agents come first, then what agents of one kind share, so that vLLM computes
them once for a run; what differs comes last. Text from outside is everything that a tool returned, everything that a
model wrote after it read such text, and what an MCP server says about its tools. It is put between `<source>` tags:
as material (`quoted`, `fenced`), or as a field of type `Outside`, whose whole line is fenced. Fenced text can't close
its tag and holds nothing that a chat template takes for a control token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.messages import ImagePart, Message
from gateway.tools.base import Source
from gateway.workflows.prompts import preamble, render

MAX_ATTRIBUTE_CHARS = 300
_CONTROL_WORD = re.compile(
    r"[\[\uff3b](?=[|\uff5c]|/?(?:[A-Z_]{3,64}|[gs]MASK|@[A-Z]{2,16}@|extra_id_\d{1,4}|unused\d{1,4})[\]\uff3d]|[a-z]~\[)"
    r"|\](?=~!?[a-z][\[\]]|![a-z][~!]\[|<\])"
)
"""Control tokens in square brackets, by their first one: Mistral's [INST] and [/TOOL_RESULTS], GLM's [gMASK], EXAONE's
[|system|], MiniMax's ]~b], ]~!b[ and [e~[."""
_CONTROL_TAG = re.compile(
    r"<(?=[|\uff5c]|<SYS>>|</SYS>>|/?(?:s|bos|eos|pad|unk|mask|sep|eod|eot|sop|eop|eoh|eoa|eom|bom|image|video|audio"
    r"|think|thinking|tools?|tool_calls?|tool_responses?|function_calls?|role|user|system|assistant|human|bot|escape"
    r"|_user|_bot|_end|_system|(?:start|end|begin)_of_[a-z]{1,24}|im_[a-z]{1,16}|fim_[a-z]{1,16}|longcat_[a-z_]{1,24}"
    r"|(?:seed|minimax):[a-z_]{1,32}|(?:reserved|extra_id|SPECIAL|unused)_?\d{1,5})>)",
    re.I,
)
"""Control tokens in angle brackets, of the template families that vLLM knows: <|im_start|>, <s>, <<SYS>>."""
# The less-than signs that a reader, or a tokenizer's NFKC normalization, may take for `<` and `>`.
_OPENING = "<\ufe64\uff1c\u2329\u27e8\u276e\u2770\u3008\u1438\u02c2\u29fc"
_CLOSING = ">\ufe65\uff1e\u232a\u27e9\u276f\u2771\u3009\u1433\u02c3\u29fd"
_ANGLES = str.maketrans(dict.fromkeys(_OPENING, "\u2039") | dict.fromkeys(_CLOSING, "\u203a"))
_LESS_THAN = re.compile(r"&(?:lt|#0{0,5}60|#x0{0,5}3c);?", re.I)
_GREATER_THAN = re.compile(r"&(?:gt|#0{0,5}62|#x0{0,5}3e);?", re.I)
_TAG_LIKE = re.compile("\u2039(?=[\\s/\\\\|\u2044\u2215\uff0f]{0,8}source)", re.I)
"""What is left of a forged tag: the guillemet alone would still look like one to a model."""

_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""Characters that people don't see and models do; U+200C and U+200D stay, which scripts and emoji need."""


class Outside(str):
    """Text from outside as a field of a prompt: the line of the template that it is in becomes data as a whole."""

    __slots__ = ()


_SUBJECT = "subject of the work, from another agent or a tool"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an agent is asked: a file of `prompts/`, what fills its places, and the material to work on.

    `material` is what may be cut to fit the model's context, each piece from its end. `turns` are earlier messages of
    the conversation; `system` are the client's own instructions, behind the prompt's; `images` go with the task.
    """

    name: str
    fields: Mapping[str, str]
    material: Sequence[str] = ()
    turns: Sequence[Message] = ()
    system: str = ""
    images: Sequence[ImagePart] = ()
    form: str = ""
    """What the answer must look like, where the model can't be held to it."""

    def messages(self, share: float, fields_share: float = 1.0, *, context: str = "") -> list[Message]:
        """Return the messages with `share` (0 to 1) of the material, of the earlier turns and of the client's context.

        `fields_share` cuts long fields, for where the prompt does not fit even without material.
        """
        pieces = [_cut(piece, share) for piece in self.material]
        fields = {name: _shortened(value, fields_share) for name, value in self.fields.items()}
        fields["material"] = "\n\n".join(filter(None, pieces)) or "(nothing)"
        outside = {name for name, value in self.fields.items() if isinstance(value, Outside)}
        instructions, task = render(self.name, fields, lambda line: fenced(_SUBJECT, line), outside)
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
            *kept,
            {"role": "user", "content": [{"type": "text", "text": task}, *self.images] if self.images else task},
        ]


def quoted(number: int, source: Source, text: str) -> str:
    """The text of a source, marked as data so that instructions in it are not followed."""
    return _fence("source", text, number=str(number), title=source.title, url=source.url)


def fenced(kind: str, text: str) -> str:
    """Text without a source, such as a tool's result, marked as data."""
    return _fence("source", text, kind=kind)


def harmless(text: str) -> str:
    """Return text from outside without what could end its fence or pass for a control token of a chat template."""
    text = replaced(_GREATER_THAN, ">", replaced(_LESS_THAN, "<", replaced(_HIDDEN, "", text))).translate(_ANGLES)
    return _CONTROL_WORD.sub(_rounded, replaced(_TAG_LIKE, "(", text))


def without_control_tokens(text: str) -> str:
    """Return an earlier answer without control tokens of chat templates: it may repeat what a page said."""
    return _CONTROL_WORD.sub(_rounded, replaced(_CONTROL_TAG, "\u2039", text))


def _rounded(bracket: re.Match[str]) -> str:
    return ")" if bracket[0] == "]" else "("


def replaced(pattern: re.Pattern[str], by: str, text: str) -> str:
    """Return a text with `by` in place of all matches.

    By a function: with a string, `sub` holds the GIL until all of them are replaced, 400 ms for 8 MiB of `<s>`.
    """
    return pattern.sub(lambda found: by, text)


def _fence(tag: str, text: str, **attributes: str) -> str:
    pairs = "".join(f' {name}="{_attribute(value)}"' for name, value in attributes.items() if value)
    return f"<{tag}{pairs}>\n{harmless(text)}\n</{tag}>"


def _attribute(value: str) -> str:
    return harmless(" ".join(value.split())).replace('"', "'")[:MAX_ATTRIBUTE_CHARS]


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
