"""Adapter files: from bytes that nobody vouches for to a checked adapter in host memory."""
