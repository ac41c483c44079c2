"""The front doors: one module per wire protocol, each a thin parse on the way to a workflow."""
