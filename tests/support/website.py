"""A web server on loopback whose every byte is scripted. It records the requests.

Example:

    async with run_website() as site:
        site.pages["/a"] = page(b"<p>Hello</p>")
        ...
    assert site.paths == ["/a"]
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field


def page(
    content: bytes = b"", *, status: str = "200 OK", length: int | None = None, headers: dict[str, str] | None = None
) -> bytes:
    """Return a response as bytes. `length` is the Content-Length where it is not that of `content`; -1 for none."""
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in (headers or {}).items())]
    if length != -1:
        lines.append(f"Content-Length: {len(content) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def redirect(location: str, status: str = "302 Found") -> bytes:
    """Return a response that leads to `location`."""
    return page(status=status, headers={"Location": location})


@dataclass
class Website:
    """What is served at each path, after which the connection is closed. A path without a page is never answered."""

    port: int = 0
    pages: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Heads of the requests, in the order they came."""
    connections: int = 0
    """Open now."""

    @property
    def paths(self) -> list[str]:
        return [head.split()[1] for head in self.asked]


@contextlib.asynccontextmanager
async def run_website(*, ssl_context: ssl.SSLContext | None = None) -> AsyncIterator[Website]:
    """Serve a website on 127.0.0.1."""
    site = Website()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        site.connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            site.asked.append(head)
            if (answer := site.pages.get(head.split()[1])) is None:
                await reader.read()  # until the client leaves
            else:
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            pass
        finally:
            site.connections -= 1
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=ssl_context)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        server.close()
