"""Builds the parts of the application from the settings: engines, inspector, store, authenticator.

The only module that knows which class implements a kind of engine. Raises ConfigError.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.base import Engine, EngineError
from engine.inspector.base import Inspector, Source
from engine.inspector.transformers_inspector import TransformersInspector
from engine.queue.admission import QueuedEngine
from engine.supervisor import SupervisedEngine
from engine.weights.cache import is_hub_id
from gateway.access.auth import Authenticator
from gateway.access.configured_keys import own_keys
from gateway.errors import StoreError, unknown_argument
from gateway.outbound.resolver import Resolver
from gateway.settings.config import (
    AdmissionSettings,
    Config,
    ConfigError,
    EmbeddedSettings,
    EngineSettings,
    MockSettings,
    RemoteSettings,
)
from gateway.store.client import Store
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.tracing import traces_endpoint


def build_engines(config: Config, environment: Mapping[str, str] = os.environ) -> dict[str, SupervisedEngine]:
    """The configured engines, not started. Raises ConfigError, which names the engine."""
    in_process = [settings for settings in config.engines.values() if isinstance(settings, EmbeddedSettings)]
    if in_process:
        from engine.local.async_llm import go_offline, local_path

        if all(local_path(settings.model, settings.revision) for settings in in_process):
            go_offline()
    engines = {}
    for name, settings in config.engines.items():
        if isinstance(settings, EmbeddedSettings):
            _check_model(name, settings)
        try:
            engines[name] = SupervisedEngine(
                name,
                _queued(_factory(name, settings, environment), settings.admission),
                lazy=settings.lazy,
                engine_stall_s=settings.engine_stall_s,
                engine_busy_s=settings.engine_busy_s,
                max_engine_restarts=settings.max_engine_restarts,
                restart_window_s=settings.restart_window_s,
            )
        except TypeError as error:
            raise ConfigError(f"engines.{name}: args: {_unknown_argument(error)}") from error
        except EngineError as error:
            raise ConfigError(f"engines.{name}: {error}") from error
    return engines


def _check_model(name: str, settings: EmbeddedSettings) -> None:
    """Raise ConfigError if `model` is a path without a checkpoint. Ids of models on a hub are not checked."""
    path = Path(settings.model)
    if settings.model == "demo" or is_hub_id(settings.model) or path.is_dir():
        return
    reason = "is a file, not a directory" if path.is_file() else "is neither a directory nor the id of a model on a hub"
    raise ConfigError(f"engines.{name}.model: {settings.model!r} {reason}")


def _unknown_argument(error: TypeError) -> str:
    """The argument that an engine does not take, in our words."""
    name = unknown_argument(error)
    return f"{name!r} is not an argument of this kind of engine" if name else str(error)


def build_inspector(config: Config) -> Inspector | None:
    """The inspector of the models in this process, with nothing loaded yet. None if it is turned off."""
    if not config.inspector.enabled:
        return None
    sources = {
        name: Source(settings.model, settings.revision, settings.trust_remote_code, _max_model_len(settings))
        for name, settings in config.engines.items()
        if isinstance(settings, EmbeddedSettings) and settings.kind == "embedded"
    }
    return TransformersInspector(sources, **config.inspector.arguments())


def _max_model_len(settings: EmbeddedSettings) -> int | None:
    """The context length that was set. vLLM also takes words such as `auto`, which leave it to the checkpoint."""
    length = settings.args.get("max_model_len")
    return length if isinstance(length, int) and length > 0 else None


def build_store(config: Config, environment: Mapping[str, str] = os.environ) -> Store:
    """The store, not connected. Raises ConfigError."""
    try:
        return Store(config.store, environment, Metrics())
    except StoreError as error:
        raise ConfigError(f"{config.store.url_env}: {error}") from error


def build_authenticator(config: Config, store: Store, environment: Mapping[str, str] = os.environ) -> Authenticator:
    """The authenticator for keys in the store and in the configuration. Raises ConfigError."""
    return Authenticator(
        store,
        own_keys(config.keys, environment),
        cache_ttl_s=config.store.auth_cache_ttl_s,
        failed_per_minute=config.limits.failed_auth_per_minute,
    )


def _queued(build: Callable[[], Engine], admission: AdmissionSettings) -> Callable[[], Engine]:
    """Builds the engine behind its queue. Both are replaced together after a failure."""
    if not admission.enabled:
        return build
    return lambda: QueuedEngine(
        build(),
        policy=admission.policy,
        max_queued_requests=admission.max_queued_requests,
        max_wait_s=admission.max_wait_s,
        in_flight_per_flow=admission.in_flight_per_key,
        max_in_flight=admission.max_in_flight,
    )


def _factory(name: str, settings: EngineSettings, environment: Mapping[str, str]) -> Callable[[], Engine]:
    """Builds an engine of this kind. Only engines with a model in this process import vllm."""
    if isinstance(settings, MockSettings):
        from engine.mock import MockEngine

        return lambda: MockEngine(**settings.args)
    if isinstance(settings, RemoteSettings):
        from engine.remote.engine import RemoteEngine

        api_key = environment.get(settings.api_key_env, "").strip() if settings.api_key_env else ""
        if settings.api_key_env and not api_key:
            raise EngineError(f"{settings.api_key_env} is not set.")
        if not (api_key.isascii() and api_key.isprintable()):
            raise EngineError(f"{settings.api_key_env} must be ASCII in one line, as HTTP headers are.")
        return lambda: RemoteEngine(**settings.arguments(), api_key=api_key, resolve=Resolver())
    # The engine's name in vLLM's metrics, because two engines may have the same model.
    args: dict[str, Any] = {"served_model_name": [name]}
    if endpoint := traces_endpoint(environment):
        args["otlp_traces_endpoint"] = endpoint
    args |= settings.args
    more: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    if settings.kind == "pooling":
        from engine.local.pooling import PoolingEngine

        return lambda: PoolingEngine(settings.model, args, **more)
    from engine.local.embedded import EmbeddedEngine

    parsers: dict[str, Any] = {"tool_parser": settings.tool_parser, "reasoning_parser": settings.reasoning_parser}
    return lambda: EmbeddedEngine(settings.model, args, **parsers, **more)
