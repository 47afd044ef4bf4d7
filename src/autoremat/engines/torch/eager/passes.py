"""Passes: the handles that autograd holds, and the backward passes that ask for what they stand for."""

from __future__ import annotations

import threading
from collections import deque

import torch

from autoremat.engines.torch.eager.handle import Handle
from autoremat.engines.torch.eager.ledger import Ledger
from autoremat.engines.torch.eager.needs import Needs

_NO_TASK = -1


def in_backward() -> bool:
    """Whether a backward pass runs in this thread."""
    return torch._C._current_graph_task_id() != _NO_TASK


def in_python_node() -> bool:
    """Whether the node that runs is of a custom ``autograd.Function``, whose code may ask for the same repeatedly."""
    return isinstance(torch._C._current_autograd_node(), torch.autograd.function.BackwardCFunction)


class Passes:
    """Counts handles and notices when a pass begins.

    A handle may die at any moment, in the middle of anything: what it leaves is put down and settled later.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.needs = Needs(ledger)
        self.moved: dict[int, int] = {}
        """For a value whose memory was overwritten the one that it holds since."""
        self.waiting: dict[int, int] = {}
        """How many handles of a value have not been served in this pass."""
        self.n_made = self.n_served = 0
        self.number = 1
        self.retained = self.differentiated = False
        """Whether the graph outlives the pass that runs; whether that pass makes a graph of its own."""
        self.is_spent = False
        """The pass after the forward has come; what is left is of other graphs, which nobody may ever go through."""
        self.lock = threading.Lock()
        self._task: int | None = None
        self._gone: deque[tuple[int, int]] = deque()

    def made(self, handle: Handle) -> None:
        """A handle has been given out."""
        self.needs.add_handle(handle.value)
        self.waiting[handle.value] = self.waiting.get(handle.value, 0) + 1
        self.n_made += 1

    def now(self, value: int) -> int:
        """The value that the memory of this one holds in the end."""
        while value in self.moved:
            value = self.moved[value]
        return value

    def move(self, old: int, new: int) -> bool:
        """The memory of a value holds another one: that is what its handles stand for; whether it had any.

        Overwriting a saved tensor is an error of the user's that shows in the backward, unless it is another part of
        the memory that is overwritten, with a version counter of its own (``unsafe_chunk``, ``tensor.data``).
        """
        if old not in self.needs.handles:
            return False
        self.needs.move_handles(old, new)
        self.waiting[new] = self.waiting.get(new, 0) + self.waiting.pop(old, 0)
        self.moved[old] = new
        return True

    def serve(self, handle: Handle) -> int:
        """A pass asks for what a handle stands for; the value."""
        value = self.now(handle.value)
        if handle.served != self.number:
            handle.served = self.number
            self.waiting[value] -= 1
            self.n_served += 1
        return value

    def begins(self) -> bool:
        """Whether this is the first request of a new pass."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return False
        self.is_again = self.retained
        if self.is_again:
            self.number += 1
            self.n_served = 0
            self.waiting = dict(self.needs.handles)
        self._task = task
        self.was_differentiated = self.differentiated
        self.differentiated = torch.is_grad_enabled()
        self.retained = self.differentiated or torch._C._autograd._get_current_graph_task_keep_graph()
        return True

    was_differentiated = is_again = False

    def put_down(self, handle: Handle) -> None:
        """A handle is gone."""
        self._gone.append((handle.value, handle.served))

    @property
    def has_gone(self) -> bool:
        """Whether a handle is gone that nobody has taken note of."""
        return bool(self._gone)

    def settle(self) -> list[int]:
        """Take note of the handles that are gone; the values that nothing needs any more."""
        unneeded: list[int] = []
        while self._gone:
            value, served = self._gone.popleft()
            value = self.now(value)
            if served != self.number:
                self.waiting[value] -= 1
            unneeded += self.needs.remove_handle(value)
        return unneeded
