"""A gateway to look at: agents that research this gateway's own README, a model that follows a script, some usage.

    python -m tests.browser.scripted_gateway FOLDER [--demo] [--days N]

Prints its URL when it is ready. The key is `tests.conftest.KEY`. What the agents' model says stands below; the search,
the reading, the events and the citations are the product's own. With `--demo`, shannon-chat is the real demo model,
and may be inspected. `--days` makes up usage of several keys over so many days: pictures of one bar show little.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.base import GenerationRequest
from engine.mock import MockEngine
from engine.supervisor import SupervisedEngine
from gateway.api.dependencies import Services
from gateway.app import build_authenticator, build_engines, build_store, create_app
from gateway.config import ConfigError, load_config
from gateway.keys import KeySpec
from gateway.limits import Allowance
from gateway.server import Server
from gateway.usage import Entry
from tests.conftest import KEY, ROOT
from tests.scripted import ScriptedModel, text_of

QUESTION = "What happens to the books when a client hangs up in mid-stream?"
_PARTS = {
    "What does the gateway do when a client hangs up?": "client hangs up",
    "How are tokens counted, and where?": "usage ledger exact counters",
    "What if the store is away at that moment?": "store dies journal replayed",
    "Which limits get their tokens back?": "limits reserved not used goes back",
    "Who may see the figures?": "usage admin keys",
}
_FINDINGS = {
    "When things go wrong": "The request leaves the engine at once, streamed or not, and the tokens made until then "
    "are counted exactly",
    "Keys limits sessions usage": "The ledger equals vLLM's own counters, to the token; what was reserved and not used "
    "goes back to where it came from",
    "Inside": "Each generation is settled in `finally`, on every exit",
}
_WORKFLOWS = {
    "shannon-quick-research": "quick_research",
    "shannon-standard-research": "standard_research",
    "shannon-deep-research": "deep_research",
    "shannon-complex": "complex",
}
_ANSWER = """Nothing is lost, and nothing is counted twice{wrong}.

### While the client is gone

- The request **leaves the engine at once**, streamed or not, and the tokens made until then are counted exactly{wrong}.
- Each generation is settled in `finally`, so there is no exit without an entry{inside}.
- What was reserved and not used goes back to the second of the window that it was taken from{keys}.

### When the store is away as well

Usage goes to a journal on disk, which is replayed when the store is back{wrong}:

| State of the store | Where usage goes | Limits |
|---|---|---|
| answers | the ledger, in order | shared by all gateways |
| away | a journal on disk | this process's share |
| back again | the journal first | shared again |

The ledger and vLLM's own counters agree to the token, under disconnects, errors and drains{keys}.
"""


def write_documents(folder: Path) -> None:
    """Write the README's sections as documents of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in re.split(r"^## ", (ROOT / "README.md").read_text(), flags=re.M)[1:]:
        title = section.partition("\n")[0].replace(",", "").strip()
        (folder / f"{title.lower().replace(' ', '-')}.md").write_text(f"# {title}\n{section.partition(chr(10))[2]}")


def _plan(request: GenerationRequest) -> Mapping[str, Any]:
    assert request.structured_outputs is not None
    least = request.structured_outputs["json"]["properties"]["sub_questions"]["minItems"]
    parts = list(_PARTS.items())[: max(4, least)]
    return {"sub_questions": [{"question": part, "queries": [query]} for part, query in parts]}


def _notes(request: GenerationRequest) -> str:
    numbers = {
        title: number for number, title in re.findall(r'<source number="(\d+)"[^>]*title="([^"]*)"', _all(request))
    }
    found = [f"{text} [{numbers[title]}]." for title, text in _FINDINGS.items() if title in numbers]
    return "\n".join(f"- {line}" for line in found) or "Nothing on this."


def _answer(request: GenerationRequest) -> str:
    text = _all(request)

    def marker(title: str) -> str:
        found = re.search(re.escape(_FINDINGS[title]) + r" (\[\d+\])", text)
        return f" {found[1]}" if found else ""

    wrong, keys, inside = map(marker, _FINDINGS)
    return _ANSWER.format(wrong=wrong, keys=keys, inside=inside)


def _all(request: GenerationRequest) -> str:
    return "\n".join(text_of(request, number) for number in range(len(request.messages)))


def _engine() -> SupervisedEngine:
    model = ScriptedModel(plan=_plan, notes=_notes, answer=_answer)
    return SupervisedEngine(
        "scripted",
        lambda: MockEngine(reply=model, max_model_len=32_768, takes_images=True, first_token_s=0.12, token_s=0.012),
    )


def _config(folder: Path, *, demo: bool) -> Path:
    """Write the configuration and return its path."""
    import yaml

    tree: dict[str, Any] = {
        "include": str(ROOT / "configs/models.yaml"),
        "engines": {"scripted": {"kind": "mock"}},
        "models": {},
        "store": {"data_dir": str(folder / "data")},
        "tools": {"local_search": {"folder": str(folder / "documents")}},
    }
    if demo:
        tree["engines"]["main"] = {"kind": "embedded", "model": "demo", "args": {"max_model_len": 2048}}
        tree["inspector"] = {"enabled": True}
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
                entry = Entry(key_id=key.id, model_id=model, allowance=Allowance(0, 0), day=date.isoformat())
                entry.requests = requests
                entry.prompt_tokens = requests * chance.randint(300, 900)
                entry.cached_tokens = entry.prompt_tokens // 3
                entry.completion_tokens = requests * chance.randint(80, 400)
                await services.ledger.settle(entry)


async def _serve(folder: Path, *, demo: bool, days: int) -> None:
    write_documents(folder / "documents")
    environment = os.environ | {"SHANNON_BOOTSTRAP_KEY": KEY}
    config = load_config(_config(folder, demo=demo), environment)
    engines = build_engines(config, environment) | {"scripted": _engine()}
    store = build_store(config, environment)
    app = create_app(config, engines, store, build_authenticator(config, store, environment))
    ready = asyncio.Event()
    server = Server(app, host="127.0.0.1", port=0, on_ready=lambda url: ready.set())
    serving = asyncio.create_task(server.serve())
    await asyncio.wait({serving, asyncio.create_task(ready.wait())}, return_when=asyncio.FIRST_COMPLETED)
    if days:
        await _make_up_usage(app.state.services, days)
    print(server.url, flush=True)
    await serving


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--days", type=int, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        asyncio.run(_serve(arguments.folder, demo=arguments.demo, days=arguments.days))
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
