"""Joins the streamed outputs of several choices into complete ones.

vLLM returns final outputs of several choices only when all of them have ended. A failed choice would only be noticed
then, while the others run for nothing. So several choices are always requested as delta outputs.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput


class WholeChoices:
    """The choices of one request. Time and memory are linear in the size of the outputs."""

    def __init__(self) -> None:
        self._pieces: defaultdict[int, list[CompletionOutput]] = defaultdict(list)

    def add(self, pieces: list[CompletionOutput]) -> list[CompletionOutput]:
        """Add delta outputs. Returns the complete outputs of the choices that ended with them."""
        ended = []
        for piece in pieces:
            self._pieces[piece.index].append(piece)
            if piece.finish_reason is not None:
                ended.append(_joined(self._pieces.pop(piece.index)))
        return ended


def _joined(pieces: list[CompletionOutput]) -> CompletionOutput:
    logprobs = [entry for piece in pieces for entry in piece.logprobs or ()]
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=[token_id for piece in pieces for token_id in piece.token_ids],
        logprobs=logprobs or None,
    )
