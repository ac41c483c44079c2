"""One module per wire protocol: how its responses look, streamed and whole."""
