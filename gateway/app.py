"""Builds the ASGI application from the settings."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from engine.base import EngineError
from engine.inspector.base import Inspector
from engine.supervisor import SupervisedEngine
from gateway import __version__
from gateway.access.address_limit import AddressLimit
from gateway.access.allowance import DIMENSIONS
from gateway.access.auth import Authenticator
from gateway.access.cache_salts import CacheSalts
from gateway.access.catalog import Catalog
from gateway.access.keys import Keys
from gateway.access.ledger import Ledger
from gateway.access.limits import Limits
from gateway.api import (
    admin,
    chat,
    completions,
    embeddings,
    health,
    inspection,
    jobs,
    messages,
    models,
    page,
    responses,
    resume,
    sessions,
    tokens,
    usage,
)
from gateway.api.schema import declare_bodies
from gateway.clock import Clock
from gateway.components import build_inspector
from gateway.conversations.live_responses import LiveResponses
from gateway.conversations.sessions import Sessions
from gateway.conversations.stored_responses import StoredResponses
from gateway.durable.event_log import EventLogs
from gateway.durable.jobs import Jobs
from gateway.durable.resumable import ResumableStreams
from gateway.errors import (
    BadRequest,
    GatewayError,
    MethodNotAllowed,
    NotFound,
    StoreUnavailable,
    from_store,
)
from gateway.exchange.bodies import Bodies
from gateway.exchange.drain import Drain
from gateway.exchange.error_response import ErrorResponse
from gateway.images import Images
from gateway.outbound.fetch import Fetcher
from gateway.services import Services
from gateway.serving.middleware import RequestMiddleware
from gateway.settings.config import (
    Config,
)
from gateway.store.client import Store
from gateway.telemetry.logs import without_keys
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.tracing import Tracing, build_tracing
from gateway.tools.assembly import build_toolbox

EXPOSED_HEADERS = [
    "X-Session-ID",
    "X-Request-ID",
    "X-Shannon-Resume",
    *("Retry-After", "Retry-After-Ms", "X-Should-Retry"),  # a browser's SDK obeys what it may read
    *(f"X-RateLimit-{kind}-{of}" for kind in ("Limit", "Remaining", "Reset") for of in map(str.title, DIMENSIONS)),
]


def create_app(
    config: Config,
    engines: Mapping[str, SupervisedEngine],
    store: Store,
    authenticator: Authenticator,
    clock: Clock = time.time,
    environment: Mapping[str, str] = os.environ,
    inspector: Inspector | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Return the application. Raises ConfigError where `environment` lacks a tool's key, or asks for odd traces.

    `inspector` and `tracing` replace those of the configuration and the environment.

    Its lifespan starts the store, and the engines in the background; at the end it closes them in reverse. Usage is
    written before the store goes.
    """
    app = FastAPI(
        title="Shannon Gateway",
        version=__version__,
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    metrics = store.metrics
    tracing = tracing or build_tracing(environment)
    drain = Drain()
    logs = EventLogs(store.bulk, config.resume.max_bytes_per_key)
    limits, ledger = Limits(config.limits, store, metrics), Ledger(store, config.store.data_dir)
    ledger.on_charged = limits.charged
    fetcher = Fetcher(config.fetch)
    app.state.services = Services(
        config=config,
        engines=engines,
        catalog=Catalog(config, engines),
        authenticator=authenticator,
        keys=Keys(store.patient),
        limits=limits,
        ledger=ledger,
        sessions=Sessions(config.sessions, store.bulk, metrics),
        responses=LiveResponses(StoredResponses(config.sessions, store.bulk, metrics), drain, metrics),
        resumable=ResumableStreams(config.resume, logs, drain, metrics),
        jobs=Jobs(config.jobs, logs, store.bulk, drain, metrics),
        images=Images(config.images, fetcher),
        bodies=Bodies(config.server),
        tools=build_toolbox(config, environment, fetcher),
        cache_salts=CacheSalts(config.prefix_cache, store.patient),
        store=store,
        metrics=metrics,
        tracing=tracing,
        drain=drain,
        inspector=inspector or build_inspector(config),
        address_limit=AddressLimit(config.inspector.requests_per_minute, config.inspector.burst, clock),
        clock=clock,
    )
    protocols = (chat, resume, responses, messages, completions, embeddings, tokens, inspection, jobs)
    for module in (*protocols, models, sessions, usage, admin, health, page):
        app.include_router(module.router)
    app.include_router(inspection.plain_router)
    app.user_middleware = _middleware(config, metrics, tracing)
    app.add_exception_handler(GatewayError, _on_gateway_error)
    app.add_exception_handler(StoreUnavailable, _on_store_unavailable)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.openapi = _openapi(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend the document
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start all engines at once, without waiting: /health answers meanwhile, /ready reports when they are up."""
    services: Services = app.state.services
    try:
        await services.store.start()
    except BaseException:
        await services.store.close()  # the bundled server may run, with a layout that is not ours
        raise
    await services.authenticator.start()
    await services.ledger.start()
    await services.cache_salts.start()
    await services.tools.start()
    # A failed start is kept in the engine's `failed`, which the owner of the process watches.
    starts = [asyncio.create_task(_start(engine)) for engine in services.engines.values()]
    try:
        yield
    finally:
        for start in starts:
            start.cancel()
        await asyncio.gather(*starts, return_exceptions=True)
        await services.responses.close()
        await services.resumable.close()
        await services.jobs.close()
        if services.inspector is not None:
            await services.inspector.close()
        await services.tools.close()
        # One that fails to close must not keep the ledger from being written.
        await asyncio.gather(*(engine.close() for engine in services.engines.values()), return_exceptions=True)
        await services.authenticator.close()
        services.limits.close()
        await services.ledger.close()
        await services.store.close()
        services.images.close()
        services.bodies.close()
        await services.tracing.close()


async def _start(engine: SupervisedEngine) -> None:
    with contextlib.suppress(EngineError):
        await engine.start()


def _middleware(config: Config, metrics: Metrics, tracing: Tracing) -> list[Middleware]:
    """Return the middleware, outermost first."""
    server = config.server
    around = Middleware(
        RequestMiddleware,
        metrics=metrics,
        tracing=tracing,
        max_body_bytes=server.max_body_bytes,
        allowed_hosts=server.allowed_hosts,
        body_timeout_s=server.body_timeout_s,
    )
    if not server.cors_origins:
        return [around]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=server.cors_origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],  # the SDKs send a dozen x-stainless-* headers
        expose_headers=EXPOSED_HEADERS,
    )
    return [around, cors]


async def _on_gateway_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    return ErrorResponse(error)


async def _on_store_unavailable(request: Request, error: Exception) -> Response:
    """For routes that cannot work without the store: keys, sessions, usage."""
    assert isinstance(error, StoreUnavailable)
    return ErrorResponse(from_store(error))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Put Starlette's own 404 and 405 into OpenAI's shape."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {without_keys(request.scope['path'])}"
    if error.status_code == 405:
        response = ErrorResponse(MethodNotAllowed(f"Not allowed to {where}. Check the HTTP method."))
        response.headers.update(error.headers or {})  # Allow
        return response
    if error.status_code == 404:
        return ErrorResponse(NotFound(f"Unknown request URL: {where}. Check the URL for typos."))
    return ErrorResponse(BadRequest(str(error.detail)))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return ErrorResponse(BadRequest(f"Invalid value for '{param}': {first['msg']}.", param))


def _openapi(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """Return app.openapi, extended by what FastAPI can't see: bodies that routes parse themselves, and keys."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = generate()
        declare_bodies(document)
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        document["security"] = [{"bearer": []}, {"apiKey": []}]
        return document

    return openapi
