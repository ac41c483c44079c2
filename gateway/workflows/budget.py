"""What one run of a workflow may spend: time, tokens, tool calls, and agents at once.

Tokens are set aside before a generation and given back as far as it did not spend them, so that agents side by side
never spend more than the budget. Does not handle waiting. Raises OutOfBudget.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from gateway.clock import Clock


class OutOfBudget(Exception):
    """A run has used up its time, tokens or tool calls. The message says which, for people."""


@dataclass(slots=True)
class Budget:
    """What one run may spend. Spending is noted by the agents; nothing here waits."""

    seconds: float
    tokens: int
    """Prompt and completion together, the answer's own not included."""
    tool_calls: int
    concurrency: int
    now: Clock = time.monotonic
    started: float = field(init=False)
    taken_tokens: int = field(default=0, init=False)
    """Spent, or set aside for what still runs."""
    spent_tool_calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.started = self.now()

    def left_s(self, share: float = 1.0) -> float:
        """Return the seconds left of the given share of the time: what is gathered must leave some to answer in."""
        return self.started + self.seconds * share - self.now()

    def take_tokens(self, most: int) -> None:
        """Set aside what a generation may spend at most, to be given back as far as it does not. Raises OutOfBudget."""
        if self.taken_tokens + most > self.tokens:
            raise OutOfBudget(f"the {self.tokens} tokens of this run are spent")
        self.taken_tokens += most

    def give_back_tokens(self, unspent: int) -> None:
        """Give back the tokens that a generation did not spend."""
        self.taken_tokens -= unspent

    def take_tool_call(self) -> None:
        """Note a tool call. Raises OutOfBudget."""
        if self.spent_tool_calls >= self.tool_calls:
            raise OutOfBudget(f"the {self.tool_calls} tool calls of this run are spent")
        self.spent_tool_calls += 1
