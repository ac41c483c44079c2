"""Valkey or Redis: the client, its two lanes, Lua scripts, large values, and the bundled server.

Only this room opens connections to the store. It knows nothing of limits, sessions or jobs; their scripts are in `lua`.
"""
