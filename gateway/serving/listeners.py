"""The sockets that the server listens on, from `server.host` and `server.port`.

`::` stands for both families, as two sockets: IPv4 clients keep their own form of address that way. Raises
ConfigError, in one line that names the address.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import socket
from collections.abc import Sequence
from typing import Any

from gateway.settings.config import ConfigError

log = logging.getLogger(__name__)

_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""What a machine without IPv6 says to an address of it."""
_FREE_PORT_TRIES = 10
_Address = tuple[Any, ...]
"""Host and port, and more for IPv6, as sockets have it."""
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def bind(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """Return bound sockets for all addresses of `hosts`, on one port; 0 is one that is free at each of them.

    Raises ConfigError.
    """
    for _ in range(_FREE_PORT_TRIES - 1 if port == 0 else 0):
        with contextlib.suppress(ConfigError):  # another process may hold the port at the second address
            return _bind(hosts, port)
    return _bind(hosts, port)


def _bind(hosts: Sequence[str], port: int) -> list[socket.socket]:
    with contextlib.ExitStack() as stack:
        sockets: list[socket.socket] = []
        absent: ConfigError | None = None
        for (family, address), host in _addresses(hosts).items():
            taken = sockets[0].getsockname()[1] if sockets and port == 0 else port
            try:
                sockets.append(stack.enter_context(_bound(family, (address[0], taken, *address[2:]))))
            except OSError as error:
                absent = ConfigError(f"server.host: can't listen on {_shown(host, taken)}: {error.strerror or error}")
                absent.__cause__ = error
                # A name or `::` may mean a family that this machine does not have.
                if error.errno not in _ABSENT or (_is_literal(host) and not _is_any(host)):
                    raise absent from error
                log.warning("%s", absent)
        if not sockets:
            raise absent or ConfigError("server.host: name at least one address")
        stack.pop_all()
        return sockets


def _addresses(hosts: Sequence[str]) -> dict[tuple[int, _Address], str]:
    """Return every address to bind with the host that means it, without those that a wildcard has in it."""
    names = [name for host in hosts for name in ((host, "0.0.0.0") if _is_any(host) else (host,))]
    found: dict[tuple[int, _Address], str] = {}
    for name in names:
        for key in _resolve(name):
            found.setdefault(key, name)
    any_of = {family for family, address in found if address[0] in _LOOPBACK}
    return {key: name for key, name in found.items() if key[0] not in any_of or key[1][0] in _LOOPBACK}


def _is_literal(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


def _is_any(host: str) -> bool:
    return _is_literal(host) and ipaddress.ip_address(host) == ipaddress.IPv6Address("::")


def _resolve(host: str) -> list[tuple[int, _Address]]:
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a host name"
        raise ConfigError(f"server.host: can't find the address of {host!r}: {reason}") from error
    return list(dict.fromkeys((int(family), tuple(address)) for family, _, _, _, address in found))


def _bound(family: int, address: _Address) -> socket.socket:
    with contextlib.ExitStack() as stack:
        bound = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
        bound.setblocking(False)
        stack.pop_all()
        return bound


def url(sockets: Sequence[socket.socket]) -> str:
    """Return a base URL under which this machine reaches the first socket."""
    host, port = sockets[0].getsockname()[:2]
    return f"http://{_shown(_LOOPBACK.get(host, host), port)}"


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
