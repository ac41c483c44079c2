"""vLLM's Prometheus metrics, for several engines in one process.

vLLM registers its metrics again with every AsyncLLM and takes down those of the one before, whose counters then go
nowhere. Here each engine's are moved out of the way as soon as they exist, and one collector shows them all, merged
by name. Does not handle the metrics of engines that were closed.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class _Engines(Collector):
    """All running engines' metrics as one."""

    def __init__(self) -> None:
        self.process = CollectorRegistry()
        """What counts for the whole process, and stays when an engine goes."""
        self.registries: list[CollectorRegistry] = [self.process]
        self.names: dict[CollectorRegistry, str] = {}
        """The label `model_name` of each engine's metrics."""
        self.lock = threading.Lock()
        """Engines are built in threads, side by side."""

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for registry in list(self.registries):
            for family in registry.collect():
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples.extend(family.samples)
        return families.values()


_engines = _Engines()
REGISTRY.register(_engines)


def claim_name(registry: CollectorRegistry, wanted: str | list[str]) -> str:
    """Return the name for an engine's metrics: `wanted`, with a number behind it if a running engine has that name.

    Two engines of one name would give every series twice, and Prometheus refuses such a page whole. Of several names
    vLLM shows the first.
    """
    first = wanted if isinstance(wanted, str) else wanted[0]
    with _engines.lock:
        taken = {name for other, name in _engines.names.items() if other is not registry}
        candidates = itertools.chain([first], (f"{first}-{number}" for number in itertools.count(2)))
        _engines.names[registry] = name = next(name for name in candidates if name not in taken)
    return name


def stat_logger(registry: CollectorRegistry) -> type[Any]:
    """Return vLLM's Prometheus logger in a form that keeps its metrics in `registry`, which is shown from now on."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    _engines.registries.append(registry)

    class OwnPrometheusStatLogger(PrometheusStatLogger):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with _engines.lock:
                _take_over(_engines.process)  # what vLLM's modules registered; it would be taken down now
                super().__init__(*args, **kwargs)
                _take_over(registry)

        def log_engine_initialized(self) -> None:
            with _engines.lock:
                super().log_engine_initialized()  # type: ignore[no-untyped-call]
                _take_over(registry)

    return OwnPrometheusStatLogger


def _take_over(registry: CollectorRegistry) -> None:
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith("vllm:"):
            REGISTRY.unregister(collector)
            registry.register(collector)


def drop_metrics(registry: CollectorRegistry) -> None:
    """Show the metrics of a closed engine no more, and free its name."""
    with _engines.lock:
        _engines.names.pop(registry, None)
    if registry in _engines.registries:
        _engines.registries.remove(registry)
