"""Models on other OpenAI-compatible servers: a pool of replicas, an HTTP client, and the wire format.

`engine` is the entry point. Nothing here samples, or counts tokens that the server reports.
"""
