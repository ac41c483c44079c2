"""The kinds of hostile requests. Another kind is another function here: it tries things until its time is up."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fuzz.bodies import for_models, routes_of, sample
from tests.fuzz.checks import MAX_BODY_BYTES, faults_of
from tests.fuzz.server import AGENT_MODELS, Target, gateway
from tests.support.app import build_app

Kind = Callable[[random.Random, float], Iterator[str]]
"""Yields a line for each finding, until `time.monotonic()` is past the second argument. All chance comes from the
first, so that a run can be repeated."""


def bodies(rng: random.Random, until: float) -> Iterator[str]:
    """Send hostile bodies of any size to all routes, and to all models with agents."""
    app, _, _ = build_app(config={"inspector": {"enabled": True}})
    routes = routes_of(app)
    routes += for_models(routes, AGENT_MODELS)
    with tempfile.TemporaryDirectory() as folder, gateway(Path(folder)) as process:
        target = Target(process)
        while time.monotonic() < until:
            (body,) = sample(routes, rng, 1)
            size = rng.choice((MAX_BODY_BYTES, rng.randrange(2**16, MAX_BODY_BYTES)))
            try:
                faults = faults_of(target, body, size)
            except OSError as error:
                faults = [f"got no answer: {error!r}"]
            for fault in faults:
                yield f"{body} ({size} bytes): {fault}"
            if process.process.poll() is not None:
                yield f"{body} ({size} bytes): the gateway has ended; its log says {process.log.read_text()[-2000:]}"
                return


KINDS: dict[str, Kind] = {"bodies": bodies}
