"""What a node publishes of itself: report types, error shape, SSE framing, header names.

Both sides of the wire import these, so that neither can drift from the other. Pure data: no sockets, no engine.
"""
