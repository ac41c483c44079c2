"""`python -m tests.support.few_files`: the command line in a process that may open 128 files.

Example:

    with serve(tmp_path, tree, module="tests.support.few_files") as gateway:
        gateway.wait_until_ready()
"""

from __future__ import annotations

import resource
import sys

from gateway.cli import main

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    sys.exit(main())
