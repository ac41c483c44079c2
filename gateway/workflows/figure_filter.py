"""Removes figures from an answer that no report has, and marks every other figure with its report.

The answer passes sentence by sentence. A number that can't be found is taken out; one that can gets a marker `[R1]` at
the end of its sentence, unless a marker of its report stands there already. Markers of reports that there are not are
taken out. What passes besides, without a marker: numbers of the question, days that reports are about, numbers of
lists, ordinals, `top 5`, `the last 28 days`, and names that hold a digit or two, like GA4.

Not checked: whether a number belongs to the right word, whole numbers up to ten in words, words such as half or
twice, and words for numbers in languages other than English.
"""

from __future__ import annotations

import re

from gateway.workflows.figures import QUESTION, TOKEN, Figures, day_of, values_of
from gateway.workflows.number_words import word_value
from gateway.workflows.sentences import SentenceFilter

REMOVED = "(figure removed: not in any report)"
_MOST_PLAIN_WORDS = 10
_MOST_NAME_DIGITS = 2
_TOKEN = re.compile(TOKEN, re.IGNORECASE | re.VERBOSE)
_GOES_ON = re.compile(r"[^\W_]|%|[.,]\d")
_DIGITS = re.compile(r"\d+")
_POINTS = ".!?:;,\u3002\uff01\uff1f"
_CLOSERS = "\"')*_"
_CHOICE = re.compile(r"(?:top|bottom|first|last|best|worst)[\s-]+(?:the\s+)?$", re.IGNORECASE)
_REPORT = re.compile(r"reports?\s+(?:R\d+\s*(?:,|and)\s*)*(?:no\.\s*)?$", re.IGNORECASE)
_SPAN = re.compile(r"[\s-](?P<unit>days?|weeks?|minutes?)\b|\s?(?P<cjk>日|分|週)", re.IGNORECASE)


class FigureFilter(SentenceFilter):
    """Removes sentences with figures that no report has."""

    def __init__(self, figures: Figures) -> None:
        super().__init__()
        self.removed = 0
        """Figures that were taken out so far."""
        self._figures = figures
        self._found: list[set[int]] = []
        """Of the sentence in hand: the reports of each figure."""
        self._marked: set[int] = set()
        self._known: list[tuple[int, int, set[int]]] = []
        """Where in it texts of reports stand word for word: from, to, and the reports."""

    def check(self, sentence: str) -> str:
        """Return the sentence with the figures that can be found, and markers for them."""
        self._found, self._marked = [], set()
        self._known = self._texts_in(sentence)
        return self._with_markers(_TOKEN.sub(self._looked_up, sentence))

    def _texts_in(self, sentence: str) -> list[tuple[int, int, set[int]]]:
        if not _DIGITS.search(sentence):  # as each of them does
            return []
        lowered = sentence.lower()
        if len(lowered) != len(sentence):  # a few letters become two
            return []
        found = []
        for text, reports in self._figures.texts.items():
            at = lowered.find(text)
            while at >= 0:
                end = at + len(text)
                if not (at and lowered[at - 1].isalnum()) and not _GOES_ON.match(lowered, end):
                    found.append((at, end, reports))
                at = lowered.find(text, end)
        return found

    def _with_markers(self, sentence: str) -> str:
        missing: set[int] = set()
        for reports in self._found:
            if not reports & (self._marked | missing):
                missing.add(min(reports))
        if not missing:
            return sentence
        marker = " " + "".join(f"[R{number}]" for number in sorted(missing))
        if (row := sentence.rstrip()).endswith("|"):  # of a table: within its last cell
            return f"{row[:-1].rstrip()}{marker} |{sentence[len(row) :]}"
        end = len(sentence.rstrip())
        closed = len(sentence[:end].rstrip(_CLOSERS).rstrip(_POINTS))
        if closed < len(sentence[:end].rstrip(_CLOSERS)):  # there is a full stop, or the like
            end = closed
        return sentence[:end] + marker + sentence[end:]

    def _looked_up(self, match: re.Match[str]) -> str:
        """The text for a figure: the figure itself if a report has it."""
        if match["marker"]:
            return self._marker(match[0])
        reports = self._reports(match)
        if reports is None:
            self.removed += 1
            return REMOVED
        if reports := reports - {QUESTION}:
            self._found.append(reports)
        return match[0]

    def _marker(self, text: str) -> str:
        named = [int(number) for number in _DIGITS.findall(text)]
        kept = [number for number in dict.fromkeys(named) if number in self._figures.reports]
        self._marked.update(kept)
        space = " " if text.startswith(" ") else ""
        return f"{space}[{', '.join(f'R{number}' for number in kept)}]" if kept else ""

    def _reports(self, match: re.Match[str]) -> set[int] | None:
        """Return the reports that hold a figure, none where it needs none; None where there should be one."""
        figures = self._figures
        for start, end, reports in self._known:
            if start <= match.start() and match.end() <= end:
                return reports
        if match["date"]:
            return set() if figures.find_day(day_of(match)) else None
        if match["clock"]:
            return None  # those that reports hold were found as texts
        if match["span"]:
            parts = (match["hours"] or 0, match["minutes"], match["seconds"])
            hours, minutes, seconds = map(int, parts)
            return figures.find(hours * 3600 + minutes * 60 + seconds, 1) or None
        if match["name"]:
            return self._name(match[0])
        if match["words"]:
            value = word_value(match["words"])
            if value <= _MOST_PLAIN_WORDS and not match["words_percent"]:
                return set()
            return figures.find(value, 1, percent=bool(match["words_percent"])) or None
        return self._number(match)

    def _number(self, match: re.Match[str]) -> set[int] | None:
        figures = self._figures
        digits, percent = match["digits"], match["percent"] is not None
        before, after = match.string[: match.start()], match.string[match.end() :]
        if digits.isdecimal() and not percent and not match["scale"]:
            value = int(digits)
            if _REPORT.search(before) and value in figures.reports:
                self._marked.add(value)
                return set()
            if match["ordinal"] and value <= max(figures.most_rows, _MOST_PLAIN_WORDS):
                return set()
            if _CHOICE.search(before) and value <= figures.most_rows and not _SPAN.match(after):
                return set()
            if (span := _SPAN.match(after)) and self._is_span(value, span):
                return set()
            if len(digits) == 4 and figures.find_day((value, None, None)):
                return set()
        found: set[int] = set()
        for reading, grid in values_of(match):
            found |= figures.find(reading, grid, percent=percent)
        return found or None

    def _is_span(self, value: int, span: re.Match[str]) -> bool:
        weeks = (span["unit"] or "").lower().startswith("week") or span["cjk"] == "週"
        return value * (7 if weeks else 1) in self._figures.spans

    def _name(self, text: str) -> set[int] | None:
        runs = _DIGITS.findall(text)
        if sum(map(len, runs)) <= _MOST_NAME_DIGITS:
            return set()
        found: set[int] = set()
        for run in runs:
            reports = self._figures.find(float(run), 1.0) or self._figures.find_day((int(run), None, None))
            if not reports:
                return None
            found |= reports
        return found
