"""robots.txt by RFC 9309: which group counts, which rule wins, and what a site without one means."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from gateway.outbound.fetch import Fetcher, FetchFailed
from gateway.settings.config import FetchSettings
from gateway.tools.robots import MAX_BYTES, Robots, RobotsRefused, allows, parse
from tests.support.waiting import FakeClock
from tests.support.website import Website, page, redirect, run_website

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("", True),
        ("User-agent: *\nDisallow: /", False),
        ("user-agent:*\ndisallow:/ # all of it", False),
        ("User-agent: *\nDisallow:", True),
        ("User-agent: other\nDisallow: /", True),
        ("User-agent: Shannon-Gateway\nDisallow: /", False),
        ("User-agent: shannon-gateway/1.0\nDisallow: /", False),
        ("User-agent: shannon\nDisallow: /", True),
        ("User-agent: *\nDisallow: /\n\nUser-agent: shannon-gateway\nDisallow: /other", True),
        ("User-agent: shannon-gateway\nDisallow:\n\nUser-agent: *\nDisallow: /", True),
        ("User-agent: a\nUser-agent: shannon-gateway\n\nDisallow: /", False),
        ("User-agent: shannon-gateway\nAllow: /x\nUser-agent: b\nDisallow: /", True),
        (
            "User-agent: shannon-gateway\nDisallow: /x\n"
            "User-agent: b\nAllow: /\nUser-agent: shannon-gateway\nDisallow: /a",
            False,
        ),
        ("Disallow: /", True),
        ("Sitemap: http://a.test/\nUser-agent: *\nCrawl-delay: 9\nDisallow: /", False),
        ("User-agent: *\r\nDisallow: /\r\n", False),
        ("User-agent: *\nDisallow /", True),
        ("\x00\x01::\n:\nUser-agent\nUser-agent:\nDisallow: /", True),
    ],
)
def test_group_for_this_gateway_counts(text: str, allowed: bool) -> None:
    assert allows(parse(text), "/a/b.html") == allowed


@pytest.mark.parametrize(
    ("rules", "path", "allowed"),
    [
        ("Disallow: /a", "/b", True),
        ("Disallow: /a", "/abc", False),
        ("Disallow: /a/", "/a", True),
        ("Disallow: /a\nAllow: /a/b", "/a/b/c", True),
        ("Allow: /a/b\nDisallow: /a", "/a/b/c", True),
        ("Disallow: /a/b\nAllow: /a", "/a/b/c", False),
        ("Disallow: /a\nAllow: /a", "/a", True),
        ("Disallow: /*.pdf", "/x/y.pdf?z", False),
        ("Disallow: /*.pdf$", "/x/y.pdf?z", True),
        ("Disallow: /*.pdf$", "/x/y.pdf", False),
        ("Disallow: /*.pdf$", "/x/.pdf.pdf", False),
        ("Disallow: /a*b*c", "/a1b2c3", False),
        ("Disallow: /a*b*c", "/a1c2b3", True),
        ("Disallow: /a*a$", "/a", True),
        ("Disallow: /a*a$", "/aa", False),
        ("Disallow: *", "/", False),
        ("Disallow: /*?", "/x?q", False),
        ("Disallow: /*?", "/x", True),
        ("Disallow: /$", "/", False),
        ("Disallow: /$", "/x", True),
        ("Disallow: /%7Ejo", "/~jo/", False),
        ("Disallow: /\u00e4", "/%C3%A4", False),
        ("Disallow: /%c3%a4", "/%C3%A4", False),
        ("Disallow: /a%2Fb", "/a/b", True),
        ("Disallow: /", "/robots.txt", True),
        ("Disallow: /", "/", False),
    ],
)
def test_longest_rule_that_matches_wins(rules: str, path: str, allowed: bool) -> None:
    assert allows(parse(f"User-agent: *\n{rules}"), path) == allowed


def test_hostile_patterns_come_to_an_end() -> None:
    """A matcher that goes back and tries again would not."""
    text = "User-agent: *\n" + "\n".join(f"Disallow: /{'a*' * 200}b$" for _ in range(1000))

    assert allows(parse(text), "/" + "a" * 8000)


@pytest.fixture
async def site() -> AsyncIterator[Website]:
    async with run_website() as site:
        yield site


def robots_of(clock: FakeClock | None = None) -> Robots:
    settings = FetchSettings.model_validate({"ports": [], "allowed_networks": ["127.0.0.0/8"], "timeout_s": 2})
    return Robots(Fetcher(settings), clock or FakeClock())


def url(site: Website, path: str = "/x") -> httpx.URL:
    return httpx.URL(f"http://127.0.0.1:{site.port}{path}")


async def test_site_is_asked_once_an_hour(site: Website) -> None:
    clock = FakeClock()
    robots = robots_of(clock)
    site.pages["/robots.txt"] = page(b"User-agent: *\nDisallow: /no")

    await asyncio.gather(*(robots.admit(url(site)) for _ in range(9)))
    with pytest.raises(RobotsRefused, match=r"robots\.txt does not allow"):
        await robots.admit(url(site, "/no?q"))
    assert site.paths == ["/robots.txt"]
    assert "User-Agent: shannon-gateway/" in site.asked[0]

    clock.advance(3601)
    site.pages["/robots.txt"] = page(b"")
    await robots.admit(url(site, "/no"))
    assert site.paths == ["/robots.txt"] * 2


@pytest.mark.parametrize("status", ["404 Not Found", "403 Forbidden", "401 Unauthorized", "410 Gone"])
async def test_site_without_rules_allows_everything(site: Website, status: str) -> None:
    site.pages["/robots.txt"] = page(b"User-agent: *\nDisallow: /", status=status)

    await robots_of().admit(url(site))


@pytest.mark.parametrize("status", ["500 Internal Server Error", "503 Service Unavailable", "429 Too Many Requests"])
async def test_site_that_can_not_tell_its_rules_is_left_alone_for_a_minute(site: Website, status: str) -> None:
    clock = FakeClock()
    robots = robots_of(clock)
    site.pages["/robots.txt"] = page(status=status)
    for _ in range(2):
        with pytest.raises(RobotsRefused):
            await robots.admit(url(site))
    assert len(site.asked) == 1

    clock.advance(61)
    site.pages["/robots.txt"] = page(b"")
    await robots.admit(url(site))


async def test_endless_rules_allow_nothing(site: Website) -> None:
    site.pages["/robots.txt"] = page(b"#" * (MAX_BYTES + 1))

    with pytest.raises(RobotsRefused):
        await robots_of().admit(url(site))


async def test_site_that_can_not_be_reached_fails_as_its_pages_do(site: Website) -> None:
    site.pages["/robots.txt"] = redirect("http://10.0.0.1/robots.txt")

    for address in (url(site), httpx.URL("http://192.168.0.1/"), httpx.URL("http://127.0.0.1:1/")):
        with pytest.raises(FetchFailed):
            await robots_of().admit(address)
