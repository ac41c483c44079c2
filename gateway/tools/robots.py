"""What a site's robots.txt lets this gateway read, by RFC 9309.

The group for our own name counts, else the one for all agents; the longest rule that matches wins, with `*` and `$` as
the RFC has them, which Python's own parser does not know. A site without the file allows everything, one that fails to
give it allows nothing for now. Does not handle crawl delays: agents read single pages. Raises FetchError.

Protego 0.7 does not choose groups as the RFC does: it ignores a group for `shannon-gateway/1.0`, and applies one for
`shannon`. So it is not used here.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import httpx

from gateway.outbound.fetch import USER_AGENT, Fetcher, FetchError, FetchFailed, TooLarge

PRODUCT = USER_AGENT.partition("/")[0]
MAX_BYTES = 512 * 2**10
"""The RFC asks to read 500 KiB at least."""
_TTL_S = 3600.0
_FAILURE_TTL_S = 60.0
_MAX_SITES = 1000
_MAX_RULES = 5000
_MAX_CHARS_AT_ONCE = 16_384
"""Of a file; more is parsed beside the event loop."""
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


class RobotsRefused(FetchError):
    """The site does not want this page read by programs."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One Allow or Disallow line, its pattern normalised."""

    allow: bool
    pattern: str


ALLOW_ALL: Sequence[Rule] = ()
ALLOW_NONE: Sequence[Rule] = (Rule(False, "/"),)


def parse(text: str, product: str = PRODUCT) -> list[Rule]:
    """Return the rules for `product`. Lines that mean nothing are skipped."""
    product = product.lower()
    groups: dict[str, list[Rule]] = {}
    agents: set[str] = set()
    """Those of the group that concern us; a file may name any number of others."""
    in_rules = False
    for line in text.splitlines():
        name, colon, value = line.partition("#")[0].partition(":")
        name, value = name.strip().lower(), value.strip()
        if not colon:
            continue
        if name == "user-agent":
            if in_rules:
                agents, in_rules = set(), False
            agent = next(iter(value.lower().partition("/")[0].split()), "")
            if agent in (product, "*"):
                agents.add(agent)
                groups.setdefault(agent, [])
        elif name in ("allow", "disallow"):
            in_rules = True
            for agent in agents if value else ():
                if len(groups[agent]) < _MAX_RULES:
                    groups[agent].append(Rule(name == "allow", normal(value)))
    return groups.get(product, groups.get("*", []))


def allows(rules: Sequence[Rule], target: str) -> bool:
    """Whether `target`, a path with its query, may be read."""
    if target.partition("?")[0] == "/robots.txt":
        return True
    path = normal(target)
    matching = [(len(rule.pattern), rule.allow) for rule in rules if _matches(rule.pattern, path)]
    return max(matching, default=(0, True))[1]


def normal(path: str) -> str:
    """Return a path in which the same characters are spelled the same way."""
    spelled = quote(path, safe="".join(map(chr, range(0x21, 0x7F))))
    return _ESCAPE.sub(_respelled, spelled)


class Robots:
    """Asks sites for their robots.txt, and remembers what they said for an hour."""

    def __init__(self, fetcher: Fetcher, clock: Callable[[], float] = time.monotonic) -> None:
        self._fetcher = fetcher
        self._clock = clock
        self._known: OrderedDict[str, tuple[float, Sequence[Rule]]] = OrderedDict()
        self._asking: dict[str, asyncio.Lock] = {}

    async def admit(self, url: httpx.URL) -> None:
        """Return if `url` may be read. Raises RobotsRefused, and FetchFailed where the site can't be reached."""
        if not allows(await self._rules(url), url.raw_path.decode("ascii")):
            raise RobotsRefused("the site's robots.txt does not allow programs to read it")

    async def _rules(self, url: httpx.URL) -> Sequence[Rule]:
        site = f"{url.scheme}://{url.netloc.decode('ascii')}"
        lock = self._asking.setdefault(site, asyncio.Lock())
        try:
            async with lock:  # agents that come to a site at once ask it once
                known = self._known.get(site)
                if known is None or known[0] <= self._clock():
                    rules, ttl_s = await self._ask(f"{site}/robots.txt")
                    known = self._known[site] = (self._clock() + ttl_s, rules)
                self._known.move_to_end(site)
                if len(self._known) > _MAX_SITES:
                    self._known.popitem(last=False)
                return known[1]
        finally:
            if not lock.locked():
                self._asking.pop(site, None)

    async def _ask(self, address: str) -> tuple[Sequence[Rule], float]:
        """Return a site's rules, and for how long they hold. Raises FetchFailed."""
        try:
            fetched = await self._fetcher.fetch(address, max_bytes=MAX_BYTES, accept="text/plain")
        except TooLarge:
            return ALLOW_NONE, _TTL_S
        except FetchFailed as error:
            if error.status is None:
                raise
            # The RFC: 4xx means that there is no such file, anything else that it can't be had now.
            missing = 400 <= error.status < 500 and error.status != 429
            return (ALLOW_ALL, _TTL_S) if missing else (ALLOW_NONE, _FAILURE_TTL_S)
        text = fetched.content.decode("utf-8-sig", "replace")
        rules = parse(text) if len(text) <= _MAX_CHARS_AT_ONCE else await asyncio.to_thread(parse, text)
        return rules, _TTL_S


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern matches the beginning of a path; in one go, whatever the pattern."""
    whole = pattern.endswith("$")
    first, *rest = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    if not rest:
        return not whole or path == first
    place = len(first)
    for part in rest[:-1]:
        place = path.find(part, place)
        if place < 0:
            return False
        place += len(part)
    last = rest[-1]
    if whole:
        return path.endswith(last) and len(path) - len(last) >= place
    return path.find(last, place) >= 0


def _respelled(escape: re.Match[str]) -> str:
    character = chr(int(escape[0][1:], 16))
    return character if character in _UNRESERVED else escape[0].upper()
