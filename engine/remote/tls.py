"""TLS towards the servers of remote engines."""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path

import httpx

from engine.plain_file import read_plain_file


def make_context(verify: bool, ca_file: str | None) -> ssl.SSLContext:
    """The context that checks servers' certificates. Raises OSError if the authority's file can't be read."""
    if ca_file:
        read_plain_file(Path(ca_file))  # OpenSSL would wait for the writer of a pipe
    context = ssl.create_default_context(cafile=ca_file) if ca_file else httpx.create_ssl_context(trust_env=False)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    with contextlib.suppress(NotImplementedError):
        context.set_alpn_protocols(["http/1.1"])
    return context
