"""Models and tokens: everything below HTTP. Nothing here knows API keys, tenants, sessions or HTTP servers."""
