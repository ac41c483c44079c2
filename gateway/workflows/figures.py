"""What counts as a figure in a text, and which figures the reports of a run hold.

A number is looked up by its value, whatever it looks like: 12,345 is also 12345, 12.3k and, in other countries,
12.345. A rounded one is found if it is off by no more than a twentieth. Dates are days, looked up among the days that
reports cover; percentages are looked up among percentages. See `gateway.workflows.figure_filter` for what is done
about those that are not found.
"""

from __future__ import annotations

import bisect
import datetime
import math
import re
from dataclasses import dataclass, field
from itertools import chain, islice

from gateway.workflows.number_words import NUMBER_WORDS

QUESTION = 0
"""Stands for the question among the numbers of reports."""
_ROUNDING = 0.05
_MAX_DAYS = 1100
"""Of a range whose days may be named: three years."""
_SCALES = {
    **dict.fromkeys(("k", "thousand", "tsd", "千"), 1e3),
    **dict.fromkeys(("m", "mn", "million", "millions", "mio"), 1e6),
    **dict.fromkeys(("b", "bn", "billion", "billions", "mrd"), 1e9),
    "万": 1e4,
    "億": 1e8,
}
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
# With capitals only: "may" is a word as well.
_MONTH = (
    r"(?-i:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)\.?"
)
_DAY = r"(?:0?[1-9]|[12]\d|3[01])"
_YEAR = r"(?:19|20)\d{2}"
_CURRENCIES = r"(?:USD|EUR|GBP|JPY|CHF|AUD|CAD|CNY)"
_DIGITS = r"\d{1,3}(?:[\ \u00a0\u202f]\d{3}){1,8}(?!\d)(?:[.,]\d+)?|\d+(?:[.,'\u2019]\d+)*"
_PERCENT = r"(?:%|\uff05|per\ ?cent\b|percentage\ points?\b|pp\b|パーセント|ポイント)"
TOKEN = rf"""
      (?P<marker>\ ?\[\ *R\d{{1,2}}(?:\ *[,;]\ *R?\d{{1,2}})*\ *\])
    | (?P<date>(?<![A-Za-z0-9])(?:
          (?P<y1>\d{{4}})[-/.](?P<m1>\d{{1,2}})[-/.](?P<d1>\d{{1,2}})
        | (?P<y2>{_YEAR})-(?P<m2>0[1-9]|1[0-2])
        | (?P<m3>{_MONTH})\ (?P<d3>{_DAY})(?:st|nd|rd|th)?(?:,?\ (?P<y3>{_YEAR}))?
        | (?P<d4>{_DAY})(?:st|nd|rd|th|\.)?\ (?:of\ )?(?P<m4>{_MONTH})(?:,?\ (?P<y4>{_YEAR}))?
        | (?P<m5>{_MONTH}),?\ (?P<y5>{_YEAR})
        )(?![A-Za-z0-9]|[.,]\d)
        | (?:(?P<y6>\d{{4}})年)?(?P<m6>\d{{1,2}})月(?:(?P<d6>\d{{1,2}})日)?
        | (?P<y7>\d{{4}})年)
    | (?P<clock>(?<![\d:])\d{{1,2}}:\d{{2}}(?::\d{{2}})?(?![\d:]))
    | (?P<span>(?<![A-Za-z\d.,])(?:(?P<hours>\d+)\ ?(?:h|hrs?|hours?)(?:,|\ and)?\ )?
        (?P<minutes>\d+)\ ?(?:m|mins?|minutes?)(?:,|\ and)?\ (?P<seconds>\d+)\ ?(?:s|secs?|seconds?)\b)
    | (?P<name>(?<![A-Za-z0-9_])(?!{_CURRENCIES}\d)[A-Za-z_\u00c0-\u024f][A-Za-z_-]{{0,60}}\d[A-Za-z0-9_-]*(?:\.\d+)*)
    | (?P<number>(?P<currency>(?:{_CURRENCIES}\ ?)?[$\u20ac\u00a3\u00a5\uffe5\u20b9]?)(?P<digits>{_DIGITS})
        (?P<ordinal>(?:st|nd|rd|th)(?![A-Za-z]))?
        (?:(?P<scale>[kmb](?![A-Za-z0-9])|[\ -]?(?:thousand|tsd|mn|millions?|mio|bn|billions?|mrd)\b|[千万億]))?
        (?P<percent>[\ \u00a0-]?{_PERCENT})?)
    | (?P<words>\b{NUMBER_WORDS}\b(?P<words_percent>\ {_PERCENT})?)
"""
"""What may be a figure; compile with IGNORECASE and VERBOSE."""
_TOKEN = re.compile(TOKEN, re.IGNORECASE | re.VERBOSE)
_WORD = re.compile(r"[^\s\"'()\[\]{}<>|,;]+")
_COMPACT_DAY = re.compile(r"(?:19|20)\d{6}")
"""The form of GA4's dates."""
_GAP = re.compile(r"[\s=|]+")
_GROUPING = re.compile("[ \u00a0\u202f'\u2019]")
_MOST_TEXTS = 20_000
"""Texts with digits that are looked for in each sentence of an answer."""
_MOST_NUMBERS = 100_000
"""Of one text. Each may take some 400 bytes, and a question of 8 MiB has room for two million."""
_MOST_ZEROS = 15
"""Of a number's step: floats have no more digits."""

