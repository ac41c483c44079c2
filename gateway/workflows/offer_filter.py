"""Removes sentences of an answer with a price, percentage or domain that is in no ad and on no page.

Other numbers pass: an answer about ads counts, and proposes. Does not handle names of companies, which can't be
distinguished from other words.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import islice

from gateway.workflows.figures import TOKEN, Figures, values_of
from gateway.workflows.sentences import SentenceFilter

PRICE_REMOVED = "(removed: in no ad or page)"
_TOKEN = re.compile(TOKEN, re.IGNORECASE | re.VERBOSE)
_CURRENCY_BEHIND = re.compile(
    r"\s?(?:[\u20ac\u00a3\u5186]|(?:USD|EUR|GBP|JPY|CHF|AUD|CAD|dollars?|euros?|pounds?|yen|cents?)\b)", re.IGNORECASE
)
# A name with a dot in it and an ending of letters, unless it is part of an address, which is looked at elsewhere.
_DOMAIN = re.compile(
    r"(?<![\w@/.-])(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,24}(?![\w-]|\.\w)", re.IGNORECASE
)
_NO_ENDINGS = frozenset({"html", "htm", "pdf", "txt", "md", "csv", "json", "js", "css", "php", "png", "jpg", "svg"})
"""Of files, not of registered domains."""
_MOST_NAMED = 10_000
"""Domains out of what the user wrote. Each domain of an answer is compared with all of them."""


class OfferFilter(SentenceFilter):
    """Removes sentences with prices, percentages or domains that no ad or page has."""

    def __init__(self, figures: Figures, domains: Collection[str], said: str) -> None:
        """`figures` are those of ads and pages, `domains` the advertisers'; `said` is what the user wrote."""
        super().__init__()
        self.removed = 0
        self._figures = figures
        named = (match[0].lower() for match in islice(_DOMAIN.finditer(said), _MOST_NAMED))
        self._domains = frozenset(domains) | frozenset(named)

    def check(self, sentence: str) -> str:
        """Return the sentence without what stands nowhere."""
        return _DOMAIN.sub(self._domain, _TOKEN.sub(self._price, sentence))

    def _price(self, match: re.Match[str]) -> str:
        if not match["number"]:
            return match[0]
        percent = match["percent"] is not None
        if not percent and not match["currency"] and not _CURRENCY_BEHIND.match(match.string, match.end()):
            return match[0]
        if any(self._figures.holds(value, percent=percent) for value, _ in values_of(match)):
            return match[0]
        self.removed += 1
        return PRICE_REMOVED

    def _domain(self, match: re.Match[str]) -> str:
        domain = match[0].lower().removeprefix("www.")
        ending = match[0].rpartition(".")[2]
        # Abbreviations, files, and sentences with no space between them.
        if len(domain) < 5 or ending in _NO_ENDINGS or (ending[0].isupper() and not match[0][0].isupper()):
            return match[0]
        if domain in self._domains or self._is_below(domain):
            return match[0]
        self.removed += 1
        return PRICE_REMOVED

    def _is_below(self, domain: str) -> bool:
        """Whether a domain belongs to a known one, or a known one to it."""
        return any(domain.endswith(f".{known}") or known.endswith(f".{domain}") for known in self._domains)
