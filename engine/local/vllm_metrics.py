"""vLLM's Prometheus metrics, for several engines in one process.

vLLM registers its metrics again with every AsyncLLM and unregisters those of the previous one, whose counters are then
lost. Here each engine's metrics are moved to a registry of their own as soon as they exist, and one collector exports
all of them, merged by name. Not handled: metrics of closed engines.
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
    """Collects the metrics of all running engines."""

    def __init__(self) -> None:
        self.process = CollectorRegistry()
        """Metrics of the whole process, kept when an engine is closed."""
        self.registries: list[CollectorRegistry] = [self.process]
        self.names: dict[CollectorRegistry, str] = {}
        """The label `model_name` of each engine's metrics."""
        self.lock = threading.Lock()
        """Engines are built concurrently in threads."""

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
    """Return the name for an engine's metrics: `wanted`, with a number appended if a running engine has that name.

    Two engines with one name would export every series twice, and Prometheus rejects such a page. Of several names vLLM
    exports the first.
    """
    first = wanted if isinstance(wanted, str) else wanted[0]
    with _engines.lock:
        taken = {name for other, name in _engines.names.items() if other is not registry}
        candidates = itertools.chain([first], (f"{first}-{number}" for number in itertools.count(2)))
        _engines.names[registry] = name = next(name for name in candidates if name not in taken)
    return name


def stat_logger(registry: CollectorRegistry) -> type[Any]:
    """Return a subclass of vLLM's Prometheus logger with its metrics in `registry`, which is exported from now on."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    _engines.registries.append(registry)

    class OwnPrometheusStatLogger(PrometheusStatLogger):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with _engines.lock:
                _take_over(_engines.process)  # metrics of vLLM's modules, which would be unregistered now
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
    """Stop exporting the metrics of a closed engine, and free its name."""
    with _engines.lock:
        _engines.names.pop(registry, None)
    if registry in _engines.registries:
        _engines.registries.remove(registry)
