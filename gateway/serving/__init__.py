"""The server: sockets, HTTP/1.1 framing, the connection limit, the middleware around every request, and reload.

This room decides what is a request and what closes a connection. It knows no protocol of `gateway.api`.
"""
