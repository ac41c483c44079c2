"""Work that outlives its connection: event logs in the store, resumable streams, and jobs.

Writers hold a lease, so that one gateway at a time writes a log. Nothing here knows a protocol's frames.
"""
