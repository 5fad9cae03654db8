"""What any llmrack service needs of the host it runs on: settings, systemd, logs.

Knows nothing of models, HTTP or the gate. One of the two node packages that llmgate may import.
"""
