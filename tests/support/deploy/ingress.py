"""A real nginx in front of replicas, configured as the chart's Ingress configures ingress-nginx.

Example:

    ingress = Ingress(network.add_host("nginx"), tmp_path / "nginx")
    ingress.route(["10.0.0.2:8000", "10.0.0.3:8000"])

The annotations are read from the chart's values; one without a translation here fails the test. nginx differs from
ingress-nginx in three points. It changes endpoints by a reload. It does not hash an empty key, for which the chart has
a second Ingress. And it retries on another replica after a failure even where it hashes; a request that needs no retry
here needs none there.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import yaml

from tests.support.debian import program
from tests.support.deploy.hosts import Host
from tests.support.gateway_process import ROOT

_PREFIX = "nginx.ingress.kubernetes.io/"
_DIRECTIVES = {
    "proxy-buffering": "proxy_buffering {};",
    "proxy-request-buffering": "proxy_request_buffering {};",
    "proxy-http-version": "proxy_http_version {};",
    "proxy-body-size": "client_max_body_size {};",
    "proxy-connect-timeout": "proxy_connect_timeout {}s;",
    "proxy-read-timeout": "proxy_read_timeout {}s;",
    "proxy-send-timeout": "proxy_send_timeout {}s;",
    "proxy-next-upstream": "proxy_next_upstream {};",
    "proxy-next-upstream-timeout": "proxy_next_upstream_timeout {}s;",
    "proxy-next-upstream-tries": "proxy_next_upstream_tries {};",
}
_HASH = "upstream-hash-by"
_CONFIG = """
daemon off;
user root;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 2048; }}
http {{
    access_log off;
    upstream gateways {{
        {hash}
        {servers}
        keepalive 320;
        keepalive_timeout 60s;
    }}
    server {{
        listen {address}:80;
        location / {{
            proxy_pass http://gateways;
            proxy_set_header Host $host;
            proxy_set_header Connection "";
            proxy_set_header X-Request-ID $request_id;
            proxy_set_header X-Forwarded-For $remote_addr;
            add_header X-Replicas $upstream_addr always;
            {directives}
        }}
    }}
}}
"""


def chart_annotations() -> dict[str, str]:
    """Return the annotations of the chart's Ingress for ingress-nginx, without their prefix."""
    values = yaml.safe_load((ROOT / "helm/shannon/values.yaml").read_text())
    return {name.removeprefix(_PREFIX): value for name, value in values["ingress"]["annotations"].items()}


class Ingress:
    """nginx on a host of its own.

    Its responses say in X-Replicas which ones were asked, `address:port, address:port`; the last of them answered.
    """

    def __init__(self, host: Host, folder: Path) -> None:
        self._host = host
        self._folder = folder
        self._binary = program("nginx", "nginx")
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://{host.address}"
        folder.mkdir()

    def route(self, endpoints: Sequence[str]) -> None:
        """Send requests to these, `address:port`, from now on. Running ones stay where they are."""
        command = [self._binary, "-c", str(self._folder / "nginx.conf"), "-e", str(self._folder / "error.log")]
        (self._folder / "nginx.conf").write_text(self._config(endpoints))
        if self._process is None:
            with self._host.inside():
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            self._wait(lambda: bool(self._workers()))
            return
        before = self._workers()
        subprocess.run([*command, "-s", "reload"], check=True, capture_output=True)
        self._wait(lambda: bool(self._workers()) and not before & self._workers())

    def _workers(self) -> set[int]:
        """Return the workers that take connections; those of an earlier configuration only end what they have."""
        assert self._process is not None
        found = set()
        for worker in psutil.Process(self._process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(worker.cmdline()).strip() == "nginx: worker process":
                    found.add(worker.pid)
        return found

    def _wait(self, condition: Callable[[], bool]) -> None:
        assert self._process is not None
        deadline = time.monotonic() + 10
        while not condition():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._folder / "error.log").read_text())
            time.sleep(0.01)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()  # at once, open connections or not
            self._process.wait(timeout=10)

    def _config(self, endpoints: Sequence[str]) -> str:
        annotations = chart_annotations()
        key = annotations.pop(_HASH, None)
        unknown = annotations.keys() - _DIRECTIVES.keys()
        assert not unknown, f"annotations of the chart that have no translation in {__name__}: {unknown}"
        return _CONFIG.format(
            folder=self._folder,
            address=self._host.address,
            hash=f'hash "{key}" consistent;' if key else "",
            servers=" ".join(f"server {endpoint} max_fails=0;" for endpoint in endpoints),
            directives=" ".join(_DIRECTIVES[name].format(value) for name, value in annotations.items()),
        )
