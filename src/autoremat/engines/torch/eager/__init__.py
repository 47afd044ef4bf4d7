"""The engine for eager PyTorch: a tape of calls.

User code runs once, and torch runs as it is.
"""
