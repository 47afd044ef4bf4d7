"""Makes a program of a recording: adds costs and everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from autoremat.engines.torch.operators.costs import Cost
from autoremat.engines.torch.operators.timing import FREE, Progress, estimate_all, known_all, measure_all
from autoremat.engines.torch.recording.assembly import assemble, main_device
from autoremat.engines.torch.recording.recording import Recording
from autoremat.engines.torch.world.devices import free_bytes
from autoremat.program import Program

_SHARE_OF_FREE: Final = 0.5
"""Share of the free memory that an operator may take unasked."""


@dataclass(frozen=True)
class Whole:
    """What a program has besides its recording."""

    name: str
    recorded: str
    optimizer_state_bytes: int
    optimizer_scratch_bytes: int
    beside: Mapping[str, int]
    timing: str
    """``measure``, ``auto`` or ``estimate``.

    ``measure`` runs all operators, ``auto`` those that have room. ``estimate`` runs none, and looks up no known costs.
    """
    has_numbers: bool
    """Whether tensors are real, so that operators can be run."""
    limit: Callable[[Program], int] | None
    progress: Progress | None

    def program(self, recording: Recording) -> Program:
        """Make the program, with operators measured or estimated."""
        signatures = [op.signature for op in recording.ops]
        written = [sum(recording.values[n].nbytes for n in op.writes) for op in recording.ops]
        if self.timing == "estimate":
            return self._assembled(recording, estimate_all(signatures, written), "estimated")
        if not self.has_numbers:
            return self._with_real_sizes(recording, known_all(signatures, written), "estimated")
        room = most = None
        if self.limit is not None:
            without_costs = self._assembled(recording, [FREE] * len(signatures), "estimated")
            room = self.limit(without_costs) - without_costs.fixed_bytes
        if self.timing == "auto":
            most = int(_SHARE_OF_FREE * free_bytes(main_device(recording.values)))
        costs = measure_all(signatures, self.progress, room_bytes=room, most_bytes=most, outputs=written)
        return self._with_real_sizes(recording, costs, "measured")

    def _with_real_sizes(self, recording: Recording, costs: Sequence[Cost], source: str) -> Program:
        if self.recorded == "fake":  # a recording on real tensors has seen the real sizes
            recording.take_sizes([cost.made_bytes for cost in costs])
        return self._assembled(recording, costs, source)

    def _assembled(self, recording: Recording, costs: Sequence[Cost], source: str) -> Program:
        return assemble(
            recording, self.name, costs, optimizer_state_bytes=self.optimizer_state_bytes,
            optimizer_scratch_bytes=self.optimizer_scratch_bytes, beside=self.beside, timing=source,
            recorded=self.recorded,
        )  # fmt: skip
