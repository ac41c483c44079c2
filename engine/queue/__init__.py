"""Admission: which request enters an engine next, and how long the others wait.

`admission` wraps any engine. `fair_slots` shares a bounded number of slots between API keys. Nothing here knows
models, tokens or HTTP.
"""
