"""HTTP and policy: everything above the tokens. Never imports vllm, torch or transformers."""

__version__ = "0.1.0"
