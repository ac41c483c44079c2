"""Words of any script, as SQLite's full-text index compares them.

FTS5 splits text at every character that is neither letter nor digit. Chinese, Japanese, Thai and similar scripts have
no spaces between words: there each character becomes a word, and queries search for pairs of them. Not handled:
dictionaries, so a pair may match across two words.
"""

from __future__ import annotations

import re
import unicodedata

TOKENIZER = "porter unicode61 remove_diacritics 2 categories 'L* N* Co Mn Mc'"
"""FTS5's tokenizer: ignores case and accents, stems English words. Marks are part of words, for Indian scripts."""
MAX_TERMS = 48

_GAP = "\u200b"
"""Put around a character that is a word. Documents don't contain it, so it can be removed again."""
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
_UNSPACED_CHARACTER = re.compile(f"([{_UNSPACED}])")
_UNSPACED_RUN = re.compile(f"[{_UNSPACED}]+")
# In nearly every passage: searching for them costs time and finds nothing.
_EMPTY_WORDS = frozenset(
    str.split(
        "a an and are as at be but by did do does for from had has have how in is it its of on or that the their this "
        "to was were what when where which who why will with"
    )
)


def gapped(text: str) -> str:
    """Return `text` in its indexed form."""
    return _UNSPACED_CHARACTER.sub(rf"{_GAP}\1{_GAP}", text)


def ungapped(text: str) -> str:
    """Return the original of an indexed `text`."""
    return text.replace(_GAP, "")


def match_expression(query: str) -> str:
    """Return the FTS5 expression that matches any word of `query`. No part of it is read as syntax."""
    terms: list[str] = []
    for chunk in unicodedata.normalize("NFC", query).split():
        for run in _UNSPACED_RUN.findall(chunk):
            pairs = [run[place : place + 2] for place in range(max(1, len(run) - 1))]
            terms += [_GAP.join(pair) for pair in pairs if _words(pair)]
        for part in _UNSPACED_RUN.sub(" ", chunk).split():
            words = _words(part)
            # Words joined without spaces (`state-of-the-art`, `3.5`) match as a phrase and as single words.
            terms += [" ".join(words), *words] if len(words) > 1 else words
    different = list({term.casefold(): term for term in terms}.values())
    telling = [term for term in different if term.lower() not in _EMPTY_WORDS] or different
    return " OR ".join(f'"{term}"' for term in telling[:MAX_TERMS])


def _words(text: str) -> list[str]:
    return "".join(character if _in_words(character) else " " for character in text).split()


def _in_words(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "LN" or category in ("Co", "Mn", "Mc")
