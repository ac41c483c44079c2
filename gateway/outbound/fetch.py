"""Fetches client-supplied URLs with SSRF protection.

One parser reads the URL, for the check and for the connection. The host is resolved once; every address that it has
must be public (or in a network that the operator allows), and exactly these addresses are dialled, under the URL's
own host name for TLS and the Host header. Redirects go through the same door. Bytes and time are bounded.

Does not handle proxies, cookies, credentials, compression and HTTP/2. Raises FetchError, whose message is safe for
clients and the same for every failure that could reveal something about the network; the log knows the reason.

    FetchError
    +- UrlRefused     what the URL itself says
    +- TooLarge       more bytes than asked for
    +- FetchFailed    everything else
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import httpcore
import httpx

from gateway import __version__
from gateway.fair_slots import FairSlots
from gateway.outbound.resolver import Resolver
from gateway.settings.config import FetchSettings

log = logging.getLogger(__name__)

Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port to addresses. Raises OSError."""
Admit = Callable[[httpx.URL], Awaitable[None]]
"""Called before each request, also of redirects. Raises FetchError if the URL must not be requested."""

USER_AGENT = f"shannon-gateway/{__version__}"

_MAX_URL_CHARACTERS = 8192
_HOST = re.compile(rb"[a-z0-9_.-]{1,255}|[0-9a-f:.]{2,45}")  # a name or IPv4, or IPv6 without its brackets
_CHARSET = re.compile(r"""(?:^|;)\s*charset\s*=\s*["']?([a-z0-9_.:+-]{1,40})""")
_CONNECT_S = 3.0
"""Connect timeout per address: an unreachable one must not use up the time of the next."""
_MAX_ADDRESSES = 4
_MAX_FETCHES = 64
"""Concurrent fetches, shared fairly between API keys."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

_UNICAST = ip_network("2000::/3")
_NAT64 = ip_network("64:ff9b::/96")
_NOT_PUBLIC = [
    ip_network("192.0.0.0/24"),  # protocol assignments; Oracle's cloud keeps its metadata in it
    ip_network("192.88.99.0/24"),  # relays between IPv4 and IPv6
    ip_network("168.63.129.16/32"),  # Azure's platform, seen from its machines; public by its number only
]


class FetchError(Exception):
    """Base. The message is safe to show to a client."""


class UrlRefused(FetchError):
    """The URL must not be fetched."""


class TooLarge(FetchError):
    """The content is longer than the caller accepts."""


class FetchFailed(FetchError):
    """The fetch failed. `reason` is for the log, `status` is the response's, if the server may be contacted."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__("it could not be fetched")
        self.reason = reason
        self.status = status


@dataclass(frozen=True, slots=True)
class Fetched:
    """A response. `url` is the one after all redirects, `media_type` the server's, in lower case."""

    url: str
    media_type: str
    content: bytes
    charset: str = ""
    """In lower case, or empty."""


def parse_url(text: str, ports: Sequence[int] = ()) -> httpx.URL:
    """Parse a URL that may be fetched. `ports` are the allowed ones, empty for any. Raises UrlRefused."""
    if len(text) > _MAX_URL_CHARACTERS:
        raise UrlRefused(f"it is longer than {_MAX_URL_CHARACTERS} characters")
    # Parsers read backslashes and white space in two ways; a URL that has any is not one.
    if "\\" in text or not text.isprintable() or any(character.isspace() for character in text):
        raise UrlRefused("it holds a character that URLs can't have")
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        raise UrlRefused("it is not a valid URL") from None
    if url.scheme not in ("http", "https"):
        raise UrlRefused("it must begin with http:// or https://")
    if url.userinfo:
        raise UrlRefused("it must not hold a user name or password")
    if not _HOST.fullmatch(url.raw_host):
        raise UrlRefused("it names no valid host")
    if ports and _port(url) not in ports:
        raise UrlRefused(f"its port must be one of {', '.join(map(str, ports))}")
    return url


def is_public(address: Address) -> bool:
    """Return whether an address is public, as well as the IPv4 address embedded in it, if any."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or (IPv4Address(address.packed[-4:]) if address in _NAT64 else None)
        if inner is None:
            return address in _UNICAST and address.is_global and address.sixtofour is None and address.teredo is None
        address = inner
    return address.is_global and not address.is_multicast and not any(address in network for network in _NOT_PUBLIC)


class _Pinned(httpcore.AsyncNetworkBackend):
    """Network backend that dials the given addresses for any host, and keeps the stream in order to close it."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._backend = httpcore.AnyIOBackend()
        self._stream: httpcore.AsyncNetworkStream | None = None

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception | None = None
        for address in self._addresses:
            try:
                self._stream = await self._backend.connect_tcp(address, port, timeout=_CONNECT_S)
                return self._stream
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure or httpcore.ConnectError("no address")

    async def aclose(self) -> None:
        """Close the stream: httpcore loses one whose TLS handshake is cancelled."""
        if self._stream is not None:
            await self._stream.aclose()


