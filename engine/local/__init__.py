"""Models in engine cores of this process: vLLM's `AsyncLLM`, its renderer and its parsers.

Only this room imports vLLM. It uses the engine level and never vLLM's HTTP server. Each unstable vLLM API has one
adapter module. Entry points: `embedded` (generation) and `pooling` (embeddings).
"""
