"""One HTTP exchange: the request body that is read, the events of an answer, and the bytes that are sent.

`frames` has the format of each protocol. Nothing here knows engines' internals, the store or limits.
"""
