"""A Hugging Face hub on a loopback port, as much of it as a download needs.

Example:

    with run_hub() as stub:
        stub.add("org/model", {"config.json": b"{}"}, gated=True)

Serves what huggingface_hub 2.4 requests: `GET /api/models/ID[/revision/REV]`, `GET` and `HEAD /ID/resolve/REV/PATH`
with ETag, commit and ranges, and the hub's error codes. Git LFS files are redirected to another origin, as the hub
redirects to its CDN; a token must not arrive there. Faults are scripted: cut connections, stalls, statuses, damage.
Not handled: Xet, write access, accounts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_BYTES = 100_000
"""Files from this size on are in LFS."""
_PIECE_BYTES = 2**14


@dataclass
class Repository:
    """`files` at one commit; every name in `revisions` means that commit, and so does its hash."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False
    private: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    """What the hub says of a file's size where it is not the truth."""

    @property
    def commit(self) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for path, content in sorted(self.files.items()):
            digest.update(path.encode() + checksum(content).encode())
        return digest.hexdigest()


@dataclass
class Asked:
    """A request that came in."""

    method: str
    path: str
    """Decoded, without the query; for a file behind the redirect `/cdn/SHA256`."""
    range: str | None
    authorization: str | None


@dataclass
class Fault:
    """What goes wrong with the body of one GET of a file."""

    after_bytes: int = 0
    """Sent before it goes wrong."""
    stall: bool = False
    """Send nothing more, but hold the connection until the client leaves or the hub closes."""
    status: int = 0
    """Answer with this and no body."""
    damage: bool = False
    """Send other bytes, as many."""
    ignore_range: bool = False
    """Send the file from its beginning, with 200."""


def is_lfs(content: bytes) -> bool:
    return len(content) >= LFS_BYTES


def checksum(content: bytes) -> str:
    """Return what the hub calls the file's ETag: SHA-256 in LFS, git's blob SHA-1 outside."""
    if is_lfs(content):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class HubStub:
    """See the module. `repositories` may be changed at any time."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens = {"hf_reader"}
        """Those that the hub knows; each may read everything private and gated but what is in `refused`."""
        self.refused: set[str] = set()
        """Gated repositories whose licence nobody has accepted."""
        self.asked: list[Asked] = []
        self.faults: dict[str, deque[Fault]] = {}
        """By path in the repository, one per GET of its content."""
        self.status = 0
        """Answers everything with this, if set."""
        self.stalled = threading.Event()
        """Set when a stall has begun."""
        self.closing = threading.Event()
        hub = self

        class Handler(_Handler):
            stub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.cdn_url = f"http://localhost:{self.port}"
        """The same server, but another origin."""
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def add(self, model: str, files: dict[str, bytes], **fields: Any) -> Repository:
        self.repositories[model] = Repository(files, **fields)
        return self.repositories[model]

    def add_folder(self, model: str, folder: Path) -> Repository:
        """Serve the files of a folder."""
        return self.add(model, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})

    def fault(self, path: str, *faults: Fault) -> None:
        self.faults.setdefault(path, deque()).extend(faults)

    def ranges(self, content: bytes) -> list[str | None]:
        """Return the ranges that were asked for of a file in LFS, in order."""
        return [asked.range for asked in self.asked if asked.path == f"/cdn/{checksum(content)}"]

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def run_hub() -> Iterator[HubStub]:
    """Run a hub without repositories."""
    hub = HubStub()
    try:
        yield hub
    finally:
        hub.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: HubStub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        authorization = self.headers.get("Authorization")
        self.stub.asked.append(Asked(self.command, path, self.headers.get("Range"), authorization))
        if self.stub.status:
            self._answer(self.stub.status)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._describe(match[1], match[2] or "main", "blobs" in parse_qs(url.query))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            self._send_from_cdn(match[1])
        else:
            self._answer(404)

    def _describe(self, model: str, revision: str, with_sizes: bool) -> None:
        # A gated repository may be listed by anybody.
        repository = self._find(model, revision, for_content=False)
        if repository is None:
            return
        siblings: list[dict[str, Any]] = []
        for path, content in repository.files.items():
            size = repository.sizes.get(path, len(content))
            sibling: dict[str, Any] = {"rfilename": path}
            if with_sizes:
                sibling |= {"size": size, "blobId": hashlib.sha1(content, usedforsecurity=False).hexdigest()}
                if is_lfs(content):
                    sibling["lfs"] = {"sha256": checksum(content), "size": size, "pointerSize": 130}
                else:
                    sibling["blobId"] = checksum(content)
            siblings.append(sibling)
        body = {"id": model, "modelId": model, "sha": repository.commit, "siblings": siblings, "tags": []}
        self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, model: str, revision: str, path: str) -> None:
        repository = self._find(model, revision, for_content=True)
        if repository is None:
            return
        headers = {"X-Repo-Commit": repository.commit}
        content = repository.files.get(path)
        if content is None:
            self._answer(404, headers={"X-Error-Code": "EntryNotFound", **headers})
        elif is_lfs(content):
            location = f"{self.stub.cdn_url}/cdn/{checksum(content)}"
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{checksum(content)}"'}
            self._answer(302, headers={"Location": location, **linked, **headers})
        else:
            self._send(path, content, {"ETag": f'"{checksum(content)}"', **headers})

    def _find(self, model: str, revision: str, *, for_content: bool) -> Repository | None:
        """Return a repository that the caller may see, or answer why not."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        known = token in self.stub.tokens
        repository = self.stub.repositories.get(model)
        if token and not known:
            self._answer(401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repository is None or (repository.private and not known):
            self._answer(404 if known else 401, headers={"X-Error-Code": "RepoNotFound"})
        elif for_content and repository.gated and (not known or model in self.stub.refused):
            self._answer(403 if known else 401, headers={"X-Error-Code": "GatedRepo"})
        elif revision not in (*repository.revisions, repository.commit):
            self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        else:
            return repository
        return None

    def _send_from_cdn(self, sha256: str) -> None:
        for repository in self.stub.repositories.values():
            for path, content in repository.files.items():
                if checksum(content) == sha256:
                    self._send(path, content, {"ETag": f'"{sha256}"'})
                    return
        self._answer(404)

    def _send(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        faults = self.stub.faults.get(path)
        fault = faults.popleft() if faults and self.command == "GET" else None
        if fault is not None and fault.status:
            self._answer(fault.status, headers={"Retry-After": "0"})
            return
        start = 0
        if (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) and not (
            fault and fault.ignore_range
        ):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if fault is not None and fault.damage:
            content = bytes(255 - byte for byte in content)
        self._answer(206 if start else 200, content[start:], headers, fault)

    def _answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, fault: Fault | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        breaks = fault is not None and not fault.damage and not fault.ignore_range
        sent = body[: fault.after_bytes] if breaks and fault else body
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(sent), _PIECE_BYTES):
                self.wfile.write(sent[at : at + _PIECE_BYTES])
            self.wfile.flush()
        if breaks:
            self.close_connection = True
            if fault and fault.stall:
                self.stub.stalled.set()
                self.stub.closing.wait()
