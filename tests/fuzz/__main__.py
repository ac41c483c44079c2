"""`python -m tests.fuzz`: hostile requests for a while. Prints what it finds, and the seed that finds it again.

Ends with 1 where it found something. Times and memory are measured: what else runs on the machine may spoil them.
"""

from __future__ import annotations

import argparse
import random
import secrets
import sys
import time

from tests.fuzz.kinds import KINDS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=900, help="for how long, over all kinds; default 900")
    parser.add_argument("--kind", choices=sorted(KINDS), action="append", help="only these kinds")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of an earlier run, to repeat it")
    args = parser.parse_args()
    kinds = args.kind or sorted(KINDS)
    findings = 0
    for kind in kinds:
        print(f"{kind}: {args.seconds / len(kinds):.0f} s with --seed {args.seed}", flush=True)
        until = time.monotonic() + args.seconds / len(kinds)
        for finding in KINDS[kind](random.Random(f"{kind} {args.seed}"), until):
            findings += 1
            print(f"{kind}: {finding}", flush=True)
    print(f"{findings} findings with --seed {args.seed}")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
