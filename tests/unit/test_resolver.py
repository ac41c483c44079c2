"""Names are looked up as the system would, against a real name server, and a lookup ends with whoever wanted it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from gateway.outbound import resolver
from gateway.outbound.resolver import Resolver
from tests.support.dns_server import (
    AAAA,
    NXDOMAIN,
    REFUSED,
    SERVFAIL,
    A,
    NameServer,
    Zone,
    open_sockets,
    run_name_server,
)
from tests.support.waiting import until

NEVER = frozenset({A, AAAA})


@pytest.fixture(params=[True, False], ids=["uvloop", "asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


pytestmark = pytest.mark.anyio


@pytest.fixture
async def server() -> AsyncIterator[NameServer]:
    async with run_name_server() as server:
        yield server


async def look_up(server: NameServer, host: str) -> Sequence[str]:
    return await Resolver(servers=[server.address])(host, 80)


async def test_all_addresses_of_both_families_are_found(server: NameServer) -> None:
    server.zones["a.test"] = Zone(["192.0.2.1", "2001:db8::1", "192.0.2.2", "2001:db8::2"])

    for host in ("a.test", "a.test.", "A.Test"):
        assert set(await look_up(server, host)) == {"192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"}


@pytest.mark.parametrize("addresses", [["192.0.2.1"], ["2001:db8::1"]])
async def test_host_of_one_family_is_found(server: NameServer, addresses: list[str]) -> None:
    server.zones["a.test"] = Zone(addresses)

    assert await look_up(server, "a.test") == addresses


async def test_alias_leads_to_its_addresses(server: NameServer) -> None:
    server.zones |= {"www.test": Zone(alias="a.test"), "a.test": Zone(["192.0.2.1", "2001:db8::1"])}

    assert set(await look_up(server, "www.test")) == {"192.0.2.1", "2001:db8::1"}


async def test_truncated_answer_is_asked_for_over_tcp(server: NameServer) -> None:
    addresses = {f"192.0.2.{number}" for number in range(1, 255)}
    server.zones["a.test"] = Zone(sorted(addresses), truncated=True)

    assert set(await look_up(server, "a.test")) == addresses
    assert server.over_tcp == 2


@pytest.mark.parametrize("code", [SERVFAIL, NXDOMAIN, REFUSED])
async def test_failure_of_the_name_server_is_an_error_at_once(server: NameServer, code: int) -> None:
    server.zones["a.test"] = Zone(code=code)

    with pytest.raises(OSError):  # noqa: PT011 - the words are c-ares'
        await asyncio.wait_for(look_up(server, "a.test"), resolver.LOOKUP_S / 2)


@pytest.mark.parametrize("host", ["nowhere.test", "empty.test", "a" * 64 + ".test", ".", "a..b", "-", "x" * 255])
async def test_host_that_is_not_there_is_an_error(server: NameServer, host: str) -> None:
    server.zones["empty.test"] = Zone()

    with pytest.raises(OSError):  # noqa: PT011
        await look_up(server, host)


async def test_silent_family_does_not_hide_the_other(server: NameServer) -> None:
    """A firewall that drops questions for AAAA records must not make a host unreachable."""
    server.zones["a.test"] = Zone(["192.0.2.1", "2001:db8::1"], silent=frozenset({AAAA}))

    assert await look_up(server, "a.test") == ["192.0.2.1"]


async def test_silent_name_server_is_given_up(server: NameServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "LOOKUP_S", 0.05)
    server.zones["a.test"] = Zone(silent=NEVER)

    with pytest.raises(OSError, match=r"within 0\.05 s"):
        await look_up(server, "a.test")


async def test_second_name_server_is_asked_where_the_first_refuses(server: NameServer) -> None:
    server.zones["a.test"] = Zone(["192.0.2.1"])
    async with run_name_server(a_test=Zone(code=REFUSED)) as first:
        assert await Resolver(servers=[first.address, server.address])("a.test", 80) == ["192.0.2.1"]


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8::1", "2001:db8::1"),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1"),
        *(("127.1", "127.0.0.1"), ("0x7f.1", "127.0.0.1"), ("2130706433", "127.0.0.1"), ("0177.0.0.1", "127.0.0.1")),
        *(("0", "0.0.0.0"), ("0x7f000001", "127.0.0.1"), ("10.1", "10.0.0.1")),
    ],
)
async def test_number_is_an_address_and_no_question(server: NameServer, host: str, address: str) -> None:
    (found,) = await look_up(server, host)

    assert found == address or found == "::ffff:7f00:1"
    assert server.asked == []


@pytest.mark.parametrize("host", ["1.2.3.4.5", "256.1.1.1", "08.1.1.1", "1.2.3.4.", "a.0x1", "999999999999", "0x"])
async def test_number_that_is_no_address_is_an_error_and_no_question(server: NameServer, host: str) -> None:
    with pytest.raises(OSError, match="number"):
        await look_up(server, host)

    assert server.asked == []


async def test_names_of_this_machine_are_known(server: NameServer) -> None:
    """As /etc/hosts has them, which the system's own resolver reads in an instant."""
    entries = [line.partition("#")[0].split() for line in Path("/etc/hosts").read_text().splitlines()]
    names = {name for _, *names in filter(None, entries) for name in names}
    for name in names:
        infos = socket.getaddrinfo(name, 80, type=socket.SOCK_STREAM)
        assert set(await look_up(server, name)) == {str(info[4][0]) for info in infos}
    assert "127.0.0.1" in await look_up(server, "localhost")
    assert server.asked == []