_PUNCTUATION = "\"'()[]{}<>,;:.!?*~"

Day = tuple[int | None, int | None, int | None]
"""Year, month and day, as far as they are given."""


@dataclass(slots=True)
class Figures:
    """What the reports of one run hold, each figure with the numbers of its reports."""

    plain: dict[float, set[int]] = field(default_factory=dict)
    percents: dict[float, set[int]] = field(default_factory=dict)
    days: dict[datetime.date, set[int]] = field(default_factory=dict)
    texts: dict[str, set[int]] = field(default_factory=dict)
    """Text in reports, or in the question, that has digits, such as pages' paths; in lower case."""
    spans: set[int] = field(default_factory=set)
    """How many days, or minutes, reports are about."""
    most_rows: int = 0
    reports: set[int] = field(default_factory=set)
    _sorted: dict[bool, list[float]] = field(default_factory=dict)
    """The numbers in order, by whether they are percentages; made again when there are more."""

    def add(self, value: float, report: int, *, percent: bool = False) -> None:
        """Note a number; `percent` says that it is one, in per cent."""
        if math.isfinite(value):
            (self.percents if percent else self.plain).setdefault(abs(float(value)), set()).add(report)

    def add_days(self, start: str, end: str, report: int) -> None:
        """Note every day of a range of ISO dates, and how many they are. Values that are not dates are skipped."""
        try:
            first, last = datetime.date.fromisoformat(start), datetime.date.fromisoformat(end)
        except ValueError:
            return
        length = min((last - first).days + 1, _MAX_DAYS)
        self.spans.add(length)
        for number in range(length):
            self.days.setdefault(first + datetime.timedelta(days=number), set()).add(report)

    def add_all(self, text: str, report: int = QUESTION) -> None:
        """Note every number of a text, wherever in it it stands."""
        for match in islice(_TOKEN.finditer(text), _MOST_NUMBERS):
            self._add_match(match, report)
        self._add_words(text, report)

    def add_name(self, text: str, report: int) -> None:
        """Note what a report is called, without its numbers: a model has chosen them, no tool has counted them."""
        self._add_words(text, report)

    def add_text(self, text: str, report: int) -> None:
        """Note what a report says in words, with the dates and numbers that are words of it, not parts of words."""
        if _COMPACT_DAY.fullmatch(text):
            text = f"{text[:4]}-{text[4:6]}-{text[6:]}"
        for word in _GAP.split(text):
            if match := _TOKEN.fullmatch(word.strip(_PUNCTUATION)):
                self._add_match(match, report)
        self._add_words(text, report)

    def _add_match(self, match: re.Match[str], report: int) -> None:
        if match["date"] and None not in (day := day_of(match)):
            iso = "{:04}-{:02}-{:02}".format(*day)
            self.add_days(iso, iso, report)
        for value, _ in values_of(match) if match["number"] else ():
            self.add(value, report)
            if match["percent"]:
                self.add(value, report, percent=True)

    def _add_words(self, text: str, report: int) -> None:
        # Word by word: `findall` would hold the GIL until it has all of them.
        for word in chain((text,), (found[0].strip(_PUNCTUATION) for found in _WORD.finditer(text))):
            if not 2 < len(word) <= 200 or not any(character.isdigit() for character in word) or _is_plain(word):
                continue
            if len(self.texts) < _MOST_TEXTS or word.lower() in self.texts:
                self.texts.setdefault(word.lower(), set()).add(report)

    def holds(self, value: float, *, percent: bool = False) -> bool:
        """Whether any report holds just this number."""
        return any(math.isclose(value, known, rel_tol=1e-9) for known in self._near(value, percent))

    def find(self, value: float, grid: float, *, percent: bool = False) -> set[int]:
        """Return the reports that hold a number, or one that is rounded to it in steps of `grid`."""
        found: set[int] = set()
        # A percentage may stand without its sign, in a table; as a whole number it could be anything.
        kinds = (True,) if percent else (False, True) if grid < 1 else (False,)
        for kind in kinds:
            known = self.percents if kind else self.plain
            for candidate in self._near(value, kind):
                if _is_rounding(value, grid, candidate):
                    found |= known[candidate]
        return found

    def _near(self, value: float, percent: bool) -> list[float]:
        """Return the numbers that `value` could be a rounding of."""
        known = self.percents if percent else self.plain
        if len(self._sorted.get(percent, ())) != len(known):
            self._sorted[percent] = sorted(known)
        numbers = self._sorted.get(percent, [])
        first = bisect.bisect_left(numbers, value / (1 + 2 * _ROUNDING))
        return numbers[first : bisect.bisect_right(numbers, value / (1 - 2 * _ROUNDING))]

    def find_day(self, day: Day) -> set[int]:
        """Return the reports that are about a day of which these parts are given."""
        found: set[int] = set()
        for known, reports in self.days.items():
            whole = (known.year, known.month, known.day)
            if all(part in (None, known_part) for part, known_part in zip(day, whole, strict=True)):
                found |= reports
        return found