class Fetcher:
    """Fetches URLs. One instance serves the process and limits concurrent fetches."""

    def __init__(
        self,
        settings: FetchSettings,
        *,
        resolve: Resolve | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """`resolve` and `ssl_context` replace the system's resolver and certificates."""
        self._settings = settings
        self._resolve = resolve or Resolver()
        self._given_ssl_context = ssl_context
        self._slots = FairSlots(_MAX_FETCHES)

    @cached_property
    def _ssl_context(self) -> ssl.SSLContext:
        # Made at the first use, because it reads hundreds of certificates.
        return self._given_ssl_context or httpx.create_ssl_context()

    async def fetch(self, text: str, *, max_bytes: int, accept: str = "*/*", admit: Admit | None = None) -> Fetched:
        """Fetch the URL `text`. Raises FetchError. Cancellation closes the connection."""
        url = parse_url(text, self._settings.ports)
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                return await self._follow(url, max_bytes, accept, admit)
        except TimeoutError:
            failure = FetchFailed(f"no answer within {self._settings.timeout_s:g} s")
        except FetchFailed as error:
            failure = error
        log.info("could not fetch from %s: %s", url.host, failure.reason)
        raise failure

    async def _follow(self, url: httpx.URL, max_bytes: int, accept: str, admit: Admit | None) -> Fetched:
        for _ in range(self._settings.max_redirects + 1):
            if admit is not None:
                await admit(url)  # holds no place meanwhile: it may fetch something itself
            async with self._slots.held(), self._get(url, accept) as response:
                if response.status not in _REDIRECTS:
                    content = await _read(response, max_bytes)
                    media_type, _, parameters = _header(response, b"content-type").lower().partition(";")
                    charset = _CHARSET.search(parameters)
                    return Fetched(str(url), media_type.strip(), content, charset[1] if charset else "")
                location = _header(response, b"location")
            url = self._redirected(url, location)
        raise FetchFailed("too many redirects")

    def _redirected(self, url: httpx.URL, location: str) -> httpx.URL:
        """Return the target of a redirect. Raises FetchFailed, so that clients don't learn what is wrong with it."""
        try:
            target = parse_url(str(url.join(location)), self._settings.ports)
        except (UrlRefused, httpx.InvalidURL) as error:
            raise FetchFailed(f"redirected to a URL that is refused: {error}") from None
        if (url.scheme, target.scheme) == ("https", "http"):
            raise FetchFailed("redirected from https to http")
        return target

    @contextlib.asynccontextmanager
    async def _get(self, url: httpx.URL, accept: str) -> AsyncIterator[httpcore.Response]:
        """Request `url` on a new connection."""
        backend = _Pinned(await self._addresses(url))
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=_port(url), target=url.raw_path)
        headers = [
            (b"Host", url.netloc),
            (b"Accept", accept.encode()),
            (b"Accept-Encoding", b"identity"),
            (b"User-Agent", USER_AGENT.encode()),
            (b"Connection", b"close"),
        ]
        ssl_context = self._ssl_context if url.scheme == "https" else None
        connection = httpcore.AsyncHTTPConnection(target.origin, ssl_context, network_backend=backend)
        async with contextlib.aclosing(backend), contextlib.aclosing(connection):
            try:
                async with connection.stream("GET", target, headers=headers) as response:
                    yield response
            except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
                raise FetchFailed(f"{type(error).__name__}: {error}") from error

    async def _addresses(self, url: httpx.URL) -> Sequence[str]:
        """Return the addresses to dial.

        Every resolved address must be allowed; a host that also resolves to a private one is rejected.
        """
        try:
            addresses = await self._resolve(url.raw_host.decode("ascii"), _port(url))
        except OSError as error:
            raise FetchFailed(f"the host can't be resolved: {error}") from error
        for address in addresses:
            if not self._allowed(address):
                raise FetchFailed(f"{address} is not a public address")
        if not addresses:
            raise FetchFailed("the host has no address")
        return addresses[:_MAX_ADDRESSES]

    def _allowed(self, text: str) -> bool:
        try:
            address = ip_address(text)
        except ValueError:
            return False
        networks = self._settings.allowed_networks
        inner = address.ipv4_mapped if isinstance(address, IPv6Address) else None
        return is_public(address) or any((inner or address) in network for network in networks)


async def _read(response: httpcore.Response, max_bytes: int) -> bytes:
    """Return the body. Raises TooLarge, before reading where the server says how long it is, and FetchFailed."""
    if response.status != 200:
        raise FetchFailed(f"status {response.status}", response.status)
    if _header(response, b"content-encoding").lower() not in ("", "identity"):
        raise FetchFailed("the content is compressed")  # we asked for it plain, and it could be any size
    announced = _header(response, b"content-length")
    too_large = TooLarge(f"it is larger than {max_bytes} bytes")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    content = bytearray()
    async for chunk in response.aiter_stream():
        content += chunk
        if len(content) > max_bytes:
            raise too_large
    return bytes(content)


def _header(response: httpcore.Response, name: bytes) -> str:
    value = next((value for key, value in response.headers if key.lower() == name), b"")
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _port(url: httpx.URL) -> int:
    return url.port if url.port is not None else {"http": 80, "https": 443}[url.scheme]
