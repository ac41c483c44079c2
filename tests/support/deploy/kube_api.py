"""The part of a Kubernetes API that helm reads before an install: which kinds and which objects exist.

Example:

    with run_kube_api(tmp_path, objects=[]) as kubeconfig:
        helm("install", "shannon", CHART, "--dry-run=server", f"--kubeconfig={kubeconfig}")

Nothing can be created, so every run of helm stays a dry run.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

KINDS = {
    "v1": ["ConfigMap", "PersistentVolumeClaim", "Pod", "Secret", "Service", "ServiceAccount"],
    "apps/v1": ["Deployment", "StatefulSet"],
    "autoscaling/v2": ["HorizontalPodAutoscaler"],
    "batch/v1": ["Job"],
    "gateway.networking.k8s.io/v1": ["HTTPRoute"],
    "keda.sh/v1alpha1": ["ScaledObject"],
    "leaderworkerset.x-k8s.io/v1": ["LeaderWorkerSet"],
    "monitoring.coreos.com/v1": ["PrometheusRule", "ServiceMonitor"],
    "networking.k8s.io/v1": ["Ingress", "NetworkPolicy"],
    "policy/v1": ["PodDisruptionBudget"],
}
_PLURALS = {"Ingress": "ingresses", "NetworkPolicy": "networkpolicies"}


def _plural(kind: str) -> str:
    return _PLURALS.get(kind, kind.lower() + "s")


def _discovery(path: str) -> dict[str, Any] | None:
    """Return what tells a client which kinds there are, or None where `path` asks for something else."""
    if path == "/version":
        return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = [{"groupVersion": name, "version": name.partition("/")[2]} for name in KINDS if "/" in name]
        names = [version["groupVersion"].partition("/")[0] for version in versions]
        groups = [
            {"name": name, "versions": [version], "preferredVersion": version}
            for name, version in zip(names, versions, strict=True)
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    group = path.removeprefix("/apis/").removeprefix("/api/")
    if group not in KINDS:
        return None
    resources = [
        {
            "name": _plural(kind),
            "singularName": kind.lower(),
            "namespaced": True,
            "kind": kind,
            "verbs": ["get", "list"],
        }
        for kind in KINDS[group]
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": resources}


@contextlib.contextmanager
def run_kube_api(folder: Path, objects: list[dict[str, Any]]) -> Iterator[Path]:
    """Serve `objects`, and yield a kubeconfig for them."""
    found = {
        f"/api/v1/namespaces/{o['metadata']['namespace']}/{_plural(o['kind'])}/{o['metadata']['name']}": o
        for o in objects
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            body = _discovery(path) or found.get(path)
            if body is None and path.endswith("/secrets"):  # helm looks for its own releases
                body = {"kind": "SecretList", "apiVersion": "v1", "items": []}
            status = 200 if body else 404
            self._answer(status, body or {"kind": "Status", "apiVersion": "v1", "code": 404, "reason": "NotFound"})

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    kubeconfig = folder / "kubeconfig"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "current-context": "here",
    }
    kubeconfig.write_text(yaml.safe_dump(config))
    try:
        yield kubeconfig
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
