"""Markdown that grows, read piece by piece: which of it is code, and which is shown as text.

A subclass says what becomes of text and of the content of code spans; blocks of code pass as they are, but for those
that front ends draw (see `gateway.workflows.drawings`). What counts as
code is only what every renderer takes for code, whatever comes later: see `gateway.workflows.fences` for blocks. A code
span is sure if both of its runs of backticks are on one line, no run before them in the paragraph is still without its
partner, and neither cells of tables nor formulas can bind tighter.
"""

from __future__ import annotations

import re

from gateway.workflows.drawings import MAX_LINE_CHARS, checked_line, is_drawn
from gateway.workflows.fences import Fences

Parsed = tuple[int, str] | None
"""Where to continue and what may be sent by then; None to wait for more."""

_MAX_SPAN_CHARS = 400
"""Of a code span; a longer one is treated as text."""
_MAX_LINE_CHARS = 2400
"""Characters of a line that are kept, to recognize blocks of code."""
_MAX_TAIL_CHARS = 320
_TICKS = re.compile(r"`+")
_RUN = re.compile(r"[A-Za-z0-9]+")
_PLAIN = re.compile(r"[^A-Za-z0-9\\&`<!\]:/?#@$\n]+")


class Lines:
    """Gives a growing text the lines that every renderer sees: each CRLF and each lone CR becomes a line feed, and the
    byte order mark at the beginning, which only some renderers leave out of the first line, is left out."""

    def __init__(self) -> None:
        self._begun = False
        self._return = False
        """The last character so far was a CR."""

    def __call__(self, piece: str) -> str:
        """Return the piece as it is read on. Nothing is held back."""
        if not self._begun:
            piece = piece.lstrip("\ufeff")
            self._begun = bool(piece)
        if self._return and piece.startswith("\n"):
            piece = piece[1:]
            self._return = False
        if piece:
            self._return = piece.endswith("\r")
        return piece.replace("\r\n", "\n").replace("\r", "\n")


