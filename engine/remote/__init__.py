"""Models on other OpenAI-compatible servers: a pool of replicas, an HTTP client, and the wire format.

`engine` is the entry; the other modules serve it. No sampling and no token counting that the server reports itself.
"""
