"""Anthropic's Messages API: a body in its shape to a chat, and an answer to its events. Package of /v1/messages."""
