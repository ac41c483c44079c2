"""The last step of every workflow with agents: one answer, streamed as it is written, and the sources that it names.

Where the client binds the answer to a grammar, nothing is put in front of it or added to it, and only links to what
was not read are taken out of it: then the sources are only in the payload. Where the key's limits leave no room for
the answer, what was found is sent as it is. Raises GatewayError.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.base import Delta, FinishReason
from gateway.errors import BadRequest, GatewayError
from gateway.workflows.agents import Agent, Prompt
from gateway.workflows.bound_answers import BoundFilter
from gateway.workflows.citations import AnswerFilter, Sources
from gateway.workflows.filtering import filtered
from gateway.workflows.run import OutOfBudget, Run

_NO_ROOM = "The limits of this API key left no room to write an answer. This is what was found.\n\n"


async def answer(
    run: Run,
    prompt: Prompt,
    sources: Sources,
    *,
    opening: str = "",
    closing: Callable[[str], str] = lambda text: "",
    instead: str = "",
) -> None:
    """Write the answer to `prompt`, end the stream of it, and leave its sources in the run's result.

    `opening` is put before it, what `closing` makes of it behind it. `instead` is what was found, as text.
    """
    answer_filter = AnswerFilter(sources, run.addresses, run.image_hosts)
    text, tail = "", ""
    async with Agent(run, "synthesis", "writer") as writer:
        writer.think("Pulling it all together.")
        try:
            if run.constrained:
                bound = BoundFilter(run)
                _, finish_reason = await writer.speak(prompt, bound)
                tail = bound.flush()
            else:
                text, finish_reason = await writer.speak(prompt, answer_filter, opening)
        except (BadRequest, OutOfBudget) as error:
            text, finish_reason = await _without_writer(run, error, writer, answer_filter, opening, instead)
    if not run.constrained:
        tail = answer_filter.flush()
        text += tail
        # What is put behind may be of a model's making as well.
        last_filter = AnswerFilter(sources, run.addresses, run.image_hosts)
        tail += await filtered(closing(text), last_filter) + last_filter.flush()
    listing = sources.listing(text) if sources.fetched else []
    if listing:
        async with Agent(run, "citation", "librarian") as librarian:
            librarian.think(f"The answer rests on {len(listing)} of {len(sources.fetched)} sources.", sources=listing)
        tail += "" if run.constrained else Sources.markdown(listing)
    run.send(Delta(tail, finish_reason=finish_reason, stop_reason=writer.stop_reason))
    run.result["sources"] = listing


async def _without_writer(
    run: Run, error: GatewayError | OutOfBudget, writer: Agent, answer_filter: AnswerFilter, opening: str, instead: str
) -> tuple[str, FinishReason]:
    """Send what was found in place of an answer. Raises where the client is better served by the error."""
    if run.constrained or not run.begun:
        if isinstance(error, OutOfBudget) and isinstance(error.__cause__, GatewayError):
            raise error.__cause__
        raise error
    run.emit("PROGRESS", writer.id, f"No answer can be written: {error}", role=writer.role)
    text = await filtered(instead or "Nothing was found.", answer_filter)
    run.send(Delta(opening + _NO_ROOM + text))
    return text, "length"
