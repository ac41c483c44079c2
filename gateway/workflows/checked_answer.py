"""The last step of workflows whose answers are checked as they are written: tables by code, then an analysis of them.

What code has put together stands first and is sent as it is; what the model writes passes through filters. Where the
key's limits leave no room for an analysis, the tables stand alone. An answer that a grammar binds can't be checked in
this way, since taking something out of it breaks it: such a request is refused. Raises GatewayError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.base import Delta
from gateway.errors import BadRequest
from gateway.workflows.agents import Agent, Prompt
from gateway.workflows.citations import AnswerFilter, Sources
from gateway.workflows.links import LinkFilter
from gateway.workflows.run import OutOfBudget, Run

_NO_ROOM = "The limits of this API key left no room to write an analysis.\n"


class Filter(Protocol):
    """Lets an answer through piece by piece, changed or not."""

    def __call__(self, piece: str, /) -> str:
        """The text that may be sent so far."""

    def flush(self) -> str:
        """Return the rest."""


def check_unbound(run: Run) -> None:
    """Raise BadRequest where the client binds the answer to a grammar."""
    if run.constrained:
        what = f"{run.meter.model.id} checks its answer while it writes, which a grammar does not allow"
        raise BadRequest(f"'response_format' must be text: {what}.", "response_format")


async def checked_answer(run: Run, prompt: Prompt, sources: Sources, filters: Sequence[Filter], opening: str) -> None:
    """Send `opening` and the answer to `prompt`, end the stream, and leave the sources named in the run's result."""
    # Links once more: what the other filters take out must not put one together.
    passes: list[Filter] = [
        AnswerFilter(sources, run.addresses, run.image_hosts),
        *filters,
        LinkFilter(run.addresses, image_hosts=run.image_hosts),
    ]

    def through(piece: str) -> str:
        for one in passes:
            piece = one(piece)
        return piece

    def flush() -> str:
        rest = ""
        for one in passes:
            rest = one(rest) + one.flush()
        return rest

    async with Agent(run, "synthesis", "writer") as writer:
        writer.think("Pulling it all together.")
        try:
            text, finish_reason = await writer.speak(prompt, through, opening)
            tail = flush()
        except (BadRequest, OutOfBudget) as error:
            run.emit("PROGRESS", writer.id, f"No analysis can be written: {error}", role=writer.role)
            run.send(Delta(opening))
            text, tail, finish_reason = "", _NO_ROOM, "length"
    listing = sources.listing(opening + text + tail) if sources.fetched else []
    if listing:
        async with Agent(run, "citation", "librarian") as librarian:
            librarian.think(f"The answer rests on {len(listing)} of {len(sources.fetched)} sources.", sources=listing)
        tail += Sources.markdown(listing)
    run.send(Delta(tail, finish_reason=finish_reason, stop_reason=writer.stop_reason))
    run.result["sources"] = listing
