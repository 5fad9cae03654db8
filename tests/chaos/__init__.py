"""Chaos: hundreds of streams through a fleet whose nodes and gates are killed, stopped, cut off, drained and restarted,
and what must be left of the harm: nothing that a client can see."""
