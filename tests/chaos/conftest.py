"""Tests here break things: each has a gateway of its own."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="these tests kill a real engine; `make setup` installs vllm")
