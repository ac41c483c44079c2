"""The services that search the web: how each is asked, what it answers, and what its refusals mean.

    SearXNG   a server of the operator's own, which asks others
    Brave, Tavily, Serper   sold by the search

Only their lists of results are used: no answers, images or whole pages. An answer of another shape than
documented raises ValueError, TypeError or KeyError, which `gateway.tools.web_search` catches.
"""

from __future__ import annotations

import datetime
import email.utils
import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from gateway.tools.base import Source

Meaning = Literal["key", "plan", "format", "address", "busy", "query"]
"""Meaning of an error: wrong key, used-up plan, JSON not allowed, no such service, busy, or invalid query."""

_MAX_TITLE_CHARS = 200
_MAX_SNIPPET_CHARS = 600
_MAX_URL_CHARS = 2048
_MAX_FIELD_CHARS = 4096
_MAX_DATE_CHARS = 64
_BRAVE_MAX_WORDS = 50
_BRAVE_LANGUAGES = {
    "en-GB": "en-gb",
    "ja": "jp",
    "pt": "pt-pt",
    "pt-BR": "pt-br",
    "zh": "zh-hans",
    "zh-HK": "zh-hant",
    "zh-TW": "zh-hant",
}
"""Brave's names that differ from the usual codes."""
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,200}>")
_ISO = re.compile(r"\d{4}-\d{2}-\d{2}")
_AGO = re.compile(r"(\d{1,3}) (minute|hour|day|week|month|year)s? ago")
_DAYS = {"minute": 0, "hour": 0, "day": 1, "week": 7, "month": 30, "year": 365}


@dataclass(frozen=True, slots=True)
class Found:
    """One result, as the service returned it."""

    url: str
    title: str
    snippet: str
    published: str = ""


class Provider:
    """One service. `base_url` has no slash at its end."""

    name = ""
    default_url = ""
    default_api_key_env: str | None = None

    def __init__(self, base_url: str, api_key: str, language: str | None) -> None:
        self._base_url = base_url
        self._api_key = api_key
        self._language = language

    def request(self, query: str, max_results: int) -> dict[str, Any]:
        """Return the request for a search, as the arguments of `JsonClient.ask`."""
        raise NotImplementedError

    def results(self, body: Any) -> Iterable[Found]:
        """Yield the results of a response."""
        raise NotImplementedError

    def meaning(self, status: int, body: Any) -> Meaning:
        """Return the meaning of a status other than 200. `body` is the JSON object, or None."""
        if status in (401, 403):
            return "key"
        if status in (404, 405) or 300 <= status < 400:
            return "address"
        return "busy" if status in (408, 425, 429) or status >= 500 else "query"

    def failure(self, body: Any) -> bool:
        """Return whether a response without results is a failure."""
        return False


class SearXNG(Provider):
    """GET /search, https://docs.searxng.org/dev/search_api.html. A key is sent as a bearer token, for a proxy."""

    name = "SearXNG"

    def request(self, query: str, max_results: int) -> dict[str, Any]:
        params = {"q": query, "format": "json"} | ({"language": self._language} if self._language else {})
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        return {"method": "GET", "url": f"{self._base_url}/search", "params": params, "headers": headers}

    def results(self, body: Any) -> Iterable[Found]:
        for entry in body["results"]:
            yield Found(entry["url"], _text(entry, "title"), _text(entry, "content"), _text(entry, "publishedDate"))

    def meaning(self, status: int, body: Any) -> Meaning:
        # Asked for a format that its settings don't name, SearXNG says 403.
        return "format" if status == 403 else super().meaning(status, body)

    def failure(self, body: Any) -> bool:
        return bool(body.get("unresponsive_engines"))


class Brave(Provider):
    """GET /res/v1/web/search, https://api-dashboard.search.brave.com/documentation."""

    name = "Brave"
    default_url = "https://api.search.brave.com"
    default_api_key_env = "BRAVE_API_KEY"

    def request(self, query: str, max_results: int) -> dict[str, Any]:
        params: dict[str, Any] = {
            "q": " ".join(query.split()[:_BRAVE_MAX_WORDS]),
            "count": min(max_results, 20),
            "result_filter": "web",
            "text_decorations": "false",
        }
        if self._language:
            language = self._language.partition("-")[0]
            params["search_lang"] = _BRAVE_LANGUAGES.get(self._language) or _BRAVE_LANGUAGES.get(language, language)
        headers = {"X-Subscription-Token": self._api_key}
        url = f"{self._base_url}/res/v1/web/search"
        return {"method": "GET", "url": url, "params": params, "headers": headers}

    def results(self, body: Any) -> Iterable[Found]:
        for entry in (body.get("web") or {}).get("results") or ():  # there is no `web` where nothing was found
            yield Found(entry["url"], _text(entry, "title"), _text(entry, "description"), _text(entry, "page_age"))

    def meaning(self, status: int, body: Any) -> Meaning:
        code = str(((body or {}).get("error") or {}).get("code"))
        # A wrong key is 422, as a wrong parameter is; a plan used up is 429, as too many at once are.
        if code.startswith("SUBSCRIPTION_") or "x-subscription-token" in str(body):
            return "key"
        return "plan" if code == "QUOTA_LIMITED" else super().meaning(status, body)


