"""A receiver of OTLP metrics over HTTP on a free loopback port: what was sent in, the decoded points out."""

from __future__ import annotations

import gzip
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Receiver", "receiving"]


@dataclass(slots=True)
class Receiver:
    """What arrived: whole requests, and their points as (name, attributes, value, metric)."""

    port: int
    requests: list[ExportMetricsServiceRequest] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def metrics(self) -> list[Any]:
        resources = [resource for request in self.requests for resource in request.resource_metrics]
        return [metric for resource in resources for scope in resource.scope_metrics for metric in scope.metrics]

    def points(self, name: str) -> dict[tuple[str, ...], float]:
        """The sum of the points of a metric by the values of its attributes, in the order of their names."""
        found: dict[tuple[str, ...], float] = {}
        for metric in self.metrics:
            if metric.name == name:
                for point in getattr(metric, metric.WhichOneof("data")).data_points:
                    labels = {one.key: one.value.string_value for one in point.attributes}
                    key = tuple(labels[label] for label in sorted(labels))
                    value = point.sum if metric.HasField("histogram") else point.as_double or point.as_int
                    found[key] = found.get(key, 0) + value
        return found


@contextmanager
def receiving() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            receiver.requests.append(ExportMetricsServiceRequest.FromString(body))
            answer = ExportMetricsServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver = Receiver(server.server_port)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()
