"""What agents may call, one module per tool."""
