"""Connections that the gateway opens for a request or a tool: host names and fetching with SSRF protection.

Connections to engines and to the store are not made here.
"""
