"""The gate's decisions, as values and pure functions.

No sockets, no clock, no dice, no database, no web framework: time, randomness and outcomes arrive as arguments, and
what comes back says what to do. So every rule here is tested by a table and replayed from a log.
"""
