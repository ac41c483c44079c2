"""`serp_ads`: the ads on a search engine's results page, through a provider that fetches such pages.

`Observation.data` is a list of ads in the order of the page, each

    {position, block, advertiser, domain, title, description, url, extensions}

where `block` is top, bottom or what else the provider says, and `url` is the advertiser's own page, without the search
engine's click counter, or empty if the provider returns only the domain. The results page itself counts as a source
that was read. Does not handle shopping and video ads. Raises ToolError; no ads is not a failure.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Annotated, Any
from urllib.parse import urlencode

import httpx
import re2
from pydantic import BaseModel, ConfigDict, Field

from gateway.settings.config import ConfigError, SerpAdsSettings
from gateway.tools.base import Observation, Source, ToolError
from gateway.tools.json_client import Answer, JsonClient

log = logging.getLogger(__name__)

_BASE_URLS = {"serper": "https://google.serper.dev", "searchapi": "https://www.searchapi.io"}
# Both take their key in a header; one in the URL would end up in logs.
_API_KEY_ENVS = {"serper": "SERPER_API_KEY", "searchapi": "SEARCHAPI_API_KEY"}
MAX_ADS = 20
_MAX_TITLE_CHARS = 200
_MAX_DESCRIPTION_CHARS = 500
_MAX_URL_CHARS = 2000
_MAX_EXTENSIONS = 8
_RESULTS_PAGE = "https://www.google.com/search"
_DOMAIN = re2.compile(r"(?i)(?:https?://)?(?:www\.)?([a-z0-9.-]+\.[a-z]{2,})")
_CLICK_HOSTS = ("googleadservices.com", "doubleclick.net")
_MAX_COUNTERS = 3
"""Click trackers nested in each other's addresses."""


