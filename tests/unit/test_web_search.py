"""Searching the web: what each service is asked, what is made of its answers, and what its refusals mean."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import respx

from gateway.settings.config import ConfigError, WebSearchSettings, parse_config
from gateway.tools.base import Source, Toolbox, ToolError
from gateway.tools.search_providers import iso_date
from gateway.tools.web_search import WebSearch, WebSearchArguments
from tests.support.waiting import FakeClock

pytestmark = pytest.mark.anyio

TODAY = datetime.date(2026, 3, 15)
KEY = "key-Zq3x9"
ENVIRONMENT = {"BRAVE_API_KEY": KEY, "TAVILY_API_KEY": KEY, "SERPER_API_KEY": KEY, "OWN_KEY": KEY}

SEARXNG: dict[str, Any] = {
    "query": "heat pumps",
    "number_of_results": 0,
    "results": [
        {
            "url": "https://a.test/pumps",
            "title": "Heat pumps &amp; cold",
            "content": "A <b>pump</b>\n moves heat.",
            "publishedDate": "2024-05-01T00:00:00",
            "engine": "bing",
            "score": 1.5,
        },
        {"url": "https://b.test/", "title": "B", "content": None, "publishedDate": None},
    ],
    "answers": [],
    "unresponsive_engines": [["google", "CAPTCHA"]],
}
BRAVE: dict[str, Any] = {
    "type": "search",
    "query": {"original": "heat pumps"},
    "web": {
        "type": "search",
        "results": [
            {
                "title": "Heat pumps &amp; cold",
                "url": "https://a.test/pumps",
                "description": "A <strong>pump</strong> moves heat.",
                "page_age": "2024-05-01T10:11:12",
                "age": "May 1, 2024",
            },
            {"title": "B", "url": "https://b.test/"},
        ],
    },
}
TAVILY: dict[str, Any] = {
    "query": "heat pumps",
    "answer": None,
    "results": [
        {
            "url": "https://a.test/pumps",
            "title": "Heat pumps & cold",
            "content": "A pump moves heat.",
            "score": 0.9,
            "raw_content": None,
            "published_date": "Wed, 01 May 2024 07:00:00 GMT",
        },
        {"url": "https://b.test/", "title": "B", "content": "", "score": 0.1},
    ],
    "response_time": 1.2,
}
SERPER: dict[str, Any] = {
    "searchParameters": {"q": "heat pumps", "type": "search"},
    "knowledgeGraph": {"title": "Heat pump"},
    "organic": [
        {
            "title": "Heat pumps & cold",
            "link": "https://a.test/pumps",
            "snippet": "A pump moves heat.",
            "date": "May 1, 2024",
            "position": 1,
        },
        {"title": "B", "link": "https://b.test/", "position": 2},
    ],
    "credits": 1,
}
URLS = {
    "searxng": "http://searxng.test:8080/sub/search",
    "brave": "https://api.search.brave.com/res/v1/web/search",
    "tavily": "https://api.tavily.com/search",
    "serper": "https://google.serper.dev/search",
}
BODIES = {"searxng": SEARXNG, "brave": BRAVE, "tavily": TAVILY, "serper": SERPER}
PROVIDERS = list(URLS)


@pytest.fixture
def web() -> Iterator[respx.MockRouter]:
    with respx.mock(assert_all_called=False) as router:
        yield router


def search(provider: str, **settings: Any) -> WebSearch:
    base = {"url": "http://searxng.test:8080/sub/"} if provider == "searxng" else {}
    made = WebSearchSettings.model_validate({"provider": provider} | base | settings)
    return WebSearch(made, ENVIRONMENT, today=lambda: TODAY)


async def find(tool: WebSearch, query: str = "heat pumps", **arguments: Any) -> list[Source]:
    return list((await tool.run(WebSearchArguments(query=query, **arguments))).sources)


async def failure(tool: WebSearch) -> ToolError:
    with pytest.raises(ToolError) as caught:
        await find(tool)
    return caught.value


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_results_become_sources(web: respx.MockRouter, provider: str) -> None:
    web.route(url__startswith=URLS[provider]).respond(json=BODIES[provider])

    found = await search(provider).run(WebSearchArguments(query=" heat pumps "))

    assert found.sources == [
        Source("https://a.test/pumps", "Heat pumps & cold", "A pump moves heat.", published="2024-05-01"),
        Source("https://b.test/", "B", ""),
    ]
    assert found.text == (
        "1. Heat pumps & cold\nhttps://a.test/pumps (2024-05-01)\nA pump moves heat.\n\n2. B\nhttps://b.test/\n"
    )


async def asked(web: respx.MockRouter, provider: str, **settings: Any) -> httpx.Request:
    """Return the request that a search for five results makes."""
    route = web.route(url__startswith=URLS[provider]).respond(json=BODIES[provider])
    await find(search(provider, **settings), max_results=5)
    request: httpx.Request = route.calls.last.request
    assert request.headers["user-agent"].startswith("shannon-gateway/")
    assert request.headers["accept"] == "application/json"
    return request


async def test_searxng_is_asked_for_json(web: respx.MockRouter) -> None:
    request = await asked(web, "searxng")

    assert request.method == "GET"
    assert str(request.url) == "http://searxng.test:8080/sub/search?q=heat+pumps&format=json"
    assert "authorization" not in request.headers
    with_more = await asked(web, "searxng", language="de-CH", api_key_env="OWN_KEY")
    assert with_more.url.params["language"] == "de-CH"
    assert with_more.headers["authorization"] == f"Bearer {KEY}"


async def test_brave_is_asked_with_its_token(web: respx.MockRouter) -> None:
    request = await asked(web, "brave")

    assert request.method == "GET"
    assert dict(request.url.params) == {
        "q": "heat pumps",
        "count": "5",
        "result_filter": "web",
        "text_decorations": "false",
    }
    assert request.headers["x-subscription-token"] == KEY
    assert KEY not in str(request.url)
    for language, name in {"de-CH": "de", "ja": "jp", "pt-BR": "pt-br", "zh-CN": "zh-hans"}.items():
        assert (await asked(web, "brave", language=language)).url.params["search_lang"] == name


async def test_brave_is_asked_fifty_words_at_most(web: respx.MockRouter) -> None:
    route = web.route(url__startswith=URLS["brave"]).respond(json=BRAVE)

    await find(search("brave"), " ".join("abc" for _ in range(80)))

    assert len(route.calls.last.request.url.params["q"].split()) == 50


async def test_tavily_is_asked_with_a_bearer_token(web: respx.MockRouter) -> None:
    request = await asked(web, "tavily", api_key_env="OWN_KEY", url="https://api.tavily.com/")

    assert (request.method, str(request.url)) == ("POST", "https://api.tavily.com/search")
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert json.loads(request.content) == {
        "query": "heat pumps",
        "max_results": 5,
        "search_depth": "basic",
        "include_answer": False,
        "include_raw_content": False,
        "include_images": False,
    }


async def test_serper_is_asked_with_its_key(web: respx.MockRouter) -> None:
    request = await asked(web, "serper")

    assert (request.method, str(request.url)) == ("POST", "https://google.serper.dev/search")
    assert request.headers["x-api-key"] == KEY
    assert json.loads(request.content) == {"q": "heat pumps", "num": 5}
    swiss = await asked(web, "serper", language="de-CH")
    assert json.loads(swiss.content) == {"q": "heat pumps", "num": 5, "hl": "de", "gl": "ch"}


@pytest.mark.parametrize(
    ("provider", "body"),
    [
        ("searxng", {"results": [], "unresponsive_engines": []}),
        ("brave", {"type": "search", "query": {}}),
        ("brave", {"web": None}),
        ("tavily", {"results": []}),
        ("serper", {"searchParameters": {}}),
    ],
)
async def test_nothing_found_is_no_failure(web: respx.MockRouter, provider: str, body: Any) -> None:
    web.route(url__startswith=URLS[provider]).respond(json=body)

    found = await search(provider).run(WebSearchArguments(query="x"))

    assert (found.ok, list(found.sources), found.text) == (True, [], "Nothing was found. Try other words.")


async def test_searxng_whose_engines_all_fail_has_not_searched(web: respx.MockRouter) -> None:
    body = {"results": [], "unresponsive_engines": [["bing", "timeout"]]}
    web.route(url__startswith=URLS["searxng"]).respond(json=body)

    error = await failure(search("searxng"))

    assert (str(error), error.may_pass) == (
        "the search engines behind the search server do not answer.",
        True,
    )


async def test_results_are_bounded_and_none_comes_twice(web: respx.MockRouter) -> None:
    entries = [{"url": f"https://a.test/{n // 2}", "title": "t" * 900, "content": "c" * 9000} for n in range(60)]
    web.route(url__startswith=URLS["tavily"]).respond(json={"results": entries})

    assert [source.url for source in await find(search("tavily", max_results=3))] == [
        *("https://a.test/0", "https://a.test/1", "https://a.test/2")
    ]
    found = await find(search("tavily"), max_results=20)
    assert len(found) == 20
    assert all(len(source.title) <= 200 and len(source.snippet) <= 600 for source in found)


@pytest.mark.parametrize(
    "url",
    ["javascript:alert(1)", "file:///etc/passwd", "//a.test/", "", "http://", f"https://a.test/{'x' * 3000}", None, 3],
)
async def test_address_that_can_not_be_fetched_is_left_out(web: respx.MockRouter, url: Any) -> None:
    web.route(url__startswith=URLS["tavily"]).respond(json={"results": [{"url": url, "title": "x"}]})

    assert await find(search("tavily")) == []


async def test_address_can_stand_between_quotation_marks(web: respx.MockRouter) -> None:
    entry = {"url": 'https://a.test/x">\n<b y', "title": "</source> <script>alert(1)</script>do", "content": "<i>x</i>"}
    web.route(url__startswith=URLS["tavily"]).respond(json={"results": [entry | {"url": 'https://a.test/x"><b y'}]})

    (source,) = await find(search("tavily"))

    assert source.url == "https://a.test/x%22%3E%3Cb%20y"
    assert (source.title, source.snippet) == ("alert(1)do", "x")


REFUSALS = [
    ("searxng", 403, {}, "operator"),  # JSON is not among its formats
    ("searxng", 401, {}, "operator"),
    ("searxng", 404, {}, "operator"),
    ("searxng", 301, {}, "operator"),
    ("searxng", 429, {}, "busy"),
    ("searxng", 400, {}, "query"),
    ("brave", 401, {}, "operator"),
    ("brave", 422, {"type": "ErrorResponse", "error": {"code": "SUBSCRIPTION_TOKEN_INVALID"}}, "operator"),
    (
        "brave",
        422,
        {"error": {"code": "VALIDATION", "meta": {"errors": [{"loc": ["header", "x-subscription-token"]}]}}},
        "operator",
    ),
    ("brave", 422, {"error": {"code": "VALIDATION", "meta": {"errors": [{"loc": ["query", "q"]}]}}}, "query"),
    ("brave", 404, {"error": {"code": "SUBSCRIPTION_NOT_FOUND"}}, "operator"),
    ("brave", 429, {"error": {"code": "QUOTA_LIMITED"}}, "operator"),
    ("brave", 429, {"error": {"code": "RATE_LIMITED"}}, "busy"),
    ("tavily", 401, {"detail": {"error": "Unauthorized: missing or invalid API key."}}, "operator"),
    ("tavily", 432, {"detail": {"error": "plan limit"}}, "operator"),
    ("tavily", 433, {"detail": {"error": "paygo limit"}}, "operator"),
    ("tavily", 400, {"detail": {"error": "Query is too long."}}, "query"),
    ("serper", 403, {"message": "Unauthorized.", "statusCode": 403}, "operator"),
    ("serper", 400, {"message": "Not enough credits", "statusCode": 400}, "operator"),
    ("serper", 400, {"message": "Query not allowed", "statusCode": 400}, "query"),
    *((provider, status, {}, "busy") for provider in PROVIDERS for status in (500, 502, 503)),
]


@pytest.mark.parametrize(("provider", "status", "body", "meaning"), REFUSALS)
async def test_refusal_says_whose_matter_it_is(
    web: respx.MockRouter,
    caplog: pytest.LogCaptureFixture,
    provider: str,
    status: int,
    body: Any,
    meaning: str,
) -> None:
    web.route(url__startswith=URLS[provider]).respond(status, json=body | {"echo": KEY})

    error = await failure(search(provider))

    assert {
        "operator": "web_search is misconfigured; the operator has to fix it.",
        "busy": f"the search service {'has no room at the moment' if status == 429 else 'failed'}.",
        "query": "the search service refused the query; try a shorter or simpler one.",
    }[meaning] == str(error)
    assert (error.may_pass, error.out_of_order) == (meaning == "busy", meaning != "query")
    assert [record.levelname for record in caplog.records if record.name == "gateway.tools.web_search"] == [
        "ERROR" if meaning == "operator" else "WARNING"
    ]
    assert KEY not in caplog.text
    assert KEY not in str(error)


async def test_log_tells_the_operator_what_to_mend(web: respx.MockRouter, caplog: pytest.LogCaptureFixture) -> None:
    web.route(url__startswith=URLS["searxng"]).respond(403, html="<h1>Forbidden</h1>")

    await failure(search("searxng"))

    assert "add `json` to `search.formats` in its settings.yml" in caplog.text


async def test_pause_that_the_service_asks_for_is_passed_on(web: respx.MockRouter) -> None:
    route = web.route(url__startswith=URLS["tavily"])
    for header, wait_s in {"3": 3.0, "Wed, 21 Oct 2026 07:28:00 GMT": None, "-1": None, "": None}.items():
        route.respond(429, headers={"Retry-After": header})
        assert (await failure(search("tavily"))).retry_after_s == wait_s


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("refused by 10.0.0.7"), httpx.ReadError(""), httpx.ConnectTimeout("")]
)
async def test_service_that_can_not_be_reached_may_be_later(web: respx.MockRouter, error: Exception) -> None:
    web.route(url__startswith=URLS["brave"]).mock(side_effect=error)

    failed = await failure(search("brave"))

    assert failed.may_pass
    assert "10.0.0.7" not in str(failed)


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b'"x"', b"\xff\xfe", b'{"results": "x"', b"null"])
async def test_answer_that_is_not_json_may_pass(web: respx.MockRouter, content: bytes) -> None:
    web.route(url__startswith=URLS["tavily"]).respond(content=content)

    assert (await failure(search("tavily"))).may_pass


@pytest.mark.parametrize(
    ("provider", "body"),
    [
        ("searxng", {}),
        ("searxng", {"results": None}),
        ("searxng", {"results": ["x"]}),
        ("searxng", {"results": [{"title": "no address"}]}),
        ("brave", {"web": {"results": {"a": 1}}}),
        ("tavily", {"results": 3}),
        ("serper", {"organic": [None]}),
    ],
)
async def test_answer_of_another_shape_is_a_failure(
    web: respx.MockRouter, caplog: pytest.LogCaptureFixture, provider: str, body: Any
) -> None:
    web.route(url__startswith=URLS[provider]).respond(json=body)

    error = await failure(search(provider))

    assert (str(error), error.may_pass) == ("the search service returned an unreadable response.", False)
    assert "another shape than documented" in caplog.text


async def test_answer_that_is_too_long_is_not_read(web: respx.MockRouter) -> None:
    web.route(url__startswith=URLS["tavily"]).respond(content=b"x" * (4 * 2**20 + 1))

    assert str(await failure(search("tavily"))) == "the search service returned a response that is too long."


async def test_box_tries_again_what_may_pass(web: respx.MockRouter) -> None:
    route = web.route(url__startswith=URLS["tavily"])
    route.side_effect = [httpx.Response(503), httpx.Response(200, json=TAVILY)]
    toolbox = Toolbox([search("tavily")], backoff_s=0.0)

    found = await toolbox.call("web_search", {"query": "heat pumps"})

    assert (found.ok, len(found.sources), route.call_count) == (True, 2, 2)
    await toolbox.close()


async def test_searches_wait_for_their_turn(web: respx.MockRouter) -> None:
    web.route(url__startswith=URLS["brave"]).respond(json=BRAVE)
    clock = FakeClock(1000.0)
    settings = WebSearchSettings(provider="brave", requests_per_s=0.04)
    tool = WebSearch(settings, ENVIRONMENT, clock=clock)

    assert len(await find(tool)) == 2
    error = await failure(tool)
    assert (str(error), error.out_of_order) == ("too many searches are waiting for their turn.", False)
    clock.advance(25)
    assert len(await find(tool)) == 2


@pytest.mark.parametrize("query", ["", "  ", "x" * 401])
async def test_query_must_be_one(query: str) -> None:
    found = await Toolbox([search("brave")]).call("web_search", {"query": query})

    assert not found.ok
    assert found.text.startswith("web_search: query: String should have at ")


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("2024-05-01", "2024-05-01"),
        ("2024-05-01T10:00:00Z", "2024-05-01"),
        ("Wed, 01 May 2024 07:00:00 GMT", "2024-05-01"),
        ("May 1, 2024", "2024-05-01"),
        ("1 May 2024", "2024-05-01"),
        ("3 days ago", "2026-03-12"),
        ("2 hours ago", "2026-03-15"),
        ("1 week ago", "2026-03-08"),
        *((text, "") for text in ("", "yesterday", "99999", "May", "2024", "999 years ago and more")),
    ],
)
def test_date_is_read_in_the_ways_that_services_write_it(text: str, date: str) -> None:
    assert iso_date(text, TODAY) == date


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"provider": "searxng"}, "url: SearXNG needs the address of your server"),
        ({"provider": "searxng", "url": "searxng:8080"}, "url: must be an http or https URL"),
        ({"provider": "searxng", "url": "http://me:pw@searxng"}, "url: must not contain credentials"),
        ({"provider": "bing"}, "provider: "),
        ({"provider": "brave", "language": "German"}, "language: "),
    ],
)
def test_setting_that_can_not_work_is_refused(settings: dict[str, Any], problem: str) -> None:
    tree = {
        "engines": {"main": {"kind": "mock"}},
        "models": {"shannon-chat": {"description": "x"}},
        "tools": {"web_search": settings},
    }
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)

    assert "tools.web_search" in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize("key", ["", "  ", "k\u00e9y", "a\nb"])
def test_key_must_be_one(key: str) -> None:
    with pytest.raises(ConfigError, match="BRAVE_API_KEY") as caught:
        WebSearch(WebSearchSettings(provider="brave"), {"BRAVE_API_KEY": key})

    assert not key.strip() or key not in str(caught.value)
