"""The soak: thousands of mixed requests against one real node, and what must be left of them: nothing."""
