"""The parts of a long text that bear on a question, so that agents need not read, and pay for, all of it.

Passages are weighed by the words that they share with the question, rare ones counting more. Meaning is not compared: a
passage that says the same in other words is found only beside one that does not.
"""

from __future__ import annotations

import math
import re

from gateway.tools.passages import passages

_GAP = "\n\n[...]\n\n"
_UNSPACED = re.compile("[\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]{2,}")
"""Scripts that put nothing between words: pairs of characters stand for them."""
_MAX_QUESTION_CHARS = 2000
"""Each of its words is looked for in each passage."""
_MIN_WORD_CHARS = 3
_WORD = re.compile(r"\w+")
_MOST_OF_A_WORD = 3
"""Occurrences of one word in a passage that count: more of them say nothing more."""


def one_line(text: str, most_chars: int) -> str:
    """The beginning of a text, on one line. The rest is not read: it may have millions of words."""
    return " ".join(text.lstrip()[: 4 * most_chars].split())[:most_chars].rstrip()


def excerpt(text: str, question: str, most_chars: int) -> str:
    """Return the passages of `text` that bear most on `question`, in their order, `most_chars` in all at most."""
    if len(text) <= most_chars:
        return text
    question = question[:_MAX_QUESTION_CHARS]
    pieces = [passage.text for passage in passages(text)]
    weights = _weights(pieces, question)
    chosen: dict[int, str] = {}
    left = most_chars
    for number in sorted(range(len(pieces)), key=lambda number: -weights[number]):
        # The best one in any case, if only a part of it.
        piece = pieces[number] if chosen else _window(pieces[number], question, most_chars - len(_GAP))
        if len(piece) + len(_GAP) <= left:
            chosen[number] = piece
            left -= len(piece) + len(_GAP)
    out: list[str] = []
    before = 0
    for number, piece in sorted(chosen.items()):
        out += ["\n\n" if number == before + 1 else _GAP if out or number else "", piece]
        before = number
    return "".join(out).strip() or text[:most_chars]


def _weights(pieces: list[str], question: str) -> list[float]:
    """The relevance of each piece to the question. The first piece, which introduces the text, gets a little more."""
    lowered = [piece.casefold() for piece in pieces]
    weights = [0.5 / (number + 1) for number in range(len(pieces))]
    for word in _words(question.casefold()):
        holding = [piece.count(word) for piece in lowered]
        rarity = math.log(1 + len(pieces) / (1 + sum(map(bool, holding))))
        for number, count in enumerate(holding):
            weights[number] += rarity * min(count, _MOST_OF_A_WORD)
    return weights


def _window(piece: str, question: str, most_chars: int) -> str:
    """Return a part of a passage, around the longest of the question's words that it holds."""
    lowered = piece.casefold()
    held = [word for word in _words(question.casefold()) if word in lowered]
    place = lowered.index(max(sorted(held), key=len)) if held else 0
    start = max(0, min(place - most_chars // 2, len(piece) - most_chars))
    return piece[start : start + most_chars]


def _words(text: str) -> set[str]:
    pairs = {run[place : place + 2] for run in _UNSPACED.findall(text) for place in range(len(run) - 1)}
    return pairs | {word for word in _WORD.findall(_UNSPACED.sub(" ", text)) if len(word) >= _MIN_WORD_CHARS}
