"""The names on vLLM's page, on which alerts, dashboard and autoscaling are built, are those that were recorded."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from prometheus_client import REGISTRY

from engine.base import GenerationRequest
from engine.local.embedded import EmbeddedEngine

RECORDED = Path(__file__).parents[1] / "support/deploy/vllm_metrics.yaml"

pytestmark = [pytest.mark.vllm, pytest.mark.anyio]


async def test_recorded_names_are_those_of_the_vllm_that_is_installed(engine: EmbeddedEngine) -> None:
    prepared = await engine.prepare(GenerationRequest(request_id="m", messages=[{"role": "user", "content": "hi"}]))
    async for _ in engine.generate(prepared):
        pass

    labels: dict[str, set[str]] = defaultdict(set)
    for family in REGISTRY.collect():
        for sample in family.samples:
            labels[sample.name] |= set(sample.labels)

    recorded = yaml.safe_load(RECORDED.read_text())
    assert {name: sorted(labels[name]) for name in recorded["samples"]} == recorded["samples"]
