"""Passes: the handles of autograd, and the backward passes that use them."""

from __future__ import annotations

import threading
from collections import deque
from typing import Final

import torch

from autoremat.engines.torch.eager.handle import Handle
from autoremat.engines.torch.eager.ledger import Ledger
from autoremat.engines.torch.eager.needs import Needs

NO_TASK: Final = -1
"""What torch calls the pass in a thread that goes not backward."""


current_task: Final = torch._C._current_graph_task_id
"""Returns the number of the pass that runs in this thread."""


def in_backward() -> bool:
    """Tell whether a backward pass runs in this thread."""
    return current_task() != NO_TASK


def in_python_node() -> bool:
    """Tell whether the running node is a custom ``autograd.Function``.

    Its Python code may ask for the same tensor repeatedly.
    """
    return isinstance(torch._C._current_autograd_node(), torch.autograd.function.BackwardCFunction)


class Passes:
    """Counts handles and notices when a pass begins.

    A handle may die at any moment, in the middle of anything: its death is put down, and settled later.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.needs = Needs(ledger)
        self.moved: dict[int, int] = {}
        """For an overwritten value, the one that its memory holds since."""
        self.waiting: dict[int, int] = {}
        """By value, how many handles this pass has not served."""
        self.n_made = self.n_served = 0
        self.number = 1
        self.retained = self.differentiated = False
        """Whether the graph outlives this pass; whether it makes another graph."""
        self.is_spent = False
        """The last pass has begun; handles that remain belong to other graphs."""
        self.lock = threading.Lock()
        self.task: int | None = None
        """The pass that asked last."""
        self._gone: deque[tuple[int, int, int]] = deque()

    def made(self, handle: Handle) -> None:
        """Count a handle that has been given out."""
        self.needs.add_handle(handle.value)
        self.waiting[handle.value] = self.waiting.get(handle.value, 0) + 1
        self.n_made += 1

    def now(self, value: int) -> int:
        """Return the value that this one's memory holds in the end."""
        while value in self.moved:
            value = self.moved[value]
        return value

    def move(self, old: int, new: int) -> bool:
        """Let handles follow their overwritten memory; tell if there were any.

        Overwriting a saved tensor is a user's error that shows in the backward; except where another part of the
        memory, with its own version counter, is overwritten (``unsafe_chunk``, ``tensor.data``).
        """
        if old not in self.needs.handles:
            return False
        self.needs.move_handles(old, new)
        self.waiting[new] = self.waiting.get(new, 0) + self.waiting.pop(old, 0)
        self.moved[old] = new
        return True

    def serve(self, handle: Handle) -> int:
        """Note that a pass asks for a handle; return its value."""
        value = self.now(handle.value) if self.moved else handle.value
        if handle.served != self.number:
            handle.served = self.number
            self.waiting[value] -= 1
            self.n_served += 1
        return value

    def begin(self, task: int) -> None:
        """Note the first request of a new pass; deaths have been settled."""
        self.is_again = self.retained
        if self.is_again:
            self.number += 1
            self.n_served = 0
            self.waiting = dict(self.needs.handles)
        self.task = task
        self.was_differentiated = self.differentiated
        self.differentiated = torch.is_grad_enabled()
        self.retained = self.differentiated or torch._C._autograd._get_current_graph_task_keep_graph()

    was_differentiated = is_again = False

    def put_down(self, handle: Handle) -> None:
        """Put down that a handle is gone."""
        self._gone.append((handle.value, handle.served, handle.pack))

    @property
    def are_all_gone(self) -> bool:
        """Whether no handle is alive."""
        return len(self._gone) >= self.needs.n_handles

    def settle(self) -> tuple[list[int], list[int]]:
        """Settle the deaths of handles; return unneeded values, and their packs."""
        unneeded: list[int] = []
        packs: list[int] = []
        while self._gone:
            value, served, pack = self._gone.popleft()
            packs.append(pack)
            value = self.now(value)
            if served != self.number:
                self.waiting[value] -= 1
            unneeded += self.needs.remove_handle(value)
        return unneeded, packs
