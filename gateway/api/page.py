"""GET / and /web/{version}/{name}: the page, and the files that it is made of. Neither needs a key.

The files are read when the gateway starts, and nothing else on disk can be asked for. Their paths carry a hash of all
of them, so browsers may keep them forever; the page itself is asked for each time and answered by 304 while it is
the same. Its policy lets it run and reach what this gateway serves, and nothing else. Raises NotFound.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

import gateway.web
from gateway.errors import NotFound

router = APIRouter(include_in_schema=False)

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "font-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # The page builds nodes and never parses HTML, so that no model and no tool can bring any in.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
_FOR_GOOD = "public, max-age=31536000, immutable"
_ASK_EACH_TIME = "no-cache"


def _read(folder: Path) -> dict[str, bytes]:
    """Return the page's files by their path within `folder`; licences and screenshots are not part of it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in _MEDIA_TYPES and path.is_file()
    }


def _version_of(files: dict[str, bytes]) -> str:
    """Return a hash of all files: any change gives every one of them a new path, so versions never mix."""
    digest = hashlib.sha256()
    for name, data in files.items():
        digest.update(f"{name} {len(data)} ".encode() + data)
    return digest.hexdigest()[:16]


_FILES = _read(Path(gateway.web.__file__).parent)
_VERSION = _version_of(_FILES)
# In the files the version is called "version".
_PAGE = _FILES.pop("index.html").replace(b"/web/version/", f"/web/{_VERSION}/".encode())


@router.api_route("/", methods=["GET", "HEAD"])
async def get_page(request: Request) -> Response:
    """Return the page."""
    return _response(request, _PAGE, ".html", _ASK_EACH_TIME)


@router.api_route("/web/{version}/{name:path}", methods=["GET", "HEAD"])
async def get_file(version: str, name: str, request: Request) -> Response:
    """Return one of the page's files. Raises NotFound, also for another version of the page."""
    data = _FILES.get(name)
    if data is None or version != _VERSION:
        raise NotFound("The page does not have this file any more. Reload the page.")
    return _response(request, data, Path(name).suffix, _FOR_GOOD)


def _response(request: Request, data: bytes, suffix: str, cache_control: str) -> Response:
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = _HEADERS | {"Cache-Control": cache_control, "ETag": tag}
    known = {part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")}
    if tag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    headers["Content-Type"] = _MEDIA_TYPES[suffix]
    headers["Content-Length"] = str(len(data))
    return Response(b"" if request.method == "HEAD" else data, headers=headers)
