"""Benchmarks: each measures llmrack beside its rivals in one run. `make bench-*` runs them; no test depends on them."""
