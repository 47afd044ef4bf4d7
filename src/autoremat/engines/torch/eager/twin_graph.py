"""The graph of the twins, which stands for the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from autoremat.engines.torch.eager.by_hand import is_given_to_a_region
from autoremat.engines.torch.eager.twin_packs import TwinPacks
from autoremat.engines.torch.eager.twin_world import Blank, TwinWorld, blank_of, without_duals
from autoremat.engines.torch.eager.twins import Twins
from autoremat.engines.torch.operators.local import is_jagged, local_of
from autoremat.engines.torch.operators.values import storage_of
from autoremat.engines.torch.recording.frames import user_line
from autoremat.engines.torch.recording.recording import RecordedOp

_COMPILED: Final = "CompiledFunctionBackward"
"""Name of the node that ``torch.compile`` makes for compiled code.

It comes from ``CompiledFunction`` in ``torch/_functorch/_aot_autograd/runtime_wrappers.py`` (2.13).
"""
Mark = Callable[[Sequence[Any]], None]
"""Lets a recorded op stand for user code given these gradients."""


class TwinGraph:
    """Histories of twins, by the nodes of the real graph.

    Args:
        world: in which the twins live.
        twins: whose histories they are.
        packs: what autograd saves of them.
    """

    def __init__(self, world: TwinWorld, twins: Twins, packs: TwinPacks) -> None:
        self._world, self._twins, self._packs = world, twins, packs
        self.compiled = ""
        """Where the output of compiled code was met."""
        self.marks: dict[int, int] = {}
        """Recorded ops that stand for user code, by node's or hook's key."""
        self.met: Callable[[Any], int] | None = None
        """Called with nodes of custom Functions; returns their keys."""
        self._nodes: dict[tuple[int, int], tuple[Tensor, Blank]] = {}
        """Twins by real node; without memory once their tensor is gone."""
        self._node_of: dict[int, tuple[int, int]] = {}
        self._first_node = _next_node()
        self._loose: list[tuple[int, Tensor]] = []
        """What has been saved outside all calls, and by no node yet."""

    def place(self, twin: Tensor, where: tuple[int, int]) -> None:
        """Let a twin stand for this output of a node."""
        known = self._node_of.get(id(twin))
        if known is not None and known != where:  # it has been overwritten
            self._nodes.pop(known, None)
        self._nodes[where] = twin, blank_of(twin)
        self._node_of[id(twin)] = where

    def is_placed(self, twin: Tensor, where: tuple[int, int]) -> bool:
        """Tell whether a twin stands for this output of a node."""
        return self._node_of.get(id(twin)) == where

    def cut(self, twin: Tensor) -> None:
        """Take the memory from a twin; what was computed needs its history."""
        where = self._node_of.pop(id(twin), None)
        if where is None or where not in self._nodes or not (twin.layout is torch.strided or is_jagged(twin)):
            return
        with self._world.here(), without_duals():
            try:
                tail = _Tail.apply(self._world.mode, self._nodes[where][1], twin)
            except RuntimeError:  # a view whose base has been overwritten, if nothing may go on from it any more
                del self._nodes[where]
                return
            self._nodes[where] = tail, blank_of(tail)

    def of_node(self, tensor: Tensor, node: Any) -> Tensor | None:
        """Make a twin of a custom function's result, behind its inputs' twins."""
        if type(node).__name__ == _COMPILED:
            self.compiled = self.compiled or user_line() or "a function"
        found = list(self._behind(node, set()))
        if not found and not _leads_nowhere(node):
            return None
        alias = self._twins.alias_of(tensor)
        blank = self._twins.blank_like(tensor) if alias is None else alias
        if blank._is_view() and not tensor._is_view():
            blank = blank.data  # what is no view may be overwritten in place
        made = self.stand_in([blank], found, node, self._loose)
        self._loose = []
        return made[0]

    def save_loose(self, j: int, tensor: Tensor) -> None:
        """Note what is saved outside all calls, as by custom functions."""
        twin = self._twins.memory_of(tensor)
        if is_given_to_a_region():
            self._packs.give(j, twin)
        else:
            self._loose.append((j, twin))

    def _behind(self, node: Any, seen: set[Any]) -> Iterator[tuple[Tensor, Blank]]:
        """Yield a node's nearest known inputs; unseen nodes may lie between."""
        for n, nr in node.next_functions:
            found = self._input(n, nr)
            if found is not None:
                yield found
            elif n is not None and n not in seen and n._sequence_nr() >= self._first_node:
                seen.add(n)
                yield from self._behind(n, seen)

    def _input(self, node: Any, nr: int) -> tuple[Tensor, Blank] | None:
        if node is None:
            return None
        if hasattr(node, "variable"):
            twin = self._twins.of(node.variable)
            return twin, blank_of(twin)
        return self._nodes.get((node._sequence_nr(), nr))

    def stand_in(
        self, results: Sequence[Tensor], inputs: Sequence[tuple[Tensor, Blank]], node: Any,
        loose: Sequence[tuple[int, Tensor]],
    ) -> list[Tensor]:  # fmt: skip
        """Give fake results a history: one node, which saves what is loose."""
        saved = [twin for _, twin in loose]
        mark = None
        is_custom = isinstance(node, torch.autograd.function.BackwardCFunction) and type(node).__name__ != _COMPILED
        if self.met is not None and is_custom:
            mark = partial(self._mark, self.met(node), type(node).__name__)
        self._packs.begin()
        if not any(twin.requires_grad for twin, _ in inputs):
            nothing = torch.empty(0, requires_grad=True)
            inputs = [(nothing, blank_of(nothing))]
        with torch.enable_grad(), without_duals(), self._packs.hooks(), self._packs.outside_of_regions():
            made = _StandIn.apply(
                self._world.mode, mark, list(results), saved, [b for _, b in inputs], *[t for t, _ in inputs]
            )
        for packed, (j, _) in zip(self._packs.packs, loose, strict=True):
            self._packs.match(packed, j)
        self._packs.begin()
        return list(made)

    def hook(self, key: int, tensor: Tensor) -> bool:
        """Mark a tensor's new hook in the backward; tell if possible."""
        try:
            with self._world.here():
                twin: Any = self._twins.of(tensor)
                twin.register_hook(lambda gradient: self._mark(key, "hook", (gradient,)))
        except Exception:  # noqa: BLE001 - whatever a fake tensor cannot do
            return False
        return True

    def _mark(self, key: int, name: str, gradients: Sequence[Any]) -> None:
        """Let an op of the recorded backward stand for user code."""
        recorder = self._world.recorder
        if not recorder.backward:
            return
        storages = (storage_of(local_of(g)) for g in gradients if isinstance(g, Tensor))
        reads = [n for s in storages if s is not None and (n := recorder.map.number(s)) >= 0]
        self.marks[key] = len(recorder.ops)
        recorder.log.append(RecordedOp(name, reads, (), (), True, None))

    def known(self) -> frozenset[tuple[int, int]]:
        """Return the nodes whose twins have a history by now."""
        return frozenset(self._nodes)

    def forget(self, but: frozenset[tuple[int, int]]) -> None:
        """Free histories of newer nodes, from which nobody goes on."""
        for where in self._nodes.keys() - but:
            twin, _ = self._nodes.pop(where)
            self._node_of.pop(id(twin), None)

    def close(self) -> None:
        """Hold no tensor any more."""
        for things in (self._nodes, self._node_of, self._loose):
            things.clear()


