"""What a model id does with a request: async generators of Events, one module per workflow."""
