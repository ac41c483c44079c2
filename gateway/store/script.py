"""Lua scripts in gateway/store/lua, as commands for the store."""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import Any

Command = tuple[Any, ...]
"""A command's name, or a Script, and its arguments."""


class Script:
    """A Lua script: the concatenation of the named files in gateway/store/lua.

    The whole text is sent the first time in every pipeline and its hash after that. If only the hash were sent, the
    first calls after a restart of the server would fail.
    """

    def __init__(self, *names: str, when_full: bool = False, reads: bool = False) -> None:
        """Read the files.

        A store that has reached its maxmemory refuses a script unless `when_full` is set: for scripts that shrink what
        is stored, or whose writes are small and bounded per API key. A script that only `reads` also runs while the
        disk can't be written. It needs Redis 7 or Valkey.
        """
        folder = resources.files("gateway.store") / "lua"
        text = "\n".join((folder / f"{name}.lua").read_text(encoding="utf-8") for name in names)
        lines = [line.strip() for line in text.splitlines()]  # every pipeline carries the text
        text = "\n".join(line for line in lines if line and not line.startswith("--")) + "\n"
        flags = " flags=no-writes" if reads else " flags=allow-oom" if when_full else ""
        # Without this line a full server would run a script to its end if its first write is a deletion.
        self.text = f"#!lua{flags}\n{text}"
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: list[str], arguments: list[Any]) -> Command:
        """Return the command that runs the script, atomically."""
        return (self, len(keys), *keys, *arguments)
