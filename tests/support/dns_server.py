"""A name server on loopback, over UDP and TCP, with scripted answers. It records the queries.

Example:

    async with run_name_server(a_test=Zone(addresses=["192.0.2.1"])) as server:
        ...  # resolve a.test at server.address
    assert ("a.test", A) in server.asked
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import psutil

A, CNAME, AAAA = 1, 5, 28
SERVFAIL, NXDOMAIN, REFUSED = 2, 3, 5
_TRUNCATED = 0x0200


@dataclass
class Zone:
    """What is known of one name. Without any of it there is no such name."""

    addresses: list[str] = field(default_factory=list)
    """Both families mixed."""
    alias: str = ""
    """The name that this one is an alias of."""
    code: int = 0
    """Sent instead of an answer."""
    silent: frozenset[int] = frozenset()
    """Record types that are never answered."""
    truncated: bool = False
    """Over UDP nothing but the word that there is more over TCP."""
    answers: Callable[[int], list[str]] | None = None
    """The addresses as a function of how often the name was asked for before, for both types alike."""


@dataclass
class NameServer:
    """A running server: `zones` by name."""

    port: int = 0
    zones: dict[str, Zone] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)
    """(name, record type) of every query."""
    over_tcp: int = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.asked}

    def answer(self, query: bytes, *, tcp: bool) -> bytes | None:
        """Return the response to a query, None for none."""
        name, kind, question = _read(query)
        before = sum(asked == (name, kind) for asked in self.asked)
        self.asked.append((name, kind))
        self.over_tcp += tcp
        zone = self.zones.get(name)
        if zone is None:
            return _response(query, question, code=NXDOMAIN)
        if kind in zone.silent:
            return None
        if zone.truncated and not tcp:
            return _response(query, question, flags=_TRUNCATED)
        records = b""
        count = 0
        if zone.alias:
            records += _record(name, CNAME, _name(zone.alias))
            count += 1
            name, zone = zone.alias, self.zones.get(zone.alias, Zone())
        for text in zone.answers(before) if zone.answers else zone.addresses:
            address = ip_address(text)
            if isinstance(address, IPv4Address if kind == A else IPv6Address):
                records += _record(name, kind, address.packed)
                count += 1
        return _response(query, question, records, count, code=zone.code)


def open_sockets() -> int:
    """Return how many file descriptors this process has open: c-ares' sockets are known to nobody else."""
    return psutil.Process().num_fds()


def _name(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"


def _read(query: bytes) -> tuple[str, int, bytes]:
    """Return the name, the record type, and the question as it stands in the query."""
    labels, place = [], 12
    while query[place]:
        labels.append(query[place + 1 : place + 1 + query[place]].decode().lower())
        place += 1 + query[place]
    (kind,) = struct.unpack_from("!H", query, place + 1)
    return ".".join(labels), kind, query[12 : place + 5]


def _record(name: str, kind: int, data: bytes) -> bytes:
    return _name(name) + struct.pack("!HHIH", kind, 1, 60, len(data)) + data


def _response(
    query: bytes, question: bytes, records: bytes = b"", count: int = 0, *, code: int = 0, flags: int = 0
) -> bytes:
    return query[:2] + struct.pack("!HHHHH", 0x8180 | flags | code, 1, count, 0, 0) + question + records


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, server: NameServer) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if (answer := self._server.answer(data, tcp=False)) is not None:
            self._transport.sendto(answer, addr)


@contextlib.asynccontextmanager
async def run_name_server(**zones: Zone) -> AsyncIterator[NameServer]:
    """Serve names on 127.0.0.1, on a port of UDP and the same of TCP."""
    server = NameServer(zones={name.replace("__", "-").replace("_", "."): zone for name, zone in zones.items()})

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (length,) = struct.unpack("!H", await reader.readexactly(2))
                if (answer := server.answer(await reader.readexactly(length), tcp=True)) is not None:
                    writer.write(struct.pack("!H", len(answer)) + answer)
                    await writer.drain()
        writer.close()

    tcp = await asyncio.start_server(serve, "127.0.0.1", 0)
    server.port = tcp.sockets[0].getsockname()[1]
    loop = asyncio.get_running_loop()
    udp, _ = await loop.create_datagram_endpoint(lambda: _Udp(server), local_addr=("127.0.0.1", server.port))
    try:
        yield server
    finally:
        udp.close()
        tcp.close()
