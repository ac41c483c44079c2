"""The process that parses documents. Started by `gateway.tools.reader` only.

Reads documents from standard input and writes answers to standard output until its input ends. Each message is its
length in four bytes, a line of JSON, and for documents their bytes. The process has no secrets in its environment,
limits its own memory, and kills itself by an alarm if a document takes too long, even if its parent is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

from gateway.tools.documents import Unreadable, read_document

LENGTH = struct.Struct(">I")
_NICENESS = 10
"""Low priority: parsing must not slow the event loop and the engine."""


def main(max_memory_bytes: int) -> None:
    """Serve until the input ends."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # a parser's output must not mix with the answers
    logging.disable()
    os.nice(_NICENESS)
    for kind, bound in ((resource.RLIMIT_AS, max_memory_bytes), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(OSError, ValueError):  # not every system supports the limit
            resource.setrlimit(kind, (bound, bound))
    while (head := requests.read(LENGTH.size)) and len(head) == LENGTH.size:
        answer = _answer(requests.read(LENGTH.unpack(head)[0]))
        _send(answers, answer)


def _answer(message: bytes) -> dict[str, Any]:
    line, _, content = message.partition(b"\n")
    request = json.loads(line)
    signal.setitimer(signal.ITIMER_REAL, request["timeout_s"])
    try:
        document = read_document(content, request["kind"], request["charset"], request["max_chars"])
    except Unreadable as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it takes too much memory to read"}
    except Exception as error:  # parsers raise any exception on untrusted input
        return {"error": "it can't be read", "reason": f"{type(error).__name__}: {error}"[:500]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {"text": document.text, "title": document.title, "published": document.published}


def _send(answers: BinaryIO, answer: dict[str, Any]) -> None:
    body = json.dumps(answer).encode()
    answers.write(LENGTH.pack(len(body)) + body)
    answers.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
