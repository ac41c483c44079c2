"""Wait until the leader's gateway has gone: what a worker does before it stops. Its grace period bounds it.

LWS_LEADER_ADDRESS names the leader; the port is the first argument.
"""

import os
import sys
import time
import urllib.error
import urllib.request

health = f"http://{os.environ['LWS_LEADER_ADDRESS']}:{sys.argv[1]}/health"
misses = 0
while misses < 3:
    try:
        urllib.request.urlopen(health, timeout=5).close()
        misses = 0
    except (urllib.error.URLError, ConnectionError):
        misses += 1
    time.sleep(1)
