"""Away: which values of one step are in the tier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from autoremat.engines.torch.eager.arguments import version_of
from autoremat.engines.torch.operators.values import View
from autoremat.engines.torch.world.tier import OffloadFailed
from autoremat.program.schedule import Fetch, Gone, Here, Send

if TYPE_CHECKING:
    from autoremat.engines.torch.eager.ledger import Ledger

Move = Send | Gone | Fetch | Here
"""An event of the plan; its value is a number of the path."""


class Store(Protocol):
    """What one step has in a tier."""

    def has_room(self, nbytes: int) -> bool:
        """Tell whether so many bytes more are within the tier's budget."""

    def send(self, storage: torch.UntypedStorage) -> Any:
        """Begin to copy memory to the tier."""

    def fetch(self, sent: Any, storage: torch.UntypedStorage) -> Any:
        """Begin to copy it back into other memory."""

    def wait(self, copy: Any) -> BaseException | None:
        """Wait for a copy; return the reason of a failure."""

    def close(self) -> None:
        """End all copies."""


class Nowhere:
    """Stands where no value is away."""

    def carry_out(self, ledger: Ledger, moves: Sequence[Move]) -> None:
        """Do nothing."""

    def back(self, ledger: Ledger, value: int) -> bool:
        """Tell that the value is not away."""
        return False

    def come_back(self, ledger: Ledger) -> None:
        """Do nothing."""

    def take(self, ledger: Ledger, values: Iterable[int]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


NOWHERE: Final = Nowhere()


class Away(Nowhere):
    """Values of a step in the tier, or on their way.

    A value that cannot be written stays in memory. One that cannot be read back is recomputed, or ends the step in an
    error.

    Args:
        store: the step's own part of the tier.
        where: what a person calls the tier.
        warn: told what did not work.
    """

    def __init__(self, store: Store, where: str, warn: Callable[[str], None]) -> None:
        self._store, self._where, self._warn = store, where, warn
        self._leaving: dict[int, tuple[Any, int]] = {}
        """By value the copy out, and the version of what it copies."""
        self._gone: dict[int, tuple[Any, View, int, torch.device]] = {}
        self._coming: dict[int, tuple[Any, View, torch.UntypedStorage]] = {}

    def carry_out(self, ledger: Ledger, moves: Sequence[Move]) -> None:
        """Move what moves now.

        What is not where the plan has it stays where it is.
        """
        if moves:
            with torch._C.DisableTorchFunction():
                for move in moves:
                    self._carry_out(ledger, move)

    def _carry_out(self, ledger: Ledger, move: Move) -> None:
        match move:
            case Send(value):
                self._send(ledger, value)
            case Gone(value):
                self._free(ledger, value)
            case Fetch(value):
                self._fetch(value)
            case Here(value):
                self._receive(ledger, value)

    def _send(self, ledger: Ledger, value: int) -> None:
        tensor = ledger.held.get(value)
        if tensor is None or value in self._leaving:
            return
        storage = tensor.untyped_storage()
        if not self._store.has_room(storage.nbytes()):
            self._warn(f"the tier ({self._where}) is full: what does not fit stays in memory, beyond the budget")
            return
        self._leaving[value] = self._store.send(storage), version_of(tensor)

    def _free(self, ledger: Ledger, value: int) -> None:
        """Wait for the copy out, and free the value.

        It stays if the copy failed, or if it was overwritten meanwhile.
        """
        if value not in self._leaving:
            return
        copy, version = self._leaving.pop(value)
        failure = self._store.wait(copy)
        tensor = ledger.held.get(value)
        if failure is not None:
            self._warn(
                f"a value could not be written to the tier ({self._where}): {failure}. It stays in memory, beyond the "
                "budget; gradients are exact"
            )
        elif tensor is not None and version_of(tensor) == version:
            storage = tensor.untyped_storage()
            self._gone[value] = copy, View.of(tensor), storage.nbytes(), storage.device
            ledger.let_go(value)

    def _fetch(self, value: int) -> None:
        if value not in self._gone:
            return
        sent, view, nbytes, device = self._gone.pop(value)
        storage = torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()
        self._coming[value] = self._store.fetch(sent, storage), view, storage

    def _receive(self, ledger: Ledger, value: int) -> None:
        if value not in self._coming:
            return
        copy, view, storage = self._coming.pop(value)
        failure = self._store.wait(copy)
        if failure is None:
            ledger.hold(value, view.on(storage))
        elif value not in ledger.maker:
            raise OffloadFailed(
                f"a value that this backward needs could not be read back from the tier ({self._where}): {failure}. "
                "Its gradients are lost: clear them and run the step again, on another disk or without (offload=None)"
            ) from failure
        else:
            self._warn(f"a value could not be read back from the tier ({self._where}): {failure}. It is computed again")

    def back(self, ledger: Ledger, value: int) -> bool:
        """Bring a value back now; tell whether it is in memory then."""
        self._fetch(value)
        self._receive(ledger, value)
        return value in ledger.held

    def come_back(self, ledger: Ledger) -> None:
        """Bring all values back: the plan does not hold any more."""
        self._leaving.clear()
        with torch._C.DisableTorchFunction():
            for value in (*self._gone, *self._coming):
                self.back(ledger, value)

    def take(self, ledger: Ledger, values: Iterable[int]) -> None:
        """Move values that are in memory to the tier now."""
        for value in values:
            self._send(ledger, value)
            self._free(ledger, value)

    def close(self) -> None:
        """Let go of everything: the step is over, or abandoned."""
        for away in (self._leaving, self._gone, self._coming):
            away.clear()
        self._store.close()

    def __del__(self) -> None:
        self.close()
