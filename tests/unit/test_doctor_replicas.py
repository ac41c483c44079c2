"""`shannon doctor` on engines elsewhere: scripted servers, each with one fault."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.doctor.finding import Finding
from gateway.doctor.replicas import check_replicas
from gateway.settings.config import RemoteSettings
from tests.support.doctor_case import case
from tests.support.upstream_server import Connection, run_upstream

pytestmark = pytest.mark.anyio

SECRET = "upstream-secret"


async def never(connection: Connection) -> None:
    raise AssertionError("no generation is asked for")


async def examined(*urls: str, **settings: Any) -> list[Finding]:
    engine = RemoteSettings.model_validate({"kind": "remote", "model": "demo", "urls": list(urls)} | settings)
    findings = await check_replicas(case({}, {"UPSTREAM_KEY": SECRET}), "main", engine)
    assert SECRET not in str(findings)
    assert {finding.subject for finding in findings} == {"engines.main"}
    return findings


async def test_replica_that_answers_is_fine_and_hears_the_key() -> None:
    async with run_upstream(never) as server:
        (found,) = await examined(server.url, api_key_env="UPSTREAM_KEY")

    assert found.verdict == "ok"
    assert "1000 tokens of context" in found.text
    assert server.received[0].headers["authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize(
    ("settings", "status", "body", "words", "step"),
    [
        ({}, 401, {}, "asks for a key", "api_key_env"),
        ({"api_key_env": "UPSTREAM_KEY"}, 401, {"error": SECRET}, "refuses the key", "UPSTREAM_KEY"),
        ({}, 404, {}, "answers 404", "URL"),
        ({}, 200, {"data": [{"id": "other"}]}, "no model 'demo'; it lists other", "model"),
        ({}, 200, b"<html>", "it lists none", "model"),
    ],
)
async def test_fault_of_a_replica_is_told(
    settings: dict[str, Any], status: int, body: Any, words: str, step: str
) -> None:
    async with run_upstream(never) as server:
        server.routes["/v1/models"] = lambda connection: connection.reply(status, body)
        (found,) = await examined(server.url, **settings)

    assert found.verdict == "failed"
    assert words in found.text
    assert step in found.next_step


async def test_context_that_nobody_tells_is_a_warning() -> None:
    async with run_upstream(never, max_model_len=None) as server:
        (found,) = await examined(server.url)
        (told,) = await examined(server.url, max_model_len=4096)

    assert found.verdict == "warning"
    assert found.next_step == "Set max_model_len"
    assert told.verdict == "ok"


async def test_replica_that_is_down_is_a_warning_while_another_answers() -> None:
    async with run_upstream(never) as gone:
        url = gone.url
    async with run_upstream(never) as server:
        one, other = await examined(server.url, url)
        (alone,) = await examined(url)

    assert (one.verdict, other.verdict, alone.verdict) == ("ok", "warning", "failed")
    assert "can't be reached" in other.text


async def test_file_of_authorities_that_can_not_be_read_fails() -> None:
    (found,) = await examined("https://127.0.0.1:9/v1", tls_ca_file="/nowhere.pem")

    assert found.verdict == "failed"
    assert "tls_ca_file" in found.next_step
