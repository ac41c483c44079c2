"""A filter for answers that works on whole sentences, while they are being written.

It holds back the sentence that has only begun, so that what decides about it, numbers and markers behind them, is
there when it is looked at. A line of a list or a table counts as a sentence. Leaves out what is done to a sentence.
"""

from __future__ import annotations

import re

_MAX_HELD_CHARS = 800
MARKUP = r"\s*(?:>\s*)*(?:[-*+]\s+)?(?:#{1,6}\s*)?(?:\*\*|__)?"
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
        """Return what is said in place of a sentence, white space behind it included."""
        raise NotImplementedError

    def __call__(self, piece: str) -> str:
        """Return what may be sent by now."""
        self._held += piece
        out: list[str] = []
        while (end := self._end()) is not None:
            out.append(self._checked(self._held[:end]))
            self._held = self._held[end:]
        return "".join(out)

    def flush(self) -> str:
        """Return the rest."""
        rest, self._held = self._held, ""
        return self._checked(rest) if rest else ""

    def _end(self) -> int | None:
        for match in _END.finditer(self._held):
            before = self._held[: match.start()]
            numbered = self._line_start and _ONLY_A_NUMBER.fullmatch(before) is not None
            if match[0] == "\n" or not (numbered or _ABBREVIATION.search(before)):
                return match.end()
        if len(self._held) > _MAX_HELD_CHARS:
            return self._held.rfind(" ", 0, _MAX_HELD_CHARS) + 1 or _MAX_HELD_CHARS
        return None

    def _checked(self, sentence: str) -> str:
        """Return the sentence as checked, but for the number that a line of a list begins with."""
        number = _LIST_NUMBER.match(sentence) if self._line_start else None
        at = number.end() if number else 0
        self._line_start = sentence.endswith("\n")
        return sentence[:at] + self.check(sentence[at:])