async def test_search_domains_and_ndots_are_the_systems(server: NameServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a pod, where a service is named without its namespace. What resolv.conf says is read at each lookup."""
    resolve = Resolver(servers=[server.address])
    server.zones |= {
        "vllm.ns.svc.cluster.local": Zone(["10.96.0.1"]),
        "a.test": Zone(["192.0.2.1"]),
    }
    with pytest.raises(OSError):  # noqa: PT011
        await resolve("vllm", 80)

    # These stand for `search` and `options`; of several domains c-ares takes only the first from here.
    monkeypatch.setenv("RES_OPTIONS", "ndots:5")
    monkeypatch.setenv("LOCALDOMAIN", "ns.svc.cluster.local")
    assert await resolve("vllm", 80) == ["10.96.0.1"]
    monkeypatch.setenv("LOCALDOMAIN", "svc.cluster.local")
    assert await resolve("vllm.ns", 80) == ["10.96.0.1"]
    assert await resolve("a.test", 80) == ["192.0.2.1"]
    server.asked.clear()
    assert await resolve("a.test.", 80) == ["192.0.2.1"]
    assert server.names == {"a.test"}, "a name with a dot at its end is whole"


async def test_lookups_end_when_their_callers_leave(server: NameServer) -> None:
    """None holds a thread, a socket or another lookup up."""
    server.zones |= {"slow.test": Zone(silent=NEVER), "a.test": Zone(["192.0.2.1"])}
    resolve = Resolver(servers=[server.address])
    threads = threading.active_count()
    assert await resolve("a.test", 80) == ["192.0.2.1"]  # starts the one thread that c-ares closes channels on
    sockets = open_sockets()
    callers = [asyncio.create_task(resolve("slow.test", 80)) for _ in range(100)]
    await until(lambda: len(server.asked) >= 100)
    assert open_sockets() >= sockets + 100
    assert threading.active_count() <= threads + 1

    assert await asyncio.wait_for(resolve("a.test", 80), resolver.LOOKUP_S / 2) == ["192.0.2.1"]
    for caller in callers:
        caller.cancel()
    ended = await asyncio.gather(*callers, return_exceptions=True)

    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in ended)
    await until(lambda: open_sockets() == sockets)


async def test_answer_that_comes_after_its_caller_left_harms_nobody(server: NameServer) -> None:
    resolve = Resolver(servers=[server.address])
    server.zones["a.test"] = Zone(["192.0.2.1"])
    for turns in range(12):  # cancelled at every step of the way
        caller = asyncio.create_task(resolve("a.test", 80))
        for _ in range(turns):
            await asyncio.sleep(0)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)

    assert await resolve("a.test", 80) == ["192.0.2.1"]
