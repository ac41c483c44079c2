"""What a conversation remembers: sessions, derived sessions, stored and running responses.

Everything is kept per API key or tenant, within a number of bytes. Nothing here generates text.
"""
