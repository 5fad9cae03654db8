"""What any llmrack service needs of the host it runs on: settings, systemd, logs, its clients' connections.

Knows nothing of models, of what is asked, or of the gate. One of the two node packages that llmgate may import.
"""
