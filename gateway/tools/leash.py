"""Becomes a command that the kernel kills when the process that started it is gone: `leash.py PARENT_PID COMMAND...`.

Run as a file by its path, with nothing but the standard library: it stands between a gateway with threads, which must
not run Python between fork and exec, and a server that must not outlive it. Linux only; elsewhere the command has no
leash, and ends when its standard input does. See `engine.process` for the same from within.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h; it outlives exec


def main(parent: int, command: list[str]) -> None:
    """Tie this process to `parent` and become `command`. Exits with 127 where there is no such command."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)  # it was gone before the kernel knew
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
