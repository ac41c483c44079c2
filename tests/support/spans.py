"""Keeps spans in memory, and reads them as a tree.

Example:

    gateway = await serve(tracing=spans.tracing)
    await gateway.chat()
    await until(lambda: spans.open == 0)
    (generation,) = spans.below(spans.finished()[0])
"""

from __future__ import annotations

import importlib
import pkgutil

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv import _incubating, attributes

from gateway.telemetry.tracing import Tracing


class Spans(SpanProcessor):
    """`tracing` is for whoever makes spans; the rest shows those that have ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        provider.add_span_processor(self)
        self.tracing = Tracing(provider)
        self.open = 0
        """Spans that have begun and not ended."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        self.open += 1

    def on_end(self, span: ReadableSpan) -> None:
        self.open -= 1

    def finished(self) -> list[ReadableSpan]:
        """Return all that have ended, in the order in which they began."""
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.finished() if span.name == name]

    def below(self, parent: ReadableSpan) -> list[ReadableSpan]:
        """Return the children of a span."""
        assert parent.context is not None
        return [
            span
            for span in self.finished()
            if span.parent is not None and span.parent.span_id == parent.context.span_id
        ]


def conventional_names() -> set[str]:
    """Return every attribute's name in the installed opentelemetry-semantic-conventions."""
    names: set[str] = set()
    for package in (attributes, importlib.import_module(f"{_incubating.__name__}.attributes")):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            members = vars(importlib.import_module(module.name))
            names |= {value for name, value in members.items() if name.isupper() and isinstance(value, str)}
    return names
