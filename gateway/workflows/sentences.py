"""A filter for answers that works on whole sentences, while they are being written.

It holds back the sentence that has only begun, so that what decides about it, numbers and markers behind them, is there
when it is looked at. A line of a list or a table counts as a sentence. Only finds sentences; changes none.
"""

from __future__ import annotations

import re

_MAX_HELD_CHARS = 800
# Possessive, and not from within white space: in each of many places it would look through what follows once more.
MARKUP = r"(?<![\s>])\s*+(?:>\s*+)*+(?:[-*+]\s++)?+(?:#{1,6}+\s*+)?+(?:\*\*|__)?+"
_LIST_NUMBER = re.compile(rf"{MARKUP}\d{{1,2}}[.)](?=\s|\*|_|$)")
_ONLY_A_NUMBER = re.compile(rf"{MARKUP}\d{{1,2}}")
_END = re.compile(r"[.!?][\"')*_]*(?:[ \t]*\[R[\dR,; ]*\])*[ \t]+(?=[^\s\[]|\[[^R])|[\u3002\uff01\uff1f]+|\n")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|vs|approx|ca|cf|no|z\. ?B|bzw|inkl)$", re.IGNORECASE)


class SentenceFilter:
    """Gives each sentence to `check`. `flush` at the end returns what is held."""

    def __init__(self) -> None:
        self._held = ""
        self._line_start = True

    def check(self, sentence: str) -> str:
        """The replacement of a sentence, including the white space after it."""
        raise NotImplementedError

    def __call__(self, piece: str) -> str:
        """The text that may be sent so far."""
        self._held += piece
        out: list[str] = []
        begin = 0
        while (end := self._end(begin)) is not None:
            out.append(self._checked(self._held[begin:end]))
            begin = end
        self._held = self._held[begin:]
        return "".join(out)

    def flush(self) -> str:
        """Return the rest."""
        rest, self._held = self._held, ""
        return self._checked(rest) if rest else ""

    def _end(self, begin: int) -> int | None:
        """The end of the sentence that begins at `begin`, None if it is not complete."""
        limit = begin + _MAX_HELD_CHARS
        for match in _END.finditer(self._held, begin):
            if match.end() > limit + 1:
                break
            before = self._held[begin : match.start()]
            numbered = self._line_start and _ONLY_A_NUMBER.fullmatch(before) is not None
            if match[0] == "\n" or not (numbered or _ABBREVIATION.search(before)):
                return match.end()
        if len(self._held) > limit:
            return self._held.rfind(" ", begin, limit) + 1 or limit
        return None

    def _checked(self, sentence: str) -> str:
        """Return the sentence as checked, but for the number that a line of a list begins with."""
        number = _LIST_NUMBER.match(sentence) if self._line_start else None
        at = number.end() if number else 0
        self._line_start = sentence.endswith("\n")
        return sentence[:at] + self.check(sentence[at:])
