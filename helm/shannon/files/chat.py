"""Ask a release whether it is ready, and chat with it as a client would: one whole answer and one stream.

SHANNON_URL and SHANNON_BOOTSTRAP_KEY name the release and the key. Raises the gateway's error.
"""

import json
import os
import time
import urllib.error
import urllib.request

URL = os.environ["SHANNON_URL"]
READY_WITHIN_S = float(os.environ.get("READY_WITHIN_S", "60"))


def ask(path: str, body: dict[str, object] | None = None) -> str:
    """Return the body of an answer. Raises SystemExit that says why there is none."""
    request = urllib.request.Request(URL + path, None if body is None else json.dumps(body).encode())
    request.add_header("Authorization", "Bearer " + os.environ["SHANNON_BOOTSTRAP_KEY"])
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return str(answer.read(), "utf-8")
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{path}: {error.code} {error.read().decode(errors='replace')}") from None
    except urllib.error.URLError as error:
        raise SystemExit(f"{path}: {error.reason}") from None


deadline = time.monotonic() + READY_WITHIN_S
while True:
    try:
        print("ready:", ask("/ready"))
        break
    except SystemExit:
        if time.monotonic() > deadline:
            raise
        time.sleep(1)
question: dict[str, object] = {"messages": [{"role": "user", "content": "What are you?"}], "max_tokens": 64}
completion = json.loads(ask("/v1/chat/completions", question))
print("answer:", completion["choices"][0]["message"]["content"])
assert completion["usage"]["completion_tokens"] > 0, completion["usage"]
frames = ask("/v1/chat/completions", question | {"stream": True}).strip().split("\n\n")
assert frames[-1] == "data: [DONE]", frames[-1]
print("stream:", len(frames), "frames")
