"""Traces of requests, generations, agents and tool calls, sent to an OTLP endpoint that the environment names.

The variables are OpenTelemetry's own: OTEL_EXPORTER_OTLP_ENDPOINT turns it on, the SDK obeys the others. Names of
spans and attributes follow the semantic conventions for HTTP and generative AI, as opentelemetry-semantic-conventions
0.66b2 has them; what has none there begins with `shannon.`. Without an endpoint this module imports none of it, and
every method returns at once. No prompt, answer, tool argument or tool result is ever recorded, nor the message of an
exception, which may quote one.

A span's parent is the one that is current in its task. A generation's is never made current: generators run in
whichever task asks for the next piece. Spans leave in a thread of their own; what can't be sent is dropped, and logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from engine.base import EngineError, GenerationRequest, PoolingRequest, Prepared, Request, Usage
from gateway import __version__
from gateway.errors import CLIENT_DISCONNECTED, GatewayError, from_engine
from gateway.settings.config import ConfigError
from gateway.telemetry.logs import without_keys

if TYPE_CHECKING:
    from opentelemetry import trace as otel
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

PROVIDER = "shannon"
"""Of generative AI: a name of our own, which the conventions allow for systems that are not on their list."""
SERVICE = "shannon-gateway"
CANCELLED = "cancelled"
"""Error type of what its client, or the run that it belonged to, no longer wanted."""
_NO_FAILURES = (CANCELLED, CLIENT_DISCONNECTED)
_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_TRACES_PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
_HTTP = "http/protobuf"
_CLOSE_S = 3.0
"""How long the end of the process waits for the last spans to leave; an endpoint that is there takes milliseconds."""


def traces_endpoint(environment: Mapping[str, str]) -> str | None:
    """Return the URL that traces go to, None where they are off. Raises ConfigError."""
    given = {name: environment.get(name, "").strip() for name in (_TRACES_ENDPOINT, _ENDPOINT)}
    name = next((name for name in given if given[name]), None)
    if name is None or environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    if exporter == "none":
        return None
    protocols = (environment.get(name, "").strip() for name in (_TRACES_PROTOCOL, "OTEL_EXPORTER_OTLP_PROTOCOL"))
    protocol = next(filter(None, protocols), _HTTP)
    if exporter != "otlp":
        raise ConfigError(f"OTEL_TRACES_EXPORTER: must be otlp or none, not {exporter!r}")
    if protocol != _HTTP:
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL: must be {_HTTP}, not {protocol!r}; collectors take it on 4318")
    url = urlsplit(given[name])
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(f"{name}: must be an http or https URL, as http://collector:4318, not {given[name]!r}")
    return given[name] if name == _TRACES_ENDPOINT else f"{given[name].rstrip('/')}/v1/traces"


def vllm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that have vLLM send its own spans the way ours go. Raises ConfigError."""
    if traces_endpoint(environment) is None:
        return {}
    named = "OTEL_SERVICE_NAME" in environment or "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return {_TRACES_PROTOCOL: _HTTP} | ({} if named else {"OTEL_SERVICE_NAME": SERVICE})


def build_tracing(environment: Mapping[str, str]) -> Tracing:
    """The tracing that `environment` configures, started. The SDK reads all settings but the endpoint itself."""
    endpoint = traces_endpoint(environment)
    if endpoint is None:
        return Tracing()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    own = Resource({"service.name": SERVICE, "service.version": __version__})
    resource = Resource.create().merge(own).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider)


class Span:
    """A span that records nothing: what there is where tracing is off, or the trace is not sampled."""

    trace_id: str | None = None
    headers: Mapping[str, str] | None = None
    """W3C trace context, for services that continue the trace."""

    def asked(self, request_id: str, key_id: str | None) -> None:
        """Note what the log knows a request by."""

    def answered(self, method: str, route: str, status: int | None, error: str | None) -> None:
        """Note how a request ended. `status` is None where none was sent."""

    def generated(self, prepared: Prepared, finish_reasons: list[str], first_token_s: float | None) -> None:
        """Note how a generation or an embedding ended."""

    def spent(self, usage: Usage) -> None:
        """Note tokens."""

    def fail(self, error: str) -> None:
        """Note an error by its code."""


_NOTHING: AbstractContextManager[Span] = contextlib.nullcontext(Span())


class _Recording(Span):
    def __init__(self, span: otel.Span) -> None:
        self._span = span

    def asked(self, request_id: str, key_id: str | None) -> None:
        self._span.set_attribute("shannon.request_id", request_id)
        if key_id is not None:
            self._span.set_attribute("shannon.key_id", key_id)

    def answered(self, method: str, route: str, status: int | None, error: str | None) -> None:
        self._span.update_name(f"{method} {route}")
        self._span.set_attribute("http.route", route)
        if status is not None:
            self._span.set_attribute("http.response.status_code", status)
        if error is not None or (status is not None and status >= 500):
            # What the client got wrong is no failure of the server. A stream may fail behind its 200.
            self._note(error or str(status), failed=status is None or not 400 <= status < 500)

    def generated(self, prepared: Prepared, finish_reasons: list[str], first_token_s: float | None) -> None:
        self.spent(prepared.usage)
        self._span.set_attribute("shannon.queue_s", prepared.queue_s)
        if finish_reasons:
            self._span.set_attribute("gen_ai.response.finish_reasons", finish_reasons)
        if first_token_s is not None and isinstance(prepared.request, GenerationRequest) and prepared.request.stream:
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", first_token_s)

    def spent(self, usage: Usage) -> None:
        tokens = {
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
        }
        if usage.reasoning_tokens:
            tokens["gen_ai.usage.reasoning.output_tokens"] = usage.reasoning_tokens
        self._span.set_attributes(tokens)

    def fail(self, error: str) -> None:
        self._note(error, failed=True)

    def _note(self, error: str, *, failed: bool) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("error.type", error)
        if failed and error not in _NO_FAILURES:
            self._span.set_status(StatusCode.ERROR)


