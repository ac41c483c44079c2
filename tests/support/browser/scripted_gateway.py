"""A gateway to look at: agents that research its own documentation, a model that follows a script, some usage.

    python -m tests.support.browser.scripted_gateway FOLDER [--port N] [--demo] [--days N]

Prints its URL when it is ready. The key is `tests.conftest.KEY`. What the model says stands in `script`; the search,
the reading, the events and the citations are the product's own. One more model, `FAST`, says the same in no time; it
takes no pictures and has no limits. With `--demo`, shannon-chat is the real demo model in its place, and may be
inspected. `--days` makes up usage of several keys over so many days: pictures of one bar show little.

Example:

    with scripted_gateway.run(tmp_path) as running:
        page.goto(running.url)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.mock import MockEngine
from engine.supervisor import SupervisedEngine
from gateway.access.allowance import Allowance
from gateway.access.keys import KeySpec
from gateway.access.ledger import Entry
from gateway.app import create_app
from gateway.components import build_authenticator, build_engines, build_store
from gateway.services import Services
from gateway.serving.server import Server
from gateway.settings.config import ConfigError, load_config
from tests.support.app import KEY, ROOT
from tests.support.browser import script
from tests.support.browser.visit import Site
from tests.support.gateway_process import UNLIMITED, child, printed

FAST = "acme-research/instruct-70b-with-a-name-that-goes-on-and-on-and-on-2026-11-preview"
PATIENT = {"command_timeout_ms": 10_000}
"""The store's answer is waited for, however busy this machine is with a browser."""
_WORKFLOWS = {
    "shannon-quick-research": "quick_research",
    "shannon-standard-research": "standard_research",
    "shannon-deep-research": "deep_research",
    "shannon-complex": "complex",
}


@dataclass
class ScriptedGateway:
    """A running one."""

    site: Site
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End it as a power cut would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def run(folder: Path, *arguments: str) -> Iterator[ScriptedGateway]:
    """Run this module, and yield when it is ready."""
    folder.mkdir(exist_ok=True)
    log = folder / "gateway.log"
    with child([__name__, str(folder), *arguments], log, {}) as process:
        yield ScriptedGateway(Site(printed(process, log, r"^(http://\S+)$"), KEY), process)


def write_documents(folder: Path) -> None:
    """Write the chapters of the documentation as documents; their titles have no commas."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in (ROOT / "docs").glob("*.md"):
        title, _, text = page.read_text().partition("\n")
        (folder / page.name).write_text(f"{title.replace(',', '')}\n{text}")


def _engine(name: str, **options: Any) -> SupervisedEngine:
    return SupervisedEngine(name, lambda: MockEngine(reply=script.model(), max_model_len=65_536, **options))


def _config(folder: Path, *, demo: bool) -> Path:
    """Write the configuration and return its path."""
    tree: dict[str, Any] = {
        "include": str(ROOT / "configs/models.yaml"),
        "engines": {"scripted": {"kind": "mock"}},
        "models": {},
        "store": {"data_dir": str(folder / "data"), **PATIENT},
        "tools": {"local_search": {"folder": str(folder / "documents")}},
    }
    if demo:
        tree["engines"]["main"] = {"kind": "embedded", "model": "demo", "args": {"max_model_len": 2048}}
        tree["inspector"] = {"enabled": True}
    else:
        fast = {"description": "All of it at once", "engine": "fast", "limits": UNLIMITED}
        tree["engines"]["fast"] = {"kind": "mock"}
        tree["models"][FAST] = fast | {"defaults": {"max_tokens": script.LONG_TOKENS}}
    for model in yaml.safe_load((ROOT / "configs/models.yaml").read_text())["models"]:
        engine = "main" if demo and model == "shannon-chat" else "scripted"
        tree["models"][model] = {"engine": engine, "workflow": _WORKFLOWS.get(model, "chat")}
    path = folder / "gateway.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


async def _make_up_usage(services: Services, days: int) -> None:
    chance = random.Random(days)
    names = ("playground", "search-team", "nightly-eval", "mobile-app")
    keys = [(await services.keys.create(KeySpec(name=name, tenant="acme")))[0] for name in names]
    today = datetime.datetime.now(datetime.UTC).date()
    for ago in range(days):
        date = today - datetime.timedelta(days=ago)
        for weight, key in enumerate(keys, 1):
            requests = int(chance.uniform(40, 120) * weight * (0.35 if date.weekday() > 4 else 1))
            for model in ("shannon-chat", "shannon-standard-research"):
                entry = Entry(key_id=key.id, model_id=model, allowance=Allowance(), day=date.isoformat())
                entry.requests = requests
                entry.prompt_tokens = requests * chance.randint(300, 900)
                entry.cached_tokens = entry.prompt_tokens // 3
                entry.completion_tokens = requests * chance.randint(80, 400)
                await services.ledger.settle(entry)


async def _serve(folder: Path, *, port: int, demo: bool, days: int) -> None:
    write_documents(folder / "documents")
    environment = os.environ | {"SHANNON_BOOTSTRAP_KEY": KEY}
    config = load_config(_config(folder, demo=demo), environment)
    engines = build_engines(config, environment)
    engines["scripted"] = _engine("scripted", takes_images=True, first_token_s=0.05, token_s=0.004)
    if "fast" in engines:
        engines["fast"] = _engine("fast")
    store = build_store(config, environment)
    app = create_app(config, engines, store, build_authenticator(config, store, environment))
    ready = asyncio.Event()
    server = Server(app, host="127.0.0.1", port=port, on_ready=lambda url: ready.set())
    serving = asyncio.create_task(server.serve())
    await asyncio.wait({serving, asyncio.create_task(ready.wait())}, return_when=asyncio.FIRST_COMPLETED)
    if days:
        await _make_up_usage(app.state.services, days)
    print(server.url, flush=True)
    await serving


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--days", type=int, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        asyncio.run(_serve(arguments.folder, port=arguments.port, demo=arguments.demo, days=arguments.days))
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
