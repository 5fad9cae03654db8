"""Conversations as text: messages to a prompt. Knows nothing of HTTP, tokens or the engine."""
