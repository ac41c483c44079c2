"""`shannon download`: bring the models' weights before the server needs them, and show how far it is.

On a terminal every file has a bar; elsewhere a line comes every few seconds. All of that goes to stderr: stdout has the
result. `engine.weights.hub` transfers the bytes. Raises ConfigError and WeightsError; an
interrupted download continues with the next run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn

from engine.weights.cache import File, Offline, Plan, find_snapshot, is_hub_id, show_bytes
from engine.weights.hub import Hub
from gateway.outbound import event_loop
from gateway.settings.config import Config, ConfigError, EmbeddedSettings
from gateway.settings.environment import VARIABLES, hub_token

LINE_S = 10.0
"""Time between two lines where there is no terminal."""

Wanted = list[tuple[str, str | None]]
"""Model ids and their revisions."""


class Reporter(Protocol):
    """Shows how far a download is. A context manager around it."""

    def __enter__(self) -> Reporter: ...

    def __exit__(self, *error: object) -> None: ...

    def advance(self, file: File, count: int) -> None:
        """Take in that `count` more bytes of `file` are there."""


def download(
    models: list[str],
    config: Config | None,
    revision: str | None,
    cache: Path | None,
    console: Console,
    *,
    as_json: bool,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Download `models`, or else those of `config`, and print where they are.

    Raises ConfigError, WeightsError, and KeyboardInterrupt.
    """
    wanted = choose_models(models, config, revision)
    hub = Hub(
        cache or cache_dir(config, environment),
        endpoint=environment.get("HF_ENDPOINT") or None,
        token=hub_token(environment),
    )
    results = []
    plans: list[Plan] = []
    for model, wanted_revision in wanted:
        try:
            plans.append(hub.plan(model, wanted_revision))
        except Offline as error:
            # A pod that starts while the hub is down needs it no more than the server does.
            snapshot = find_snapshot(model, wanted_revision, hub.cache_dir)
            if snapshot is None:
                raise
            note = escape(f"{error}. Its finished download is used.")
            console.print("[yellow]shannon:[/yellow]", note, soft_wrap=True)
            results.append(_result(model, wanted_revision or "main", snapshot, None, 0))
    hub.check_space(plans)
    for plan in plans:
        missing = plan.missing_bytes
        console.print(
            f"[bold]{escape(plan.model)}[/bold] at {plan.commit[:12]}: {len(plan.files)} files, "
            f"{show_bytes(plan.size_bytes)}, {show_bytes(missing) + ' to come' if missing else 'all there'}",
            soft_wrap=True,
        )
        with reporter(plan, console) as shown:
            snapshot = event_loop.run(hub.download(plan, shown.advance))
        results.append(_result(plan.model, plan.revision, snapshot, plan.size_bytes, missing))
    if as_json:
        print(json.dumps(results))
        return
    for result in results:
        print(result["path"])


def choose_models(models: list[str], config: Config | None, revision: str | None) -> Wanted:
    """The models to download: the named ones, at the revisions in the configuration, or all in the configuration.

    Raises ConfigError.
    """
    if revision is not None and len(models) != 1:
        raise ConfigError("--revision goes with one MODEL; pin others with `revision` of their engine")
    engines = [] if config is None else [e for e in config.engines.values() if isinstance(e, EmbeddedSettings)]
    configured = list(dict.fromkeys((e.model, e.revision) for e in engines if is_hub_id(e.model)))
    if not models:
        if config is None:
            raise ConfigError("name a model, or the deployment's file with --config or SHANNON_CONFIG")
        if not configured:
            raise ConfigError("no engine's model comes from a hub; name one: shannon download ORGANISATION/NAME")
        return configured
    wanted: Wanted = []
    for model in models:
        pinned = [pair for pair in configured if pair[0] == model]
        wanted += pinned if pinned and revision is None else [(model, revision)]
    return list(dict.fromkeys(wanted))


def cache_dir(config: Config | None, environment: Mapping[str, str]) -> Path | None:
    """Return the configured cache, without a configuration that of the environment, or None for the library's."""
    if config is not None:
        return config.weights.cache_dir
    named = [environment[name] for name in VARIABLES["weights", "cache_dir"] if environment.get(name)]
    return Path(named[0]) if named else None


def reporter(plan: Plan, console: Console) -> Reporter:
    """The progress display for `console`."""
    return Bars(plan, console) if console.is_terminal else Lines(plan, console)


class Bars:
    """A bar for all bytes, and one for each file under way."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            SpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._all = self._progress.add_task("[bold]all files[/bold]", total=plan.size_bytes)
        self._tasks: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self, file: File, count: int) -> None:
        task = self._tasks.get(file.path)
        if task is None:
            task = self._tasks[file.path] = self._progress.add_task(escape(file.path[-40:]), total=file.size_bytes)
        self._progress.advance(self._all, count)
        self._progress.advance(task, count)
        self._done[file.path] = self._done.get(file.path, 0) + count
        self._progress.update(task, visible=self._done[file.path] < file.size_bytes)


class Lines:
    """A line every LINE_S seconds, and one at the end."""

    def __init__(self, plan: Plan, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan = plan
        self._console = console
        self._clock = clock
        self._done = 0
        self._printed_at = clock()
        self._printed_bytes = plan.size_bytes - plan.missing_bytes  # what is there at the start took no time

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None and self._done > self._printed_bytes:
            self._print()

    def advance(self, file: File, count: int) -> None:
        self._done += count
        if self._clock() - self._printed_at >= LINE_S:
            self._print()

    def _print(self) -> None:
        now = self._clock()
        speed = (self._done - self._printed_bytes) / max(now - self._printed_at, 1e-3)
        share = self._done / max(self._plan.size_bytes, 1)
        self._console.print(
            f"{escape(self._plan.model)}: {show_bytes(self._done)} of {show_bytes(self._plan.size_bytes)} "
            f"({share:.0%}), {show_bytes(max(0, int(speed)))}/s",
            soft_wrap=True,
        )
        self._printed_at, self._printed_bytes = now, self._done


def _result(model: str, revision: str, snapshot: Path, size: int | None, fetched: int) -> dict[str, Any]:
    return {
        "model": model,
        "revision": revision,
        "commit": snapshot.name,
        "path": str(snapshot),
        "bytes": size,
        "downloaded_bytes": fetched,
    }
