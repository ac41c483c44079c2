"""Words of any script, the way that SQLite's full-text index compares them.

FTS5 cuts text into words at whatever is neither letter nor digit. Chinese, Japanese, Thai and their like put nothing
between words: there each character is made a word of its own, and a query looks for pairs of them. Does not handle
dictionaries, so a pair may match across two words.
"""

from __future__ import annotations

import re
import unicodedata

TOKENIZER = "porter unicode61 remove_diacritics 2 categories 'L* N* Co Mn Mc'"
"""FTS5's: no case, no accents, English words by their stem. Marks are part of words, as Indian scripts need it."""
MAX_TERMS = 48

_GAP = "\u200b"
"""Around a character that is a word. Documents come without it, so it can be taken out again."""
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
_UNSPACED_CHARACTER = re.compile(f"([{_UNSPACED}])")
_UNSPACED_RUN = re.compile(f"[{_UNSPACED}]+")
# Every passage holds some of these: they would cost time and find nothing.
_EMPTY_WORDS = frozenset(
    str.split(
        "a an and are as at be but by did do does for from had has have how in is it its of on or that the their this "
        "to was were what when where which who why will with"
    )
)


def gapped(text: str) -> str:
    """Return `text` as it goes into the index."""
    return _UNSPACED_CHARACTER.sub(rf"{_GAP}\1{_GAP}", text)


def ungapped(text: str) -> str:
    """Return `text` as it was before it went into the index."""
    return text.replace(_GAP, "")


def match_expression(query: str) -> str:
    """Return FTS5's expression for any of the words of `query`. Nothing in them is taken for syntax."""
    terms: list[str] = []
    for chunk in unicodedata.normalize("NFC", query).split():
        for run in _UNSPACED_RUN.findall(chunk):
            pairs = [run[place : place + 2] for place in range(max(1, len(run) - 1))]
            terms += [_GAP.join(pair) for pair in pairs if _words(pair)]
        for part in _UNSPACED_RUN.sub(" ", chunk).split():
            words = _words(part)
            # What is joined by other than spaces (`state-of-the-art`, `3.5`) counts as a phrase, and by its words.
            terms += [" ".join(words), *words] if len(words) > 1 else words
    different = list({term.casefold(): term for term in terms}.values())
    telling = [term for term in different if term.lower() not in _EMPTY_WORDS] or different
    return " OR ".join(f'"{term}"' for term in telling[:MAX_TERMS])


def _words(text: str) -> list[str]:
    return "".join(character if _in_words(character) else " " for character in text).split()


def _in_words(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "LN" or category in ("Co", "Mn", "Mc")
