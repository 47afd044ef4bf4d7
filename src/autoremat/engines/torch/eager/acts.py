"""Acts: what requests of the backward set off under a plan."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from autoremat.engines.torch.eager.away import Move
from autoremat.engines.torch.eager.script import Act, Rerun
from autoremat.engines.torch.eager.stays import Stays

_NONE: Final[Mapping[int, tuple[Move, ...]]] = MappingProxyType({})


class Acts:
    """Makes the acts of a script.

    Args:
        stays: of the values, with the last reads of the tape.
    """

    def __init__(self, stays: Stays) -> None:
        self._stays, self._order, self._ops = stays, stays.order, stays.program.ops
        self._drops: dict[int, list[int]] = {}
        for v, ss in stays.by_value.items():
            for s in ss:
                if s.last_read is not None:
                    self._drops.setdefault(s.last_read, []).append(stays.number[v])
        self._installed = {(s.made_at, v) for v, ss in stays.by_value.items() for s in ss if s.last_read is not None}

    def of(self, packs: tuple[int | None, ...], moves: Mapping[int, tuple[Move, ...]] = _NONE) -> tuple[Act, ...]:
        """Make the acts.

        Args:
            packs: for every pack the value, if its memory may go; else None.
            moves: by position of a request, what goes to the tier or comes back ahead of it.
        """
        reruns, end = self._stays.reruns, max(self._stays.program.forward, default=-1)
        acts: list[Act] = []
        pending: list[Rerun] = []
        block: list[int] = []
        for p, i in enumerate(self._order):
            op = self._ops[i]
            if p in reruns:
                block.append(p)
                after = p + 1
                if not (after in reruns and self._ops[self._order[after]].call == op.call and self._order[after] > i):
                    pending.append(self._rerun(block))
                    block = []
            elif op.kind == "ask":
                v, j = op.reads[0], self._stays.pack_at[p]
                is_handle = j >= 0 and packs[j] is not None
                if pending or is_handle or p in moves:
                    value = self._stays.number.get(v, -1)
                    drops = is_handle and value in self._drops.get(p, ())
                    acts.append(Act(j, value, tuple(pending), drops, moves.get(p, ()), i < end))
                    pending = []
        return tuple(acts)

    def _rerun(self, block: list[int]) -> Rerun:
        runs = [(p, self._ops[self._order[p]]) for p in block]
        number = self._stays.number
        install = frozenset(number[v] for p, op in runs for v in op.writes if (p, v) in self._installed)
        gone = frozenset(n for p in block for n in self._drops.get(p, ()))
        return Rerun(runs[0][1].call, install, gone)
