"""MCP servers, over real pipes to a real process and over real HTTP: their tools, their failures, and their end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from mcp.server.mcpserver import MCPServer
from pydantic import ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.outbound.fetch import Fetcher
from gateway.settings.config import ConfigError, McpServerSettings, parse_config
from gateway.tools import leash
from gateway.tools.assembly import build_toolbox
from gateway.tools.base import Observation, Toolbox, ToolError
from gateway.tools.json_arguments import arguments_model
from gateway.tools.mcp_servers import McpServer
from gateway.tools.server_toolbox import ServerToolbox, stocked
from tests.support.app import ROOT
from tests.support.mcp_stub import ROWS
from tests.support.waiting import FakeClock, until

pytestmark = pytest.mark.anyio

VARIABLES = {"PTENGINE_TOKEN": "theirs", "PT_KEY": "k-1", "WRONG_KEY": "k-2", "SHANNON_BOOTSTRAP_KEY": "ours"}
STUB = [sys.executable, str(ROOT / "tests/support/mcp_stub.py")]


@pytest.fixture
async def servers() -> AsyncIterator[Callable[..., McpServer]]:
    """Makes servers, closed at the end of the test."""
    made: list[McpServer] = []

    def make(name: str = "stub", clock: Callable[[], float] = time.monotonic, **settings: Any) -> McpServer:
        whole = McpServerSettings(**({"command": STUB, "timeout_s": 20.0} | settings))
        made.append(McpServer(name, whole, VARIABLES, clock=clock))
        return made[-1]

    yield make
    for server in made:
        await server.close()


async def box(*several: McpServer) -> Toolbox:
    return await stocked(ServerToolbox(servers=several, backoff_s=0.0))


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and nobody has asked about counts as ended."""
    try:
        return f"{pid} (" in (stat := Path(f"/proc/{pid}/stat").read_text()) and stat.rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


async def environment(tools: Toolbox) -> dict[str, Any]:
    found = await tools.call("stub__environment", {})
    assert found.ok, found.text
    told: dict[str, Any] = found.data
    return told


async def test_tools_of_a_server_have_its_name_in_front(servers: Callable[..., McpServer]) -> None:
    tools = await box(servers())
    assert tools.names == [
        *("stub__add", "stub__traffic", "stub__wait", "stub__die", "stub__fail", "stub__page_views_v2"),
        *("stub__environment", "stub__look_and_die"),
    ]
    added = next(tool for tool in tools.describe() if tool["name"] == "stub__add")
    assert added["description"] == "Add two numbers."
    assert added["arguments"]["required"] == ["a", "b"]
    assert (await tools.call("stub__add", {"a": 2, "b": 40})).text == "42"
    assert (await tools.call("stub__page_views_v2", {})).text == "page.views/v2"


async def test_arguments_are_checked_against_the_servers_schema(servers: Callable[..., McpServer]) -> None:
    tools = await box(servers())
    for arguments, said in (
        ({"a": 1}, "'b' is a required property"),
        ({"a": 1, "b": "x"}, "b: 'x' is not of type 'number'"),
        ({"a": 1, "b": 2, "c": 3}, "Additional properties are not allowed"),
    ):
        found = await tools.call("stub__add", arguments)
        assert not found.ok
        assert said in found.text


async def test_structured_content_is_data(servers: Callable[..., McpServer]) -> None:
    found = await (await box(servers())).call("stub__traffic", {})
    assert found == Observation("two pages", data={"rows": ROWS})


async def test_error_of_a_tool_is_an_observation(servers: Callable[..., McpServer]) -> None:
    found = await (await box(servers())).call("stub__fail", {})
    assert (found.ok, found.text) == (False, "no such segment")


async def test_only_allowed_tools_are_offered(servers: Callable[..., McpServer]) -> None:
    server = servers(tools=["add", "fail"])
    assert (await box(server)).names == ["stub__add", "stub__fail"]
    whole = ServerToolbox(servers=[server])
    assert "stub__add" in whole
    assert "other__add" not in whole
    assert (await stocked(whole.only(["stub__fail", "web_search"]))).names == ["stub__fail"]
    assert (await stocked(whole.only(["stub"]))).names == ["stub__add", "stub__fail"]
    assert (await stocked(whole.only(["web_search"]))).names == []


