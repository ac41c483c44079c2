"""GET /health, /ready, /metrics and /openapi.json: for machines that look after this one.

/health and /ready need no key. /metrics needs one unless `server.metrics_public` is set.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from engine.admission import QueuedEngine
from gateway import __version__
from gateway.api.dependencies import Services, authenticate, services
from gateway.auth import Principal

router = APIRouter()

AppServices = Annotated[Services, Depends(services)]


@router.get("/health")
async def get_health() -> dict[str, Any]:
    """Tell that the process is alive. Says nothing about engines: a restart would not help one that is loading."""
    return {"ok": True, "version": __version__}


@router.get("/ready", response_class=JSONResponse)
async def get_ready(services: AppServices) -> JSONResponse:
    """Tell whether requests would be served: 503 until every engine answers, and while draining."""
    states = {name: engine.state for name, engine in services.engines.items()}
    ready = not services.drain.draining and all(engine.ready.is_set() for engine in services.engines.values())
    body = {"ready": ready, "draining": services.drain.draining, "engines": states}
    return JSONResponse(body, 200 if ready else 503)


async def _scraper(request: Request, services: AppServices) -> None:
    if not services.config.server.metrics_public:
        await authenticate(request, services)


@router.get("/metrics", response_class=Response, dependencies=[Depends(_scraper)])
async def get_metrics(services: AppServices) -> Response:
    """Return Prometheus metrics: the gateway's own and vLLM's."""
    for name, engine in services.engines.items():
        services.metrics.engine_ready.labels(name).set(engine.ready.is_set())
        services.metrics.engine_unfinished.labels(name).set(engine.unfinished_requests)
        if isinstance(queue := engine.current, QueuedEngine):
            services.metrics.queue_depth.labels(name).set(queue.queued_requests)
            services.metrics.queue_longest_wait.labels(name).set(queue.longest_wait_s)
    services.metrics.store_available.set(services.store.available)
    return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/openapi.json", include_in_schema=False)
async def get_openapi(request: Request, principal: Annotated[Principal, Depends(authenticate)]) -> dict[str, Any]:
    """Return the OpenAPI document of this API."""
    document: dict[str, Any] = request.app.openapi()
    return document
