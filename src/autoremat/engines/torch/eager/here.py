"""What belongs to one thread: whether it is in a call, and which graphs wait for their backward."""

from __future__ import annotations

import threading

from autoremat.engines.torch.eager.several import Living, Load


class Here(threading.local):
    """What belongs to one thread: whether it is in a call, and which graphs wait for their backward."""

    def __init__(self) -> None:
        self.inside = False
        self.living, self.load = Living(), Load()
        self.inputs: dict[int, int] = {}

    def next_call(self, inputs: dict[int, int]) -> None:
        """A call comes, with this input."""
        self.inputs, self.load = inputs, self.living.next_call(inputs)
