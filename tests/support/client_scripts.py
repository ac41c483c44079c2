"""The clients of tests/e2e/clients, run as a user runs them.

Example:

    output = run_client(gateway, sys.executable, str(CLIENTS / "chat.py"))
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support.gateway_process import ROOT, GatewayProcess

CLIENTS = Path(__file__).parents[1] / "e2e/clients"


def run_client(gateway: GatewayProcess, *command: str, cwd: Path = ROOT, **environment: str) -> str:
    """The standard output of a command that calls the gateway."""
    result = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"SHANNON_URL": gateway.url, "SHANNON_KEY": gateway.key} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
