"""Common code of the routes that generate: reading a body, opening the call, and answering it.

A route parses its protocol and names an encoder; the rest of the path is the same for all of them. Errors about a
request carry the caller's rate-limit standing: every metered response has it, refusals as well.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, TypeVar

from fastapi import Depends, Request
from starlette.responses import Response

from engine.base import GenerationRequest
from gateway.access.auth import Principal
from gateway.access.catalog import ModelSpec
from gateway.access.prompt_size import WORK_BYTES
from gateway.api.dependencies import authenticate, services
from gateway.api.shannon_options import ShannonOptions
from gateway.conversations.sessions import Session
from gateway.errors import BadRequest, GatewayError, InvalidApiKey, ModelNotAllowed, ModelNotFound, RateLimitExceeded
from gateway.exchange.bodies import model_named_in
from gateway.exchange.chunking import rechunk
from gateway.exchange.encoder import Encoder, collect, stream
from gateway.exchange.events import Event
from gateway.exchange.json_parser import LARGE_BYTES
from gateway.exchange.response import GenerationResponse, RenderError, queue_comment, render_openai
from gateway.images import with_images
from gateway.meter import Meter
from gateway.services import Services
from gateway.workflows.chat import chat
from gateway.workflows.registry import WORKFLOWS
from gateway.workflows.run import Budget, Run, conduct

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and what the app offers: what generating takes, on behalf of a request or after it."""

    principal: Principal
    services: Services

    async def admit(self, model_id: str | None) -> ModelSpec:
        """Return the model that was asked for. Raises what the drain and the catalog raise."""
        self.services.drain.admit()
        return self.services.catalog.resolve(model_id, self.principal)

    def meter(self, request_id: str, model: ModelSpec) -> Meter:
        """Return the model's engine as this caller may use it."""
        app = self.services
        salt = app.cache_salts.salt_of(self.principal.tenant)
        meter = Meter(request_id, self.principal, model, app.limits, app.ledger, app.metrics, salt, app.tracing)
        meter.account.recheck = partial(self._recheck, model.id)
        return meter

    async def _recheck(self, model_id: str) -> None:
        """Raise what a new request for the model would: its key was revoked meanwhile, or the model removed."""
        now = self._services_now()
        now.catalog.resolve(model_id, await now.authenticator.renewed(self.principal))

    def _services_now(self) -> Services:
        """The app's services after the last reload, if they are known."""
        return self.services

    def work(
        self,
        generation: GenerationRequest,
        meter: Meter,
        session: Session,
        ready: Callable[[GenerationRequest], GenerationRequest] = lambda generation: generation,
        options: ShannonOptions | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Return the events of the model's workflow. `ready` gets the request once its images are in it as data, and
        may change it."""
        app = self.services
        generation = replace(generation, affinity=session.affinity or session.id)

        def run(generation: GenerationRequest) -> AsyncGenerator[Event, None]:
            return self._workflow(ready(generation), meter, session, options or ShannonOptions())

        return with_images(run, generation, meter, app.images)

    def _workflow(
        self, generation: GenerationRequest, meter: Meter, session: Session, options: ShannonOptions
    ) -> AsyncGenerator[Event, None]:
        app = self.services
        settings = meter.model.settings
        if settings.workflow == "chat":
            return chat(generation, meter, session, app.clock)
        tools = app.tools_of(meter.model)
        tools = tools if options.tools is None else tools.only(options.tools)
        budget = Budget(**settings.budget.model_dump())
        chosen = options.model_dump(exclude_none=True, exclude={"tools"})
        images = app.config.answers.images
        run = Run(generation, meter, session, tools, budget, app.clock, chosen, images)
        return conduct(WORKFLOWS[settings.workflow], run)

    def encode(
        self, events: AsyncGenerator[Event, None], encoder: Encoder, *, streamed: bool
    ) -> AsyncGenerator[bytes, None]:
        """Return `events` as bytes in the encoder's form."""
        chars = self.services.config.server.stream_chunk_chars
        if streamed and chars is not None:
            events = rechunk(events, chars)
        return stream(events, encoder) if streamed else collect(events, encoder)


@dataclass(frozen=True, slots=True)
class Call(Caller):
    """One HTTP request that generates."""

    request: Request

    def _services_now(self) -> Services:
        services: Services = self.request.app.state.services
        return services

    def meter(self, request_id: str, model: ModelSpec) -> Meter:
        """Return the meter as a Caller does, and note it for the access log."""
        meter = Caller.meter(self, request_id, model)
        meter.account.limited = self._bar
        meter.account.worked = self._takes_work
        self.request.state.meter = meter
        return meter

    @property
    def _takes_work(self) -> bool:
        return getattr(self.request.state, "body_bytes", 0) > WORK_BYTES

    def _bar(self, model: ModelSpec, error: RateLimitExceeded) -> None:
        """Record that further requests of this size would be refused."""
        if self._takes_work and error.retry_after_s is not None:
            self.services.bodies.bar(self.principal.key_id, model.id, error.retry_after_s)

    async def read(self, parse: Callable[[bytes], T]) -> T:
        """Read the body and parse it, beside the event loop if it is large. One that is refused after some work
        counts as a request. The caller is authenticated again when the body is complete: its key may have been revoked
        or rotated meanwhile.

        Raises what `Bodies.receive` raises, RequestTooLarge, RateLimitExceeded, and what `parse` and `authenticate`
        raise.
        """
        parsed = await self._read(parse)
        await self._authenticate_again()
        return parsed

    async def _authenticate_again(self) -> None:
        fresh = await self.services.authenticator.authenticate(self.request)
        if self.principal.admin and not fresh.admin:
            raise InvalidApiKey("The rights of this API key have changed. Send the request again.")

    async def _read(self, parse: Callable[[bytes], T]) -> T:
        bodies, key_id = self.services.bodies, self.principal.key_id
        # Which model a bad body means can't be relied on; the default's limits are the best answer there is.
        model = self.services.catalog.default_for(self.principal)
        async with self.telling_standing(model), bodies.receive(self.request, key_id) as body:
            self.request.state.body_bytes = len(body)
            if not self._takes_work:
                return parse(body)
            model = self._model_named_in(body) or model
            async with self.telling_standing(model):
                if model is not None:
                    bodies.check_bar(key_id, model.id)
                try:
                    return await self._aside(lambda: parse(body), large=len(body) > LARGE_BYTES)
                except BadRequest as error:
                    raise await self._charge(error, model) from error.__cause__

    def _model_named_in(self, body: bytes) -> ModelSpec | None:
        named = model_named_in(body)
        with contextlib.suppress(ModelNotFound, ModelNotAllowed):
            return None if named is None else self.services.catalog.resolve(named, self.principal)
        return None

    async def _charge(self, error: GatewayError, model: ModelSpec | None) -> GatewayError:
        """Count a refused request, and return the client's error. Raises RateLimitExceeded."""
        if model is not None:
            meter = self.meter(f"refused-{secrets.token_hex(16)}", model)
            await meter.account.charge(error)
            error.extra_headers = meter.headers() | error.extra_headers
        return error

    async def _aside(self, work: Callable[[], T], *, large: bool) -> T:
        return await self.services.bodies.aside(self.principal.key_id, work) if large else work()

    async def admit(self, model_id: str | None) -> ModelSpec:
        """Return the model as a Caller does."""
        async with self.telling_standing(self.services.catalog.resolve(model_id, self.principal)):
            return await Caller.admit(self, model_id)

    async def converse(
        self, generation: GenerationRequest, meter: Meter, options: ShannonOptions | None = None
    ) -> tuple[AsyncGenerator[Event, None], Session]:
        """Return the events of the model's workflow within the caller's session, which takes note of the turn."""
        app = self.services
        given_id = self.request.headers.get("x-session-id")
        async with self.telling_standing(meter.model):
            if options is not None:
                options.check(meter.model, app.tools_of(meter.model))
            session = await app.sessions.open(self.principal, given_id, generation.messages)
        return self.work(generation, meter, session, options=options), session

    def answer(
        self,
        events: AsyncGenerator[Event, None],
        encoder: Encoder,
        meter: Meter,
        *,
        streamed: bool,
        session: Session | None = None,
        render_error: RenderError = render_openai,
    ) -> Response:
        """Return the response that sends `events` in the encoder's form."""
        return self.send(
            self.encode(events, encoder, streamed=streamed),
            meter,
            streamed=streamed,
            session=session,
            render_error=render_error,
        )

    def send(
        self,
        chunks: AsyncGenerator[bytes, None],
        meter: Meter,
        *,
        streamed: bool,
        session: Session | None = None,
        headers: Callable[[], dict[str, str]] = dict,
        render_error: RenderError = render_openai,
    ) -> Response:
        """Return the response that sends `chunks`. `headers` is asked for more headers when the status is sent."""
        return GenerationResponse(
            chunks,
            stream=streamed,
            drain=self.services.drain,
            metrics=self.services.metrics,
            keepalive_s=self.services.config.server.keepalive_s,
            headers=lambda: (session.headers() if session is not None else {}) | meter.headers() | headers(),
            comment=lambda: queue_comment(meter.waiting),
            render_error=render_error,
        )

    @property
    def wants_events(self) -> bool:
        """Whether the client takes Shannon events."""
        return self.request.headers.get("x-shannon-events", "").lower() != "off"

    @contextlib.asynccontextmanager
    async def telling_standing(self, model: ModelSpec | None) -> AsyncIterator[None]:
        """Send with an error where the caller's limits stand."""
        try:
            yield
        except GatewayError as error:
            standing = None if model is None else await self.services.limits.peek(self.principal, model)
            if standing is not None:
                error.extra_headers = standing.headers() | error.extra_headers
            raise


async def call(
    request: Request,
    principal: Annotated[Principal, Depends(authenticate)],
    services: Annotated[Services, Depends(services)],
) -> Call:
    """Return the call. For routes, as a dependency."""
    return Call(principal, services, request)
