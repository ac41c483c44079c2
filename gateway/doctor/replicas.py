"""Engines elsewhere: whether each of their servers answers, takes the key, and has the model."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from dataclasses import replace
from typing import Any

import httpx

from engine.remote.reply import read_count
from engine.remote.tls import make_context
from gateway.doctor.case import Case
from gateway.doctor.finding import Finding
from gateway.settings.config import RemoteSettings

_TIMEOUT_S = 10.0


async def check_replicas(case: Case, name: str, engine: RemoteSettings) -> list[Finding]:
    """Ask each replica for its models. One that fails is a warning where another answers."""
    try:
        context = make_context(engine.tls_verify, engine.tls_ca_file)
    except OSError as error:  # ssl.SSLError is one
        text = f"tls_ca_file can't be read: {error.strerror or error}"
        return [Finding("replica", "failed", text, "Correct tls_ca_file", f"engines.{name}")]
    async with httpx.AsyncClient(verify=context, trust_env=False, timeout=_TIMEOUT_S) as client:
        found = await asyncio.gather(*(_check(client, case, name, engine, url) for url in engine.urls))
    if any(finding.verdict == "ok" for finding in found):
        return [replace(finding, verdict="warning") if finding.verdict == "failed" else finding for finding in found]
    return list(found)


async def _check(client: httpx.AsyncClient, case: Case, name: str, engine: RemoteSettings, url: str) -> Finding:
    subject = f"engines.{name}"
    key = case.environment.get(engine.api_key_env, "").strip() if engine.api_key_env else ""
    began = time.monotonic()
    try:
        response = await client.get(f"{url}/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    except (httpx.TransportError, UnicodeEncodeError) as error:
        text, step = _why(error, engine)
        return Finding("replica", "failed", f"{url} {text}", step, subject)
    took_ms = (time.monotonic() - began) * 1000
    if response.status_code in (401, 403):
        if key:
            text = f"{url} refuses the key ({response.status_code})"
            return Finding("replica", "failed", text, f"Correct {engine.api_key_env}", subject)
        text = f"{url} asks for a key ({response.status_code})"
        return Finding("replica", "failed", text, "Name the variable that holds it in api_key_env", subject)
    if response.status_code != 200:
        step = "See that the URL ends where its /models is, and the server's log"
        return Finding("replica", "failed", f"{url}/models answers {response.status_code}", step, subject)
    cards = _cards(response)
    if engine.model not in cards:
        listed = ", ".join(sorted(cards)[:5]) or "none"
        step = "Correct `model`, or the server's --served-model-name"
        return Finding("replica", "failed", f"{url} has no model {engine.model!r}; it lists {listed}", step, subject)
    length = engine.max_model_len or read_count(cards[engine.model], "max_model_len")
    context = f"{length} tokens of context" if length else "an unknown context length"
    text = f"{url} has {engine.model}, {context}; it answers in {took_ms:.0f} ms"
    if length is None:
        return Finding("replica", "warning", text, "Set max_model_len", subject)
    return Finding("replica", "ok", text, subject=subject)


def _why(error: Exception, engine: RemoteSettings) -> tuple[str, str]:
    """Return why a server can't be asked, and what to do."""
    if isinstance(error, UnicodeEncodeError):
        return "was not asked: its key is not ASCII", f"Correct {engine.api_key_env}"
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, ssl.SSLCertVerificationError):
            return (
                f"shows a certificate that is not trusted: {chain.verify_message}",
                "Name its authority in tls_ca_file",
            )
        chain = chain.__cause__ or chain.__context__
    if isinstance(error, httpx.TimeoutException):
        return (
            f"does not answer within {_TIMEOUT_S:.0f} s",
            "See whether it runs, and what lies between: a firewall drops",
        )
    reason = str(error).partition("\n")[0] or type(error).__name__
    return f"can't be reached: {reason}", "See whether it runs, and whether its name and port are right"


def _cards(response: httpx.Response) -> dict[str, Any]:
    """Return the models that an answer lists, by id."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return {str(card["id"]): card for card in response.json()["data"]}
    return {}