class MarkdownStream:
    """Markdown that grows, divided into code and text. `flush` returns the held text and closes open code blocks."""

    def __init__(self, *, prose: bool = True) -> None:
        """`prose` False says that there is no code in the text."""
        self._prose = prose
        self._lines = Lines()
        self._held = ""
        self._line = ""
        """What was sent of the line, as far as blocks of code need to know it."""
        self._at_line_start = True
        self._in_code_line = False
        self._drawn = ""
        """The info string of the block of code that the line is within, if front ends draw it."""
        self._cut = False
        """The rest of the line is left out: it is too long to be checked."""
        self._fences = Fences()
        self._spans = prose
        """Code spans are known: every backtick of this paragraph has its partner."""
        self._tail = ""
        """The end of what was sent, back to the last white space, as a reader sees it."""
        self._dollar = False
        self._formula = False

    def _text(self, text: str, at: int, final: bool) -> Parsed:
        """Take what comes next of the text, but for backticks and plain characters."""
        raise NotImplementedError

    def _word(self, text: str, run: re.Match[str], final: bool) -> Parsed:
        """Take a word."""
        raise NotImplementedError

    def _checked_code(self, content: str) -> str:
        """The text for the content of a code span."""
        raise NotImplementedError

    def __call__(self, piece: str) -> str:
        """The text that may be sent so far."""
        self._held += self._lines(piece) if self._prose else piece
        return self._release(final=False)

    def flush(self) -> str:
        """Return the rest."""
        rest = self._release(final=True)
        if not self._fences.inside:
            return rest
        closing, self._fences = self._fences.closing, Fences()
        return f"{rest}\n{closing}"

    def _release(self, *, final: bool) -> str:
        text, at = self._held, 0
        out: list[str] = []
        while at < len(text):
            step = self._begin_line(text, at, final) if self._at_line_start else self._within(text, at, final)
            if step is None:
                break
            at, said = step
            self._note(said)
            out.append(said)
        self._held = text[at:]
        return "".join(out)

    def _note(self, said: str) -> None:
        *whole, last = said.split("\n")
        for line in whole:
            self._end_line(self._line + line)
            self._line = ""
        if len(self._line) < _MAX_LINE_CHARS:
            self._line += last

    def _end_line(self, line: str) -> None:
        self._fences.note(line)
        if not line.strip(" \t"):
            self._spans = self._prose  # a paragraph has ended

    # Lines

    def _begin_line(self, text: str, at: int, final: bool) -> Parsed:
        """Look at a line's beginning: it may be the edge of a block of code.

        Returns where to continue and what may be sent, None to wait for more.
        """
        end = text.find("\n", at)
        line = text[at:] if end < 0 else text[at:end]
        whole = end >= 0 or final
        if not self._prose:
            self._at_line_start = False
            return at, ""
        if not whole and self._fences.may_matter(line):
            return None
        if self._fences.inside and not self._fences.leaves(line):
            self._in_code_line = True
            self._drawn = self._fences.info if is_drawn(self._fences.info) else ""
            if whole and self._fences.closes(line):
                return (len(text) if end < 0 else end), line
        elif whole and not self._formula and self._fences.opens(line):
            self._in_code_line, self._drawn = True, ""
        elif whole and self._formula and line.lstrip()[:3] in ("```", "~~~"):
            self._fences.certain = False
        self._at_line_start = False
        return at, ""

    def _within(self, text: str, at: int, final: bool) -> Parsed:
        """Take what comes next within a line. Returns what `_begin_line` does."""
        character = text[at]
        if character == "\n":
            self._at_line_start, self._in_code_line, self._cut, self._tail = True, False, False, ""
            return at + 1, character
        if self._in_code_line:
            return self._code_line(text, at, final)
        if text[at] == "`":
            return self._code_span(text, at, final)
        if run := _RUN.match(text, at):
            return self._word(text, run, final)
        if plain := _PLAIN.match(text, at):
            return self._plain(text, plain)
        return self._text(text, at, final)

    def _code_line(self, text: str, at: int, final: bool) -> Parsed:
        """Take the rest of a line of a block of code. One that is drawn is checked as a whole."""
        end = text.find("\n", at)
        line = text[at:] if end < 0 else text[at:end]
        if not self._drawn:
            return at + len(line), line
        if self._cut:
            return at + len(line), ""
        if end < 0 and not final and len(line) <= MAX_LINE_CHARS:
            return None
        self._cut = len(line) > MAX_LINE_CHARS
        return at + len(line), checked_line(self._drawn, line)

    def _plain(self, text: str, plain: re.Match[str]) -> Parsed:
        """Take characters that begin nothing."""
        return self._pass(plain.end(), plain[0], plain[0])

    def _pass(self, end: int, said: str, meant: str) -> tuple[int, str]:
        """Send something, and remember how it reads."""
        pieces = (self._tail + meant).split()
        self._tail = pieces[-1][-_MAX_TAIL_CHARS:] if pieces and not meant[-1:].isspace() else ""
        return end, said

    # Code spans

    def _code_span(self, text: str, at: int, final: bool) -> Parsed:
        ticks = _TICKS.match(text, at)
        assert ticks is not None
        if ticks.end() == len(text) and not final:
            return None if len(ticks[0]) < _MAX_SPAN_CHARS else self._pass(ticks.end(), ticks[0], "`")
        if not self._spans:
            return self._pass(ticks.end(), ticks[0], "`")
        limit = ticks.end() + _MAX_SPAN_CHARS
        newline = text.find("\n", at, limit)
        end = newline if newline >= 0 else min(len(text), limit)
        closer = next((run for run in _TICKS.finditer(text, ticks.end(), end) if len(run[0]) == len(ticks[0])), None)
        open_ended = end == len(text) and end < limit and not final
        if (closer is None or closer.end() == end) and open_ended:
            return None
        content = text[ticks.end() : closer.start()] if closer else ""
        if closer is None or not self._is_certain(content):
            self._spans = False  # its partner may come in another line; until the paragraph ends, nothing is sure
            return self._pass(ticks.end(), ticks[0], "`")
        return self._pass(closer.end(), f"{ticks[0]}{self._checked_code(content)}{ticks[0]}", "`")

    def _is_certain(self, content: str) -> bool:
        """Whether a pair of backticks is a code span even where cells or formulas bind tighter."""
        if "|" in content.replace("\\|", ""):
            return False
        return not ("$" in content and self._dollar) and not ("\\)" in content or "\\]" in content)