class SerpAdsArguments(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    query: Annotated[str, Field(min_length=1, max_length=200)]
    """What a customer would type into the search engine."""
    country: Annotated[str, Field(pattern=r"^([a-zA-Z]{2})?$")] = ""
    """Two letters (ISO 3166-1), such as `us`; ads differ by country. Empty takes the configured one."""
    language: Annotated[str, Field(pattern=r"^([a-zA-Z]{2}(-[a-zA-Z]{2,4})?)?$")] = ""
    """Of the page, such as `en`; empty takes the configured one."""


class SerpAds:
    """The tool."""

    name = "serp_ads"
    description = "Find the ads that a search engine shows for a query, with their texts and where they lead."
    arguments: type[BaseModel] = SerpAdsArguments

    def __init__(self, settings: SerpAdsSettings, environment: Mapping[str, str]) -> None:
        """Raises ConfigError where the key is missing."""
        variable = settings.api_key_env or _API_KEY_ENVS[settings.provider]
        self._api_key = environment.get(variable, "").strip()
        if not self._api_key:
            raise ConfigError(f"tools.serp_ads: {variable} is not set; {settings.provider} needs its API key there")
        if not self._api_key.isascii() or not self._api_key.isprintable():
            raise ConfigError(f"tools.serp_ads: {variable} does not contain an API key")
        self._settings = settings
        self._url = (settings.url or _BASE_URLS[settings.provider]).rstrip("/")
        self._client = JsonClient("The search service", settings.timeout_s)
        self.timeout_s = settings.timeout_s + 1

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        await self._client.close()

    async def run(self, arguments: SerpAdsArguments) -> Observation:
        """Fetch the page through the provider. Raises ToolError."""
        country = (arguments.country or self._settings.country).lower()
        language = (arguments.language or self._settings.language).lower()
        answer = await self._ask(arguments.query, country, language)
        ads = [ad for entry in _entries(answer) if (ad := _ad(entry)) is not None][:MAX_ADS]
        ads = [ad | {"position": number} for number, ad in enumerate(ads, 1)]
        page = f"{_RESULTS_PAGE}?{urlencode({'q': arguments.query, 'gl': country, 'hl': language})}"
        found = Source(page, f"Ads on Google for {arguments.query!r} ({country})", fetched=True)
        sources = [Source(ad["url"], ad["title"], ad["description"]) for ad in ads if ad["url"]]
        lines = [_line(ad) for ad in ads] or [f"No ads are shown for {arguments.query!r} in {country}."]
        return Observation("\n".join(lines), [found, *sources], data=ads)

    async def _ask(self, query: str, country: str, language: str) -> dict[str, Any]:
        fields = {"q": query, "gl": country, "hl": language}
        if self._settings.provider == "serper":
            headers = {"X-API-KEY": self._api_key}
            answer = await self._client.ask("POST", f"{self._url}/search", body=fields, headers=headers)
        else:
            headers = {"Authorization": f"Bearer {self._api_key}"}
            url = f"{self._url}/api/v1/search"
            answer = await self._client.ask("GET", url, params={"engine": "google"} | fields, headers=headers)
        if answer.status != 200:
            raise _failure(answer)
        return answer.body


def _failure(answer: Answer) -> ToolError:
    status = answer.status
    # Serper says with status 400 that the credits are used up.
    if status in (401, 402, 403) or "credits" in str(answer.body.get("message")):
        log.error("serp_ads: the search service refuses the gateway's key, or its plan is used up (status %d)", status)
        return ToolError("serp_ads is misconfigured; the operator has to fix it.", out_of_order=True)
    if status == 429:
        message = "The search service has no room at the moment."
        return ToolError(message, may_pass=True, retry_after_s=answer.retry_after_s)
    if status >= 500:
        return ToolError("The search service failed.", may_pass=True)
    return ToolError("The search service refused the query; try a shorter or simpler one.")


def _entries(answer: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Yield the provider's entries in page order. Some providers have one list per block."""
    for name, block in (("topAds", "top"), ("ads", ""), ("bottomAds", "bottom")):
        for entry in answer.get(name) or []:
            if isinstance(entry, dict):
                yield {"block_position": block} | entry


def _ad(entry: dict[str, Any]) -> dict[str, Any] | None:
    """Return an entry in our format, or None if it names no advertiser."""
    url = _landing_page(_text(entry, "link", "url", chars=_MAX_URL_CHARS + 1))
    shown = _text(entry, "domain", "displayed_link", "displayedLink", "source", chars=300)
    match = _DOMAIN.match(httpx.URL(url).host or shown)
    title = _text(entry, "title", chars=_MAX_TITLE_CHARS)
    if match is None or not title:
        return None
    domain = match[1].lower()
    advertiser = _text(entry, "source", "advertiser", chars=80)
    return {
        "position": 0,
        "block": _text(entry, "block_position", "blockPosition", "block", chars=20) or "page",
        # Some providers give the domain once more as the source.
        "advertiser": domain if not advertiser or _DOMAIN.match(advertiser) else advertiser,
        "domain": domain,
        "title": title,
        "description": _text(entry, "description", "snippet", chars=_MAX_DESCRIPTION_CHARS),
        "url": url,
        "extensions": _extensions(entry),
    }


def _landing_page(url: str, counters: int = 0) -> str:
    """Return an ad's target. A click tracker's URL may contain it; requesting the tracker would bill the advertiser."""
    if len(url) > _MAX_URL_CHARS or any(character.isspace() for character in url):
        return ""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        return ""
    if parts.scheme not in ("http", "https") or not parts.host:
        return ""
    counts = any(parts.host == host or parts.host.endswith(f".{host}") for host in _CLICK_HOSTS)
    if parts.path != "/aclk" and not counts:
        return str(parts)  # in a form that can stand between quotation marks
    return _landing_page(parts.params.get("adurl", ""), counters + 1) if counters < _MAX_COUNTERS else ""


def _extensions(entry: dict[str, Any]) -> list[str]:
    """Return an ad's extensions and the titles of its further links."""
    found: list[str] = []
    links = entry.get("sitelinks") or []
    groups = list(links.values()) if isinstance(links, dict) else [links]
    for group in (entry.get("extensions") or [], *groups):
        for item in group if isinstance(group, list) else []:
            text = item.get("title", "") if isinstance(item, dict) else item
            if isinstance(text, str) and text.strip():
                found.append(" ".join(text.split())[:80])
    return list(dict.fromkeys(found))[:_MAX_EXTENSIONS]


def _text(entry: dict[str, Any], *names: str, chars: int) -> str:
    """Return the first of these fields that is text, on one line."""
    for name in names:
        value = entry.get(name)
        if isinstance(value, str) and value.strip():
            return " ".join(value.split())[:chars]
    return ""


def _line(ad: dict[str, Any]) -> str:
    more = f" [{'; '.join(ad['extensions'])}]" if ad["extensions"] else ""
    where = ad["url"] or ad["domain"]
    return f"{ad['position']}. ({ad['block']}) {ad['advertiser']}: {ad['title']}. {ad['description']}{more} {where}"
