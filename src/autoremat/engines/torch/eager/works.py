"""Works: what a plan does at each call of the path."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from autoremat.engines.torch.eager.path import Call, Path
from autoremat.engines.torch.eager.script import Work
from autoremat.program import Program


class Works:
    """Makes the works of a script.

    Args:
        program: of the step.
        path: of its forward.
        stops: values that a rerun of their call can hand out before its end.
        ready: calls that the plan reruns.
        hold: values that the tape itself holds.
    """

    def __init__(
        self, program: Program, path: Path, stops: frozenset[int], ready: frozenset[int], hold: frozenset[int]
    ) -> None:
        self._program, self._path, self._stops, self._ready, self._hold = program, path, stops, ready, hold

    def of(self, packs: tuple[int | None, ...], hooked: Collection[int]) -> tuple[Work | None, ...]:
        """Make the work of every call; None where there is none.

        Args:
            packs: for every pack the value, if its memory may go; else None.
            hooked: packs at which there is something to do.
        """
        read = {v for k in self._ready for _, v in self._path.calls[k].reads}
        matter = frozenset(read | {v for v in packs if v is not None}) | self._hold
        calls = enumerate(self._path.calls)
        return tuple(self._work(k, c, self._ready, matter, hooked) or _drawing(c) for k, c in calls)

    def spare(self, works: Sequence[Work | None]) -> tuple[Work | None, ...]:
        """Make the works of a forward that is followed with spare.

        Every call that may be rerun is prepared, and every saved tensor looked at.
        """
        spare = self._may_rerun()
        saved = {j: v for j, v in enumerate(self._path.packed) if v is not None}
        matter = frozenset({v for k in spare for _, v in self._path.calls[k].reads}.union(saved.values()))
        found: list[Work | None] = []
        for k, (call, work) in enumerate(zip(self._path.calls, works, strict=True)):
            other = self._work(k, call, self._ready, matter, saved)
            if work is not None and work.draws_only:
                work = None
            if work is not None and other is not None:
                other = replace(work, hooked=work.hooked or other.hooked)
            other = other or work
            if k in spare and other is None:
                other = self._work(k, call, spare, matter, saved)
            found.append(_drawing(call) if other is None else replace(other, ready=k in self._ready, spare=k in spare))
        return tuple(found)

    def _may_rerun(self) -> frozenset[int]:
        """Find calls of which nothing known forbids a rerun."""
        ops = self._program.ops
        able = {op.call for op in ops} - {op.call for op in ops if op.call >= 0 and op.once}
        calls = enumerate(self._path.calls)
        return frozenset(k for k, c in calls if k in able and not c.leaves and set(c.effects) <= set(c.statistics))

    def _work(
        self, k: int, call: Call, ready: frozenset[int], matter: frozenset[int], hooked: Collection[int]
    ) -> Work | None:
        makes = {v for _, v in call.results} | {new for _, _, new in call.written}
        is_hooked = any(j in hooked for j in range(*call.packs))
        if not (k in ready or is_hooked or call.written or call.effects or call.leaves or makes & matter):
            return None
        stops = frozenset(v for _, v in call.saved if v in self._stops)
        written = frozenset(i for i, _, _ in call.written)
        return Work(call, k in ready, frozenset(makes & self._hold), stops, is_hooked, dict(call.reads), written)


def _drawing(call: Call) -> Work | None:
    """Make the work of a random call that the plan ignores."""
    return Work(call, False, frozenset(), frozenset(), hooked=False, draws_only=True) if call.random else None
