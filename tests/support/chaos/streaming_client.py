"""A client that keeps one long chat stream open while a test breaks the gateway under it.

Example:

    client = Client(gateway)
    client.start()
    assert client.streaming.wait(30)
    gateway.engine_core().kill()
    client.join(30)
    assert "engine_unavailable" in client.frames[-1]
"""

from __future__ import annotations

import threading
import time

import httpx

from tests.support.gateway_process import GatewayProcess

BODY = {
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "stream": True,
    "ignore_eos": True,
    "max_tokens": 4000,
}


class Client(threading.Thread):
    """A client that reads one stream to its end and notes when it ended and with what."""

    def __init__(self, gateway: GatewayProcess) -> None:
        super().__init__(daemon=True)
        self._gateway = gateway
        self.streaming = threading.Event()
        self.frames: list[str] = []
        self.ended_at = 0.0

    def run(self) -> None:
        url = f"{self._gateway.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=BODY, headers=self._gateway.authorization, timeout=60) as response:
            for line in response.iter_lines():
                if line:
                    self.frames.append(line)
                    self.streaming.set()
        self.ended_at = time.monotonic()
