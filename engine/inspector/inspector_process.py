"""The process of the inspector. Only `engine.inspector.transformers_inspector` starts it.

It reads requests from standard input and answers each on standard output until its input ends. A message is its length
in four bytes, then lines of JSON; the first line of an answer has its kind:

    load       the checkpoint at `path`             loaded
    trace      start to generate                    busy, step (two more lines: token, trace) or reply
    attention  start to compute a matrix            busy or attention (one more line: the matrix)
    next       continue the current request         as above
    any                                             refused (the request's fault) or failed (anything else)

It does one step per message, so it stops when no message follows. Its CPU priority is below the engine's, and it dies
with the gateway.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import orjson

from engine.base import InvalidRequest
from engine.process import die_with_parent

if TYPE_CHECKING:
    from engine.inspector.inspection import Subject

LENGTH = struct.Struct(">I")
_NICENESS = 10
"""Served requests have priority over inspections."""


def main(device: str, threads: int) -> None:
    """Serve until the input ends."""
    die_with_parent(signal.SIGKILL)
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # output of libraries must not mix with the answers
    os.nice(_NICENESS)
    worker = _Worker(device, threads)
    while (head := requests.read(LENGTH.size)) and len(head) == LENGTH.size:
        answer = worker.answer(orjson.loads(requests.read(LENGTH.unpack(head)[0])))
        answers.write(LENGTH.pack(len(answer)) + answer)
        answers.flush()


class _Worker:
    """The loaded checkpoint and the current job."""

    def __init__(self, device: str, threads: int) -> None:
        self._device = device
        self._threads = threads
        self._subject: Subject | None = None
        self._job: Iterator[Any] = iter(())

    def answer(self, request: dict[str, Any]) -> bytes:
        """Return the answer to a request."""
        try:
            return _encode(self._perform(request.pop("op"), request))
        except InvalidRequest as error:
            return _encode(({"kind": "refused", "message": str(error), "param": error.param, "code": error.code},))
        except Exception as error:  # models raise any type; the gateway logs it
            return _encode(({"kind": "failed", "reason": f"{type(error).__name__}: {error}"[:500]},))

    def _perform(self, op: str, fields: dict[str, Any]) -> Any:
        from engine.inspector.inspection import Job, Subject, set_threads

        if op == "load":
            set_threads(self._threads)
            self._subject = Subject(fields["path"], self._device, fields["trust_remote_code"])
            return ({"kind": "loaded"},)
        assert self._subject is not None
        if op != "next":
            self._job = iter(())  # frees the last job's cache before this job allocates its own
            begin = self._subject.trace if op == "trace" else self._subject.attention
            self._job = begin(Job(**fields))
        return next(self._job)


def _encode(answer: tuple[Any, ...]) -> bytes:
    return b"\n".join(orjson.dumps(part, option=orjson.OPT_SERIALIZE_NUMPY) for part in answer)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
