"""Admission: the order in which requests enter an engine, and how long they wait.

`admission` wraps any engine. `fair_slots` shares a bounded number of slots between API keys. Nothing here knows
models, tokens or HTTP.
"""
