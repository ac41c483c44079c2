"""Reading web pages: a loopback website through the product's own fetcher, robots and reading processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.outbound.fetch import Fetcher
from gateway.settings.config import FetchSettings, WebFetchSettings
from gateway.tools.base import Observation, Source, Toolbox
from gateway.tools.reader import Reader
from gateway.tools.robots import Robots
from gateway.tools.web_fetch import WebFetch
from tests.support.documents import pdf
from tests.support.waiting import until
from tests.support.website import Website, page, redirect, run_website

pytestmark = pytest.mark.anyio

ARTICLE = """<html><head><title>Heat pumps</title><meta property="article:published_time" content="2024-03-05"></head>
<body><nav>Home</nav><article><h1>Heat pumps</h1><p>A heat pump moves heat from the cold air outside into a house.</p>
<p>It needs a third of the electricity that mere heating would take, says the trial.</p></article></body></html>"""


@pytest.fixture
async def site() -> AsyncIterator[Website]:
    async with run_website() as site:
        site.pages["/robots.txt"] = page(b"User-agent: *\nDisallow: /private")
        yield site


@pytest.fixture
async def reader() -> AsyncIterator[Reader]:
    reader = Reader(processes=2)
    yield reader
    await reader.close()


def toolbox(reader: Reader, *, robots: bool = True, fetch: dict[str, Any] | None = None, **settings: Any) -> Toolbox:
    rules: dict[str, Any] = {"ports": [], "allowed_networks": ["127.0.0.0/8"], "timeout_s": 2}
    fetcher = Fetcher(FetchSettings.model_validate(rules | (fetch or {})))
    made = WebFetchSettings.model_validate({"robots": robots} | settings)
    asker = Robots(fetcher) if robots else None
    return Toolbox([WebFetch(made, fetcher, reader, robots=asker, timeout_s=30)], backoff_s=0.0)


async def get(box: Toolbox, site: Website, path: str = "/") -> Observation:
    return await box.call("web_fetch", {"url": f"http://127.0.0.1:{site.port}{path}"})


async def test_page_is_read_as_text_and_as_a_source(site: Website, reader: Reader) -> None:
    site.pages["/pumps?x=1"] = page(ARTICLE.encode(), headers={"Content-Type": "text/html; charset=utf-8"})

    found = await get(toolbox(reader), site, "/pumps?x=1")

    assert found.ok
    assert found.text.startswith("# Heat pumps\n\nA heat pump moves heat from the cold air outside into a house.")
    (source,) = found.sources
    assert source == Source(
        f"http://127.0.0.1:{site.port}/pumps?x=1",
        "Heat pumps",
        source.snippet,
        fetched=True,
        published="2024-03-05",
    )
    assert source.snippet.startswith("# Heat pumps A heat pump moves")
    assert "Accept: text/html, application/xhtml+xml, application/pdf" in site.asked[1]


async def test_source_is_where_the_redirects_ended(site: Website, reader: Reader) -> None:
    site.pages |= {"/old": redirect("/new"), "/new": page(ARTICLE.encode(), headers={"Content-Type": "text/html"})}

    found = await get(toolbox(reader), site, "/old")

    assert found.sources[0].url == f"http://127.0.0.1:{site.port}/new"


async def test_pdf_is_read(site: Website, reader: Reader) -> None:
    site.pages["/a.pdf"] = page(pdf("The trial", ["One.", "Two."]), headers={"Content-Type": "application/pdf"})

    found = await get(toolbox(reader), site, "/a.pdf")

    assert (found.text, found.sources[0].title, found.sources[0].published) == (
        "One.\n\nTwo.",
        "The trial",
        "2024-03-05",
    )


@pytest.mark.parametrize(
    ("content_type", "content", "text"),
    [
        ("text/plain; charset=ISO-8859-1", "Gr\u00fc\u00dfe".encode("latin-1"), "Gr\u00fc\u00dfe"),
        ('text/plain;Charset="UTF-16LE"', "Gr\u00fc\u00dfe".encode("utf-16-le"), "Gr\u00fc\u00dfe"),
        ("application/json", b'{"a": 1}', '{"a": 1}'),
        ("text/csv", b"a,b\n1,2\n", "a,b\n1,2"),
    ],
)
async def test_text_is_read_in_its_own_encoding(
    site: Website, reader: Reader, content_type: str, content: bytes, text: str
) -> None:
    site.pages["/"] = page(content, headers={"Content-Type": content_type})

    assert (await get(toolbox(reader), site)).text == text


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (page(b"\x89PNG", headers={"Content-Type": "image/png"}), "the page is image/png, which can't be read."),
        (page(b"\x00\x01"), "the page is of an unknown type, which can't be read."),
        (page(b"", headers={"Content-Type": "text/html"}), "the page can't be read: it is not HTML."),
        (page(b"%PDF-1.4"), "the page can't be read: it is not a whole PDF."),
        (
            page(b"x" * 2000, headers={"Content-Type": "text/plain"}),
            "the page can't be read: it is larger than 1024 bytes.",
        ),
        (page(status="404 Not Found"), "the site answered with status 404."),
        (page(status="403 Forbidden"), "the site answered with status 403."),
        (b"nonsense\r\n\r\n", "the page could not be fetched."),
        (redirect("http://127.0.0.1.test/"), "the page could not be fetched."),
        (redirect("ftp://a.test/"), "the page could not be fetched."),
    ],
)
async def test_page_that_can_not_be_read_says_why(site: Website, reader: Reader, answer: bytes, says: str) -> None:
    site.pages["/"] = answer

    found = await get(toolbox(reader, max_bytes=1024), site)

    assert (found.ok, found.text, list(found.sources)) == (False, f"web_fetch: {says}", [])
    assert site.paths.count("/") == 1, "it would fail again"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://a.test/", "this address can't be fetched: it must begin with http:// or https://."),
        ("local:a.md", "this address can't be fetched: it must begin with http:// or https://."),
        ("http://me:pw@a.test/", "this address can't be fetched: it must not hold a user name or password."),
        ("http://no-such-host.test/", "the page could not be fetched."),
        ("http://169.254.169.254/latest/meta-data/", "the page could not be fetched."),
        ("http://10.0.0.1/", "the page could not be fetched."),
        ("http://[::1]/", "the page could not be fetched."),
    ],
)
@pytest.mark.parametrize("robots", [True, False])
async def test_address_within_is_like_one_that_is_not_there(reader: Reader, url: str, says: str, robots: bool) -> None:
    found = await toolbox(reader, robots=robots, fetch={"allowed_networks": []}).call("web_fetch", {"url": url})

    assert (found.ok, found.text) == (False, f"web_fetch: {says}")


async def test_robots_are_obeyed_at_every_step(site: Website, reader: Reader) -> None:
    site.pages |= {
        "/private": page(b"secret", headers={"Content-Type": "text/plain"}),
        "/way": redirect("/private"),
    }
    box = toolbox(reader)

    for path in ("/private", "/way"):
        found = await get(box, site, path)
        assert (
            found.text == "web_fetch: the page can't be read: the site's robots.txt does not allow programs to read it."
        )
    assert site.paths == ["/robots.txt", "/way"]


async def test_robots_may_be_left_unasked(site: Website, reader: Reader) -> None:
    site.pages["/private"] = page(b"open", headers={"Content-Type": "text/plain"})

    assert (await get(toolbox(reader, robots=False), site, "/private")).text == "open"
    assert site.paths == ["/private"]


async def test_site_in_trouble_is_asked_again_and_does_not_close_the_tool(site: Website, reader: Reader) -> None:
    site.pages |= {
        "/": page(status="503 Service Unavailable"),
        "/ok": page(b"ok", headers={"Content-Type": "text/plain"}),
    }
    box = toolbox(reader)

    for _ in range(6):
        assert (await get(box, site)).text == "web_fetch: the site answered with status 503."
    assert site.paths.count("/") == 18
    assert (await get(box, site, "/ok")).text == "ok"


async def test_cancelling_closes_the_connection(site: Website, reader: Reader) -> None:
    call = asyncio.create_task(get(toolbox(reader), site, "/never"))
    await until(lambda: "/never" in site.paths)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    await until(lambda: site.connections == 0)


async def test_many_pages_of_one_site_at_once(site: Website, reader: Reader) -> None:
    """More than the fetcher's places: who waits for robots.txt holds none."""
    for number in range(50):
        site.pages[f"/{number}"] = page(str(number).encode(), headers={"Content-Type": "text/plain"})
    box = toolbox(reader, fetch={"timeout_s": 20})

    found = await asyncio.gather(*(get(box, site, f"/{number}") for number in range(50)))

    assert [observation.text for observation in found] == [str(number) for number in range(50)]
    assert site.paths.count("/robots.txt") == 1
