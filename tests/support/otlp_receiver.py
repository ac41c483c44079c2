"""An OTLP/HTTP endpoint on loopback that keeps the traces it receives.

Example:

    with run_receiver() as receiver:
        ...  # serve with OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url
        wait_until(lambda: "/v1/traces" in receiver.paths, "no trace was exported")
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Receiver:
    """`status` is what it answers from now on."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.status = 200
        self.paths: set[str] = set()
        self.requests: list[ExportTraceServiceRequest] = []

    def spans(self) -> list[dict[str, Any]]:
        """Return all spans: `service`, `name`, `kind`, `trace_id`, `span_id`, `parent_id`, and their attributes."""
        return [
            {
                "service": _values(resource.resource.attributes)["service.name"],
                "name": span.name,
                "kind": Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                "trace_id": span.trace_id.hex(),
                "span_id": span.span_id.hex(),
                "parent_id": span.parent_span_id.hex(),
                **_values(span.attributes),
            }
            for request in list(self.requests)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def named(self, name: str) -> list[dict[str, Any]]:
        return [span for span in self.spans() if span["name"] == name]


def _values(attributes: Any) -> dict[str, Any]:
    return {entry.key: getattr(entry.value, entry.value.WhichOneof("value")) for entry in attributes}


@contextlib.contextmanager
def run_receiver() -> Iterator[Receiver]:
    """Receive on a free port until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.headers["Content-Type"] == "application/x-protobuf"
            receiver.paths.add(self.path)
            if receiver.status == 200:
                receiver.requests.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(receiver.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver = Receiver(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
