"""Measures the largest command that a gateway sends to its store, and the largest answer.

Example:

    largest = watch_store(gateway.services.store, monkeypatch)
    await gateway.chat()
    assert largest.bytes < 10_000, largest.command
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from gateway.store.client import Command, Store


@dataclass
class Largest:
    """Most bytes of arguments in one command, or of values in its answer."""

    bytes: int = 0
    command: str = ""

    def note(self, command: Command, answer: Any) -> None:
        for size in (size_of(command), size_of(answer)):
            if size > self.bytes:
                self.bytes, self.command = size, str(command)[:200]


def size_of(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, list | tuple | set):
        return sum(map(size_of, value))
    if isinstance(value, dict):
        return sum(size_of(part) for pair in value.items() for part in pair)
    return 8


def watch_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> Largest:
    """Note from now on how large a store's commands and answers are."""
    largest = Largest()
    run_in_order = store.try_in_order

    async def try_in_order(commands: list[Command]) -> list[Any]:
        answers = await run_in_order(commands)
        for command, answer in zip(commands, answers, strict=True):
            largest.note(command, answer)
        return answers

    monkeypatch.setattr(store, "try_in_order", try_in_order)
    return largest
