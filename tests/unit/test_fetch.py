"""Fetching untrusted URLs: one reading of the URL, public addresses only, the address that was checked is dialled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from gateway.fair_slots import working_for
from gateway.outbound.fetch import Fetcher, FetchError, FetchFailed, TooLarge, UrlRefused, is_public, parse_url
from gateway.outbound.resolver import Resolver
from gateway.settings.config import FetchSettings
from tests.support.certificates import certify
from tests.support.dns_server import AAAA, A, Zone, open_sockets, run_name_server
from tests.support.waiting import until
from tests.support.website import Website, page, redirect, run_website

pytestmark = pytest.mark.anyio

LOOPBACK = ["127.0.0.0/8"]


class Names:
    """A resolver that knows what it was told, and counts the questions. A list of lists answers each time anew."""

    def __init__(self, **names: list[str] | list[list[str]]) -> None:
        self.names: dict[str, Any] = {name.replace("_", "."): value for name, value in names.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host not in self.names:
            raise OSError("no such host in tests")
        answer: Any = self.names[host]
        addresses: list[str] = answer.pop(0) if isinstance(answer[0], list) else answer
        return addresses


@pytest.fixture
async def site() -> AsyncIterator[Website]:
    async with run_website() as site:
        yield site


def fetcher(names: Names, **settings: Any) -> Fetcher:
    return Fetcher(FetchSettings(**({"ports": [], "allowed_networks": LOOPBACK} | settings)), resolve=names)


async def failure(fetcher: Fetcher, url: str, error: type[FetchError] = FetchFailed) -> FetchError:
    with pytest.raises(error) as caught:
        await fetcher.fetch(url, max_bytes=1000)
    return caught.value


@pytest.mark.parametrize(
    "url",
    [
        *("", "/cat.png", "//a.test/", "http:", "http:///x", "http://", "http:a.test", "http://:80/", "http://?x"),
        *("ftp://a.test/", "file:///etc/passwd", "gopher://a.test/", "data:image/png;base64,AA==", "javascript:1"),
        *("http://a.test\\@b.test/", "http://a.test\\b.test/", "http:\\\\a.test\\", "http://a.test/\\..\\x"),
        *("http://a.test/a b", " http://a.test/", "http://a.test/\n", "http://a\t.test/", "http://a.test/\x00"),
        *("http://a.test/\u2028", "http://a.test/\u00a0", "http://a.test/\x85"),
        *("http://user@a.test/", "http://user:pw@a.test/", "http://:pw@a.test/", "http://b.test%40a.test/"),
        *("http://a.test:x/", "http://a.test:99999/", "http://a.test:0/", "http://a.test:-1/", "http://a.test:8080/"),
        *("http://[::1%25eth0]/", "http://[::1/", "http://[v1.x]/", "http://a%2etest/", "http://a!.test/"),
        *("http://\u24d4xample.test/", "http://1\uff11.0.0.1/", f"http://a.test/{'x' * 8192}"),
    ],
    ids=lambda url: ascii(url)[:40],
)
def test_url_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(UrlRefused):
        parse_url(url, [80, 443])


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://a.test", "a.test"),
        ("HTTPS://A.TEST:443/%20?q=1&r=@#f", "a.test"),
        ("http://a_b.c-d.test./", "a_b.c-d.test."),
        ("http://m\u00fcnchen.test/\u00e4", "xn--mnchen-3ya.test"),
        ("http://192.0.2.1/", "192.0.2.1"),
        ("https://[2001:db8::1]/x", "2001:db8::1"),
    ],
)
def test_url_of_the_web_is_taken(url: str, host: str) -> None:
    assert parse_url(url, [80, 443]).raw_host.decode() == host


def test_any_port_is_taken_where_none_is_named() -> None:
    assert parse_url("http://a.test:8080/").port == 8080


@pytest.mark.parametrize(
    "address",
    [
        *("8.8.8.8", "1.1.1.1", "172.15.255.255", "172.32.0.0", "100.63.255.255", "192.0.1.0"),
        *("2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"),
    ],
)
def test_public_address_is_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.255"),
        *("169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1"),
        *("198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
        "168.63.129.16",
        *("::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2002:808:808::"),
        *("2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1", "fc00::1", "fd00:ec2::254", "fe80::1"),
        *("fec0::1", "ff02::1", "ff0e::1", "100::1", "4000::1"),
    ],
)
def test_address_of_a_network_of_its_own_is_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


async def test_fetch_returns_what_the_server_sends(site: Website) -> None:
    site.pages["/cat?size=1"] = page(b"meow", headers={"Content-Type": "Image/PNG; q=1"})

    fetched = await fetcher(Names(a_test=["127.0.0.1"])).fetch(
        f"http://a.test:{site.port}/cat?size=1#there", max_bytes=4, accept="image/png"
    )

    assert (fetched.content, fetched.media_type) == (b"meow", "image/png")
    assert fetched.url.startswith(f"http://a.test:{site.port}/cat?size=1")


async def test_fetch_sends_the_hosts_name_and_nothing_of_ours(site: Website) -> None:
    site.pages["/"] = page(headers={"Set-Cookie": "a=b"})
    fetch = fetcher(Names(a_test=["127.0.0.1"])).fetch
    for _ in range(2):
        await fetch(f"http://a.test:{site.port}/", max_bytes=0, accept="image/png")

    fields = dict(line.split(": ", 1) for line in site.asked[1].split("\r\n")[1:] if line)
    assert fields.keys() == {"Host", "Accept", "Accept-Encoding", "User-Agent", "Connection"}
    assert fields["Host"] == f"a.test:{site.port}"
    assert (fields["Accept"], fields["Accept-Encoding"]) == ("image/png", "identity")


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["::ffff:127.0.0.1"], ["127.0.0.1", "8.8.8.8"], ["8.8.8.8", "127.0.0.1"], ["0.0.0.0"], ["junk"]],
)
async def test_address_that_is_not_public_is_never_dialled(site: Website, addresses: list[str]) -> None:
    names = Names(a_test=addresses)

    await failure(fetcher(names, allowed_networks=[]), f"http://a.test:{site.port}/")

    assert site.asked == []


@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:127.0.0.1"])
async def test_allowed_network_is_reached_and_others_are_not(site: Website, address: str) -> None:
    site.pages["/"] = page(b"hi")
    names = Names(in_test=[address], out_test=["10.0.0.1"])
    fetch = fetcher(names, allowed_networks=["127.0.0.1/32"])

    assert (await fetch.fetch(f"http://in.test:{site.port}/", max_bytes=10)).content == b"hi"
    await failure(fetch, f"http://out.test:{site.port}/")


async def test_name_is_resolved_once_and_that_address_dialled(site: Website) -> None:
    """A name server that answers differently the second time gains nothing."""
    site.pages["/"] = page(b"hi")
    names = Names(a_test=[["127.0.0.1"], ["10.0.0.1"]])

    assert (await fetcher(names).fetch(f"http://a.test:{site.port}/", max_bytes=10)).content == b"hi"
    assert names.asked == ["a.test"]


async def test_next_address_is_dialled_when_one_does_not_answer(site: Website) -> None:
    site.pages["/"] = page(b"hi")
    names = Names(a_test=["127.0.0.2", "127.0.0.1"])

    assert (await fetcher(names).fetch(f"http://a.test:{site.port}/", max_bytes=10)).content == b"hi"


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See", "307 Temporary", "308 Permanent"])
async def test_redirect_is_followed(site: Website, status: str) -> None:
    site.pages |= {"/a/b": redirect("../c", status), "/c": redirect(f"//b.test:{site.port}/d"), "/d": page(b"hi")}
    names = Names(a_test=["127.0.0.1"], b_test=["127.0.0.1"])

    fetched = await fetcher(names).fetch(f"http://a.test:{site.port}/a/b", max_bytes=10)

    assert (fetched.content, fetched.url) == (b"hi", f"http://b.test:{site.port}/d")
    assert names.asked == ["a.test", "a.test", "b.test"]
    assert [head.partition("Host: ")[2].split(":")[0] for head in site.asked] == ["a.test", "a.test", "b.test"]


@pytest.mark.parametrize(
    "location",
    [
        *("http://inside.test/", "http://127.0.0.1.nowhere.test/", "http://a.test:1\\@b.test/", "\\\\inside.test\\"),
        *("file:///etc/passwd", "http://user@a.test/", "http://[::1]:x/", "http://a.test\\b/", "/a\\b"),
    ],
)
async def test_redirect_elsewhere_is_refused(site: Website, location: str) -> None:
    site.pages["/"] = redirect(location)
    names = Names(a_test=["127.0.0.1"], inside_test=["10.0.0.1"])

    await failure(fetcher(names), f"http://a.test:{site.port}/")

    assert site.paths == ["/"]


@pytest.mark.parametrize("location", ["", "/", "//", "#there"])
async def test_redirect_to_itself_ends(site: Website, location: str) -> None:
    site.pages["/"] = redirect(location)

    await failure(fetcher(Names(a_test=["127.0.0.1"])), f"http://a.test:{site.port}/")

    assert site.paths == ["/"] * 4


async def test_redirect_to_another_port_is_refused(site: Website) -> None:
    site.pages["/"] = redirect("http://a.test:22/")

    await failure(fetcher(Names(a_test=["127.0.0.1"]), ports=[site.port]), f"http://a.test:{site.port}/")


async def test_redirects_are_counted(site: Website) -> None:
    site.pages |= {f"/{number}": redirect(f"/{number + 1}") for number in range(3)} | {"/3": page(b"hi")}
    names = Names(a_test=["127.0.0.1"])

    assert (await fetcher(names).fetch(f"http://a.test:{site.port}/0", max_bytes=10)).content == b"hi"
    await failure(fetcher(names, max_redirects=2), f"http://a.test:{site.port}/0")


@pytest.mark.parametrize("length", [None, -1], ids=["announced", "unannounced"])
async def test_more_bytes_than_asked_for_are_too_many(site: Website, length: int | None) -> None:
    site.pages["/"] = page(b"x" * 1001, length=length)

    error = await failure(fetcher(Names(a_test=["127.0.0.1"])), f"http://a.test:{site.port}/", TooLarge)

    assert str(error) == "it is larger than 1000 bytes"


async def test_endless_answer_is_left_at_the_bound(site: Website) -> None:
    site.pages["/"] = page(b"x" * 4_000_000, length=-1)

    await failure(fetcher(Names(a_test=["127.0.0.1"])), f"http://a.test:{site.port}/", TooLarge)
    await until(lambda: site.connections == 0)


@pytest.mark.parametrize(
    "answer",
    [
        page(b"hi", status="404 Not Found"),
        page(b"hi", status="500 Oops"),
        page(b"hi", status="206 Partial Content"),
        page(b"hi", status="304 Not Modified", headers={"Location": "/"}),
        page(b"hi", headers={"Content-Encoding": "gzip"}),
        page(b"hi", length=10),
        page(b"hi", headers={"Content-Length": "1, 2"}, length=-1),
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 20_000 + b"\r\n",
        b"",
    ],
    ids=["404", "500", "206", "304", "gzip", "cut", "two lengths", "ssh", "head", "nothing"],
)
async def test_failures_tell_the_client_nothing_about_the_network(site: Website, answer: bytes) -> None:
    site.pages["/"] = answer
    names = Names(a_test=["127.0.0.1"], inside_test=["10.0.0.1"])
    fetch = fetcher(names)

    texts = {
        str(await failure(fetch, url))
        for url in (
            f"http://a.test:{site.port}/",
            "http://a.test:1/",
            f"http://inside.test:{site.port}/",
            f"http://nowhere.test:{site.port}/",
        )
    }

    assert texts == {"it could not be fetched"}


async def test_server_that_does_not_answer_is_given_up(site: Website) -> None:
    await failure(fetcher(Names(a_test=["127.0.0.1"]), timeout_s=0.05), f"http://a.test:{site.port}/silent")

    await until(lambda: site.connections == 0)


async def test_name_that_does_not_resolve_in_time_is_given_up() -> None:
    async def never(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    await failure(Fetcher(FetchSettings(timeout_s=0.05), resolve=never), "http://a.test/")


async def test_cancelling_closes_the_connection(site: Website) -> None:
    fetch = fetcher(Names(a_test=["127.0.0.1"]))
    task = asyncio.create_task(fetch.fetch(f"http://a.test:{site.port}/silent", max_bytes=10))
    await until(lambda: site.connections == 1)

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: site.connections == 0)


async def test_system_names_are_checked_as_well(site: Website) -> None:
    site.pages["/"] = page(b"hi")
    url = f"http://localhost:{site.port}/"

    await failure(Fetcher(FetchSettings(ports=[])), url)
    assert site.asked == []
    allowed: Any = ["127.0.0.0/8", "::1/128"]
    fetched = await Fetcher(FetchSettings(ports=[], allowed_networks=allowed)).fetch(url, max_bytes=10)
    assert fetched.content == b"hi"


@pytest.mark.parametrize("host", ["127.1", "0x7f.1", "2130706433", "0177.0.0.1", "0", "[::1]", "[::ffff:7f00:1]"])
async def test_loopback_by_another_name_is_refused(site: Website, host: str) -> None:
    await failure(Fetcher(FetchSettings(ports=[])), f"http://{host}:{site.port}/", FetchError)

    assert site.asked == []


async def test_one_keys_slow_sites_leave_room_for_other_keys(site: Website) -> None:
    """Fetches that wait for a name or for an answer hold a slot; one key never holds the last."""
    site.pages["/"] = page(b"hi")
    names = Names(a_test=["127.0.0.1"])
    fetch = fetcher(names)

    async def greedy() -> list[asyncio.Task[Any]]:
        with working_for("greedy"):
            url = f"http://a.test:{site.port}/silent"
            return [asyncio.create_task(fetch.fetch(url, max_bytes=10)) for _ in range(100)]

    tasks = await greedy()
    try:
        await until(lambda: site.connections == 32)
        with working_for("other"):
            fetched = await asyncio.wait_for(fetch.fetch(f"http://a.test:{site.port}/", max_bytes=10), 5)
        assert fetched.content == b"hi"
        assert site.connections == 32, "half of what there is"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: site.connections == 0)


async def test_name_that_changes_between_lookups_is_dialled_where_it_was_checked(site: Website) -> None:
    site.pages["/"] = page(b"hi")
    turns = [["127.0.0.1"], ["127.0.0.1", "10.0.0.1"], ["127.0.0.1"]]
    async with run_name_server(a_test=Zone(answers=lambda before: turns[before])) as server:
        settings: Any = {"ports": [], "allowed_networks": LOOPBACK}
        fetch = Fetcher(FetchSettings(**settings), resolve=Resolver(servers=[server.address]))
        url = f"http://a.test:{site.port}/"

        assert (await fetch.fetch(url, max_bytes=10)).content == b"hi"
        await failure(fetch, url)  # one of two is private: the name is refused as a whole
        assert (await fetch.fetch(url, max_bytes=10)).content == b"hi"

    assert len(site.asked) == 2
    assert server.asked.count(("a.test", A)) == 3, "nothing is remembered between two lookups"


async def test_alias_of_a_private_host_and_families_mixed_are_refused(site: Website) -> None:
    zones = {"alias_test": Zone(alias="inside.test"), "inside_test": Zone(["10.0.0.1"])}
    zones["mixed_test"] = Zone(["8.8.8.8", "::1"])
    async with run_name_server(**zones) as server:
        fetch = Fetcher(FetchSettings(ports=[]), resolve=Resolver(servers=[server.address]))
        for name in ("alias.test", "mixed.test", "inside.test"):
            await failure(fetch, f"http://{name}:{site.port}/")

    assert site.asked == []


async def test_leaving_a_fetch_ends_its_lookup_and_gives_its_slot_back(site: Website) -> None:
    site.pages["/"] = page(b"hi")
    async with run_name_server(silent_test=Zone(silent=frozenset({A, AAAA}))) as server:
        settings: Any = {"ports": [], "allowed_networks": LOOPBACK}
        fetch = Fetcher(FetchSettings(**settings), resolve=Resolver(servers=[server.address]))
        sockets = open_sockets()
        for _ in range(3):
            tasks = [asyncio.create_task(fetch.fetch("http://silent.test/", max_bytes=10)) for _ in range(64)]
            await until(lambda: open_sockets() > sockets)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        await until(lambda: open_sockets() == sockets)
        url = f"http://127.0.0.1:{site.port}/"
        assert (await asyncio.wait_for(fetch.fetch(url, max_bytes=10), 5)).content == b"hi"


async def test_certificate_must_be_the_hosts_though_an_address_is_dialled(tmp_path: Path) -> None:
    server, client = certify(tmp_path, "a.test")
    names = Names(a_test=["127.0.0.1"], b_test=["127.0.0.1"])
    settings: Any = {"ports": [], "allowed_networks": LOOPBACK}
    fetch = Fetcher(FetchSettings(**settings), resolve=names, ssl_context=client)
    async with run_website(ssl_context=server) as site:
        site.pages |= {"/": page(b"hi"), "/down": redirect("http://a.test/")}

        assert (await fetch.fetch(f"https://a.test:{site.port}/", max_bytes=10)).content == b"hi"
        await failure(fetch, f"https://b.test:{site.port}/")
        await failure(fetch, f"https://127.0.0.1:{site.port}/")
        assert len(site.asked) == 1
        await failure(fetch, f"https://a.test:{site.port}/down")
        assert names.asked[-1] == "a.test", "what is secure never leads to what is not"
        await failure(Fetcher(FetchSettings(**settings), resolve=names), f"https://a.test:{site.port}/")
        await until(lambda: site.connections == 0)


@pytest.mark.filterwarnings("error::ResourceWarning")
async def test_cancelling_in_a_handshake_closes_the_connection(site: Website) -> None:
    """The server takes the client's hello for a request's beginning and waits for more."""
    fetch = fetcher(Names(a_test=["127.0.0.1"]), timeout_s=0.2)

    await failure(fetch, f"https://a.test:{site.port}/")

    await until(lambda: site.connections == 0)
