"""Servers that speak the Model Context Protocol: their tools, as tools of ours, called `server__tool`.

A server is connected when its tools are first wanted, over pipes to a process of its own or over streamable HTTP. One
task owns each connection from beginning to end, because what the `mcp` package opens must be closed by the task that
opened it; calls come from any task. A connection that is lost is made again by the next call. A server process gets
none of the gateway's environment but what the configuration names (and PATH, HOME and the like), and never outlives it.

Does not handle resources, prompts, sampling and elicitation: a server can't use our models or ask our users. Raises
ToolError; a server that can't be reached has no tools, and is left alone for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from pydantic import BaseModel

from gateway.settings.config import ConfigError, McpServerSettings
from gateway.tools.base import MAX_OBSERVATION_CHARS, Observation, ToolError, nested_deeper

if TYPE_CHECKING:  # the package takes most of a second to import, and few gateways need it
    from mcp import Client
    from mcp_types import CallToolResult
    from mcp_types import Tool as ListedTool

log = logging.getLogger(__name__)

SEPARATOR = "__"
"""Between a server's name and its tool's; OpenAI and others allow letters, digits, `_` and `-` in names of tools."""
MAX_TOOLS = 64
"""Of one server."""
_MAX_NAME_CHARS = 64
_MAX_DESCRIPTION_CHARS = 600
_MAX_DATA_CHARS = 400_000
_MAX_PAGES = 20
MAX_DEPTH = 64
"""Of data in a result; encoders give up at 255."""
_MAX_NUMBER_CHARS = 1000
_MAX_NUMBER_BITS = 3000
_MAX_REFUSAL_CHARS = 300
_LOST = "The connection to the server was lost."
_MAX_TIMEOUTS = 3
"""Timeouts in a row after which a server counts as hung and is reconnected, which restarts its process."""
_RETRY_S = 30.0
"""After a failed connection, tools are not listed for this long. A call tries to connect at once."""
_LISTED_S = 600.0
"""Maximum age of a list of tools."""
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]")
_REPEATED_S = 60.0
_LEASH = Path(__file__).with_name("leash.py")


def _seldom() -> Callable[[logging.LogRecord], bool]:
    """Return a filter that passes a line once in `_REPEATED_S`, without its traceback, which quotes the server."""
    quiet_until = 0.0

    def filter_record(record: logging.LogRecord) -> bool:
        nonlocal quiet_until
        record.exc_info = None
        now = time.monotonic()
        if now < quiet_until:
            return False
        quiet_until = now + _REPEATED_S
        return True

    return filter_record


# The package logs a traceback for each line of a server's output that is no message.
logging.getLogger("mcp.client.stdio").addFilter(_seldom())


class _Connection:
    """State that the owning task shares with callers."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        """Cancelled, by any task, to close the connection."""
        self.ready: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self.over = False
        self.timeouts = 0
        """Timeouts in a row."""

    def close(self) -> None:
        self.over = True
        self.scope.cancel()


class McpServer:
    """One server. `tools` lists its tools, and each tool calls it."""

    def __init__(
        self,
        name: str,
        settings: McpServerSettings,
        environment: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError if an environment variable that the server needs is missing."""
        self.name = name
        self.timeout_s = settings.timeout_s
        self._command = settings.command
        self._url = settings.url
        self._env = {variable: _value(name, variable, environment) for variable in settings.env}
        self._headers = {
            header: _value(name, variable, environment) for header, variable in settings.headers_env.items()
        }
        self._allowed = None if settings.tools is None else frozenset(settings.tools)
        self._clock = clock
        self._connection: _Connection | None = None
        self._owners: set[asyncio.Task[None]] = set()
        self._connecting = asyncio.Lock()
        self._listing = asyncio.Lock()
        self._tools: list[McpTool] = []
        self._listed_until = 0.0
        self._not_before = 0.0
        self._closed = False

    async def tools(self) -> list[McpTool]:
        """Return the server's tools, or none if it can't be reached."""
        async with self._listing:
            now = self._clock()
            connected = self._connection is not None and not self._connection.over
            if (connected and now < self._listed_until) or now < self._not_before:
                return self._tools if connected else []
            try:
                async with asyncio.timeout(2 * self.timeout_s + 1):  # to connect, and for all pages together
                    self._tools = await self._list()
                self._listed_until = self._clock() + _LISTED_S
            except (ToolError, TimeoutError) as error:
                if isinstance(error, TimeoutError):
                    error = ToolError("The server takes too long to list its tools.")
                log.warning("tools.mcp.%s: %s", self.name, error)
                self._not_before = self._clock() + _RETRY_S
                return []
            return self._tools

    async def start(self) -> None:
        """Do nothing: the first use of its tools connects."""

    async def call(self, tool: str, arguments: dict[str, Any], *, repeatable: bool = False) -> Observation:
        """Call a tool by the server's own name for it. Raises ToolError.

        Without `repeatable`, a call is not retried after a lost connection: it may have been executed.
        """
        async with self._using(repeatable=repeatable) as client:
            result = await client.call_tool(tool, arguments)
        return _observation(result)

    async def close(self) -> None:
        """Close the connection and end the server's process. Idempotent."""
        self._closed = True
        if self._connection is not None:
            self._connection.close()
        if self._owners:
            await asyncio.wait(self._owners)

    async def _list(self) -> list[McpTool]:
        listed: list[ListedTool] = []
        cursor: str | None = None
        async with self._using() as client:
            for _ in range(_MAX_PAGES):
                page = await client.list_tools(cursor=cursor, cache_mode="refresh")
                listed += page.tools
                cursor = page.next_cursor
                if cursor is None:
                    break
        tools: dict[str, McpTool] = {}
        for entry in listed:
            if self._allowed is not None and entry.name not in self._allowed:
                continue
            try:
                tool = McpTool(self, entry)
            except ValueError as error:
                log.warning("tools.mcp.%s: %r is left out: %s", self.name, entry.name[:80], error)
                continue
            tools.setdefault(tool.name, tool)
        return list(tools.values())[:MAX_TOOLS]

    @contextlib.asynccontextmanager
    async def _using(self, *, repeatable: bool = True) -> AsyncIterator[Client]:
        """Give the client, connected, and put its failures into our words."""
        from mcp import MCPError

        connection = await self._connect()
        try:
            yield connection.ready.result()
        except MCPError as error:
            raise self._failure(connection, error.code, error.message, repeatable) from error
        except (RuntimeError, ValueError) as error:  # pydantic's ValidationError is one; the package raises both
            raise ToolError("The server's answer is not what it announced.") from error
        except (anyio.ClosedResourceError, anyio.BrokenResourceError, OSError) as error:
            connection.close()
            raise ToolError(_LOST, may_pass=repeatable) from error
        connection.timeouts = 0

    def _failure(self, connection: _Connection, code: int, message: str, repeatable: bool) -> ToolError:
        from mcp_types import CONNECTION_CLOSED, INTERNAL_ERROR, INVALID_REQUEST, REQUEST_TIMEOUT

        if code == REQUEST_TIMEOUT:
            connection.timeouts += 1
            if connection.timeouts >= _MAX_TIMEOUTS:
                connection.close()
            return ToolError(f"The server did not answer within {self.timeout_s:g} s.", out_of_order=True)
        # An HTTP server that no longer knows our session calls the request invalid, and has done nothing.
        forgotten = bool(self._url) and code == INVALID_REQUEST
        if code == CONNECTION_CLOSED or forgotten:
            connection.close()
            return ToolError(_LOST, may_pass=repeatable or forgotten)
        if code == INTERNAL_ERROR and self._url:
            return ToolError("The server failed.", may_pass=repeatable)  # it, or a proxy in front of it
        return ToolError(f"The server refuses the call: {message[:_MAX_REFUSAL_CHARS]}")

    async def _connect(self) -> _Connection:
        """Return the connection, opening one if there is none. Raises ToolError."""
        async with self._connecting:
            if self._closed:
                raise ToolError("The server is being closed.")
            connection = self._connection
            if connection is None or connection.over:
                connection = self._connection = _Connection()
                owner = asyncio.create_task(self._own(connection), name=f"mcp {self.name}")
                self._owners.add(owner)
                owner.add_done_callback(self._owners.discard)
            try:
                async with asyncio.timeout(self.timeout_s):
                    # Shielded: a caller that leaves must not take the connection from those who come after it.
                    await asyncio.shield(connection.ready)
            except TimeoutError:
                connection.close()
                raise ToolError(f"The server did not start within {self.timeout_s:g} s.") from None
            except ConnectionError as error:
                raise ToolError(str(error), may_pass=True) from error
            return connection

    async def _own(self, connection: _Connection) -> None:
        """Open the connection, keep it open, and close it."""
        from mcp import Client, Implementation

        from gateway import __version__

        info = Implementation(name="shannon-gateway", version=__version__)
        try:
            with connection.scope:
                async with Client(self._transport(), read_timeout_seconds=self.timeout_s, client_info=info) as client:
                    connection.ready.set_result(client)
                    await anyio.sleep_forever()
        except Exception as error:  # whatever a server, a network or the package can do; no caller awaits this task
            log.info("tools.mcp.%s: the connection has ended: %r", self.name, error)
        finally:
            connection.over = True
            if not connection.ready.done():
                connection.ready.set_exception(ConnectionError("The server can't be reached."))
                connection.ready.exception()  # retrieved, even if no caller waits any more

    @contextlib.asynccontextmanager
    async def _transport(self) -> AsyncIterator[Any]:
        if self._url:
            import httpx2
            from mcp.client.streamable_http import streamable_http_client

            # A stream may be silent until its answer; the session bounds each request.
            timeout = httpx2.Timeout(self.timeout_s, read=self.timeout_s + 5)
            async with (
                httpx2.AsyncClient(headers=self._headers, timeout=timeout, trust_env=False) as http,
                streamable_http_client(self._url, http_client=http) as streams,
            ):
                yield streams
            return
        from mcp import StdioServerParameters, stdio_client

        leash = ["-I", "-S", str(_LEASH), str(os.getpid())]
        server = StdioServerParameters(command=sys.executable, args=[*leash, *self._command], env=self._env)
        # What it complains about belongs where the gateway complains.
        async with stdio_client(server, errlog=sys.__stderr__ or sys.stderr) as streams:
            yield streams


