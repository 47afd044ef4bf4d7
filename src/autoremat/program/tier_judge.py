"""What ``verify`` knows of offloads.

It is the tier and the link of its abstract machine.

Like the machine it believes what a schedule claims and goes on, so that one call shows all mistakes. Its sums and its
clock are its own: nothing here is shared with ``simulate`` or a planner.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from autoremat.program.model import Program
from autoremat.program.schedule import Offload, Schedule


@dataclass
class Tier:
    """Which values are where, as the machine goes from run to run.

    Attributes:
        program: the step that is carried out.
        schedule: that is judged.
        leaving: for every value whose copy out has begun and is not waited for the end of that copy, in seconds.
        away: values whose memory is free, each with whether its copy was a whole one.
        coming: for every value whose copy back has begun and is not waited for the end of that copy, in seconds.
        in_tier: bytes in the tier.
        high: the most bytes that were in the tier.
        seconds: the clock of the ops.
        waited: seconds in which no op ran.
        busy_until: when the link is free again, each way.
    """

    program: Program
    schedule: Schedule
    leaving: dict[int, float] = field(default_factory=dict)
    away: set[int] = field(default_factory=set)
    coming: dict[int, float] = field(default_factory=dict)
    in_tier: int = 0
    high: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    busy_until: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def __post_init__(self) -> None:
        n = len(self.schedule.order)
        self._at: dict[tuple[str, int], list[Offload]] = {}
        for o in (o for o in self.schedule.offloads if not disordered(o, n)):
            for event in ("send", "gone", "fetch", "here"):
                self._at.setdefault((event, getattr(o, event)), []).append(o)

    def at(self, event: str, run: int) -> list[Offload]:
        """List the offloads that have this event at this run.

        Where values come back, what is needed first comes first.
        """
        found = self._at.get((event, run), [])
        return sorted(found, key=lambda o: o.here) if event in ("fetch", "here") else found

    def send(self, v: int) -> None:
        """Begin the copy out."""
        self.leaving[v] = self._copied(v, out=True)
        self.in_tier += self._nbytes(v)
        self.high = max(self.high, self.in_tier)

    def gone(self, v: int) -> None:
        """Wait for the copy out."""
        self._wait(self.leaving.pop(v, 0.0))
        self.away.add(v)

    def fetch(self, v: int) -> None:
        """Begin the copy back."""
        self.away.discard(v)
        self.coming[v] = self._copied(v, out=False)

    def here(self, v: int) -> None:
        """Wait for the copy back."""
        self._wait(self.coming.pop(v, 0.0))
        self.in_tier -= self._nbytes(v)

    def _nbytes(self, v: int) -> int:
        return self.program.values[v].nbytes

    def _copied(self, v: int, *, out: bool) -> float:
        """Compute when a copy that begins now ends."""
        link = self.program.link
        if link is None:
            return self.seconds
        rate, way = (link.out_bytes_per_second, 0) if out else (link.in_bytes_per_second, 1)
        begin = max([self.seconds, *(self.busy_until if link.takes_turns else [self.busy_until[way]])])
        self.busy_until[way] = begin + link.latency_seconds + self._nbytes(v) / rate
        return self.busy_until[way]

    def _wait(self, until: float) -> None:
        self.waited += max(0.0, until - self.seconds)
        self.seconds = max(self.seconds, until)


def disordered(o: Offload, n_runs: int) -> bool:
    """Tell whether the four events are out of order.

    So they are as well where they are not at runs of the schedule.
    """
    return not (0 <= o.send <= o.gone and o.gone < o.fetch <= o.here and o.here < n_runs)
