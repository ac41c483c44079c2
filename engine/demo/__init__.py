"""The demo model: its weights and its exact answers.

`WEIGHTS` is a folder that vLLM and transformers load like any other model. `corpus()` returns the conversations that
the model was trained on, so that a test can send each one and require the exact answer.

Not handled: training (`python -m engine.demo.train`), which needs torch and transformers. Raises `OSError` if a file is
missing, `yaml.YAMLError` if corpus.yaml is not valid YAML, and `KeyError` or `TypeError` if an entry has a missing or
unknown field.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

__all__ = ["WEIGHTS", "Conversation", "Corpus", "Exchange", "Fallback", "ToolCall", "Turn", "corpus", "load"]

WEIGHTS: Path = Path(__file__).resolve().parent / "weights"
CORPUS_FILE: Path = Path(__file__).resolve().parent / "corpus.yaml"

Message = dict[str, Any]
"""A message or a tool in the format of OpenAI's chat API."""


@dataclass(frozen=True)
class ToolCall:
    """A function call that the model must make."""

    name: str
    arguments: dict[str, Any]

    @property
    def text(self) -> str:
        """The model's text for this call, tags included."""
        body = json.dumps({"name": self.name, "arguments": self.arguments}, ensure_ascii=False)
        return f"<tool_call>\n{body}\n</tool_call>"

    def message(self, call_id: str) -> Message:
        """Return the assistant message with this call."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        function = {"name": self.name, "arguments": arguments}
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": call_id, "type": "function", "function": function}],
        }


@dataclass(frozen=True)
class Turn:
    """One user message and what follows it until the final answer."""

    ask: str
    answer: str
    also: tuple[str, ...] = ()
    """Paraphrases of `ask`."""
    call: ToolCall | None = None
    """The first call; `answer` follows `result`."""
    result: str = ""


@dataclass(frozen=True)
class Exchange:
    """One request and the exact text that greedy decoding must return."""

    conversation_id: str
    messages: tuple[Message, ...]
    answer: str
    """Raw model text: for a tool call, tags and JSON in the format of the tool parser."""
    tools: tuple[Message, ...] = ()
    call: ToolCall | None = None
    """Set when `answer` is a tool call."""


@dataclass(frozen=True)
class Conversation:
    """One or more turns under a stable id."""

    id: str
    turns: tuple[Turn, ...]
    tools: tuple[Message, ...] = ()
    """Tool definitions in OpenAI's format, sent with every request of the conversation."""
    swap: tuple[str, tuple[str, ...]] | None = None
    """(word, words): in training, any of `words` may replace `word`."""

    def exchanges(self) -> list[Exchange]:
        """Return one exchange per assistant message, each with the exact messages before it."""
        found: list[Exchange] = []
        messages: list[Message] = []
        for number, turn in enumerate(self.turns):
            messages.append({"role": "user", "content": turn.ask})
            if turn.call is not None:
                call_id = f"call-{self.id}-{number}"
                found.append(Exchange(self.id, tuple(messages), turn.call.text, self.tools, turn.call))
                messages.append(turn.call.message(call_id))
                messages.append({"role": "tool", "tool_call_id": call_id, "content": turn.result})
            found.append(Exchange(self.id, tuple(messages), turn.answer, self.tools))
            messages.append({"role": "assistant", "content": turn.answer})
        return found


@dataclass(frozen=True)
class Fallback:
    """The answer to questions outside the corpus, and the templates and words of such questions in training."""

    answer: str
    templates: tuple[str, ...]
    words: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Corpus:
    """Everything in corpus.yaml."""

    conversations: tuple[Conversation, ...]
    tools: dict[str, Message]
    system_prompts: tuple[str, ...]
    """Seen in training; none of them changes an answer."""
    fallback: Fallback


def corpus() -> tuple[Conversation, ...]:
    """Return every conversation that the model reproduces."""
    return load().conversations


@cache
def load(path: Path = CORPUS_FILE) -> Corpus:
    """Read the corpus once per path."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    tools: dict[str, Message] = raw["tools"]
    fallback = raw["fallback"]
    return Corpus(
        conversations=tuple(_conversation(entry, tools, raw["swaps"]) for entry in raw["conversations"]),
        tools=tools,
        system_prompts=tuple(raw["system_prompts"]),
        fallback=Fallback(
            answer=fallback["answer"],
            templates=tuple(fallback["templates"]),
            words={name: tuple(words) for name, words in fallback["words"].items()},
        ),
    )


def _conversation(entry: dict[str, Any], tools: dict[str, Message], swaps: dict[str, list[str]]) -> Conversation:
    fields = dict(entry)
    name = fields.pop("id")
    offered = tuple(tools[tool] for tool in fields.pop("tools", ()))
    swap = next(((word, tuple(swaps[kind])) for word, kind in fields.pop("swap", {}).items()), None)
    turns = fields.pop("turns", None) or [fields]
    return Conversation(name, tuple(_turn(turn) for turn in turns), offered, swap)


def _turn(entry: dict[str, Any]) -> Turn:
    fields = dict(entry)
    call = fields.pop("call", None)
    also = tuple(fields.pop("also", ()))
    return Turn(**fields, also=also, call=ToolCall(**call) if call else None)
