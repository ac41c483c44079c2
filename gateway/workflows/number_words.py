"""English words for whole numbers: `twelve hundred`, `forty-two thousand`, `a million`."""

from __future__ import annotations

import re

_SMALL = {
    word: number
    for number, word in enumerate(
        (
            *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
            *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
        )
    )
} | {
    word: number
    for number, word in zip(
        range(20, 100, 10),
        ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"),
        strict=True,
    )
}
_WORD = re.compile(r"[a-z]+")
_LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_ANY = "|".join((*sorted(_SMALL, key=len, reverse=True), "hundred", *_LARGE))
NUMBER_WORDS = rf"(?:a\ (?=hundred|thousand|million|billion))?(?:{_ANY})(?:(?:\ and\ |[\ -])(?:{_ANY}))*"
"""A pattern for one of them, to stand between word boundaries; without capitals, with spaces escaped."""


def word_value(words: str) -> int:
    """Return the number that words stand for, as `NUMBER_WORDS` finds them."""
    total = part = 0
    for word in _WORD.findall(words.lower()):
        if word in _SMALL:
            part += _SMALL[word]
        elif word == "hundred":
            part = (part or 1) * 100
        elif word in _LARGE:
            total += (part or 1) * _LARGE[word]
            part = 0
    return total + part
