"""Tests here break things: each has a gateway of its own."""