class Tracing:
    """Makes spans of `provider`, or none. What opens a span gives it back, and ends it with the block."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        if provider is None:
            return
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer(SERVICE, __version__)
        self._propagator = TraceContextTextMapPropagator()

    def request(self, method: str, scheme: str, path: str, headers: Mapping[str, str]) -> AbstractContextManager[Span]:
        """Open the span of an HTTP request, below the one that its `traceparent` names."""
        if self._provider is None:
            return _NOTHING
        attributes = {"http.request.method": method, "url.scheme": scheme, "url.path": without_keys(path)}
        return self._open(method, attributes, kind="SERVER", above=self._propagator.extract(headers))

    def workflow(self, name: str, model_id: str) -> AbstractContextManager[Span]:
        """Open the span of a run of agents."""
        if self._provider is None:
            return _NOTHING
        own = {"gen_ai.workflow.name": name, "gen_ai.request.model": model_id}
        return self._open(f"invoke_workflow {name}", _operation("invoke_workflow") | own)

    def agent(self, name: str, role: str) -> AbstractContextManager[Span]:
        """Open the span of an agent's life."""
        if self._provider is None:
            return _NOTHING
        own = {"gen_ai.agent.name": name, "gen_ai.agent.description": role}
        return self._open(f"invoke_agent {name}", _operation("invoke_agent") | own)

    def tool(self, name: str, call: int) -> AbstractContextManager[Span]:
        """Open the span of a tool call, the run's number `call`."""
        if self._provider is None:
            return _NOTHING
        own = {"gen_ai.tool.name": name, "gen_ai.tool.type": "function", "gen_ai.tool.call.id": str(call)}
        return self._open(f"execute_tool {name}", _operation("execute_tool") | own)

    def generation(self, prepared: Prepared, model_id: str) -> AbstractContextManager[Span]:
        """Open the span of a generation, or of an embedding; what is prepared without a request has none."""
        if self._provider is None or prepared.request is None:
            return _NOTHING
        attributes = _request_attributes(prepared.request, prepared.max_tokens) | {
            "gen_ai.request.model": model_id,
            "gen_ai.response.model": model_id,
            "gen_ai.response.id": prepared.request_id,
        }
        name = f"{attributes['gen_ai.operation.name']} {model_id}"
        return self._open(name, attributes, kind="CLIENT", current=False)

    @contextlib.contextmanager
    def _open(
        self,
        name: str,
        attributes: Mapping[str, Any],
        *,
        kind: str = "INTERNAL",
        above: Context | None = None,
        current: bool = True,
    ) -> Iterator[Span]:
        from opentelemetry import context, trace

        span = self._tracer.start_span(name, above, trace.SpanKind[kind], attributes)
        here = trace.set_span_in_context(span, above)
        recording = _Recording(span) if span.is_recording() else Span()
        recording.trace_id = f"{span.get_span_context().trace_id:032x}"
        if not current:
            headers: dict[str, str] = {}
            self._propagator.inject(headers, here)
            recording.headers = headers
        token = context.attach(here) if current else None
        try:
            yield recording
        except BaseException as error:
            recording.fail(_type_of(error))
            raise
        finally:
            if token is not None:
                context.detach(token)
            span.end()

    async def close(self) -> None:
        """Send what is left, within a bound: the end of a process must not wait for an endpoint that is gone."""
        if self._provider is None:
            return
        loop, closed = asyncio.get_running_loop(), asyncio.Event()
        # A daemon: the interpreter would wait for any other thread.
        threading.Thread(target=self._shut_down, args=(loop, closed), daemon=True).start()
        try:
            async with asyncio.timeout(_CLOSE_S):
                await closed.wait()
        except TimeoutError:
            log.warning("the last traces could not be sent within %g s", _CLOSE_S)

    def _shut_down(self, loop: asyncio.AbstractEventLoop, closed: asyncio.Event) -> None:
        from opentelemetry import trace

        # The global provider is vLLM's; at exit it would be waited for as long as its endpoint likes.
        providers: tuple[Any, ...] = (self._provider, trace.get_tracer_provider())
        for provider in providers:
            if hasattr(provider, "shutdown"):
                provider.shutdown()
        with contextlib.suppress(RuntimeError):  # the loop is gone, and no task waits any more
            loop.call_soon_threadsafe(closed.set)


def _operation(name: str) -> dict[str, Any]:
    return {"gen_ai.operation.name": name, "gen_ai.provider.name": PROVIDER}


def _request_attributes(request: Request, max_tokens: int) -> dict[str, Any]:
    """The parameters of a request, and nothing of its text."""
    if isinstance(request, PoolingRequest):
        return _operation("embeddings" if request.task == "embed" else request.task)
    given: dict[str, Any] = {
        "gen_ai.conversation.id": request.affinity or None,
        "gen_ai.request.max_tokens": max_tokens,
        "gen_ai.request.temperature": request.temperature,
        "gen_ai.request.top_p": request.top_p,
        "gen_ai.request.top_k": request.top_k,
        "gen_ai.request.seed": request.seed,
        "gen_ai.request.choice.count": request.n if request.n > 1 else None,
        "gen_ai.request.stream": request.stream,
    }
    operation = _operation("chat" if request.prompt is None else "text_completion")
    return operation | {name: value for name, value in given.items() if value is not None}


def _type_of(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return CANCELLED
    if isinstance(error, EngineError):
        error = from_engine(error)
    return error.code if isinstance(error, GatewayError) else type(error).__name__
