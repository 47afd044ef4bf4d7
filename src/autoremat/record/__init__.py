"""torch to ``Program``: what a training step does, operator by operator, byte by byte."""

from autoremat.record.record import NothingDifferentiable, UnusableInput, record

__all__ = ["NothingDifferentiable", "UnusableInput", "record"]
