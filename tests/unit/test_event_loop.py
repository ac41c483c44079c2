"""Names are looked up by the loop itself: for every library on it, and without threads that a dead name could hold."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.remote.http1 import Http1Transport
from gateway.outbound import resolver
from gateway.outbound.event_loop import EventLoop
from gateway.outbound.resolver import Resolver
from tests.support.certificates import certify
from tests.support.dns_server import AAAA, A, NameServer, Zone, run_name_server

NEVER = frozenset({A, AAAA})
Play = Callable[[Callable[[NameServer], Awaitable[None]]], None]


@pytest.fixture
def play() -> Play:
    """Run a scene on a loop whose names are those of a server of its own."""
    servers: list[str] = []

    def play(scene: Callable[[NameServer], Awaitable[None]]) -> None:
        async def whole() -> None:
            async with run_name_server() as server:
                servers.append(server.address)
                await scene(server)

        with asyncio.Runner(loop_factory=lambda: EventLoop(Resolver(servers=servers))) as runner:
            runner.run(whole())

    return play


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi")
    writer.close()


async def listen(**options: Any) -> int:
    server = await asyncio.start_server(serve, "127.0.0.1", 0, **options)
    port: int = server.sockets[0].getsockname()[1]
    return port


def test_names_that_are_not_answered_hold_nobody_up(play: Play) -> None:
    """As many as would fill any pool of threads; and the loop closes at once, while they are still looked up."""

    async def scene(server: NameServer) -> None:
        server.zones |= {"dead.test": Zone(silent=NEVER), "a.test": Zone(["127.0.0.1"])}
        port = await listen()
        transport = Http1Transport(None, keepalive_s=1)
        threads = threading.active_count()
        async with httpx.AsyncClient(transport=transport) as remote, httpx.AsyncClient(trust_env=False) as tool:
            dead = [asyncio.create_task(client.get(f"http://dead.test:{port}/")) for client in (remote, tool) * 16]
            while len(server.asked) < len(dead):
                await asyncio.sleep(0)
            for client in (remote, tool):
                async with asyncio.timeout(resolver.LOOKUP_S / 2):
                    assert (await client.get(f"http://a.test:{port}/")).text == "hi"
            assert threading.active_count() <= threads + 1
            for task in dead:
                task.cancel()
            await asyncio.gather(*dead, return_exceptions=True)

    play(scene)


def test_addresses_are_tried_in_turn(play: Play) -> None:
    async def scene(server: NameServer) -> None:
        port = await listen()
        server.zones |= {"a.test": Zone(["127.0.0.3", "127.0.0.1", "::1"]), "b.test": Zone(["127.0.0.3", "127.0.0.4"])}
        _, writer = await asyncio.open_connection("a.test", port)
        assert writer.get_extra_info("peername") == ("127.0.0.1", port)
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("b.test", port)

    play(scene)


def test_certificates_are_those_of_the_name(play: Play, tmp_path: Path) -> None:
    ours, theirs = certify(tmp_path, "a.test")

    async def scene(server: NameServer) -> None:
        server.zones |= {"a.test": Zone(["127.0.0.1"]), "b.test": Zone(["127.0.0.1"])}
        port = await listen(ssl=ours)
        async with httpx.AsyncClient(transport=Http1Transport(theirs, keepalive_s=1)) as client:
            assert (await client.get(f"https://a.test:{port}/")).text == "hi"
            with pytest.raises(httpx.ConnectError, match=r"b\.test"):
                await client.get(f"https://b.test:{port}/")

    play(scene)


def test_answers_are_those_of_getaddrinfo(play: Play) -> None:
    async def scene(server: NameServer) -> None:
        server.zones["a.test"] = Zone(["192.0.2.1", "2001:db8::1"])
        look_up = asyncio.get_running_loop().getaddrinfo
        both = await look_up("a.test", 80, type=socket.SOCK_STREAM)
        assert {info[4][0] for info in both} == {"192.0.2.1", "2001:db8::1"}
        assert all(info[1:4] == (socket.SOCK_STREAM, socket.IPPROTO_TCP, "") for info in both)
        (four,) = await look_up(b"a.test", 80, family=socket.AF_INET, type=socket.SOCK_STREAM)
        assert four[4] == ("192.0.2.1", 80)
        server.zones["b.test"] = Zone(["192.0.2.1"])
        with pytest.raises(OSError, match="family"):
            await look_up("b.test", 80, family=socket.AF_INET6)
        for literal in ("127.0.0.1", "::1", "127.1", None):
            for info in await look_up(literal, 80, type=socket.SOCK_STREAM):
                assert info[4][:2] in (("127.0.0.1", 80), ("::1", 80))
        assert server.names == {"a.test", "b.test"}

    play(scene)


def test_name_that_dns_does_not_have_is_asked_of_the_system(play: Play) -> None:
    """It may know it from elsewhere, such as mDNS."""

    async def scene(server: NameServer) -> None:
        with pytest.raises(socket.gaierror):  # the system's own error, not that of c-ares
            await asyncio.get_running_loop().getaddrinfo("nowhere.invalid", 80)
        assert "nowhere.invalid" in server.names

    play(scene)


@pytest.mark.parametrize("code", [2, 5])
def test_failure_of_the_name_server_is_an_error_at_once(play: Play, code: int) -> None:
    """The system would ask the same server again, in a thread."""

    async def scene(server: NameServer) -> None:
        server.zones["a.test"] = Zone(code=code)
        with pytest.raises(OSError) as caught:  # noqa: PT011
            await asyncio.wait_for(asyncio.open_connection("a.test", 80), resolver.LOOKUP_S / 2)
        assert not isinstance(caught.value, socket.gaierror)

    play(scene)
