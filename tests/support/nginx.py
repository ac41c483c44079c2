"""A real nginx in front of one gateway, with kept-alive connections and the WebSocket recipe of its documentation.

Example:

    with run_nginx(gateway.url.removeprefix("http://"), tmp_path / "nginx") as nginx:
        ...
    assert nginx.requests
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.debian import program

_CONFIG = """
daemon off;
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
    log_format requests '$request_uri';
    access_log {folder}/access.log requests;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    client_max_body_size 8m;
    # Who sends half a request is soon told that it was all.
    client_header_timeout 500ms; client_body_timeout 500ms; keepalive_timeout 500ms; lingering_close off;
    map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
    upstream gateway {{ server {upstream}; keepalive 8; }}
    proxy_http_version 1.1;
    proxy_set_header Upgrade $http_upgrade;
    proxy_set_header Connection $connection_upgrade;
    server {{
        listen 127.0.0.1:{buffered_port};
        location /admin {{ return 403 "closed at the proxy\\n"; }}
        location / {{ proxy_pass http://gateway; }}
    }}
    server {{
        listen 127.0.0.1:{unbuffered_port};
        proxy_request_buffering off;
        proxy_buffering off;
        location /admin {{ return 403 "closed at the proxy\\n"; }}
        location / {{ proxy_pass http://gateway; }}
    }}
}}
"""


@dataclass(frozen=True)
class Nginx:
    """Two doors of one nginx. Both close /admin."""

    buffered_port: int
    """Reads a request's body to its end, then sends it on."""
    unbuffered_port: int
    """Sends a request on as it comes."""
    access_log: Path

    def requests(self) -> list[str]:
        """Return the target of every request that nginx itself has read and answered."""
        return self.access_log.read_text(errors="replace").splitlines()


@contextlib.contextmanager
def run_nginx(upstream: str, folder: Path) -> Iterator[Nginx]:
    """Run nginx in front of `upstream`, which is `address:port`. Skips the test where it can't be installed."""
    binary = program("nginx", "nginx")
    ports = []
    with contextlib.ExitStack() as held:
        for _ in range(2):
            free = held.enter_context(socket.socket())
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    folder.mkdir()
    config = folder / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    values = {"folder": folder, "upstream": upstream, "user": user}
    config.write_text(_CONFIG.format(buffered_port=ports[0], unbuffered_port=ports[1], **values))
    process = subprocess.Popen([binary, "-c", str(config), "-e", str(folder / "error.log")], stdin=subprocess.DEVNULL)
    try:
        for port in ports:
            _wait_until_open(port, process)
        yield Nginx(ports[0], ports[1], folder / "access.log")
    finally:
        process.terminate()
        process.wait(timeout=10)


def _wait_until_open(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert process.poll() is None, "nginx has ended"
        assert time.monotonic() < deadline, "nginx does not listen"
        time.sleep(0.01)
