"""Hostile bodies for every route: the answer, the event loop's pause, the memory, how the time grows.

The generator is that of `make fuzz`, which goes on for longer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.fuzz.bodies import HostileBody, Route, bodies_for, for_models, routes_of, sample
from tests.fuzz.checks import MAX_BODY_BYTES, faults_of
from tests.fuzz.server import AGENT_MODELS, Target, gateway
from tests.support.app import build_app

WORST = [
    ("/v1/chat/completions", "messages[0].content", "ints"),
    ("/v1/chat/completions", "messages", "messages_of_ints"),
    ("/v1/chat/completions", "messages", "messages_of_calls"),
    ("/v1/chat/completions", "messages", "messages_of_parts"),
    ("/v1/chat/completions", "user", "different_names"),
    ("/v1/chat/completions", "body", "wide"),
    ("/v1/completions", "prompt", "large_ints"),
    ("/v1/embeddings", "input", "lists_of_ints"),
    ("/v1/responses", "input", "assistants"),
    ("/v1/messages", "messages[0].content[0].input", "depth_1000"),
    ("/detokenize", "tokens", "negative_floats"),
    ("/admin/keys", "body", "wide_strings"),
]
"""What was once the worst of its kind."""
WORST_FOR_AGENTS = [
    ("shannon-quick-research", "/v1/chat/completions", "messages[0].content", "hosts"),
    ("shannon-quick-research", "/v1/chat/completions", "messages[0].content", "short_words"),
    ("shannon-deep-research", "/v1/responses", "input", "markers"),
    ("shannon-complex", "/v1/messages", "messages[0].content", "emphasis"),
]
SAMPLE_BYTES = MAX_BODY_BYTES // 4


def all_routes() -> list[Route]:
    app, _, _ = build_app(config={"inspector": {"enabled": True}}, environment={"SHANNON_REDIS_URL": "unix:///none"})
    return routes_of(app)


ROUTES = all_routes()


def find(path: str, place: str, filling: str, model: str = "") -> HostileBody:
    (route,) = (replace(route, model=model) for route in ROUTES if route.path == path)
    wanted = f"POST {path} {place} <- {filling}" + (f" to {model}" if model else "")
    return next(body for body in bodies_for(route) if str(body) == wanted)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with gateway(tmp_path_factory.mktemp("gateway")) as process:
        yield Target(process)


@pytest.mark.parametrize(("path", "place", "filling"), WORST)
def test_worst_body_of_its_kind_stalls_nobody(target: Target, path: str, place: str, filling: str) -> None:
    assert faults_of(target, find(path, place, filling)) == []


@pytest.mark.parametrize(("model", "path", "place", "filling"), WORST_FOR_AGENTS)
def test_worst_body_of_its_kind_for_agents_stalls_nobody(
    target: Target, model: str, path: str, place: str, filling: str
) -> None:
    assert faults_of(target, find(path, place, filling, model)) == []


@pytest.mark.parametrize("model", AGENT_MODELS)
def test_hostile_body_for_each_model_with_agents_stalls_nobody(target: Target, model: str) -> None:
    (body,) = sample(for_models(ROUTES, [model]), random.Random(model), 1)
    assert faults_of(target, body, SAMPLE_BYTES) == [], str(body)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_hostile_body_for_each_route_stalls_nobody(target: Target, route: Route) -> None:
    for body in sample([route], random.Random(route.path), 2):
        assert faults_of(target, body, SAMPLE_BYTES) == [], str(body)


def test_every_route_has_bodies_that_can_be_made() -> None:
    """Among them valid ones: the smallest body of a route is one that it takes."""
    assert len(ROUTES) >= 16
    for route in ROUTES:
        bodies = bodies_for(route)
        assert len(bodies) > 100
        for body in random.Random(1).sample(bodies, 50):
            assert len(body.of(5000)) <= 5000 + 50_000, body
