"""The sources of an answer: numbered as they are read, named only if they were, listed at the end.

A model may write any marker and any address. `MarkerFilter` lets `[n]` stand only for a source that was fetched, a DOI
only if it was seen, and a list of sources not at all: the list is ours. `AnswerFilter` does that, and then what
`gateway.workflows.links` does. Code is left as it is. Both work on a stream: they hold back what may yet become one of
these, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from gateway.tools.base import Source
from gateway.workflows.addresses import ADDRESS_CHARS, Addresses, in_markdown, normal_url, split_end
from gateway.workflows.fences import Fences
from gateway.workflows.links import REMOVED, LinkFilter
from gateway.workflows.markdown_stream import Lines
from gateway.workflows.tables import BARE, plain_line

__all__ = ["AnswerFilter", "MarkerFilter", "Sources", "normal_url"]

_MAX_MARKER_CHARS = 80
_MAX_TITLE_CHARS = 200
_MARKER_WORDS = ("source", "sources", "ref", "refs")
# [1], [1, 2], [1-3], [^1], [Source 1], and what models trained on others' products write: 【1†source】.
_MARKER = re.compile(
    r" ?(?:\[\^?(?:(?:sources?|refs?) ?)?#?([1-9]\d{0,2}(?: ?[,;–-] ?[1-9]\d{0,2}){0,9})\]"
    r"|【([1-9]\d{0,2})[^】\n]{0,40}】)",
    re.I,
)
_MARKER_BEGINNING = re.compile(r" ?\[\^?([a-z]{0,80}) ?#?[\d ,;–-]{0,80}$", re.I)
_OTHER_MARKER_BEGINNING = re.compile(r" ?【[^】\n]{0,43}$")
_DOI = re.compile(rf"(?:doi: ?)?10\.\d{{4,9}}/{ADDRESS_CHARS}", re.I)
_DOI_GOES_ON = re.compile(r"(?:\([^\s()<>\"`]{0,200})?$")
_DOI_BEGINNING = re.compile(r"(?:d|do|doi|(?:doi: ?)?(?:1|10|10\.\d{0,9}/?)?)$", re.I)
_MAX_DOI_CHARS = 2000
_LISTS = (
    *("sources", "references", "bibliography", "works cited", "citations", "quellen", "literatur", "références"),
    *("bibliographie", "fuentes", "referencias", "bibliografía", "fonti", "riferimenti", "fontes", "referências"),
    *("источники", "литература", "参考文献", "参考资料", "来源", "出典", "출처", "참고문헌"),
)
"""Headings of lists of sources, in the languages of most questions."""
_MAX_HEADING_CHARS = 80
_HEADING_HEAD = re.compile(r" {0,3}+(?P<mark>#{0,6}+) *+\**+(?:\d{1,2}+[.)]?+)?+ *+\**+")
_HEADING_TAIL = re.compile(r"[ :*]*\r?")
_HEADING = re.compile(r" {0,3}#{1,6} ")
_ENTRY = re.compile(r"(?<!\s)\s*+(?:$|[\[【*•-]|\d{1,3}[.)\]]|https?://)")
_CODE_SPAN = re.compile(r"`[^`\n]{1,200}`")
_CODE_SPAN_BEGINNING = re.compile(r"`[^`\n]{0,200}$")
_WORD = re.compile(r"[A-Za-z0-9]+")
_BETWEEN = re.compile(r"[^A-Za-z0-9\n`\[【 ]+")


@dataclass(slots=True)
class Sources:
    """The sources of one run."""

    fetched: dict[str, tuple[int, Source]] = field(default_factory=dict)
    """By normal URL: number and source, in the order in which they were read."""
    seen: dict[str, Source] = field(default_factory=dict)
    """Found by a search, perhaps not read."""

    def add(self, sources: Iterable[Source]) -> None:
        """Take in what a tool found. A fetched source gets the next number."""
        for source in sources:
            key = normal_url(source.url)
            if source.fetched and key not in self.fetched:
                self.fetched[key] = (len(self.fetched) + 1, source)
            self.seen.setdefault(key, source)

    def number(self, url: str) -> int | None:
        """Return the number of a fetched source."""
        entry = self.fetched.get(normal_url(url))
        return entry[0] if entry else None

    def listing(self, text: str) -> list[dict[str, Any]]:
        """Return the sources that `text` names, or all that were read where it names none, in machine form."""
        named = {number for marker in _MARKER.finditer(text) for number in _numbers(marker)}
        entries = [entry for entry in self.fetched.values() if entry[0] in named] or list(self.fetched.values())
        read = Addresses()
        read.add(source for _, source in self.fetched.values())
        return [
            {
                "number": number,
                "title": _title(source, read),
                "url": source.url,
                "domain": source.domain or source.url.partition(":")[0],
            }
            for number, source in entries
        ]

    @staticmethod
    def markdown(listing: list[dict[str, Any]]) -> str:
        """Return the list that ends an answer."""
        lines = [
            f"[{entry['number']}] {entry['title']} ({_listed(entry['url'])}) - {plain_line(entry['domain'])}"
            for entry in listing
        ]
        return "\n\n## Sources\n\n" + "\n\n".join(lines)


class MarkerFilter:
    """Lets an answer through piece by piece, but for markers, DOIs and lists of sources that must not stay.

    `flush` at the end returns what is held.
    """

    def __init__(self, sources: Sources, addresses: Addresses) -> None:
        self._sources = sources
        self._addresses = addresses
        self._lines = Lines()
        self._held = ""
        self._before = ""
        """The character before what is held."""
        self._line_start = True
        self._fences = Fences()
        self._in_code = False
        """In a line of a block of code, or at its edge."""
        self._skipping: Literal["", "section", "entries"] = ""

    def __call__(self, piece: str) -> str:
        """The text that may be sent so far."""
        return self._release(self._lines(piece), final=False)

    def flush(self) -> str:
        """Return the rest."""
        return self._release("", final=True)

    def _release(self, piece: str, *, final: bool) -> str:
        text = self._before + self._held + piece
        at = len(self._before)
        out: list[str] = []
        while at < len(text):
            step = self._begin_line(text, at, final) if self._line_start else self._go_on(text, at, final)
            if step is None:
                break
            at, said = step
            out.append(said)
        self._before, self._held = text[max(0, at - 1) : at], text[at:]
        return "".join(out)

    def _begin_line(self, text: str, at: int, final: bool) -> tuple[int, str] | None:
        """Look at a line's beginning: it may be the edge of code, or the heading of a list of sources.

        Returns where to continue and what may be sent, None to wait for more.
        """
        end = text.find("\n", at)
        line = text[at:] if end < 0 else text[at:end]
        whole = end >= 0 or final
        after = len(text) if end < 0 else end + 1
        fences = self._fences
        heads = not fences.inside and _may_be_heading(line)
        if not whole and (self._skipping or fences.may_matter(line) or heads):
            return None
        if self._skipping and not self._resumes(line):
            return after, ""
        self._skipping = ""
        if fences.inside and not fences.leaves(line):
            self._in_code = True
            if whole:
                fences.closes(line)
        elif whole and fences.opens(line):
            self._in_code = True
        elif whole and (kind := _list_heading(line)):
            self._skipping = kind
            return after, ""
        if whole:
            fences.note(line)
        self._line_start = False
        return at, ""

    def _resumes(self, line: str) -> bool:
        if self._skipping == "section":
            return _HEADING.match(line) is not None and not _list_heading(line)
        return _ENTRY.match(line) is None

    def _go_on(self, text: str, at: int, final: bool) -> tuple[int, str] | None:
        """Take what comes next within a line. Returns what `_begin_line` does."""
        character = text[at]
        if character == "\n":
            self._line_start, self._in_code = True, False
            return at + 1, character
        if self._in_code:
            end = text.find("\n", at)
            return (len(text), text[at:]) if end < 0 else (end, text[at:end])
        if character == "`":
            if span := _CODE_SPAN.match(text, at):
                return span.end(), span[0]
            return None if not final and _CODE_SPAN_BEGINNING.match(text, at) else (at + 1, character)
        if character in " [【":
            if marker := _MARKER.match(text, at):
                if marker.end() == len(text) and not final:
                    return None  # the text of a link is no marker
                if text[marker.end() : marker.end() + 1] not in ("(", ":"):
                    return marker.end(), self._marker(marker)
                return at + 1, character
            return None if not final and _may_be_marker(text, at) else (at + 1, character)
        if at == 0 or not _WORD.match(text, at - 1):
            if doi := _DOI.match(text, at, at + _MAX_DOI_CHARS):
                if not final and len(doi[0]) < _MAX_DOI_CHARS and _DOI_GOES_ON.match(text, doi.end()):
                    return None
                return doi.end(), self._doi(doi[0])
            if not final and _DOI_BEGINNING.match(text, at):
                return None
        plain = _WORD.match(text, at) or _BETWEEN.match(text, at)
        assert plain is not None
        return plain.end(), plain[0]

    def _marker(self, marker: re.Match[str]) -> str:
        kept = [str(number) for number in _numbers(marker) if number <= len(self._sources.fetched)]
        space = " " if marker[0].startswith(" ") else ""
        return f"{space}[{', '.join(kept)}]" if kept else ""

    def _doi(self, written: str) -> str:
        doi, end = split_end(written)
        return written if self._addresses.has_doi(doi.lower().removeprefix("doi:").strip()) else REMOVED + end


class AnswerFilter:
    """Lets an answer through piece by piece, but for what the module says. `flush` at the end returns what is held."""

    def __init__(self, sources: Sources, said: str | Addresses = "", image_hosts: Collection[str] = ()) -> None:
        """Addresses in `said` are the user's own and may be repeated."""
        addresses = Addresses(said) if isinstance(said, str) else said
        addresses.add([*sources.seen.values(), *(source for _, source in sources.fetched.values())])
        self._markers = MarkerFilter(sources, addresses)
        self._links = LinkFilter(addresses, image_hosts=image_hosts)

    def __call__(self, piece: str) -> str:
        """The text that may be sent so far."""
        return self._links(self._markers(piece))

    def flush(self) -> str:
        """Return the rest, and what closes a block of code that was left open."""
        return self._links(self._markers.flush()) + self._links.flush()


