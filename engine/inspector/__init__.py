"""Attention weights and token distributions of a checkpoint, computed in a separate process.

`base` has the protocol and needs no model library. `inspection` and `inspector_process` import torch and run in that
process only.
"""
