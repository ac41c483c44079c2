"""A server of the Model Context Protocol (revision of June 2025) over pipes, run as a script.

It does not use the `mcp` package, which the gateway uses.

Example:

    {"kind": "mcp", "command": MCP_STUB}
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

MCP_STUB = [sys.executable, str(Path(__file__).resolve())]
"""The command that runs this server."""
_NUMBER = {"type": "number"}
TOOLS = [
    {
        "name": "add",
        "description": "Add two numbers.",
        "inputSchema": {
            "type": "object",
            "properties": {"a": _NUMBER, "b": _NUMBER},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
    *(
        {"name": name, "description": f"Do {name}.", "inputSchema": {"type": "object"}}
        for name in ("traffic", "wait", "die", "fail", "page.views/v2")
    ),
    *(
        {
            "name": name,
            "description": f"Do {name}.",
            "inputSchema": {"type": "object"},
            "annotations": {"readOnlyHint": True},
        }
        for name in ("environment", "look_and_die")
    ),
    {"name": "broken", "inputSchema": {"type": "object", "properties": {"x": {"type": "no such type"}}}},
]
ROWS = [{"page": "/", "visits": 1204}, {"page": "/pricing", "visits": 310}]


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of a tool, None to say nothing; `wait` shows by a file that it was called."""
    if name == "add":
        return text(str(arguments["a"] + arguments["b"]))
    if name == "traffic":
        return text("two pages") | {"structuredContent": {"rows": ROWS}}
    if name == "environment":
        return text(json.dumps(dict(os.environ) | {"pid": os.getpid(), "parent": os.getppid()}))
    if name == "wait":
        Path(arguments["touch"]).touch()
        return None
    if name in ("die", "look_and_die"):
        if "note" in arguments:
            with Path(arguments["note"]).open("a") as note:
                note.write("called\n")
        os._exit(3)
    if name == "fail":
        return text("no such segment") | {"isError": True}
    return text(name)


def text(what: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": what}]}


def answer(request: dict[str, Any]) -> dict[str, Any] | None:
    """Return what is said to a message, None for nothing."""
    method, params = request.get("method"), request.get("params") or {}
    if "id" not in request:
        return None
    result: dict[str, Any] | None
    if method == "initialize":
        info = {"name": "stub", "version": "1"}
        result = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": info}
    elif method == "tools/list":
        result = {"tools": TOOLS}
    elif method == "tools/call":
        result = call(params["name"], params.get("arguments") or {})
    else:
        error = {"code": -32601, "message": "Method not found"}
        return {"jsonrpc": "2.0", "id": request["id"], "error": error}
    return None if result is None else {"jsonrpc": "2.0", "id": request["id"], "result": result}


def main() -> None:
    """Answer until standard input ends."""
    for line in sys.stdin:
        said = answer(json.loads(line))
        if said is not None:
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
