"""Checkpoints on disk: location, download and completeness.

`cache` is the entry point and needs no network. `hub` downloads. Nothing here loads a model.
"""
