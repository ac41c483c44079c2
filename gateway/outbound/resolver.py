"""Resolves host names without threads: a lookup ends when its caller is cancelled or its deadline passes.

c-ares does what the system's resolver does: /etc/hosts, search domains and `ndots`, IPv4 and IPv6 side by side, CNAME
chains, other name servers, and TCP for truncated answers. Each lookup has a c-ares channel of its own. So it can be
cancelled alone (a channel cancels all of its queries or none), reads the current /etc/resolv.conf, and leaves no cache,
which c-ares bounds by age but not by size. A channel takes about 50 us to make.

`aiodns` is not used directly: its channels have a thread each, and an inotify instance, of which a user has 128.

`gateway.outbound.fetch` limits the number of concurrent lookups.

Not handled: other sources than files and DNS in /etc/nsswitch.conf (mDNS, LDAP). Raises OSError, and NoSuchName if
these sources may know the name.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

import pycares

_HOSTS = Path("/etc/hosts")

LOOKUP_S = 5.0
"""Deadline of one lookup. c-ares asks a name server again, or the next one, after 2 s."""
_TICK_S = 0.25
"""How often a channel checks its queries for timeouts."""
_NOT_THERE = (pycares.errno.ARES_ENOTFOUND, pycares.errno.ARES_ENODATA)


class NoSuchName(OSError):
    """DNS has no such name, or no address for it."""


class Resolver:
    """The resolver. One instance serves the process."""

    def __init__(self, *, servers: Sequence[str] = ()) -> None:
        """`servers` ("127.0.0.1:5353") replace those of /etc/resolv.conf."""
        self._servers = servers

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Return all addresses of a host, in the order in which to dial them. Raises OSError."""
        if (literal := _literal(host)) is not None:
            return [literal]
        if host.rstrip(".") == "localhost" and (listed := _listed(host.rstrip("."))):
            return listed
        lookup = _Lookup(self._servers)
        try:
            async with asyncio.timeout(LOOKUP_S):
                return await lookup.run(host, port)
        except TimeoutError:
            raise OSError(f"no answer within {LOOKUP_S:g} s") from None
        finally:
            lookup.close()


def _literal(host: str) -> str | None:
    """Return `host` as an address, or None if it is a name. Raises OSError if it is neither."""
    try:
        return str(ip_address(host))
    except ValueError:
        pass
    last = host.rstrip(".").rpartition(".")[2]
    if not (last.isdecimal() or last[:2] == "0x"):
        return None
    try:
        return socket.inet_ntoa(socket.inet_aton(host))  # 127.1, 0x7f.1 and the like, as getaddrinfo reads them
    except OSError:
        raise OSError("no top-level domain is a number") from None


def _listed(host: str) -> list[str]:
    """Return the addresses of a host in /etc/hosts.

    c-ares knows the file, but answers "localhost" with both families, whether they are in it or not. An operator who
    allows 127.0.0.0/8 would find it refused for `::1`.
    """
    try:
        lines = _HOSTS.read_text(errors="replace").splitlines()
    except OSError:
        return []
    entries = [line.partition("#")[0].split() for line in lines]
    return list(dict.fromkeys(entry[0] for entry in entries if host in entry[1:]))


class _Lookup:
    """One lookup and its channel. Runs on the event loop's thread only."""

    def __init__(self, servers: Sequence[str]) -> None:
        self._loop = asyncio.get_running_loop()
        self._reading: set[int] = set()
        self._writing: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._found: asyncio.Future[Sequence[str]] = self._loop.create_future()
        try:
            self._channel = pycares.Channel(sock_state_cb=self._watch, servers=servers or None)
        except pycares.AresError as error:  # out of memory, or an unreadable resolv.conf
            raise OSError(str(error)) from error

    async def run(self, host: str, port: int) -> Sequence[str]:
        """Return the addresses. Raises OSError."""
        try:
            self._channel.getaddrinfo(host, port, type=socket.SOCK_STREAM, callback=self._on_answer)
        except (pycares.AresError, UnicodeError) as error:
            raise OSError(str(error)) from error
        self._tick()
        return await self._found

    def close(self) -> None:
        """Cancel the queries and close the sockets."""
        if self._timer is not None:
            self._timer.cancel()
        self._found.cancel()
        self._channel.cancel()
        # c-ares closes the rest on its own thread.
        for fd in self._reading:
            self._loop.remove_reader(fd)
        for fd in self._writing:
            self._loop.remove_writer(fd)
        self._reading.clear()
        self._writing.clear()
        self._channel.close()

    def _on_answer(self, result: pycares.AddrInfoResult | None, error: int | None) -> None:
        if self._found.done():
            return
        if error is not None or result is None:
            kind = NoSuchName if error in _NOT_THERE else OSError
            self._found.set_exception(kind(pycares.errno.strerror(error or 0)))
            return
        addresses = (node.addr[0] for node in result.nodes)
        texts = (text.decode() if isinstance(text, bytes) else str(text) for text in addresses)
        self._found.set_result(list(dict.fromkeys(texts)))

    def _watch(self, fd: int, readable: bool, writable: bool) -> None:
        """Let the loop watch a socket for c-ares; neither direction means that the socket is about to close."""
        if readable:
            self._reading.add(fd)
            self._loop.add_reader(fd, self._process, fd, pycares.ARES_SOCKET_BAD)
        elif fd in self._reading:
            self._reading.discard(fd)
            self._loop.remove_reader(fd)
        if writable:
            self._writing.add(fd)
            self._loop.add_writer(fd, self._process, pycares.ARES_SOCKET_BAD, fd)
        elif fd in self._writing:
            self._writing.discard(fd)
            self._loop.remove_writer(fd)

    def _process(self, read_fd: int, write_fd: int) -> None:
        if not self._found.done():
            self._channel.process_fd(read_fd, write_fd)

    def _tick(self) -> None:
        """Let c-ares detect timeouts."""
        self._process(pycares.ARES_SOCKET_BAD, pycares.ARES_SOCKET_BAD)
        if not self._found.done():
            self._timer = self._loop.call_later(_TICK_S, self._tick)
