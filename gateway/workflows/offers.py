"""Advertisers: the text of their ads, the pages behind them, and what a model noted of both.

A model notes offers, prices and claims in the words of the ads and the page. Code looks each note up in them: a number
must stand there, and so must most of its words, or the note is dropped. Meaning is not checked: words that stand there
may still be put together wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from gateway.tools.base import Source
from gateway.workflows.agents import Decision
from gateway.workflows.citations import normal_url
from gateway.workflows.tables import cell, table

MOST_CLAIMS = 4
_FOUND_SHARE = 0.6
"""Share of a note's words that must be in the ads or the page."""
_UNSPACED = re.compile("[\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]{2,}")
"""Scripts that put nothing between words: pairs of characters stand for them."""
_WORD = re.compile(r"[^\W\d_]+")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")

Short = Annotated[str, Field(max_length=120)]


class Profile(Decision):
    """What one advertiser offers, in its own words."""

    advertiser: Annotated[str, Field(max_length=60)]
    offer: Short
    price: Annotated[str, Field(max_length=60)]
    claims: Annotated[list[Short], Field(max_length=MOST_CLAIMS)]
    call_to_action: Annotated[str, Field(max_length=60)]


@dataclass(slots=True)
class Advertiser:
    """One domain that advertises."""

    domain: str
    name: str
    ads: list[dict[str, Any]] = field(default_factory=list)
    """As `serp_ads` gives them, with the query that showed them; none twice."""
    page: Source | None = None
    """What the ads lead to, if it was read."""
    page_text: str = ""
    profile: Profile | None = None

    @property
    def url(self) -> str:
        return next((ad["url"] for ad in self.ads if ad["url"]), "")

    @property
    def ad_text(self) -> str:
        """What the ads say."""
        return "\n".join(
            f"Ad ({ad['block']}, position {ad['position']}, shown for {ad['query']!r}): {ad['title']}\n"
            f"{ad['description']}\n{'; '.join(ad['extensions'])}".rstrip()
            for ad in self.ads
        )

    @property
    def text(self) -> str:
        """All that the advertiser says."""
        return "\n".join((self.name, self.domain, self.ad_text, self.page_text))


def advertisers_of(shown: Iterable[tuple[str, Sequence[Mapping[str, Any]]]]) -> list[Advertiser]:
    """The advertisers in the order of the pages, by the ads that each query showed."""
    found: dict[str, Advertiser] = {}
    for query, ads in shown:
        for ad in ads:
            one = found.setdefault(ad["domain"], Advertiser(ad["domain"], ad["advertiser"]))
            same = [known for known in one.ads if _content(known) == _content(ad)]
            if not same:
                one.ads.append(dict(ad) | {"query": query})
    return list(found.values())


def _content(ad: Mapping[str, Any]) -> tuple[str, str, str]:
    return ad["title"], ad["description"], normal_url(ad["url"])


def checked(profile: Profile, text: str) -> Profile:
    """A profile with only what is in `text`."""
    return Profile(
        advertiser=profile.advertiser if stands_in(profile.advertiser, text) else "",
        offer=profile.offer if stands_in(profile.offer, text) else "",
        price=profile.price if _NUMBER.search(profile.price) and stands_in(profile.price, text) else "",
        claims=[claim for claim in dict.fromkeys(profile.claims) if stands_in(claim, text)],
        call_to_action=profile.call_to_action if stands_in(profile.call_to_action, text) else "",
    )


def stands_in(note: str, text: str) -> bool:
    """Whether a text supports a note: it has all of its numbers, and most of its words."""
    if not note.strip():
        return False
    known = text.casefold()
    if not set(_NUMBER.findall(note)) <= set(_NUMBER.findall(text)):
        return False
    words = _words(note.casefold())
    if not words:
        return bool(_NUMBER.search(note))
    return sum(word in known for word in words) >= _FOUND_SHARE * len(words)


def _words(text: str) -> list[str]:
    pairs = [run[place : place + 2] for run in _UNSPACED.findall(text) for place in range(len(run) - 1)]
    rest = _UNSPACED.sub(" ", text)
    words = [word for word in _WORD.findall(rest) if len(word) > 2]
    # Their stems, so that a plural is found as well.
    return pairs + [word[: max(4, len(word) - 2)] for word in words]


def ads_table(advertisers: Sequence[Advertiser], page_numbers: Mapping[str, int]) -> str:
    """Return all ads as a table. `page_numbers` are the sources' numbers of the results pages, by query."""
    rows = [
        [
            f"{cell(ad['block'])} {ad['position']}",
            cell(ad["query"]),
            cell(one.domain),
            cell(ad["title"]),
            cell(ad["description"]),
            _markers([page_numbers.get(ad["query"])]),
        ]
        for one in advertisers
        for ad in one.ads
    ]
    return table(["Place", "Query", "Advertiser", "Title", "Text", "Source"], rows)


def comparison(advertisers: Sequence[Advertiser], numbers: Mapping[str, list[int | None]]) -> str:
    """Return the advertisers side by side. `numbers` are their sources' numbers, by domain."""
    rows = []
    for one in advertisers:
        profile = one.profile or Profile(advertiser="", offer="", price="", claims=[], call_to_action="")
        name = profile.advertiser or one.name
        rows.append(
            [
                cell(name if name == one.domain else f"{name} ({one.domain})"),
                cell(profile.offer),
                cell(profile.price),
                "; ".join(cell(claim) for claim in profile.claims) or "-",
                cell(profile.call_to_action),
                "read" if one.page else "not read",
                _markers(numbers.get(one.domain, [])),
            ]
        )
    return table(["Advertiser", "Offer", "Price", "Claims", "Call to action", "Page", "Sources"], rows)


def _markers(numbers: Iterable[int | None]) -> str:
    return " ".join(f"[{number}]" for number in dict.fromkeys(numbers) if number) or "-"
