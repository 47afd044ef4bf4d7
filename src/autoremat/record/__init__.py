"""torch to ``Program``: what a training step does, operator by operator, byte by byte."""

from autoremat.record.problems import NothingDifferentiable, UnusableInput

__all__ = ["NothingDifferentiable", "UnusableInput"]
