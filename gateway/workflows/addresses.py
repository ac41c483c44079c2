"""The addresses of one run: which were read, which a search or the user gave, and how two spellings are compared.

A model may spell an address in any way, and anything that it adds to one (a query, a fragment, a user name) may carry
what it has read to the owner of the host. So an address is looked up in a form without these, and what is then shown
or fetched is always the address as it was given, never as the model wrote it. Not handled: whether an address is safe
to fetch, which `gateway.outbound.fetch` decides.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import idna

from gateway.tools.base import Source

MAX_ADDRESS_CHARS = 2000
_TRACKING = re.compile(r"utm_|(?:fbclid|gclid|mc_[ce]id|ref|ref_src)\Z")
ADDRESS_CHARS = r"(?:[^\s<>\"')\](`|]|\([^\s()<>\"`]{0,200}\)){1,2000}"
_DOI = re.compile(rf"10\.\d{{4,9}}/{ADDRESS_CHARS}")
_NAMED = re.compile(rf"(?:https?://|www\.){ADDRESS_CHARS}", re.I)
_WORD = re.compile(r"[^\s<>()\[\]\"'`|,;]{4,2000}")
_HOST = re.compile(r"(?:[A-Za-z0-9\u00a1-\uffef-]{1,63}\.){1,10}[A-Za-z\u00a1-\uffef]{2,24}(?::\d{1,5})?(?:[/?#]|\Z)")
_END = ".,;:!?*_~"
_MAX_NAMED = 10_000
"""Addresses of each form, out of what the user wrote. A message of 8 MiB has room for a million, which would take 30
times its size in memory."""
_MARKDOWN = re.compile(r"[\x00-\x20<>`|\\\[\]\"^{}\x7f]|[^\x00-\x7f]")


def normal_url(url: str) -> str:
    """Return a URL in the form that identifies a source: no tracking, no trailing slash, no user name, and no
    fragment, but for documents, whose passages are sources of their own."""
    url = url.strip()
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port and parts.port not in (80, 443) else ""
    except ValueError:  # models and pages write anything
        return url
    if parts.scheme not in ("http", "https"):
        return url
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    query = urlencode([(name, value) for name, value in pairs if not _TRACKING.match(name.lower())])
    return urlunsplit(("https", f"{_host(parts.hostname or '')}{port}", parts.path.rstrip("/"), query, ""))


def in_markdown(url: str) -> str:
    """Return a URL in which nothing can end a link's destination or begin another construct of Markdown."""
    encoded = _MARKDOWN.sub(lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "replace")), url)
    if not _balanced(encoded):
        encoded = encoded.replace("(", "%28").replace(")", "%29")
    return encoded


def split_end(address: str) -> tuple[str, str]:
    """An address in a sentence, and the punctuation after it."""
    bare = address.rstrip(_END)
    return bare, address[len(bare) :]


class Addresses:
    """What a run may show as a link, and what it may fetch once it has read something private."""

    def __init__(self, said: str = "") -> None:
        """`said` is what the user wrote: the addresses in it are the user's own."""
        self._live: dict[str, str] = {}
        """Read, or named by the user: by normal URL, as they were given."""
        self._given: dict[str, str] = {}
        """What was read in this run, named by the user, or found by searches."""
        self._hosts: set[str] = set()
        """Of all these."""
        self._dois = set(_first(_bare(found).lower() for found in _DOI.finditer(said)))
        for written in _first(map(_bare, _NAMED.finditer(said))):
            self._name(written)
        emails, hosts = _first(_emails(said)), _first(_hosts(said))
        self._emails = {word.lower().removeprefix("mailto:") for word in emails}
        for host in hosts:
            self._name(host)

    def add(self, sources: Iterable[Source]) -> None:
        """Note what a tool found, or read."""
        for source in sources:
            key = normal_url(source.url)
            self._give(key, source.url)
            if source.fetched:
                self._live.setdefault(key, source.url)

    def show(self, urls: Iterable[str]) -> None:
        """Note what earlier answers list as read: it may be shown, and not fetched again before it is found again."""
        for url in urls:
            self._live.setdefault(normal_url(url), url)

    def live(self, written: str) -> str | None:
        """Return the address that `written` spells, None unless it was read or the user named it."""
        return self._live.get(normal_url(_with_scheme(written)))

    def given(self, written: str) -> str | None:
        """Return the address that `written` spells, None unless a search or the user gave it."""
        return self._given.get(normal_url(_with_scheme(written)))

    def has_doi(self, doi: str) -> bool:
        """Whether the user named a DOI, or it is part of an address that was given."""
        doi = doi.lower()
        return doi in self._dois or any(doi in url.lower() for url in self._given)

    def has_host(self, name: str) -> bool:
        """Whether a host is that of an address which a search or the user gave."""
        return _host(name) in self._hosts

    def has_email(self, address: str) -> bool:
        """Whether the user named this mail address."""
        return address.lower() in self._emails

    def _name(self, written: str) -> None:
        url = _with_scheme(written)
        key = normal_url(url)
        self._live.setdefault(key, url)
        self._give(key, url)

    def _give(self, key: str, url: str) -> None:
        if key not in self._given:
            self._given[key] = url
            with contextlib.suppress(ValueError):
                self._hosts.add(urlsplit(key).hostname or "")


def _first(values: Iterable[str]) -> list[str]:
    """Return the first different values, a bounded number of them. No more are taken."""
    found: dict[str, None] = {}
    for value in values:
        found[value] = None
        if len(found) == _MAX_NAMED:
            break
    return list(found)


def _bare(found: re.Match[str]) -> str:
    return split_end(found[0])[0]


def _emails(said: str) -> Iterator[str]:
    # Word by word: `findall` would hold the GIL until it has all of them.
    for word in map(_bare, _WORD.finditer(said)):
        if "@" in word and "/" not in word:
            yield word


def _hosts(said: str) -> Iterator[str]:
    for word in map(_bare, _WORD.finditer(said)):
        if "." in word and ("@" not in word or "/" in word) and _HOST.match(word):
            yield word


def _with_scheme(written: str) -> str:
    """Return an address with a scheme. One that begins with `//` has none of its own."""
    if written.startswith("//"):
        return f"https:{written}"
    lower = written[:8].lower()
    if lower.startswith(("http://", "https://")) or _scheme(written):
        return written
    return f"https://{written}"


def _scheme(written: str) -> bool:
    """Whether something other than a host stands before the first colon, as in `local:a.md`."""
    head, colon, tail = written.partition(":")
    return bool(colon) and head.isalnum() and not tail[:1].isdigit()


def _host(host: str) -> str:
    """Return a host as browsers compare it: IDNA's letters, no `www.`, no dot at its end."""
    host = host.rstrip(".")
    if not host.isascii():
        with contextlib.suppress(idna.IDNAError):
            host = idna.encode(host, uts46=True).decode()
    return host.lower().removeprefix("www.")


def _balanced(url: str) -> bool:
    depth = 0
    for character in url:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return False
    return depth == 0