class McpTool:
    """A tool of a server."""

    def __init__(self, server: McpServer, listed: ListedTool) -> None:
        """Raises ValueError on a schema that can't be used."""
        from gateway.tools.json_arguments import arguments_model

        self.name = tool_name(server.name, listed.name)
        self.description = " ".join((listed.description or listed.title or "").split())[:_MAX_DESCRIPTION_CHARS]
        self.arguments: type[BaseModel] = arguments_model(dict(listed.input_schema))
        # Time to connect again, then the server's own limit, so that a slow answer is not taken for a dead server.
        self.timeout_s = 2 * server.timeout_s + 1
        self._server = server
        self._own_name = listed.name
        hints = listed.annotations
        self._repeatable = bool(hints and (hints.read_only_hint or hints.idempotent_hint))

    async def run(self, arguments: Any) -> Observation:
        """Call the tool. Raises ToolError."""
        return await self._server.call(self._own_name, arguments.root, repeatable=self._repeatable)

    async def close(self) -> None:
        """Do nothing: the server closes its connection."""


def tool_name(server: str, own_name: str) -> str:
    """Return the name of a server's tool for agents."""
    return f"{server}{SEPARATOR}{_NOT_IN_NAMES.sub('_', own_name)}"[:_MAX_NAME_CHARS]