class _StandIn(torch.autograd.Function):
    """One node for all that happens out of sight before a result."""

    @staticmethod
    def forward(
        ctx: Any, mode: FakeTensorMode, mark: Mark | None, results: list[Tensor], saved: Any, blanks: Any,
        *inputs: Tensor,
    ) -> Any:  # fmt: skip
        """Return the results, which have a history now."""
        ctx.mode, ctx.mark, ctx.blanks = mode, mark, blanks
        ctx.save_for_backward(*saved)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Ask for what was saved; give each input a gradient."""
        saved = ctx.saved_tensors
        if ctx.mark is not None:
            ctx.mark(gradients)
        with ctx.mode:
            made = [blank() for blank in ctx.blanks]
        del saved
        return None, None, None, None, None, *made


class _Tail(torch.autograd.Function):
    """The history of a tensor without its memory."""

    @staticmethod
    def forward(ctx: Any, mode: FakeTensorMode, blank: Blank, twin: Tensor) -> Any:
        """Return a tensor without elements."""
        ctx.mode, ctx.blank = mode, blank
        return torch.empty(0, dtype=twin.dtype, device=twin.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return a gradient of the tensor's size."""
        with ctx.mode:
            return None, None, ctx.blank()


def _leads_nowhere(node: Any) -> bool:
    """Tell whether a node has nothing behind it.

    So it is with what is made of views made without gradients: they require grad, and have no history.
    """
    return all(n is None for n, _ in node.next_functions)


def _next_node() -> int:
    """Return the number of the next graph node in this thread."""
    with torch.enable_grad():
        node = torch.empty(0, requires_grad=True).view(0).grad_fn
    assert node is not None
    return node._sequence_nr()
