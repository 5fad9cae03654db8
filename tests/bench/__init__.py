"""Benchmarks: each measures llmrack beside its rivals in one run, by `make bench-*`. Tests hold the arithmetic only."""
