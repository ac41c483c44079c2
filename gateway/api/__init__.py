"""The HTTP API: one module per wire protocol. Each parses a request and passes it to a workflow."""
