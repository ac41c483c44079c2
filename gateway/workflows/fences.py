"""Blocks of code in Markdown that grows: which lines are surely inside one.

Code is the only text of an answer that is not checked for links, so a line counts as code only where every renderer
takes it for code, whatever comes later. A fence that is not indented is one by itself; for an indented one
markdown-it decides, from the lines before it. Where an indented fence is left by a line with less indentation, or
formulas may be open around it, nothing is certain any more, and what follows is treated as text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from markdown_it import MarkdownIt

MAX_LINE_CHARS = 200
"""A longer line opens no fence."""
_MAX_CONTEXT_CHARS = 8192
"""Of the lines before an indented fence; markdown-it takes some 4 ms for so many."""
_MAX_LOOKS = 16
"""Times that the same lines are parsed; what a longer list has behind that is treated as text."""

_ENVIRONMENT = "\\begin{"
_COLON = re.compile(r" {0,3}:(?:::|[ \t])")
"""Begins a container (`:::`) or a definition of a term: what is a fence behind it differs between renderers."""

_parser = MarkdownIt("commonmark", {"html": False})


@dataclass(frozen=True, slots=True)
class _Fence:
    mark: str
    length: int
    indent: int
    info: str


class Fences:
    """Follows an answer line by line. `inside` says whether the next line is in a block of code."""

    def __init__(self) -> None:
        self.certain = True
        """False once the beginnings and ends of code blocks are unknown."""
        self._fence: _Fence | None = None
        self._context = ""
        """Lines since the last one that begins a block at the margin."""
        self._looks = 0
        self._blank = True
        self._first = True
        self._region = ""
        """What ends a region that only some renderers know, and take no fence in; empty outside of one."""

    @property
    def inside(self) -> bool:
        return self._fence is not None

    @property
    def info(self) -> str:
        """The info string of the block that is open: its language, and whatever stands behind that."""
        return "" if self._fence is None else self._fence.info

    @property
    def closing(self) -> str:
        """What ends the block that is open."""
        return "" if self._fence is None else self._fence.mark * self._fence.length

    def may_matter(self, line: str) -> bool:
        """Whether a line that has only begun may yet open or close a block, or leave one."""
        if len(line) > MAX_LINE_CHARS:
            self._doubt(line)
            return False
        text = line.lstrip(" \t")
        if not text:
            return True
        if self._fence is not None:
            return not text.strip("`~ \t")
        mark = text[0]
        run = len(text) - len(text.lstrip(mark))
        if mark not in "`~" or (run < 3 and run < len(text)):
            return False
        return mark == "~" or "`" not in text[run:]

    def leaves(self, line: str) -> bool:
        """Whether a line that has begun, or is whole, is not in the open block any more; it is then closed."""
        assert self._fence is not None
        if line.strip(" \t") and _indent(line) < self._fence.indent:
            self._fence, self.certain = None, False
            return True
        return False

    def closes(self, line: str) -> bool:
        """Whether a whole line closes the open block."""
        fence = self._fence
        assert fence is not None
        text = line.strip(" \t\r")
        if not text.startswith(fence.mark * fence.length) or text.strip("`~"):
            return False
        if text.strip(fence.mark) or line.rstrip(" ") != line.rstrip():
            self._fence, self.certain = None, False  # marked takes both marks at the end, and no tab behind them
            return True
        indent = _indent(line)
        if indent > 3 and not fence.indent:
            return False  # that is code
        if indent != fence.indent and indent > 3:
            self.certain = False  # within a list it closes the block, elsewhere it does not
        self._fence = None
        return True

    def opens(self, line: str) -> bool:
        """Whether a whole line surely opens a block."""
        text = line.strip(" \t\r")
        mark = text[:1]
        run = len(text) - len(text.lstrip(mark)) if mark else 0
        if len(line) > MAX_LINE_CHARS:
            self._doubt(line)
        if not self.certain or run < 3 or mark not in "`~":
            return False
        if self._region:
            self.certain = False
            return False
        if mark == "`" and "`" in text[run:]:
            return False
        if "|" in text:  # some renderers look for the head of a table first
            self.certain = False
            return False
        indent = _indent(line)
        if indent and not self._is_fence(line):
            return False
        self._fence = _Fence(mark, run, indent, text[run:])
        return True

    def note(self, line: str) -> None:
        """Take in a whole line as it was sent."""
        if not self.inside:
            self._note_region(line)
        if not line.strip(" \t"):
            self._blank = True
        else:
            if self._blank and not self.inside and line[0] not in " \t":
                self._context, self._looks = "", 0
            self._blank = False
        if len(self._context) <= _MAX_CONTEXT_CHARS:
            self._context += f"{line}\n"

    def _note_region(self, line: str) -> None:
        """Note where front matter and environments of LaTeX begin and end, and what nests blocks by colons."""
        text = line.strip()
        if self._region:
            self._region = "" if self._region in text else self._region
        elif self._first and text in ("---", "+++"):
            self._region = text
        elif text.startswith(_ENVIRONMENT) and "\\end{" not in text:
            self._region = "\\end{"
        elif _COLON.match(line):
            self.certain = False
        self._first = False

    def _doubt(self, line: str) -> None:
        """Give up if a line is too long to find out whether it opens a block."""
        text = line[:MAX_LINE_CHARS].lstrip(" \t")
        if self._fence is None and text.startswith(("```", "~~~")):
            self.certain = self.certain and text[0] == "`" and "`" in text.lstrip("`")

    def _is_fence(self, line: str) -> bool:
        """Whether the line opens a block behind those before it."""
        if len(self._context) > _MAX_CONTEXT_CHARS or self._looks >= _MAX_LOOKS:
            self.certain = False
            return False
        self._looks += 1
        tokens = _parser.parse(f"{self._context}{line}\n")
        last = next((token for token in reversed(tokens) if token.map is not None and token.nesting >= 0), None)
        return last is not None and last.type == "fence" and (last.map or [-1])[0] == self._context.count("\n")


def _indent(line: str) -> int:
    """The columns of a line's indentation."""
    column = 0
    for character in line:
        if character == "\t":
            column += 4 - column % 4
        elif character == " ":
            column += 1
        else:
            break
    return column