async def test_server_process_gets_named_variables_only(
    servers: Callable[..., McpServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHANNON_BOOTSTRAP_KEY", "not for others")
    told = await environment(await box(servers(env=["PTENGINE_TOKEN"])))
    assert told["PTENGINE_TOKEN"] == "theirs"
    # LC_CTYPE is Python's own doing, in the C locale.
    allowed = {"PTENGINE_TOKEN", "HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER", "LC_CTYPE", "pid", "parent"}
    assert told.keys() <= allowed


async def test_server_process_ends_when_closed(servers: Callable[..., McpServer]) -> None:
    server = servers()
    told = await environment(await box(server))
    assert alive(told["pid"])
    await server.close()
    await server.close()
    assert not alive(told["pid"])
    assert await server.tools() == []


async def test_server_process_dies_with_the_gateway(tmp_path: Path) -> None:
    """A server that reads nothing does not see its standard input end: the kernel must end it."""
    (tmp_path / "deaf.py").write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "while True: time.sleep(60)\n"
    )
    told = tmp_path / "pid"
    program = (
        "import asyncio, sys\n"
        "from gateway.settings.config import McpServerSettings\n"
        "from gateway.tools.mcp_servers import McpServer\n"
        f"command = [sys.executable, {str(tmp_path / 'deaf.py')!r}, {str(told)!r}]\n"
        "server = McpServer('deaf', McpServerSettings(command=command), {})\n"
        "asyncio.run(server.tools())\n"
    )
    gateway = await asyncio.create_subprocess_exec(sys.executable, "-c", program, cwd=ROOT)
    try:
        await until(lambda: told.exists() and told.read_text().isdigit(), within_s=30)
        pid = int(told.read_text())
        assert alive(pid)
    finally:
        gateway.send_signal(signal.SIGKILL)
        await gateway.wait()
    await until(lambda: not alive(pid))


async def test_server_that_died_is_started_anew(servers: Callable[..., McpServer]) -> None:
    server = servers()
    tools = await box(server)
    first = (await environment(tools))["pid"]
    os.kill(first, signal.SIGKILL)
    await until(lambda: not alive(first))
    assert (await environment(tools))["pid"] != first


async def test_server_that_dies_under_a_call_is_an_observation(servers: Callable[..., McpServer]) -> None:
    tools = await box(servers())
    found = await tools.call("stub__die", {})
    assert (found.ok, found.text) == (False, "stub__die: The connection to the server was lost.")
    assert (await tools.call("stub__add", {"a": 1, "b": 1})).text == "2"


@pytest.mark.parametrize(("tool", "times"), [("die", 1), ("look_and_die", 3)])
async def test_call_is_only_repeated_where_that_changes_nothing(
    servers: Callable[..., McpServer], tmp_path: Path, tool: str, times: int
) -> None:
    found = await (await box(servers())).call(f"stub__{tool}", {"note": str(tmp_path / "note")})

    assert not found.ok
    assert (tmp_path / "note").read_text().count("called") == times


async def test_server_that_does_not_answer_costs_one_call(servers: Callable[..., McpServer], tmp_path: Path) -> None:
    server = servers(timeout_s=2.0)
    tools = await box(server)
    pid = (await environment(tools))["pid"]
    waiting = asyncio.create_task(tools.call("stub__wait", {"touch": str(tmp_path / "called")}))
    await until((tmp_path / "called").exists)
    added = await asyncio.gather(*(tools.call("stub__add", {"a": n, "b": 0}) for n in range(10)))
    assert [found.text for found in added] == [str(n) for n in range(10)]
    assert (await waiting).text == "stub__wait: The server did not answer within 2 s."
    assert (await environment(tools))["pid"] == pid


async def test_server_that_hangs_is_started_anew(servers: Callable[..., McpServer]) -> None:
    server = servers(timeout_s=2.0)
    pid = json.loads((await server.call("environment", {})).text)["pid"]
    os.kill(pid, signal.SIGSTOP)
    failures = await asyncio.gather(*(server.call("add", {"a": 1, "b": 1}) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(failure, ToolError) for failure in failures)
    os.kill(pid, signal.SIGCONT)  # or its end takes seconds
    assert json.loads((await server.call("environment", {})).text)["pid"] != pid


async def test_caller_that_leaves_leaves_the_connection(servers: Callable[..., McpServer], tmp_path: Path) -> None:
    tools = await box(servers())
    pid = (await environment(tools))["pid"]
    waiting = asyncio.create_task(tools.call("stub__wait", {"touch": str(tmp_path / "called")}))
    await until((tmp_path / "called").exists)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (await environment(tools))["pid"] == pid


async def test_caller_that_leaves_while_connecting_leaves_nothing_half_open(
    servers: Callable[..., McpServer],
) -> None:
    server = servers()
    connecting = asyncio.create_task(server.tools())
    await until(lambda: server._connection is not None)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    assert len(await server.tools()) == 8


async def test_server_that_can_not_start_has_no_tools_for_a_while(servers: Callable[..., McpServer]) -> None:
    clock = FakeClock()
    server = servers(command=["no-such-command-anywhere"], clock=clock)
    assert (await box(server)).names == []
    server._command = STUB
    assert await server.tools() == []
    clock.advance(31)
    assert len(await server.tools()) == 8


async def test_server_that_never_speaks_is_given_up(servers: Callable[..., McpServer]) -> None:
    server = servers(command=[sys.executable, "-c", "import time; time.sleep(600)"], timeout_s=0.5)
    assert await server.tools() == []


async def test_list_without_an_end_is_given_up(servers: Callable[..., McpServer], tmp_path: Path) -> None:
    """Every request of a model with this server waits for its list."""
    asked = tmp_path / "asked"
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.support import mcp_stub
usual = mcp_stub.answer
def answer(request):
    said = usual(request)
    if request.get("method") == "tools/list":
        with open({str(asked)!r}, "a") as note:
            note.write("x")
        time.sleep(0.4)
        said["result"]["nextCursor"] = str(time.time())
    return said
mcp_stub.answer = answer
mcp_stub.main()
"""
    server = servers(command=[sys.executable, "-c", script], timeout_s=1.0)

    assert await server.tools() == []

    pages = len(asked.read_text())
    assert 1 <= pages < 10, "each page was in time, all twenty were not"


async def test_garbage_of_a_server_is_one_line_in_the_log(
    servers: Callable[..., McpServer], caplog: pytest.LogCaptureFixture
) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.support import mcp_stub
for number in range(500):
    print("debug: secret", number)
mcp_stub.main()
"""
    tools = await box(servers(command=[sys.executable, "-c", script]))

    assert (await tools.call("stub__add", {"a": 2, "b": 40})).text == "42"
    assert len([record for record in caplog.records if record.name == "mcp.client.stdio"]) <= 1
    assert "secret" not in caplog.text


@pytest.mark.parametrize("said", ["text", "many blocks"])
async def test_answer_that_is_too_long_is_an_observation(servers: Callable[..., McpServer], said: str) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.support import mcp_stub
usual = mcp_stub.answer
def answer(request):
    said = usual(request)
    if request.get("method") == "tools/call" and request["params"]["arguments"]["a"] == 1:
        block = {{"type": "text", "text": "x" * (20_000_000 if {said == "text"} else 1)}}
        said["result"] = {{"content": [block] * (1 if {said == "text"} else 100_000)}}
    return said
mcp_stub.answer = answer
mcp_stub.main()
"""
    tools = await box(servers(command=[sys.executable, "-c", script]))
    found = await tools.call("stub__add", {"a": 1, "b": 1})

    assert not found.ok
    assert "longer than 1048576 bytes" in found.text
    assert (await tools.call("stub__add", {"a": 2, "b": 40})).text == "42", "by the same process"


def test_server_that_writes_without_end_is_slowed_down() -> None:
    """The gateway takes its lines on the event loop, one after the other."""
    lines = 2 * leash.MESSAGES_PER_S
    command = [sys.executable, leash.__file__, str(os.getpid()), sys.executable, "-c", f"print('{{}}\\n' * {lines})"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, check=True)

    assert done.stdout.count(b"{}") == lines
    assert time.monotonic() - began > 0.9 * lines / leash.MESSAGES_PER_S - 1, "the first come at once"


# Over HTTP, to a server made with the package.


class Door:
    """Lets requests with the right header in, and counts them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.refused = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (b"x-pt-key", b"k-1") not in scope["headers"]:
            self.refused += 1
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"no"})
            return
        await self.app(scope, receive, send)


