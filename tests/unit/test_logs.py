"""Lines of the log: the same facts as text and as JSON, one line each, whatever is in them."""

from __future__ import annotations

import json
import logging
import logging.config
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import ModuleType
from typing import Any

import pytest

from gateway.telemetry.logs import VLLM_CONFIG, JsonFormatter, TextFormatter, configure, vllm_environment

AT = 1_700_000_000.25
FIELDS = {"request_id": "r1", "status": 200, "duration_ms": 12.5, "streamed": False}

Start = Callable[[str, str], None]


def record(message: str = "GET %s 200", *args: object, **attributes: Any) -> logging.LogRecord:
    return logging.makeLogRecord(
        {"name": "shannon.access", "levelname": "INFO", "msg": message, "args": args or ("/ready",), "created": AT}
        | attributes
    )


def parsed(line: str) -> dict[str, Any]:
    assert "\n" not in line
    fields: dict[str, Any] = json.loads(line)
    return fields


def failure() -> Any:
    try:
        raise KeyError("a\nb")
    except KeyError:
        return sys.exc_info()


def test_json_line_holds_the_message_and_the_fields() -> None:
    assert parsed(JsonFormatter().format(record(fields=FIELDS))) == {
        "timestamp": "2023-11-14T22:13:20.250Z",
        "level": "INFO",
        "logger": "shannon.access",
        "message": "GET /ready 200",
        **FIELDS,
    }


def test_text_line_holds_the_same_facts() -> None:
    line = TextFormatter().format(record(fields=FIELDS))

    assert line == (
        "2023-11-14T22:13:20.250Z INFO shannon.access: GET /ready 200 "
        "request_id=r1 status=200 duration_ms=12.5 streamed=False"
    )


def test_timestamp_is_rfc_3339_in_utc() -> None:
    stamp = parsed(JsonFormatter().format(record()))["timestamp"]

    assert datetime.fromisoformat(stamp) == datetime.fromtimestamp(AT, UTC)


def test_traceback_is_a_field_of_its_json_line() -> None:
    line = parsed(JsonFormatter().format(record("%s", "it\nfailed", exc_info=failure(), stack_info="Stack:\n  here")))

    assert line["message"] == "it\nfailed"
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("KeyError: 'a\\nb'")
    assert line["stack"] == "Stack:\n  here"


def test_traceback_follows_its_text_line() -> None:
    line, *rest = TextFormatter().format(record(fields={"a": 1}, exc_info=failure())).splitlines()

    assert line.endswith("GET /ready 200 a=1")
    assert rest[0].startswith("Traceback")


@pytest.mark.parametrize("odd", ["\ud800", "\x00\x1b[31m", "\u2028", "ß 東京"])
def test_any_text_makes_one_json_line(odd: str) -> None:
    line = parsed(JsonFormatter().format(record("%s", odd, fields={"name": odd})))

    assert (line["message"], line["name"]) == (odd, odd)


def test_field_that_json_has_no_form_for_is_told_in_words() -> None:
    assert parsed(JsonFormatter().format(record(fields={"what": object})))["what"] == "<class 'object'>"


def test_line_of_a_child_names_its_process() -> None:
    assert "process" not in parsed(JsonFormatter().format(record(processName="MainProcess")))
    assert parsed(JsonFormatter().format(record(processName="EngineCore")))["process"] == "EngineCore"


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Makes logging what it is in a process that has only begun; pytest's own handlers come with each test."""
    names = ("gateway", "engine", "shannon", "httpx", "httpx2", "mcp", "vllm")
    levels = {name: logging.getLogger(name).level for name in (None, *names)}
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield lambda: monkeypatch.setattr(logging.root, "handlers", [])
    logging.captureWarnings(False)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def start(begin: Callable[[], None]) -> Start:
    """Configures logging from scratch."""

    def start(form: str, level: str) -> None:
        begin()
        configure(form, level)

    return start


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [parsed(line) for line in capsys.readouterr().err.splitlines()]


def test_every_logger_writes_in_the_form_that_was_chosen(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    start("json", "info")
    for name in ("gateway.serving.server", "shannon.access", "uvicorn.error", "anything.else"):
        logging.getLogger(name).info("hello from %s", name)

    assert [line["message"] for line in lines(capsys)] == [
        f"hello from {name}" for name in ("gateway.serving.server", "shannon.access", "uvicorn.error", "anything.else")
    ]


def test_text_is_for_people(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    start("text", "info")
    logging.getLogger("gateway.serving.server").warning("hello", extra={"fields": {"engine": "main"}})

    assert capsys.readouterr().err.endswith("Z WARNING gateway.serving.server: hello engine=main\n")


def test_level_is_that_of_our_own_loggers(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    start("json", "debug")
    for name in ("gateway.meter", "engine.remote.wire", "httpcore.http11", "redis"):
        logging.getLogger(name).debug("debug of %s", name)

    assert [line["logger"] for line in lines(capsys)] == ["gateway.meter", "engine.remote.wire"]


@pytest.mark.parametrize("level", ["debug", "info", "warning"])
def test_urls_of_searches_are_never_logged(start: Start, capsys: pytest.CaptureFixture[str], level: str) -> None:
    start("json", level)
    for name in ("httpx", "httpx2", "mcp.client"):
        logging.getLogger(name).info("GET https://search.test/?q=private")

    assert capsys.readouterr().err == ""


def test_error_leaves_the_rest_out(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    start("json", "error")
    for name in ("gateway.serving.server", "shannon.access", "uvicorn.error", "httpx"):
        logging.getLogger(name).warning("not told")
        logging.getLogger(name).error("told")

    assert [line["message"] for line in lines(capsys)] == ["told"] * 4


def test_end_of_the_process_is_a_json_line_as_well(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    start("json", "info")
    sys.excepthook(*failure())

    (line,) = lines(capsys)
    assert (line["level"], line["message"]) == ("CRITICAL", "the process has failed")
    assert "KeyError" in line["exception"]


def test_vllm_is_told_where_its_configuration_is_only_for_json() -> None:
    assert vllm_environment("text") == {}
    assert vllm_environment("json") == {"VLLM_LOGGING_CONFIG_PATH": str(VLLM_CONFIG)}


def test_processes_of_vllm_log_json_at_vllms_own_level(
    begin: Callable[[], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is applied as vLLM does it, with what it asks of vllm in place."""
    vllm, envs = ModuleType("vllm"), ModuleType("vllm.envs")
    envs.VLLM_LOGGING_LEVEL = "WARNING"  # type: ignore[attr-defined]
    vllm.envs = envs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)

    begin()
    logging.config.dictConfig(json.loads(VLLM_CONFIG.read_text(encoding="utf-8")))
    logging.getLogger("vllm.engine").info("too quiet")
    logging.getLogger("vllm.engine").warning("two\nlines")
    logging.getLogger("torch").warning("from elsewhere")

    assert [(line["logger"], line["message"]) for line in lines(capsys)] == [
        ("vllm.engine", "two\nlines"),
        ("torch", "from elsewhere"),
    ]
