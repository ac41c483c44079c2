"""Reads files that an operator names: only plain ones, of a bounded size.

A pipe would make the reader wait for its writer, a device may never end. Raises OSError, with words of the system's.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

MAX_BYTES = 16 * 2**20
"""Configurations, keys and certificates are far smaller."""


def read_plain_file(path: Path) -> bytes:
    """The content of a file. Raises OSError, also for what is no plain file or larger than `MAX_BYTES`."""
    # A pipe is opened at once, instead of when there is a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", closefd=True) as opened:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "It is not a plain file", str(path))
        content = opened.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(0, f"It is larger than {MAX_BYTES >> 20} MiB", str(path))
    return content