@asynccontextmanager
async def http_server(port: int = 0) -> AsyncIterator[tuple[str, Door]]:
    """Serve two tools at the URL that is given."""
    made = MCPServer("heatmaps", log_level="ERROR")

    @made.tool()
    def clicks(page: str) -> dict[str, int]:
        """Count the clicks on a page."""
        return {"clicks": len(page) * 100}

    @made.tool()
    def broken() -> str:
        """Fail."""
        raise ValueError("no such page")

    door = Door(made.streamable_http_app())
    sock = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(door, log_config=None, lifespan="on", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        await until(lambda: server.started)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/mcp", door
    finally:
        server.should_exit = True
        await serving
        sock.close()


def over_http(servers: Callable[..., McpServer], url: str, variable: str = "PT_KEY") -> McpServer:
    return servers("heat", command=[], url=url, headers_env={"X-PT-Key": variable})


async def test_http_server_is_called(servers: Callable[..., McpServer]) -> None:
    async with http_server() as (url, door):
        server = over_http(servers, url)
        tools = await box(server)
        assert tools.names == ["heat__clicks", "heat__broken"]
        found = await tools.call("heat__clicks", {"page": "/abc"})
        assert found.ok, found.text
        assert found.data == {"clicks": 400}
        assert json.loads(found.text) == {"clicks": 400}
        assert not (await tools.call("heat__broken", {})).ok
        assert not (await tools.call("heat__clicks", {})).ok
        assert door.refused == 0
        await server.close()


async def test_http_server_that_refuses_the_key_has_no_tools(servers: Callable[..., McpServer]) -> None:
    async with http_server() as (url, door):
        server = over_http(servers, url, variable="WRONG_KEY")
        assert await server.tools() == []
        assert door.refused
        await server.close()


async def test_http_server_that_is_not_there_has_no_tools(servers: Callable[..., McpServer]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    assert await over_http(servers, f"http://127.0.0.1:{port}/mcp").tools() == []


async def test_http_server_that_was_restarted_is_connected_anew(servers: Callable[..., McpServer]) -> None:
    async with http_server() as (url, _):
        server = over_http(servers, url)
        tools = await box(server)
        assert (await tools.call("heat__clicks", {"page": "/"})).data == {"clicks": 100}
    found = await tools.call("heat__clicks", {"page": "/"})
    assert not found.ok
    async with http_server(int(url.split(":")[2].split("/")[0])) as _:
        assert (await tools.call("heat__clicks", {"page": "/"})).data == {"clicks": 100}
        await server.close()


async def test_configured_servers_are_in_the_box_and_close_with_it() -> None:
    config = parse_config(
        {
            "engines": {"main": {"kind": "mock"}},
            "models": {"shannon-chat": {"description": "Chat"}},
            "tools": {
                "web_fetch": {"enabled": False},
                "serp_ads": {"provider": "serper"},
                "mcp": {"pt-engine": {"command": STUB, "tools": ["add", "environment"]}},
            },
        }
    )
    toolbox = build_toolbox(config, {"SERPER_API_KEY": "k"}, Fetcher(config.fetch))
    await toolbox.start()
    assert toolbox.names == ["serp_ads", "pt-engine"]
    assert "pt-engine__add" in toolbox
    tools = await stocked(toolbox)
    assert tools.names == ["serp_ads", "pt-engine__add", "pt-engine__environment"]
    pid = (await tools.call("pt-engine__environment", {})).data["pid"]
    await tools.close()
    assert alive(pid), "a share closes nothing"
    await toolbox.close()
    assert not alive(pid)


def test_variable_that_is_not_set_is_named() -> None:
    settings = McpServerSettings(url="https://mcp.test/", headers_env={"X-Key": "NOT_SET"})
    with pytest.raises(ConfigError, match=r"^tools\.mcp\.pt: NOT_SET is not set$"):
        McpServer("pt", settings, {})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "give either command or url"),
        ({"command": ["x"], "url": "http://mcp.test"}, "give either command or url"),
        ({"url": "http://me:pw@mcp.test"}, "must not contain credentials"),
        ({"url": "ftp://mcp.test"}, "http or https"),
        ({"url": "http://mcp.test", "env": ["A"]}, "use headers_env"),
        ({"command": ["x"], "headers_env": {"A": "B"}}, "use env"),
        ({"command": ["x"], "env": ["A=secret"]}, "env.0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        McpServerSettings(**settings)


def test_schema_that_is_none_is_refused() -> None:
    for schema in ({"type": "no such type"}, {"properties": 3}, {"description": "x" * 30_000}):
        with pytest.raises(ValueError, match="schema"):
            arguments_model(schema)


def test_schema_fetches_nothing() -> None:
    model = arguments_model({"$ref": "http://127.0.0.1:1/schema.json"})
    with pytest.raises(ValueError, match="outside itself"):
        model.model_validate({})


@pytest.mark.parametrize("keyword", ["allOf", "anyOf", "oneOf"])
def test_arguments_are_not_checked_for_ever_against_a_schema_whose_references_branch(keyword: str) -> None:
    """Each level doubles the work: 2**40 steps, on the event loop."""
    levels = 40
    wrong = {"type": "string"} if keyword != "allOf" else {"type": "object"}
    definitions: dict[str, Any] = {
        f"d{n}": {keyword: [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}]} for n in range(levels)
    }
    model = arguments_model({"$defs": definitions | {f"d{levels}": wrong}, "$ref": "#/$defs/d0"})
    with pytest.raises(ValueError, match="takes too long to check"):
        model.model_validate({})


def test_schema_that_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(300):
        schema = {"allOf": [schema]}
    with pytest.raises(ValueError, match="nested too deeply"):
        arguments_model(schema)


def test_many_arguments_are_checked() -> None:
    properties = {f"p{n}": {"type": "string", "maxLength": 5} for n in range(300)}
    model = arguments_model({"type": "object", "properties": properties})

    assert len(model.model_validate(dict.fromkeys(properties, "x")).root) == 300
