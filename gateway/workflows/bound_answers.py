"""Links and images in answers that a grammar binds: only those that were read or named by the user.

JSON stays valid: the filter looks into each string of it, with escapes resolved, and writes it again. Such answers are
read by programs: addresses that are in no link, picture or tag of HTML stay, so does an answer that is one of the
client's own choices.
"""

from __future__ import annotations

import json
import re

from gateway.workflows.links import LinkFilter
from gateway.workflows.run import Run

_ESCAPE = re.compile(r"\\(?:u[0-9A-Fa-f]{4}|[^u])")
_HIGH_SURROGATE = re.compile(r"\\u[Dd][89ABab][0-9A-Fa-f]{2}")
_PLAIN = re.compile(r'[^"\\]+')


class BoundFilter:
    """Lets an answer through piece by piece. `flush` at the end returns what is held."""

    def __init__(self, run: Run) -> None:
        self._run = run
        bound = run.request.structured_outputs or {}
        self._as_it_is = bool(bound.get("choice"))
        is_json = (run.request.response_format or {}).get("type", "text") != "text" or bool(
            bound.get("json") or bound.get("json_object")
        )
        self._string: LinkFilter | None = None if is_json else self._new()
        self._is_json = is_json
        self._held = ""

    def __call__(self, piece: str) -> str:
        """The text that may be sent so far."""
        if self._as_it_is:
            return piece
        if not self._is_json:
            assert self._string is not None
            return self._string(piece)
        text, at = self._held + piece, 0
        out: list[str] = []
        while at < len(text):
            if self._string is None:
                quote = text.find('"', at)
                end = len(text) if quote < 0 else quote + 1
                out.append(text[at:end])
                self._string = None if quote < 0 else self._new()
                at = end
            elif text[at] == '"':
                out.append(_encoded(self._string.flush()) + '"')
                self._string = None
                at += 1
            elif plain := _PLAIN.match(text, at):
                out.append(_encoded(self._string(plain[0])))
                at = plain.end()
            else:
                escapes = _escapes(text, at)
                if escapes == at:
                    break
                out.append(_encoded(self._string(json.loads(f'"{text[at:escapes]}"'))))
                at = escapes
        self._held = text[at:]
        return "".join(out)

    def flush(self) -> str:
        """Return the rest of an answer that was cut short."""
        rest = self._string.flush() if self._string is not None else ""
        return (_encoded(rest) if self._is_json else rest) + self._held

    def _new(self) -> LinkFilter:
        return LinkFilter(
            self._run.addresses, image_hosts=self._run.image_hosts, less_than=None, prose=False, bare=False
        )


def _escapes(text: str, at: int) -> int:
    """The end of the escape at `at`, or of the two that form one character."""
    first = _ESCAPE.match(text, at)
    if first is None:
        return at
    if not _HIGH_SURROGATE.fullmatch(first[0]):
        return first.end()
    second = _ESCAPE.match(text, first.end())
    if second is None:
        return at if len(text) < first.end() + 6 and text[first.end() :][:1] in ("", "\\") else first.end()
    return second.end() if second[0][1] == "u" else first.end()


def _encoded(text: str) -> str:
    """Text as it is written in a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1].encode("utf-8", "replace").decode()
