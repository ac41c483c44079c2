"""The type of a clock that tests can replace."""

from collections.abc import Callable

Clock = Callable[[], float]
"""Returns Unix time in seconds."""
