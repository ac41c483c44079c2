"""Submit and stream: a client opens one stream of events, and submits prompts that are answered on it in turn.

    GET    /api/v1/chat/stream/{client_id}   open the stream, which registers the client
    POST   /api/v1/chat/submit               queue a prompt for it, on any gateway
    DELETE /api/v1/chat/stream/{client_id}   leave at once

The stream's events are `open`, then for each job `queued`, `started`, `token` (and `progress`, of models with agents)
and `done` or `error`, and `end` when the server ends it. Each but `end` has an `id`, for Last-Event-ID. A job takes
the same way as a chat completion, and costs what one costs.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, FastAPI, Header, Request
from pydantic import Field
from starlette.responses import Response

from engine.base import Delta, GenerationRequest
from gateway.access.auth import Principal
from gateway.api.call import Call, Caller, call
from gateway.api.dependencies import authenticate, services, while_authenticated
from gateway.api.generation_schema import MaxTokens
from gateway.api.resume import number_of
from gateway.api.sampling import SamplingSchema, accepts_sampling
from gateway.api.schema import JsonBody
from gateway.durable.job_queue import Job, JobEvent, error_fields, event_frame
from gateway.errors import BadRequest, GatewayError, RequestTooLarge
from gateway.exchange.chunking import rechunk
from gateway.exchange.encoder import event_fields, usage_fields
from gateway.exchange.events import Event
from gateway.exchange.response import GenerationResponse
from gateway.services import Services
from gateway.settings.config import DefaultSettings

router = APIRouter()

_CLIENT_ID = re.compile(r"[A-Za-z0-9._:@-]{1,128}")


@accepts_sampling("jobs")
class JobRequest(SamplingSchema):
    client_id: str
    """The client on whose stream the answer is to come."""
    prompt: Annotated[str, Field(min_length=1)]
    """What is asked."""
    context: str | None = None
    """What the prompt is about; stands before it."""
    model: Annotated[str, Field(max_length=256)] | None = None
    """Model id; the server's default when left out."""
    max_tokens: MaxTokens | None = None

    def for_engine(self, request_id: str, defaults: DefaultSettings) -> GenerationRequest:
        """Return the generation that this job asks for. The context goes into the user's own message: some chat
        templates take no other."""
        content = f"Context:\n{self.context}\n\n{self.prompt}" if self.context else self.prompt
        return GenerationRequest(
            request_id=request_id,
            messages=[{"role": "user", "content": content}],
            stream=True,
            max_tokens=self.max_tokens,
            default_max_tokens=defaults.max_tokens,
            **self.sampling(defaults),
        )


@router.get("/api/v1/chat/stream/{client_id}", response_class=Response)
async def open_job_stream(
    request: Request,
    client_id: str,
    principal: Annotated[Principal, Depends(authenticate)],
    services: Annotated[Services, Depends(services)],
    last_event_id: Annotated[str | None, Header(description="Number of the last event that was received.")] = None,
) -> Response:
    """Open a client's stream of job events, or take it up again, in place of an older one."""
    _check_client_id(client_id)
    after = number_of(last_event_id, "Last-Event-ID")
    run = partial(run_job, request.app)
    frames = services.jobs.stream(principal, client_id, after, run, services.authenticator.renewed)
    return GenerationResponse(
        while_authenticated(frames, request, services),
        stream=True,
        drain=services.drain,
        metrics=services.metrics,
        keepalive_s=services.config.server.keepalive_s,
        render_error=_render_error,
    )


BODY = JsonBody(JobRequest)


@router.post(
    "/api/v1/chat/submit",
    status_code=202,
    response_class=Response,
    openapi_extra=BODY.openapi,
)
async def submit_job(call: Annotated[Call, Depends(call)]) -> Response:
    """Queue a prompt for a client whose stream is open."""
    body = await call.read(BODY)
    model = await call.admit(body.model)
    most = call.services.config.jobs.max_job_bytes
    async with call.telling_standing(model):
        _check_client_id(body.client_id)
        if len(body.prompt) + len(body.context or "") > most:
            raise _too_large(most)
        given_id = call.request.headers.get("x-session-id")
        session = await call.services.sessions.accept(call.principal, given_id)
        job = Job(
            f"job_{secrets.token_hex(16)}",
            call.principal,
            given_id if given_id is None else session.id or given_id,
            body.model_dump(exclude_none=True),
            session.incarnation,
            session.announce,
        )
        if len(job.text().encode()) > most:
            raise _too_large(most)
        position = await call.services.jobs.submit(body.client_id, job)
    standing = await call.services.limits.peek(call.principal, model)
    return Response(
        orjson.dumps({"job_id": job.id, "client_id": body.client_id, "position": position}),
        202,
        standing.headers() if standing is not None else None,
        "application/json",
    )


@router.delete("/api/v1/chat/stream/{client_id}")
async def close_job_stream(
    client_id: str,
    principal: Annotated[Principal, Depends(authenticate)],
    services: Annotated[Services, Depends(services)],
) -> dict[str, Any]:
    """End a client's stream, and cancel its jobs."""
    _check_client_id(client_id)
    await services.jobs.leave(principal, client_id)
    return {"client_id": client_id, "closed": True}


async def run_job(app: FastAPI, job: Job) -> AsyncGenerator[JobEvent, None]:
    """Answer a job's prompt, as its submitter is now. Raises what chat completions raise."""
    services: Services = app.state.services  # of now: the stream may be older than the last reload
    principal = await services.authenticator.renewed(job.principal)
    caller = Caller(principal, services)
    body = JobRequest.model_validate(job.request)
    # A drain that has begun meanwhile waits for this job.
    model = services.catalog.resolve(body.model, principal)
    meter = caller.meter(job.id, model)
    generation = body.for_engine(job.id, model.settings.defaults)
    session = await services.sessions.open(principal, job.session_id, generation.messages, job.session_incarnation)
    session.may_store = partial(services.jobs.holds, job)
    events: AsyncGenerator[Event, None] = caller.work(generation, meter, session)
    if (chars := services.config.server.stream_chunk_chars) is not None:
        events = rechunk(events, chars)
    finish_reason = None
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Delta):
                finish_reason = event.finish_reason or finish_reason
                if fields := _token_fields(event):
                    yield "token", fields
            elif model.settings.workflow != "chat":
                yield "progress", event_fields(event)
    is_new = session.announce or job.session_is_new
    told = {"session_id": session.id} if is_new and job.session_id is not None else {}
    yield "done", {"finish_reason": finish_reason, "usage": usage_fields(meter.usage), **told}


def _token_fields(delta: Delta) -> dict[str, str]:
    fields = {"text": delta.text} if delta.text else {}
    return fields | ({"reasoning": delta.reasoning} if delta.reasoning else {})


def _check_client_id(client_id: str) -> None:
    if not _CLIENT_ID.fullmatch(client_id):
        raise BadRequest("'client_id' must be 1 to 128 characters out of letters, digits and . _ : @ -", "client_id")


def _too_large(most: int) -> RequestTooLarge:
    return RequestTooLarge(f"The job is larger than the limit of {most} bytes; shorten its context.", "context")


def _render_error(error: GatewayError, in_stream: bool) -> bytes:
    return event_frame("error", error_fields(error)) if in_stream else error.body()