def day_of(match: re.Match[str]) -> Day:
    """Return the day that a `date` of `TOKEN` names; months that there are none of find nothing."""

    def first(part: str) -> str | None:
        return next(
            (match[f"{part}{n}"] for n in range(1, 8) if match.re.groupindex.get(f"{part}{n}") and match[f"{part}{n}"]),
            None,
        )

    year, month, day = first("y"), first("m"), first("d")
    number = None
    if month is not None:
        number = int(month) if month.isdigit() else _MONTHS.index(month[:3].lower()) + 1
    return int(year) if year else None, number, int(day) if day else None


def values_of(match: re.Match[str]) -> list[tuple[float, float]]:
    """The possible values of a `number` of `TOKEN`, each with the precision in which it is written."""
    scale = _SCALES[match["scale"].strip(" -").lower()] if match["scale"] else 1.0
    return [(value * scale, grid * scale) for value, grid in _readings(match["digits"])]


def _readings(digits: str) -> list[tuple[float, float]]:
    digits = _GROUPING.sub("", digits)
    commas, points = digits.count(","), digits.count(".")
    if commas and points:  # the last one is the decimal sign
        group, sign = (",", ".") if digits.rfind(".") > digits.rfind(",") else (".", ",")
        return [_reading(digits.replace(group, ""), sign)] if digits.count(sign) == 1 else []
    sign = "," if commas else "."
    parts = digits.split(sign)
    if len(parts) == 1:
        return [_reading(digits, "")]
    grouped = parts[0] != "0" and len(parts[0]) <= 3 and all(len(part) == 3 for part in parts[1:])
    readings = [_reading(digits.replace(sign, ""), "")] if grouped else []
    if len(parts) == 2 and not (grouped and sign == ","):  # three decimals after a comma are not in use
        readings.append(_reading(digits, sign))
    return readings


def _reading(digits: str, sign: str) -> tuple[float, float]:
    if sign:
        whole, _, decimals = digits.partition(sign)
        return float(f"{whole}.{decimals}"), 10.0 ** -min(len(decimals), _MOST_ZEROS)
    stripped = digits.rstrip("0")
    # 12,000 may well be 12,345, in thousands.
    return float(digits), 10.0 ** min(len(digits) - len(stripped), _MOST_ZEROS) if stripped else 1.0


def _is_rounding(value: float, grid: float, known: float) -> bool:
    if math.isclose(value, known, rel_tol=1e-9):
        return True
    if not value or not known or abs(value - known) > _ROUNDING * known:
        return False
    steps = known / grid
    return any(
        math.isclose(value, whole * grid, rel_tol=1e-6) for whole in (math.floor(steps), math.floor(steps + 0.5))
    )


def _is_plain(word: str) -> bool:
    """Whether a word is a number or a date, which are looked up as such."""
    match = _TOKEN.fullmatch(word)
    return match is not None and (match["number"] is not None or match["date"] is not None)
