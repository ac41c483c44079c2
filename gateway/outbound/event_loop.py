"""The gateway's event loop: uvloop, with host name lookups that need no threads.

uvloop resolves names with `getaddrinfo`, on four threads that the whole process shares and that no timeout frees. Four
names that get no answer from a name server then delay every new connection by name: to other engines, to the store, to
tools. Here each lookup is a task that ends with its caller or its deadline. See `gateway.outbound.resolver`.

A name that DNS does not have is resolved with `getaddrinfo`: other sources of /etc/nsswitch.conf (mDNS, LDAP) may
have it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Coroutine
from ipaddress import ip_address
from typing import Any, TypeVar

import uvloop

from gateway.outbound.resolver import NoSuchName, Resolver

_T = TypeVar("_T")


class EventLoop(uvloop.Loop):
    """uvloop's loop with the resolver of this gateway."""

    def __init__(self, resolve: Resolver | None = None) -> None:
        """`resolve` replaces the system's name servers."""
        super().__init__()
        self._look_up = resolve or Resolver()

    async def getaddrinfo(
        self, host: str | bytes | None, port: Any, *, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> list[Any]:
        """Resolve a host, with the result of `socket.getaddrinfo`. Raises OSError."""
        options = {"family": family, "type": type, "proto": proto}
        if not host or flags & ~socket.AI_ADDRCONFIG or _is_address(host):
            return list(await super().getaddrinfo(host, port, flags=flags, **options))
        name = host if isinstance(host, str) else host.decode("ascii")
        try:
            addresses = await self._look_up(name, port if isinstance(port, int) else 0)
        except NoSuchName:
            return list(await super().getaddrinfo(host, port, flags=flags, **options))
        found: list[Any] = []
        for address in addresses:
            with contextlib.suppress(socket.gaierror):  # of another family than requested
                found += socket.getaddrinfo(address, port, flags=socket.AI_NUMERICHOST, **options)
        if not found:
            raise OSError(f"{name} has no address of the family that was asked for")
        return found

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        """Connect to the first address of `host` that answers. Raises OSError."""
        connect = super().create_connection
        if not host or _is_address(host):
            return await connect(protocol_factory, host, port, **options)
        if options.get("ssl") and options.get("server_hostname") is None:
            options["server_hostname"] = host
        failure: OSError | None = None
        family = options.pop("family", 0)
        for _, _, _, _, address in await self.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM):
            try:
                return await connect(protocol_factory, address[0], address[1], **options)
            except ssl.SSLError:
                raise
            except OSError as error:
                failure = failure or error
        assert failure is not None
        raise failure


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine on such a loop, like `asyncio.run`."""
    with asyncio.Runner(loop_factory=EventLoop) as runner:
        return runner.run(main)


def _is_address(host: str | bytes) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ip_address(host if isinstance(host, str) else host.decode("latin-1")))
    return False
