"""From a recording to a program: what every operator costs, and what else there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from autoremat.program import Program
from autoremat.record.assemble import assemble
from autoremat.record.recording import Recording
from autoremat.record.timing import FREE, Cost, Progress, estimate_all, measure_all


@dataclass(frozen=True)
class Whole:
    """What a program has beside its recording."""

    name: str
    recorded: str
    optimizer_state_bytes: int
    optimizer_scratch_bytes: int
    beside: Mapping[str, int]
    measures: bool
    limit: Callable[[Program], int] | None
    progress: Progress | None

    def program(self, recording: Recording) -> Program:
        """The program, with operators measured or estimated."""
        signatures = [op.signature for op in recording.ops]
        if not self.measures:
            written = [sum(recording.values[n].nbytes for n in op.writes) for op in recording.ops]
            return self._assembled(recording, estimate_all(signatures, written), "estimated")
        room = None
        if self.limit is not None:
            without_costs = self._assembled(recording, [FREE] * len(signatures), "estimated")
            room = self.limit(without_costs) - without_costs.fixed_bytes
        costs = measure_all(signatures, self.progress, room_bytes=room)
        if self.recorded == "fake":  # sizes that depend on the data were seen on the real tensors
            recording.take_sizes([cost.made_bytes for cost in costs])
        return self._assembled(recording, costs, "measured")

    def _assembled(self, recording: Recording, costs: Sequence[Cost], source: str) -> Program:
        return assemble(
            recording, self.name, costs, optimizer_state_bytes=self.optimizer_state_bytes,
            optimizer_scratch_bytes=self.optimizer_scratch_bytes, beside=self.beside, timing=source,
            recorded=self.recorded,
        )  # fmt: skip
