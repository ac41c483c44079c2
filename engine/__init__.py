"""Models and tokens: everything below the HTTP line. Knows no keys, tenants, sessions or HTTP."""
