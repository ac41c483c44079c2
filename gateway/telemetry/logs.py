"""What the loggers of a process write: text for people, or one JSON object per line for machines.

Facts beside the message ride in `extra={"fields": {...}}`, and are the same in both forms. vLLM's processes log as
`vllm_logging.json` says, which names the formatter here. What no logger wrote (a C library's words) stays as it is, as
does what one of those processes says before it has read that file.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from gateway.telemetry.standard_streams import LossyStream

VLLM_CONFIG = Path(__file__).with_name("vllm_logging.json")
_WORDY = ("httpx", "httpx2", "mcp")
"""They log whole URLs, with what users search for in them."""
_OURS = ("gateway", "engine", "shannon")
_LONG_SEGMENT = re.compile(r"[^/]{20,}")
"""As long as an API key is at least, see MIN_KEY_LENGTH in auth.py."""


def without_keys(path: str) -> str:
    """Return a URL's path without the segments that may be API keys. A client may have been given one as its URL."""
    return _LONG_SEGMENT.sub("[...]", path)


class TextFormatter(logging.Formatter):
    """A line of text, the fields behind it as `name=value`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return _timestamp(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record) + "".join(f" {name}={value}" for name, value in _fields(record).items())


class JsonFormatter(logging.Formatter):
    """One JSON object; a traceback is one of its fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "timestamp": _timestamp(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.processName != "MainProcess":
            line["process"] = record.processName or ""
        line |= _fields(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        try:
            return orjson.dumps(line, default=str).decode()
        except TypeError:  # lone surrogates, which only escapes can carry
            return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = record.__dict__.get("fields", {})
    return fields


def _timestamp(record: logging.LogRecord) -> str:
    """Return the record's time as RFC 3339 has it, in UTC."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Handler(logging.StreamHandler[Any]):
    """Writes to stderr, and says how many lines were lost where it is a stream that loses them."""

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(self.stream, LossyStream) and (lost := self.stream.take_lost_lines()):
            text = "%d lines of this log were lost: nothing took them in time"
            super().emit(logging.LogRecord(__name__, logging.WARNING, "", 0, text, (lost,), None))
        super().emit(record)


def configure(form: str, level: str) -> None:
    """Have all loggers of this process write to stderr in `form`, `text` or `json`, our own from `level` on.

    Others begin at INFO at the earliest: their debug lines may quote requests.
    """
    handler = _Handler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    least = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(least, logging.INFO), handlers=[handler])
    for name in _OURS:
        logging.getLogger(name).setLevel(least)
    for name in _WORDY:
        logging.getLogger(name).setLevel(max(least, logging.WARNING))
    logging.captureWarnings(form == "json")
    if form == "json":
        sys.excepthook = _log_uncaught


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("shannon").critical("the process has failed", exc_info=(kind, error, trace))


def vllm_environment(form: str) -> dict[str, str]:
    """Return the variables that have vLLM, in this process and in those that it starts, log in `form`."""
    return {"VLLM_LOGGING_CONFIG_PATH": str(VLLM_CONFIG)} if form == "json" else {}
