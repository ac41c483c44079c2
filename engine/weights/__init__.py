"""Checkpoints on disk: where they are, how they are downloaded, and whether they are complete.

`cache` is the entry; it needs no network. `hub` downloads. Nothing here loads a model.
"""
