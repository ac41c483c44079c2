"""GET /health, /ready, /metrics and /openapi.json: for machines that look after this one.

/health and /ready need no key. /metrics needs an admin key or one with `metrics: true`, unless `server.metrics_public`
is set.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from engine.queue.admission import QueuedEngine
from engine.remote.pool import Replicated
from engine.supervisor import SupervisedEngine
from gateway import __version__
from gateway.access.auth import Principal
from gateway.api.dependencies import authenticate, identify, services
from gateway.errors import MetricsNotAllowed, StoreUnavailable
from gateway.services import Services
from gateway.store import layout
from gateway.telemetry.metrics import Metrics

router = APIRouter()

AppServices = Annotated[Services, Depends(services)]


@router.get("/health")
@router.head("/health", include_in_schema=False)
async def get_health() -> dict[str, Any]:
    """Report that the process is alive. Engines don't matter: a restart would not help one that is loading."""
    return {"ok": True, "version": __version__}


@router.get("/ready", response_class=JSONResponse)
@router.head("/ready", include_in_schema=False)
async def get_ready(services: AppServices) -> JSONResponse:
    """Whether requests would be served: 503 until every engine answers, and while draining."""
    states = {name: engine.state for name, engine in services.engines.items()}
    ready = not services.drain.draining and all(engine.ready.is_set() for engine in services.engines.values())
    body = {"ready": ready, "draining": services.drain.draining, "engines": states}
    return JSONResponse(body, 200 if ready else 503)


async def _scraper(request: Request, services: AppServices) -> None:
    if services.config.server.metrics_public:
        return
    principal = await identify(request, services)  # also while there is no room for requests
    if not (principal.admin or principal.metrics):
        raise MetricsNotAllowed("This API key may not read /metrics. Use an admin key, or a key with 'metrics': true.")


@router.get("/metrics", response_class=Response, dependencies=[Depends(_scraper)])
@router.head("/metrics", include_in_schema=False, dependencies=[Depends(_scraper)])
async def get_metrics(services: AppServices) -> Response:
    """Return Prometheus metrics: the gateway's own and vLLM's."""
    metrics = services.metrics
    for name, engine in services.engines.items():
        _tell_engine(metrics, name, engine)
    metrics.draining.set(services.drain.draining)
    metrics.journal_bytes.set(services.ledger.journal_bytes)
    with contextlib.suppress(StoreUnavailable):
        metrics.drain_interrupted.values[()] = int(
            await services.store.patient.run("GET", layout.DRAIN_INTERRUPTED) or 0
        )
    metrics.store.available.set(services.store.available)
    metrics.store_bulk.available.set(services.store.bulk.available)
    return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _tell_engine(metrics: Metrics, name: str, engine: SupervisedEngine) -> None:
    metrics.engine_ready.labels(name).set(engine.ready.is_set())
    metrics.engine_unfinished.labels(name).set(engine.unfinished_requests)
    metrics.engine_restarts.values |= {(name, cause): count for cause, count in engine.restarts.items()}
    current = engine.current
    if isinstance(current, QueuedEngine):
        metrics.queue_depth.labels(name).set(current.queued_requests)
        metrics.queue_longest_wait.labels(name).set(current.longest_wait_s)
        current = current.wrapped
    if isinstance(current, Replicated):
        # By place in `urls`: the viewers of a dashboard should not learn addresses of servers.
        for index, replica in enumerate(current.replicas):
            metrics.upstream_available.labels(name, str(index)).set(replica.breaker.state != "open")
            metrics.upstream_in_flight.labels(name, str(index)).set(replica.in_flight)
            metrics.upstream_discarded.values[name, str(index)] = replica.discarded_tokens


@router.get("/openapi.json", include_in_schema=False)
async def get_openapi(request: Request, principal: Annotated[Principal, Depends(authenticate)]) -> dict[str, Any]:
    """Return the OpenAPI document of this API."""
    # The first one takes 0.2 s to build.
    document: dict[str, Any] = await asyncio.to_thread(request.app.openapi)
    return document