def _title(source: Source, read: Addresses) -> str:
    """Return the title as one line that can't be taken for markup, a marker or a link to what was not read."""
    links = LinkFilter(read, less_than="‹")
    title = links(" ".join(source.title.split())[: 2 * _MAX_TITLE_CHARS].translate(BARE)) + links.flush()
    return title.translate(BARE)[:_MAX_TITLE_CHARS] or plain_line(source.url)


def _listed(url: str) -> str:
    """Return a source's address for the list. Words behind a space are no part of a link, and stay as they are."""
    first, *words = url.split(" ")
    gap = " " if "".join(words).isalnum() else "%20"
    return gap.join(map(in_markdown, (first, *words)))


def _numbers(marker: re.Match[str]) -> list[int]:
    """Return the numbers that a marker names, ranges written out."""
    numbers: list[int] = []
    for part in (marker[1] or marker[2]).replace(";", ",").split(","):
        first, *rest = (int(number) for number in part.replace("–", "-").split("-"))
        last = rest[-1] if rest else first
        numbers += range(first, min(last, first + 20) + 1)
    return list(dict.fromkeys(numbers))


def _may_be_marker(text: str, at: int) -> bool:
    if len(text) - at > _MAX_MARKER_CHARS:
        return False
    if text[at:] == " " or _OTHER_MARKER_BEGINNING.match(text, at):
        return True
    beginning = _MARKER_BEGINNING.match(text, at)
    return beginning is not None and any(word.startswith(beginning[1].lower()) for word in _MARKER_WORDS)


def _may_be_heading(line: str) -> bool:
    """Whether a line that has only begun may still become the heading of a list of sources."""
    if len(line) > _MAX_HEADING_CHARS:
        return False
    head = _HEADING_HEAD.match(line)
    assert head is not None  # it may be empty
    rest = line[head.end() :].lower()
    return any(
        word.startswith(rest) or (rest.startswith(word) and _HEADING_TAIL.fullmatch(rest, len(word)) is not None)
        for word in _LISTS
    )


def _list_heading(line: str) -> Literal["", "section", "entries"]:
    """The end of the list under a heading: the next heading, or its last entry."""
    head = _HEADING_HEAD.match(line)
    assert head is not None
    rest = line[head.end() :].lower() if len(line) <= _MAX_HEADING_CHARS else ""
    for word in _LISTS:
        if rest.startswith(word) and _HEADING_TAIL.fullmatch(rest, len(word)):
            return "section" if head["mark"] or "*" in line else "entries"
    return ""
