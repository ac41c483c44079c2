"""Names of sub-agents: stations of Tokyo's Yamanote line, clockwise, after the field's oldest name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

STATIONS = (
    *("Ryogoku", "Tokyo", "Kanda", "Akihabara", "Okachimachi", "Ueno", "Uguisudani", "Nippori", "Nishi-Nippori"),
    *("Tabata", "Komagome", "Sugamo", "Otsuka", "Ikebukuro", "Mejiro", "Takadanobaba", "Shin-Okubo", "Shinjuku"),
    *("Yoyogi", "Harajuku", "Shibuya", "Ebisu", "Meguro", "Gotanda", "Osaki", "Shinagawa", "Takanawa-Gateway"),
    *("Tamachi", "Hamamatsucho", "Shimbashi", "Yurakucho"),
)


def stations() -> Iterator[str]:
    """Yield names that differ, without end: the second lap has numbers."""
    yield from STATIONS
    for lap in itertools.count(2):
        yield from (f"{name}-{lap}" for name in STATIONS)
