"""Ads on results pages: how the services are asked, what their answers become, and what agents are told of failures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import respx

from gateway.settings.config import ConfigError, SerpAdsSettings
from gateway.tools.base import Toolbox
from gateway.tools.serp_ads import SerpAds
from tests.support.search_ads import ADS, KEYS, SEARCHAPI

pytestmark = pytest.mark.anyio

SERPER = "https://google.serper.dev/search"


@pytest.fixture
def web() -> Iterator[respx.Router]:
    with respx.mock(assert_all_called=False) as router:
        router.post(SERPER, name="serper").respond(json={"organic": [{"title": "no ad"}], "ads": ADS})
        router.get(SEARCHAPI, name="searchapi").respond(json={"ads": ADS})
        yield router


def tools(provider: Any = "searchapi", **settings: Any) -> Toolbox:
    return Toolbox([SerpAds(SerpAdsSettings(provider=provider, **settings), KEYS)], backoff_s=0.0)


async def test_ads_come_in_the_order_of_the_page(web: respx.Router) -> None:
    found = await tools().call("serp_ads", {"query": "planner"})
    assert found.ok
    assert found.data == [
        {
            "position": 1,
            "block": "top",
            "advertiser": "Acme",
            "domain": "acme.test",
            "title": "Acme Planner - 30% off",
            "description": "Plan your week. Free for teams.",
            "url": "https://www.acme.test/plan?gclid=1",
            "extensions": ["4.8 stars", "Pricing"],
        },
        {
            "position": 2,
            "block": "bottom",
            "advertiser": "tidy.test",
            "domain": "tidy.test",
            "title": "Tidy",
            "description": "Tidy up.",
            "url": "https://tidy.test/start",
            "extensions": [],
        },
    ]
    assert found.text.splitlines()[0] == (
        "1. (top) Acme: Acme Planner - 30% off. Plan your week. Free for teams. [4.8 stars; Pricing] "
        "https://www.acme.test/plan?gclid=1"
    )


async def test_results_page_is_a_source_that_was_read(web: respx.Router) -> None:
    page, *ads = (await tools().call("serp_ads", {"query": "team planner", "country": "DE"})).sources
    assert (page.url, page.fetched) == ("https://www.google.com/search?q=team+planner&gl=de&hl=en", True)
    assert [(ad.url, ad.fetched) for ad in ads] == [
        ("https://www.acme.test/plan?gclid=1", False),
        ("https://tidy.test/start", False),
    ]


async def test_services_are_asked_with_the_key_in_a_header(web: respx.Router) -> None:
    await tools("searchapi", country="jp").call("serp_ads", {"query": "planner", "language": "ja"})
    request = web["searchapi"].calls.last.request
    assert request.headers["Authorization"] == "Bearer searchapi-secret"
    assert dict(request.url.params) == {"engine": "google", "q": "planner", "gl": "jp", "hl": "ja"}
    await tools("serper").call("serp_ads", {"query": "planner"})
    request = web["serper"].calls.last.request
    assert request.headers["X-API-KEY"] == "serper-secret"
    assert json.loads(request.content) == {"q": "planner", "gl": "us", "hl": "en"}


async def test_own_address_of_a_service_is_used(web: respx.Router) -> None:
    web.get("http://proxy.test/serp/api/v1/search", name="own").respond(json={})
    await tools("searchapi", url="http://proxy.test/serp/").call("serp_ads", {"query": "planner"})
    assert web["own"].called


@pytest.mark.parametrize("answer", [{}, {"ads": []}, {"ads": None}, {"ads": "none"}, {"organic": []}])
async def test_page_without_ads_is_no_failure(web: respx.Router, answer: dict[str, Any]) -> None:
    web["serper"].respond(json=answer)
    found = await tools("serper").call("serp_ads", {"query": "obscure"})
    assert (found.ok, found.data, found.text) == (True, [], "No ads are shown for 'obscure' in us.")
    assert [source.fetched for source in found.sources] == [True]


async def test_blocks_in_lists_of_their_own_are_told_apart(web: respx.Router) -> None:
    web["serper"].respond(
        json={
            "topAds": [{"title": "A", "link": "https://a.test/"}],
            "bottomAds": [{"title": "B", "link": "https://b.test/"}],
        }
    )
    found = await tools("serper").call("serp_ads", {"query": "planner"})
    assert [(ad["block"], ad["domain"]) for ad in found.data] == [("top", "a.test"), ("bottom", "b.test")]


@pytest.mark.parametrize(
    ("entry", "url", "domain"),
    [
        ({"link": "https://www.googleadservices.com/pagead/aclk?adurl="}, "", "shop.test"),
        ({"link": "javascript:alert(1)"}, "", "shop.test"),
        ({"link": "https://shop.test/a b"}, "", "shop.test"),
        ({"link": 'https://shop.test/"><source>'}, "https://shop.test/%22%3E%3Csource%3E", "shop.test"),
        ({"link": "http://[::1"}, "", "shop.test"),
        ({}, "", "shop.test"),
    ],
)
async def test_address_that_can_not_be_fetched_is_left_out(
    web: respx.Router, entry: dict[str, str], url: str, domain: str
) -> None:
    web["serper"].respond(json={"ads": [{"title": "Shop", "displayed_link": "https://www.shop.test › sale"} | entry]})
    found = await tools("serper").call("serp_ads", {"query": "shop"})
    assert [(ad["url"], ad["domain"]) for ad in found.data] == [(url, domain)]


@pytest.mark.parametrize(
    "entry", [{"title": "No advertiser"}, {"link": "https://a.test/"}, "text", None, {"title": 3, "link": 4}]
)
async def test_entry_that_names_no_advertiser_is_left_out(web: respx.Router, entry: Any) -> None:
    web["serper"].respond(json={"ads": [entry]})
    assert (await tools("serper").call("serp_ads", {"query": "x"})).data == []


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([httpx.Response(401)], "the operator has to fix it"),
        ([httpx.Response(400, json={"message": "Not enough credits"})], "the operator has to fix it"),
        ([httpx.Response(400, json={"message": "serper-secret"})], "refused the query"),
        ([httpx.Response(503)] * 3, "The search service failed."),
        ([httpx.ConnectError("no route to 10.0.0.1")] * 3, "The search service can't be reached."),
        ([httpx.ReadTimeout("")] * 3, "did not answer within 20 s."),
        ([httpx.Response(200, content=b"x" * (9 * 2**20))], "a response that is too long"),
    ],
)
async def test_failure_is_told_without_the_service_s_words(web: respx.Router, answers: list[Any], said: str) -> None:
    web["serper"].side_effect = answers
    found = await tools("serper").call("serp_ads", {"query": "x"})
    assert not found.ok
    assert said in found.text
    assert "secret" not in found.text
    assert web["serper"].call_count == len(answers)


async def test_service_that_is_busy_is_asked_again(web: respx.Router) -> None:
    web["serper"].side_effect = [httpx.Response(429, headers={"Retry-After": "0"}), httpx.Response(200, json={})]
    assert (await tools("serper").call("serp_ads", {"query": "x"})).ok


@pytest.mark.parametrize(
    "arguments", [{}, {"query": ""}, {"query": "x" * 201}, {"query": "x", "country": "usa"}, {"query": "x", "n": 1}]
)
async def test_wrong_arguments_are_refused(web: respx.Router, arguments: dict[str, Any]) -> None:
    assert not (await tools("serper").call("serp_ads", arguments)).ok
    assert not web["serper"].called


def test_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^tools\.serp_ads: SERPER_API_KEY is not set"):
        SerpAds(SerpAdsSettings(provider="serper"), {})
    with pytest.raises(ConfigError, match="MINE does not contain an API key"):
        SerpAds(SerpAdsSettings(provider="serper", api_key_env="MINE"), {"MINE": "a\nb"})
