"""A step on fake tensors, operator by operator, byte by byte: what becomes a ``Program``."""