def _value(name: str, variable: str, environment: Mapping[str, str]) -> str:
    if value := environment.get(variable, "").strip():
        return value
    raise ConfigError(f"tools.mcp.{name}: {variable} is not set")


def _observation(result: CallToolResult) -> Observation:
    """Return a result as text and data: the structured content, text that is JSON, or None."""
    parts = [_block_text(block) for block in result.content]
    text = "\n".join(part for part in parts if part)[:_MAX_DATA_CHARS]
    data = result.structured_content
    if data is None and text[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            data = json.loads(text)
    data = _encodable(data)
    if data is not None and not text:
        text = json.dumps(data, ensure_ascii=False)
    return Observation(text[:MAX_OBSERVATION_CHARS] or "(nothing)", ok=not result.is_error, data=data)


def _encodable(data: Any) -> Any:
    """Return data in the form that events allow: integers of at most 64 bits. None if it is nested too deep."""
    if nested_deeper(data, MAX_DEPTH):
        return None

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): plain(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return str(value)[:_MAX_NUMBER_CHARS] if value.bit_length() < _MAX_NUMBER_BITS else "(a very long number)"
        return value

    return plain(data)


def _block_text(block: Any) -> str:
    if block.type == "text":
        return str(block.text)
    if block.type == "resource":
        return str(getattr(block.resource, "text", "")) or f"[{block.resource.uri}]"
    if block.type == "resource_link":
        return f"[{block.name}: {block.uri}]"
    return f"[{block.type}]"
