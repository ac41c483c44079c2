"""Half surrogate pairs in the arguments of tool calls: JSON escapes that name no character."""

from __future__ import annotations

import re
from typing import Any

from engine.messages import Message, ToolCall

_ESCAPE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<half>\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\."
)
"""An escape in a JSON string, whole or half a surrogate pair."""


def with_whole_characters(messages: list[Message]) -> list[Message]:
    """Messages with U+FFFD in place of half surrogate pairs in the arguments of their calls.

    Models write such escapes, and clients send back what the model wrote. vLLM's tokenizer fails on them.
    """
    whole = []
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list) and any("\\ud" in _arguments(call).lower() for call in calls):
            message = {**message, "tool_calls": [_with_whole_arguments(call) for call in calls]}
        whole.append(message)
    return whole


def _with_whole_arguments(call: ToolCall) -> ToolCall:
    arguments = _ESCAPE.sub(lambda match: "\\ufffd" if match["half"] else match[0], _arguments(call))
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _arguments(call: ToolCall) -> str:
    arguments: Any = call.get("function", {}).get("arguments")
    return arguments if isinstance(arguments, str) else ""
