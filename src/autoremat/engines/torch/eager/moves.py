"""Moves: a plan's events at calls and at requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autoremat.engines.torch.eager.away import Move
from autoremat.engines.torch.eager.path import Call, Path
from autoremat.engines.torch.eager.script import Work
from autoremat.engines.torch.eager.stays import Stays
from autoremat.program import Schedule


class Moves:
    """The events of a schedule, where the tape can carry them out.

    Args:
        schedule: of a plan.
        stays: of its values.
        path: of the forward.

    Attributes:
        values: those that are away for a while, by index in the program.
        at_call: by call of the path, what moves ahead of it.
        at_ask: by position of a request of the backward, what moves ahead of it and of its reruns.
    """

    def __init__(self, schedule: Schedule, stays: Stays, path: Path) -> None:
        self._schedule, self._stays = schedule, stays
        held = {v for c in path.calls for _, v in (*c.results, *c.saved)} | {
            new for c in path.calls for _, _, new in c.written
        }
        hidden = {v for v, ss in stays.by_value.items() for s in ss for p in s.asks if stays.pack_at[p] < 0}
        able = [o for o in schedule.offloads if stays.number.get(o.value) in held and o.value not in hidden]
        self.values = frozenset(o.value for o in able)
        self.at_call: dict[int, tuple[Move, ...]] = {}
        self.at_ask: dict[int, tuple[Move, ...]] = {}
        if able:
            self._find(replace(schedule, offloads=tuple(able)))

    def _find(self, schedule: Schedule) -> None:
        """Carry every event on to the next call or request."""
        ops, pending, seen = self._stays.program.ops, list[Move](), set[int]()
        for p, i in enumerate(schedule.order):
            pending += [self._numbered(event) for events in schedule.moves[p] for event in events]
            op = ops[i]
            if pending and p not in self._stays.reruns:
                if op.kind == "ask" and self._stays.pack_at[p] >= 0:
                    self.at_ask[p], pending = tuple(pending), []
                elif op.call >= 0 and op.call not in seen and op.phase == "forward":
                    self.at_call[op.call], pending = tuple(pending), []
            seen.add(op.call)

    def _numbered(self, event: Move) -> Move:
        """Return the same event, by the path's number."""
        return type(event)(self._stays.number[event.value])

    def added(self, works: Sequence[Work | None], path: Path) -> tuple[Work | None, ...]:
        """Add what moves ahead of calls to their works."""
        found = list(works)
        for k, moves in self.at_call.items():
            found[k] = replace(found[k] or _idle(path.calls[k]), moves=moves)
        return tuple(found)


def _idle(call: Call) -> Work:
    """Make the work of a call at which there was none."""
    written = frozenset(i for i, _, _ in call.written)
    return Work(call, False, frozenset(), frozenset(), hooked=False, values=dict(call.reads), written=written)
