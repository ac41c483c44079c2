"""Wait until the leader's gateway has gone. A worker that is told to stop runs this first; its grace period bounds it."""

import os
import sys
import time
import urllib.error
import urllib.request

PORT = int(sys.argv[1]) if len(sys.argv) > 1 else 8080
health = f"http://{os.environ['LWS_LEADER_ADDRESS']}:{PORT}/health"
misses = 0
while misses < 3:
    try:
        urllib.request.urlopen(health, timeout=5).close()
        misses = 0
    except urllib.error.URLError:
        misses += 1
    time.sleep(1)
