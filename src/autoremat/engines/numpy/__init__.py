"""The reference engine: steps as lists of numpy functions.

It has what an engine has to do, and nothing else.
"""

from autoremat.engines.numpy.engine import Call, Step, carry_out, record

__all__ = ["Call", "Step", "carry_out", "record"]
