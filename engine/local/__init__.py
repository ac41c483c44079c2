"""Models in this process's own engine cores: vLLM's `AsyncLLM`, its renderer and its parsers.

Only this room imports vLLM. It uses the engine level and never vLLM's HTTP server. Each unstable vLLM API has one
adapter module. Entered through `embedded` (generation) and `pooling` (embeddings).
"""
