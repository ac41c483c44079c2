"""Tools that agents can call, one module per tool."""
