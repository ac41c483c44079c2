"""The session's engine for an app that closes its engines.

Example:

    supervised = SupervisedEngine("main", lambda: Borrowed(engine))
"""

from __future__ import annotations

from engine.local.embedded import EmbeddedEngine


class Borrowed(EmbeddedEngine):
    """The session's engine, which an app that closes must leave running."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self.__dict__ = engine.__dict__

    async def start(self) -> None: ...

    async def close(self) -> None: ...
