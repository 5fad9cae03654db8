"""The inference engine: continuous batching over llama.cpp. Knows nothing of HTTP, JSON or asyncio."""
