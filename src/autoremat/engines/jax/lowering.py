"""Carries out a plan as JAX code: a forward that hands on what the plan keeps, a backward that makes the rest again.

XLA would merge what is computed again with what has been computed, and orders runs itself. What holds the order are
*fences*: an ``optimization_barrier`` ahead of every stretch of further runs, through which everything goes that is in
memory there, and the arguments that the stretch reads. Fewer operands than that hold nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax import lax

from autoremat.engines.jax import core
from autoremat.engines.jax.graph import Atom, Constant
from autoremat.engines.jax.hosting import Hosted
from autoremat.engines.jax.recording import Recorded
from autoremat.program import Schedule

Memory = dict[int, Any]
"""What is there, by the number of its value."""


@dataclass(frozen=True, eq=False)
class Stretch:
    """Runs of the backward, one after the other, all of them further runs or all of them first ones.

    Attributes:
        begin: position of the first one in the order.
        end: the position behind the last one.
        is_again: whether they are further runs.
    """

    begin: int
    end: int
    is_again: bool


@dataclass(frozen=True, eq=False)
class Lowered:
    """A step under a schedule, ready to be traced."""

    recorded: Recorded
    schedule: Schedule

    @cached_property
    def cut(self) -> int:
        """Where the backward begins in the order: behind the last first run of the forward."""
        seen, last = set[int](), -1
        for p, i in enumerate(self.schedule.order):
            if i not in seen and i < self.recorded.first_late:
                last = p
            seen.add(i)
        return last + 1

    @cached_property
    def needed_later(self) -> frozenset[int]:
        """The values that the backward reads or hands out."""
        groups, order = self.recorded.groups, self.schedule.order
        read = {v for i in order[self.cut :] for v in groups[i].reads}
        return frozenset(
            read | {o for o in self.recorded.graph.outputs[self.recorded.n_outputs :] if isinstance(o, int)}
        )

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """The values that go from the forward to the backward, arguments left out."""
        live = set[int]()
        for p in range(self.cut):
            live.update(self.recorded.groups[self.schedule.order[p]].writes)
            live.difference_update(self._freed(p))
        return tuple(sorted(live & self.needed_later))

    @cached_property
    def kept_arguments(self) -> tuple[bool, ...]:
        """For every argument whether the backward reads it."""
        return tuple(a in self.needed_later for a in self.recorded.arguments)

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """The runs of the backward, further runs apart from first ones."""
        order, cut = self.schedule.order, self.cut
        seen, again = set(order[:cut]), list[bool]()
        for i in order[cut:]:
            again.append(i in seen)
            seen.add(i)
        begins = [k for k in range(len(again)) if k == 0 or again[k] != again[k - 1]]
        ends = [*begins[1:], len(again)]
        return tuple(Stretch(cut + b, cut + e, again[b]) for b, e in zip(begins, ends, strict=False))

    @property
    def n_fences(self) -> int:
        """How many stretches of further runs there are."""
        return sum(s.is_again for s in self.stretches)

    def forward(self, arguments: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Results of the function, the arguments that the backward reads, and what else is kept for it."""
        memory: Memory = dict(zip(self.recorded.arguments, arguments, strict=True))
        hosted = Hosted(self.recorded, self.schedule)
        for p in range(self.cut):
            hosted.follow(p, memory)
            self._run(p, memory)
        hosted.send(self.cut, memory)
        outs = [_value(o, memory) for o in self.recorded.graph.outputs[: self.recorded.n_outputs]]
        passed = [a for a, is_kept in zip(arguments, self.kept_arguments, strict=True) if is_kept]
        return outs, passed, [(memory | hosted.away)[v] for v in self.kept]

    def backward(self, passed: Sequence[Any], kept: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
        """Gradients of the differentiated arguments, from what ``forward`` handed on."""
        names = [a for a, is_kept in zip(self.recorded.arguments, self.kept_arguments, strict=True) if is_kept]
        fixed: Memory = dict(zip(names, passed, strict=True))
        memory: Memory = dict(zip((*self.kept, *self.recorded.cotangents), (*kept, *cotangents), strict=True))
        hosted = Hosted(self.recorded, self.schedule)
        hosted.away = {v: memory.pop(v) for v in hosted.at(self.cut)}
        hosted.come(self.cut, memory)
        for stretch in self.stretches:
            view = self._fenced(stretch, fixed, memory) if stretch.is_again else fixed
            for p in range(stretch.begin, stretch.end):
                if p > self.cut:
                    hosted.follow(p, memory)
                self._run(p, memory, view)
        return [_value(o, fixed | memory) for o in self.recorded.graph.outputs[self.recorded.n_outputs :]]

    def _fenced(self, stretch: Stretch, fixed: Memory, memory: Memory) -> Memory:
        """Put all that is in memory behind a fence; returns the arguments as the stretch is to see them."""
        made, read = set[int](), set[int]()
        for p in range(stretch.begin, stretch.end):
            group = self.recorded.groups[self.schedule.order[p]]
            read.update(set(group.reads) - made)
            made.update(group.writes)
        names = [*memory, *sorted(v for v in read if v in fixed)]
        behind = dict(zip(names, fence([memory[v] if v in memory else fixed[v] for v in names]), strict=True))
        memory.update((v, behind[v]) for v in memory)
        return fixed | {v: behind[v] for v in names if v in fixed}

    def _run(self, p: int, memory: Memory, fixed: Mapping[int, Any] | None = None) -> None:
        """Run one group, and let go of what is freed after it."""
        group = self.recorded.groups[self.schedule.order[p]]
        inside = {v: memory[v] if v in memory else (fixed or {})[v] for v in group.reads}
        for m in group.members:
            equation = self.recorded.graph.equations[m]
            made = equation.run([_value(r, inside) for r in equation.reads])
            inside.update(zip(equation.results, made, strict=True))
        memory.update((w, inside[w]) for w in group.writes)
        for v in self._freed(p):
            memory.pop(v, None)

    def _freed(self, p: int) -> list[int]:
        """The values that leave after a run; an output never does."""
        value_of, outputs = self.recorded.value_of, self.recorded.outputs
        return [value_of[n] for n in self.schedule.frees[p] if value_of[n] not in outputs]


def _value(atom: Atom, memory: Mapping[int, Any]) -> Any:
    return atom.value if isinstance(atom, Constant) else memory[atom]


def fence(arrays: Sequence[Any]) -> list[Any]:
    """The same arrays, and nothing that reads them runs before all of them are there.

    One barrier for each way in which arrays vary over a mesh: a common one would make all of them vary in every way.
    """
    kinds: dict[str, list[int]] = {}
    for k, array in enumerate(arrays):
        kinds.setdefault(str(core.axis_type(jax.typeof(array))), []).append(k)
    behind = list(arrays)
    for positions in kinds.values():
        for k, array in zip(positions, lax.optimization_barrier([arrays[k] for k in positions]), strict=True):
            behind[k] = array
    return behind
