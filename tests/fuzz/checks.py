"""What must hold for every hostile body: the answer, the event loop's pause, the memory, and how the time grows."""

from __future__ import annotations

import json
from typing import Any

from tests.fuzz.bodies import HostileBody
from tests.fuzz.server import Answer, Target

MAX_BODY_BYTES = 8 * 2**20
MOST_PAUSE_S = 0.25
MOST_MEMORY_TIMES = 10
FREE_MEMORY_BYTES = 8 * 2**20
"""What a process takes beside: threads, buffers, what an allocator keeps."""
MOST_GROWTH = 3.0
"""Between half of a body and the whole; what is quadratic takes four times as long."""
FREE_S = 0.3
_TRIES = 3
_NO_PLACE = ("not valid JSON", "must be a JSON object")


def faults_of(target: Target, body: HostileBody, size: int = MAX_BODY_BYTES) -> list[str]:
    """Return what is wrong about how a body is served. What neighbours of the machine may spoil is tried again."""
    half = whole = None
    faults: list[str] = []
    for _ in range(_TRIES):
        half = _better(half, target.post(body.route.path, body.of(size // 2)))
        whole = _better(whole, target.post(body.route.path, body.of(size)))
        faults = [*_answer_faults(body, half), *_answer_faults(body, whole), *_cost_faults(half, whole, size)]
        if not faults:
            break
    return list(dict.fromkeys(faults))


def _better(first: Answer | None, second: Answer) -> Answer:
    if first is None:
        return second
    seconds, pause_s = min(first.seconds, second.seconds), min(first.pause_s, second.pause_s)
    return Answer(second.status, second.body, seconds, pause_s, min(first.memory_bytes, second.memory_bytes))


def _answer_faults(body: HostileBody, answer: Answer) -> list[str]:
    if answer.status >= 500 or answer.status < 200:
        return [f"answered {answer.status}: {answer.body[:300]!r}"]
    try:
        fields = json.loads(answer.body)
    except ValueError:
        return [f"answered {answer.status} with something else than JSON: {answer.body[:300]!r}"]
    if answer.status < 300:
        return []
    message, param = _message_of(fields)
    if not message or len(message) > 1000:
        return [f"answered {answer.status} with a message of {len(message)} characters: {message[:300]!r}"]
    placeless = not body.place or any(words in message for words in _NO_PLACE)
    if param is None and answer.status == 400 and not placeless:
        return [f"answered {answer.status} without naming the place: {message!r}"]
    return []


def _message_of(fields: dict[str, Any]) -> tuple[str, str | None]:
    """Return the message of an error, and the parameter that it names; a form that has none names it in the message."""
    error = fields["error"]
    if isinstance(error, str):
        return error, error
    return str(error["message"]), error.get("param", error["message"])


def _cost_faults(half: Answer, whole: Answer, size: int) -> list[str]:
    faults = []
    for answer, sent in ((half, size // 2), (whole, size)):
        if answer.pause_s > MOST_PAUSE_S:
            faults.append(f"stopped the event loop for {answer.pause_s * 1000:.0f} ms ({sent / 2**20:.1f} MiB)")
        if answer.memory_bytes > MOST_MEMORY_TIMES * sent + FREE_MEMORY_BYTES:
            faults.append(f"took {answer.memory_bytes / sent:.1f} times its size of memory ({sent / 2**20:.1f} MiB)")
    if whole.seconds > MOST_GROWTH * half.seconds + FREE_S:
        faults.append(f"took {half.seconds:.2f} s for one half and {whole.seconds:.2f} s for the whole")
    return faults
