"""The command that runs the server of tests/support/mcp_stub.py.

Example:

    {"kind": "mcp", "command": MCP_STUB}
"""

from __future__ import annotations

import sys

from tests.support.app import ROOT

MCP_STUB = [sys.executable, str(ROOT / "tests/support/mcp_stub.py")]
