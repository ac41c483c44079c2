"""Runs an MCP server that uses pipes, and ends it with the gateway: `leash.py PARENT_PID COMMAND...`.

Run as a file, with the standard library only: the gateway has threads and so must not run Python between fork and exec,
and the server must not outlive it. The kernel kills the leash when its parent is gone, and the server when the leash is
gone. Linux only; elsewhere the server ends when its standard input does. `engine.process` does the same from within.

The server reads its standard input directly. Its output passes through the leash, so that the gateway never parses more
than MAX_LINE_BYTES at once, nor many more than MESSAGES_PER_S lines per second. A longer answer is replaced by an error
with the same id.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import time

MAX_LINE_BYTES = 2**20
MESSAGES_PER_S = 500
"""Burst of lines. A server that writes more is slowed down to this many per second."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h; it outlives exec
_READ_BYTES = 65_536
_ID_BYTES = 512
"""Length of the start and of the end of a message in which the id is searched."""
_ID = re.compile(rb'"id"\s{0,8}:\s{0,8}(\d{1,18}|"[\w-]{1,64}")')


def main(parent: int, command: list[str]) -> int:
    """Run the command until it ends. Returns its exit status, or 127 if it does not exist."""
    _die_with_parent(parent)
    reads, writes = os.pipe()
    leash = os.getpid()
    server = os.fork()
    if not server:
        os.dup2(writes, 1)
        _become(leash, command)
    os.close(writes)
    os.close(0)  # the server's alone
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # also sent to the server, whose end ends this process
    with contextlib.suppress(BrokenPipeError):
        _pass_lines(reads)
    os.close(reads)
    return os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])


def _become(leash: int, command: list[str]) -> None:
    _die_with_parent(leash)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


def _die_with_parent(parent: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before prctl took effect


def _pass_lines(reads: int) -> None:
    """Copy lines to standard output. Raises BrokenPipeError once it is closed."""
    line, cut = bytearray(), False
    allowance, since = float(MESSAGES_PER_S), time.monotonic()
    while data := os.read(reads, _READ_BYTES):
        *ends, rest = data.split(b"\n")
        for end in ends:
            line += end
            _write((_error_for(line) if cut or len(line) > MAX_LINE_BYTES else bytes(line)) + b"\n")
            line, cut = bytearray(), False
            now = time.monotonic()
            allowance = min(allowance + (now - since) * MESSAGES_PER_S, MESSAGES_PER_S) - 1
            since = now
            if allowance < 0:
                time.sleep(-allowance / MESSAGES_PER_S)
        line += rest
        if len(line) > MAX_LINE_BYTES + _READ_BYTES:
            line, cut = line[:_ID_BYTES] + line[-_ID_BYTES:], True


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def _error_for(line: bytearray) -> bytes:
    """Return the replacement of an answer that is too long: empty without an id, so that the call times out."""
    found = _ID.search(line[:_ID_BYTES]) or _ID.search(line[-_ID_BYTES:])
    if found is None:
        return b""
    message = b"The answer is longer than %d bytes." % MAX_LINE_BYTES
    return b'{"jsonrpc":"2.0","id":%b,"error":{"code":-32603,"message":"%b"}}' % (found[1], message)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
