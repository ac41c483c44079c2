"""Who may do what, and how much: API keys, authentication, the model catalogue, limits and the ledger.

Limits and the ledger are the only users of their Lua scripts. Nothing here knows protocols or engines.
"""
