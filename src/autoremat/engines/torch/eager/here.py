"""What belongs to one thread: its call and its waiting graphs."""

from __future__ import annotations

import threading

from autoremat.engines.torch.eager.several import Living, Load


class Here(threading.local):
    """What belongs to one thread.

    It knows whether the thread is in a call, and which graphs wait for their backward.
    """

    def __init__(self) -> None:
        self.inside = False
        self.living, self.load = Living(), Load()
        self.inputs: dict[int, int] = {}

    def next_call(self, inputs: dict[int, int]) -> None:
        """Note that a call comes, with this input."""
        self.inputs, self.load = inputs, self.living.next_call(inputs)
