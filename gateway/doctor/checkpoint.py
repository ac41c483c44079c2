"""The files of an engine's model: whether they are there, whole, and how large; else what is to come.

A model that is not in the cache is asked of the hub, as `shannon download` does; without a hub only what is there is
known. Does not handle checksums: `shannon download` compares them as the files come.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.demo import WEIGHTS as DEMO_WEIGHTS
from engine.weights.cache import (
    INDEX,
    NoSpace,
    Plan,
    WeightsError,
    choose,
    default_cache_dir,
    find_snapshot,
    is_hub_id,
    repository_folder,
    show_bytes,
)
from engine.weights.hub import Hub
from gateway.doctor.case import Case, existing_parent
from gateway.doctor.finding import Finding
from gateway.settings.config import EmbeddedSettings
from gateway.settings.environment import hub_token

_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is known of a model's files. `folder` holds them, if they are here; `plan` is what the hub reported."""

    model: str
    folder: Path | None = None
    plan: Plan | None = None
    failure: str = ""
    """Why they can't be had, or what is wrong with the folder."""

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of the weights, None where they are not known."""
        if self.plan is not None:
            sizes = {file.path: file.size_bytes for file in self.plan.files}
        elif self.folder is not None:
            files = [path for path in self.folder.rglob("*") if path.is_file()]
            sizes = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files}
        else:
            return None
        indexed = (
            frozenset(read_json(self.folder / INDEX).get("weight_map", {}).values()) if self.folder else frozenset()
        )
        return sum(sizes[path] for path in choose(list(sizes), indexed) if path.endswith(_SUFFIXES)) or None

    @property
    def settings(self) -> dict[str, Any]:
        """The model's own config.json, empty where it is not here."""
        return read_json(self.folder / "config.json") if self.folder else {}


def find_checkpoint(case: Case, engine: EmbeddedSettings) -> Checkpoint:
    """Look for the files of an engine's model, and ask the hub for what is not here."""
    try:
        return _find_checkpoint(case, engine)
    except PermissionError as error:
        return Checkpoint(engine.model, failure=f"{error.filename} can't be read: {error.strerror}")


def _find_checkpoint(case: Case, engine: EmbeddedSettings) -> Checkpoint:
    if engine.model == "demo":
        return Checkpoint("demo", DEMO_WEIGHTS)
    if not is_hub_id(engine.model):
        folder = Path(engine.model)
        failure = (
            _damage(folder) if folder.is_dir() else "there is no such folder, nor is it the id of a model on a hub"
        )
        return Checkpoint(engine.model, None if failure else folder, failure=failure)
    snapshot = find_snapshot(engine.model, engine.revision, case.config.weights.cache_dir)
    if snapshot is not None:
        return Checkpoint(engine.model, snapshot)
    try:
        plan = _hub(case).plan(engine.model, engine.revision)
    except WeightsError as error:
        return Checkpoint(engine.model, failure=str(error))
    return Checkpoint(engine.model, None if plan.missing_bytes else plan.snapshot, plan)


def check_weights(case: Case, name: str, engine: EmbeddedSettings, found: Checkpoint) -> Finding:
    """Whether a model's files are here, and else how they get here."""
    subject, model = f"engines.{name}", found.model
    download = f"shannon download --config {case.source}"
    if found.failure and not is_hub_id(engine.model):
        return Finding("weights", "failed", f"{model}: {found.failure}", "Correct `model`", subject)
    if found.failure:
        failure = found.failure.removeprefix(f"{model}: ")
        begun = " Part of it is in the cache." if os.path.exists(repository_folder(cache_dir(case), model)) else ""
        return Finding(
            "weights", "failed", f"{model}: not whole in the cache, and {failure}.{begun}", download, subject
        )
    if found.plan is not None and found.plan.missing_bytes:
        missing, size = show_bytes(found.plan.missing_bytes), show_bytes(found.plan.size_bytes)
        text = f"{model}: {missing} of {size} are not in the cache; the first start would wait for them"
        return Finding("weights", "warning", text, download, subject)
    where = "ships with the gateway" if model == "demo" else f"whole in {found.folder}"
    text = f"{model}: {show_bytes(found.weight_bytes or 0)} of weights, {where}"
    if found.plan is not None:  # brought by something else, which notes no sizes
        text += f"; {download} would note that, and spare asking the hub at each start"
        return Finding("weights", "ok", text, subject=subject)
    if is_hub_id(model) and engine.revision is None:
        return Finding("weights", "ok", f"{text}; `revision` pins no commit", subject=subject)
    return Finding("weights", "ok", text, subject=subject)


def check_cache_space(case: Case, found: Iterable[Checkpoint]) -> Finding:
    """Whether the cache's volume holds what is missing."""
    found = list(found)
    plans = [checkpoint.plan for checkpoint in found if checkpoint.plan and checkpoint.plan.missing_bytes]
    free = show_bytes(case.machine.free_bytes(existing_parent(cache_dir(case))))
    if not plans and any(checkpoint.failure for checkpoint in found):
        return Finding("cache_space", "skipped", f"{free} free in {cache_dir(case)}; what is to come is not known")
    if not plans:
        return Finding("cache_space", "ok", f"{free} free in {cache_dir(case)}, and nothing is to come")
    hub = _hub(case)
    try:
        hub.check_space(plans)
    except NoSpace as error:
        text, _, step = str(error).partition("; ")
        return Finding("cache_space", "failed", text, step[:1].upper() + step[1:])
    missing = show_bytes(sum(plan.missing_bytes for plan in plans))
    return Finding("cache_space", "ok", f"{free} free in {hub.cache_dir}, for {missing} to come")


def cache_dir(case: Case) -> Path:
    """Return the model cache that the deployment uses."""
    return (case.config.weights.cache_dir or default_cache_dir()).expanduser()


def _hub(case: Case) -> Hub:
    endpoint = case.environment.get("HF_ENDPOINT") or None
    token = hub_token(case.environment)
    return Hub(cache_dir(case), endpoint=endpoint, token=token, free_bytes=case.machine.free_bytes)


def _damage(folder: Path) -> str:
    """The defect of a folder that should have a model, empty for none."""
    if not (folder / "config.json").is_file():
        return "there is no config.json in it"
    shards = set(read_json(folder / INDEX).get("weight_map", {}).values())
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        return f"{len(missing)} of {len(shards)} shards are missing, {missing[0]} among them"
    if not any(path.suffix in _SUFFIXES for path in folder.iterdir()):
        return "there are no weights in it"
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file, empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
