"""Tools of agents, one module per tool."""
