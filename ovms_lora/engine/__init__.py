"""Continuous batching over paged attention: one thread that turns requests into tokens. Knows nothing of HTTP."""
