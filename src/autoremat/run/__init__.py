"""What a run takes and has done: the account of memory, torch's switches and generators, statistics."""

from autoremat.run.stats import Stats

__all__ = ["Stats"]
