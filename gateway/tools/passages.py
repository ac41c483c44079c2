"""Splits a document's text into passages for search, each with an anchor that finds it again.

Passages follow the structure of the text: pages, headings, paragraphs, sentences. They neither omit nor repeat text:
joined, they are the document. An anchor is a page (`page=3`) or a heading (`results`), numbered if several passages
share it. Not handled: tables of contents and footnotes, which are paragraphs like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from gateway.tools.documents import PAGE_BREAK

PASSAGE_CHARS = 1500
"""About 350 tokens of English: small enough for one subject, large enough to be understood alone."""
_MAX_SLUG_CHARS = 60
_MAX_HEADING_CHARS = 300
"""A longer line is not a heading, whatever it begins with."""
_HEADING = re.compile(r"#{1,6}[ \t]+(\S.*)")
_UNDERLINE = re.compile(r"([=~^-])\1{2,}[ \t]*")
_FENCE = re.compile(r"```|~~~")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n")
_NO_SLUG = re.compile(r"\W+")


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document."""

    anchor: str
    """Unique in the document; empty for the beginning of a text without headings."""
    heading: str
    """The heading above it."""
    text: str


def passages(text: str) -> list[Passage]:
    """Return the passages of a text, in order."""
    pages = text.split(PAGE_BREAK)
    found: list[Passage] = []
    seen: dict[str, int] = {}
    heading = ""
    for number, page in enumerate(pages, 1):
        for under, piece in _pieces(page, heading):
            name = f"page={number}" if len(pages) > 1 else _slug(under)
            found.append(Passage(_unique(name, seen), under, piece))
            heading = under
    return found


def _pieces(page: str, heading: str) -> Iterator[tuple[str, str]]:
    """Yield the passages of a page, each with the heading above it."""
    gathered: list[str] = []
    size = 0
    only_headings = True
    for block, own_heading in _blocks(page):
        starts_section = own_heading is not None and not only_headings
        if gathered and (starts_section or size + len(block) > PASSAGE_CHARS):
            yield heading, "\n\n".join(gathered)
            gathered, size, only_headings = [], 0, True
        heading = heading if own_heading is None else own_heading
        only_headings = only_headings and own_heading is not None
        gathered.append(block)
        size += len(block)
    if gathered:
        yield heading, "\n\n".join(gathered)


def _blocks(page: str) -> Iterator[tuple[str, str | None]]:
    """Yield headings with their text, and paragraphs with None, none longer than a passage."""
    paragraph: list[str] = []
    fenced = False
    for line in page.split("\n"):
        short = len(line) <= _MAX_HEADING_CHARS
        heading = _HEADING.fullmatch(line) if short else None
        if _FENCE.match(line):
            fenced = not fenced
        if not fenced and short and _UNDERLINE.fullmatch(line) and (title := _underlined(paragraph)):
            yield "\n".join([*paragraph, line]), title
            paragraph = []
        elif fenced or (line.strip() and heading is None):
            paragraph.append(line)
        else:
            for piece in _cut("\n".join(paragraph)):
                yield piece, None
            paragraph = []
            if heading is not None:
                yield line, heading[1].rstrip(" \t#") or heading[1][0]
    for piece in _cut("\n".join(paragraph)):
        yield piece, None


def _underlined(paragraph: list[str]) -> str:
    """Return the heading of a paragraph that is underlined: its only line, or one that also has a line above."""
    if not 1 <= len(paragraph) <= 2 or sum(map(len, paragraph)) > 2 * _MAX_HEADING_CHARS:
        return ""
    lines = paragraph[1:] if _UNDERLINE.fullmatch(paragraph[0]) else paragraph
    return lines[0].strip() if len(lines) == 1 else ""


def _cut(block: str) -> Iterator[str]:
    """Yield `block` in pieces that fit a passage, split between sentences if possible."""
    begin, end = 0, len(block)
    while end - begin > PASSAGE_CHARS:
        window = block[begin : begin + PASSAGE_CHARS]
        least = PASSAGE_CHARS // 3
        ends = [match.end() for match in _SENTENCE_END.finditer(window) if match.end() > least]
        size = ends[-1] if ends else window.rfind(" ", least) + 1 or PASSAGE_CHARS
        yield window[:size].rstrip()
        begin += size
    if rest := block[begin:end].rstrip():
        yield rest


def _slug(heading: str) -> str:
    return _NO_SLUG.sub("-", heading.lower()).strip("-")[:_MAX_SLUG_CHARS].rstrip("-")


def _unique(name: str, seen: dict[str, int]) -> str:
    """Return `name`, with a number appended if it is taken."""
    if name not in seen:
        seen[name] = 1
        return name
    while True:
        seen[name] += 1
        numbered = f"{name}-{seen[name]}" if name else f"part-{seen[name]}"
        if numbered not in seen:
            seen[numbered] = 1
            return numbered
