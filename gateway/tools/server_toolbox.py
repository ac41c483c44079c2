"""Toolbox with MCP servers, whose tools are known only after connecting.

Its tools are named `server__tool`. Where tools are chosen by name, `server` and `server/*` select all tools of a
server, and `server/tool` one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from gateway.tools.base import Resource, Tool, Toolbox
from gateway.tools.mcp_servers import SEPARATOR, McpServer, tool_name


class ServerToolbox(Toolbox):
    """A toolbox that also holds servers. `stocked` connects them and adds their tools."""

    def __init__(
        self,
        tools: Iterable[Tool] = (),
        servers: Sequence[McpServer] = (),
        *,
        meant: Sequence[frozenset[str]] = (),
        resources: Sequence[Resource] = (),
        **kept: Any,
    ) -> None:
        """`meant` are selections of servers or of their tools. A tool must be in all of them."""
        super().__init__(tools, resources=[*resources, *servers], **kept)
        self._servers = {server.name: server for server in servers}
        self._meant = tuple(meant)

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name):
            return True
        if not isinstance(name, str):
            return False
        name = canonical(name)
        return server_of(name) in self._servers and (SEPARATOR not in name or self._means(name))

    @property
    def names(self) -> list[str]:
        return [*super().names, *self._servers]

    def only(self, names: Iterable[str]) -> ServerToolbox:
        """Return a toolbox with the tools and servers among `names`. Closing it closes nothing."""
        wanted = frozenset(map(canonical, names))
        tools = [tool for name, tool in self._tools.items() if name in wanted]
        servers = [server for server in self._servers.values() if any(server_of(n) == server.name for n in wanted)]
        share = ServerToolbox(tools, servers, meant=(*self._meant, wanted), **self._shared())
        share._lent = True
        return share

    async def stocked(self) -> Toolbox:
        """Connect the servers and return a toolbox with their tools. Raises nothing but CancelledError."""
        found = await asyncio.gather(*(server.tools() for server in self._servers.values()))
        tools = [tool for tools in found for tool in tools if self._means(tool.name)]
        share = Toolbox([*self._tools.values(), *tools], **self._shared())
        share._lent = True
        return share

    def _means(self, name: str) -> bool:
        return all(name in choice or server_of(name) in choice for choice in self._meant)

    def _shared(self) -> dict[str, Any]:
        return {"clock": self._clock, "breakers": self._breakers, "backoff_s": self._backoff_s}


async def stocked(toolbox: Toolbox) -> Toolbox:
    """Return `toolbox` with the tools of its servers, if it has any."""
    return await toolbox.stocked() if isinstance(toolbox, ServerToolbox) else toolbox


def canonical(name: str) -> str:
    """Convert `server/tool` to the tool's name, and `server/*` to the server's."""
    server, _, tool = name.replace("/", SEPARATOR, 1).partition(SEPARATOR)
    return server if tool in ("", "*") else tool_name(server, tool)


def server_of(name: str) -> str:
    """Return the server in a tool's name, or the name itself if it has none."""
    return name.partition(SEPARATOR)[0]