class Tavily(Provider):
    """POST /search, https://docs.tavily.com/documentation/api-reference/endpoint/search."""

    name = "Tavily"
    default_url = "https://api.tavily.com"
    default_api_key_env = "TAVILY_API_KEY"

    def request(self, query: str, max_results: int) -> dict[str, Any]:
        body = {
            "query": query,
            "max_results": min(max_results, 20),
            "search_depth": "basic",
            "include_answer": False,
            "include_raw_content": False,
            "include_images": False,
        }
        headers = {"Authorization": f"Bearer {self._api_key}"}
        return {"method": "POST", "url": f"{self._base_url}/search", "json": body, "headers": headers}

    def results(self, body: Any) -> Iterable[Found]:
        for entry in body["results"]:
            yield Found(entry["url"], _text(entry, "title"), _text(entry, "content"), _text(entry, "published_date"))

    def meaning(self, status: int, body: Any) -> Meaning:
        # 432: the plan's searches are used up; 433: what was paid for beyond it.
        return "plan" if status in (432, 433) else super().meaning(status, body)


class Serper(Provider):
    """POST /search, https://serper.dev."""

    name = "Serper"
    default_url = "https://google.serper.dev"
    default_api_key_env = "SERPER_API_KEY"

    def request(self, query: str, max_results: int) -> dict[str, Any]:
        body: dict[str, Any] = {"q": query, "num": max_results}
        if self._language:
            language, _, country = self._language.partition("-")
            body |= {"hl": language} | ({"gl": country.lower()} if country else {})
        headers = {"X-API-KEY": self._api_key}
        return {"method": "POST", "url": f"{self._base_url}/search", "json": body, "headers": headers}

    def results(self, body: Any) -> Iterable[Found]:
        for entry in body.get("organic") or ():
            yield Found(entry["link"], _text(entry, "title"), _text(entry, "snippet"), _text(entry, "date"))

    def meaning(self, status: int, body: Any) -> Meaning:
        # "Not enough credits" comes as 400.
        return "plan" if "credits" in str((body or {}).get("message")) else super().meaning(status, body)


PROVIDERS: dict[str, type[Provider]] = {"searxng": SearXNG, "brave": Brave, "tavily": Tavily, "serper": Serper}


def sources(found: Iterable[Found], max_results: int, today: datetime.date) -> list[Source]:
    """Return results as sources without duplicates, with addresses that can be fetched and texts without markup."""
    by_url: dict[str, Source] = {}
    for entry in found:
        url = _clean_url(entry.url)
        if url and url not in by_url and len(by_url) < max_results:
            title = _clean(entry.title, _MAX_TITLE_CHARS)
            snippet = _clean(entry.snippet, _MAX_SNIPPET_CHARS)
            by_url[url] = Source(url, title, snippet, published=iso_date(entry.published, today))
    return list(by_url.values())


def iso_date(text: str, today: datetime.date) -> str:
    """Return a service's date in ISO format, or an empty string if it is unclear."""
    text = text.strip()[:_MAX_DATE_CHARS]
    if iso := _ISO.match(text):
        return iso[0]
    if ago := _AGO.fullmatch(text):
        return (today - datetime.timedelta(days=int(ago[1]) * _DAYS[ago[2]])).isoformat()
    for form in ("%b %d, %Y", "%B %d, %Y", "%d %b %Y"):
        try:
            return datetime.datetime.strptime(text, form).date().isoformat()
        except ValueError:
            continue
    try:
        return email.utils.parsedate_to_datetime(text).date().isoformat()
    except (ValueError, TypeError):
        return ""


def _text(entry: Any, name: str) -> str:
    """Return a field if it is text, cut to the length that is shown."""
    value = entry.get(name)
    return value[:_MAX_FIELD_CHARS] if isinstance(value, str) else ""


def _clean(text: str, max_chars: int) -> str:
    return " ".join(html.unescape(_TAG.sub("", text)).split())[:max_chars]


def _clean_url(text: Any) -> str:
    """Return the address in a form that is safe between quotation marks, or an empty string if it can't be fetched."""
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, TypeError):
        return ""
    whole = str(url)
    return whole if url.scheme in ("http", "https") and url.host and len(whole) <= _MAX_URL_CHARS else ""
