"""Workflows: how a model id answers a request. Async generators of Events, one module per workflow."""
