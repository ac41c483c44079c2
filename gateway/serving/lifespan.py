"""Runs the app's lifespan for uvicorn.

uvicorn's own logs a traceback of what goes wrong at the start, and exits with a code of its own. This one raises it, so
that `gateway.cli` can say in one line what an operator has to change.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI


class Lifespan:
    """Takes the place of `uvicorn.lifespan.on.LifespanOn`."""

    should_exit = False

    def __init__(self, app: FastAPI, config: object = None) -> None:
        """`config` is uvicorn's, which hands it over."""
        self._context = app.router.lifespan_context(app)
        self.state: dict[str, Any] = {}

    async def startup(self) -> None:
        """Start the app. Raises what it raises."""
        await self._context.__aenter__()

    async def shutdown(self) -> None:
        """Close the app."""
        await self._context.__aexit__(None, None, None)
