"""Units of ``fully_shard`` in a first step: when their parameters exist.

A unit gathers its parameters before its forward, frees them after it, and gathers them again for its backward: from the
first gradient of what its forward has returned to the last gradient of what it was given. A call that needs them can be
rerun in between, and at no other time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from autoremat.engines.torch.eager.arguments import tensors_in
from autoremat.engines.torch.eager.shadow import Shadow
from autoremat.engines.torch.eager.tape import Tape
from autoremat.engines.torch.operators.local import local_of
from autoremat.engines.torch.operators.values import storage_of
from autoremat.engines.torch.recording.recording import RecordedOp
from autoremat.engines.torch.world.parallel import Parallel, Unit, groups_of, replaced
from autoremat.program.once import Once, Reason

FREED: Final = Reason(Once.FREED)


class Units:
    """Watches the units of a first step.

    Args:
        parallel: what torch.distributed does around the modules.
        modules: the roots of the names of parameters.
        shadow: that records the step.
    """

    def __init__(self, parallel: Parallel, modules: Sequence[nn.Module], shadow: Shadow) -> None:
        self._parallel, self._shadow = parallel, shadow
        self._paths = {id(m): path for root in modules for path, m in root.named_modules()}
        self._of_group = {id(unit.group): unit for unit in parallel.units}
        self._unit_of: dict[int, Unit] = {}
        """The unit of every whole parameter, by the parameter's value."""
        self._marks: list[tuple[int, frozenset[Unit], bool]] = []
        """Gatherings and releases in recorded order: op, units, whether gathered."""
        self._begun: dict[int, int] = {}
        """For every group whose forward runs, the calls made before."""

    def know(self) -> None:
        """Tell the recording that the account has shards and gathered parameters."""
        for unit in self._parallel.units:
            for _, _, parameter in unit.parameters():
                self._is_elsewhere(parameter.sharded_param)

    def whole(self) -> list[tuple[str, Tensor]]:
        """List all whole parameters that the forward has gathered, by name."""
        return [
            (self._label(module, name), parameter._unsharded_param)
            for unit in self._parallel.units
            for module, name, parameter in unit.parameters()
            if hasattr(parameter, "_unsharded_param")
        ]

    def _label(self, module: nn.Module, name: str) -> str:
        path = self._paths.get(id(module), "")
        return f"{path}.{name}" if path else name

    def _is_elsewhere(self, tensor: Tensor) -> int | None:
        """Count a tensor's memory elsewhere; return its value's number."""
        if storage_of(local_of(tensor)) is None:
            return None
        number = self._shadow.number(tensor)
        if number in self._shadow.recorder.values:
            self._shadow.recorder.values[number].nbytes = 0
        return number

    # ---- the forward ---------------------------------------------------------------------------------------------

    @contextmanager
    def watched(self, tape: Tape) -> Iterator[None]:
        """Watch the forward that runs in this block."""
        with ExitStack() as stack:
            for unit in self._parallel.units:
                group = unit.group
                replaced(stack, group, "pre_forward", self._entering(tape, unit, group.pre_forward))
                replaced(stack, group, "post_forward", self._leaving(tape, unit, group.post_forward))
            for state in self._parallel.states:
                units = [self._of_group[id(g)] for g in groups_of(state) if id(g) in self._of_group]
                own = state._register_pre_backward_hook
                replaced(stack, state, "_register_pre_backward_hook", self._returning(tape, units, own))
            yield

    def _entering(self, tape: Tape, unit: Unit, own: Callable[..., Any]) -> Callable[..., Any]:
        def pre_forward(module: nn.Module, args: Any, kwargs: Any) -> Any:
            self._begun.setdefault(id(unit.group), tape.n_calls)
            before = {id(t) for t in _tensors((args, kwargs))}
            given = own(module, args, kwargs)
            with self._looking(tape):
                self._know(unit)
                self._mark([t for t in _tensors(given) if id(t) not in before], [unit], gathers=False)
            return given

        return pre_forward

    def _leaving(self, tape: Tape, unit: Unit, own: Callable[..., Any]) -> Callable[..., Any]:
        def post_forward(module: Any, args: Any, output: Any) -> Any:
            begin = self._begun.pop(id(unit.group), tape.n_calls)
            if unit.frees and not _is_fake(unit):  # fake parameters are not freed
                with torch._C.DisableTorchFunction():
                    _settle(tape, range(begin, tape.n_calls), output, is_gathered=unit.group.unshard_in_backward)
            return own(module, args, output)

        return post_forward

    def _returning(self, tape: Tape, units: Sequence[Unit], own: Callable[..., Any]) -> Callable[..., Any]:
        def register(output: Any) -> Any:
            output = own(output)
            gathered = [unit for unit in units if unit.group.unshard_in_backward]
            with self._looking(tape):
                self._mark(_tensors(output), gathered, gathers=True)
            return output

        return register

    @contextmanager
    def _looking(self, tape: Tape) -> Iterator[None]:
        """Let nobody hear calls; an error ends the recording, not the step."""
        with torch._C.DisableTorchFunction():
            try:
                yield
            except Exception as error:  # noqa: BLE001 - whatever a fake tensor cannot do
                tape.witness.give_up(error)

    def _know(self, unit: Unit) -> None:
        """Register the whole parameters that a unit has just gathered."""
        for module, name, _ in unit.parameters():
            tensor, label = module._parameters[name], self._label(module, name)
            assert tensor is not None
            self._shadow.know(tensor, label, "parameter", label.rpartition(".")[0])
            self._shadow.twin(tensor).grad = None  # what has been accumulated is in the account as a whole
            number = self._is_elsewhere(tensor)
            if number is not None:
                self._unit_of[number] = unit

    def _mark(self, tensors: Sequence[Tensor], units: Sequence[Unit], *, gathers: bool) -> None:
        """Note when the backward reaches these gradients, and units gather or free."""
        recorder, changed = self._shadow.recorder, frozenset(units)

        def note(gradient: Tensor) -> None:
            self._marks.append((len(recorder.ops), changed, gathers))

        for tensor in tensors:
            if tensor.requires_grad:
                self._shadow.twin(tensor).register_hook(note)

    # ---- what can be made again ----------------------------------------------------------------------------------

    def forbid(self) -> None:
        """Forbid reruns of calls that would miss their parameters.

        The backward has been recorded by then.
        """
        needs: dict[int, frozenset[Unit]] = {}
        ops, asked = self._shadow.recorder.ops, self._asked()
        for call, group in groupby((op for op in ops if op.call >= 0 and not op.backward), lambda op: op.call):
            own = list(group)
            needed = self._needed(own, needs)
            if not needed or call in self._shadow.once:
                continue
            made = [n for op in own for n in op.writes]
            if all(needed <= there for n in made for there in asked.get(n, ())):
                needs.update(dict.fromkeys(made, needed))
            else:
                self._shadow.once[call] = FREED

    def _needed(self, ops: Sequence[RecordedOp], needs: dict[int, frozenset[Unit]]) -> frozenset[Unit]:
        reads = [n for op in ops for n in op.reads]
        own = frozenset(self._unit_of[n] for n in reads if n in self._unit_of)
        return own.union(*(needs.get(n, frozenset()) for n in reads))

    def _asked(self) -> dict[int, list[frozenset[Unit]]]:
        """List, by value, the units gathered at each request for it."""
        found: dict[int, list[frozenset[Unit]]] = {}
        there = frozenset(unit for unit in self._parallel.units if not unit.frees)
        marks = iter([*self._marks, (len(self._shadow.recorder.ops), frozenset[Unit](), True)])
        at, units, gathers = next(marks)
        for i, op in enumerate(self._shadow.recorder.ops):
            while at <= i:
                there = there | units if gathers else there - units
                at, units, gathers = next(marks)
            if op.is_ask:
                found.setdefault(op.reads[0], []).append(there)
        return found


def _is_fake(unit: Unit) -> bool:
    """Tell whether the step is one on fake tensors."""
    return any(isinstance(module._parameters[name], FakeTensor) for module, name, _ in unit.parameters())


def _settle(tape: Tape, calls: range, output: Any, *, is_gathered: bool) -> None:
    """Prepare for a unit's parameters being freed after its forward.

    Only the unit's own backward may need them afterwards. What somebody holds by now may be read outside the unit: it
    is kept. Where that is more than what the forward returns, what has been computed from it may be asked for outside
    the unit's backward: then all of it is kept.
    """
    ledger, keeping, needs = tape.ledger, tape.keeping, tape.passes.needs
    made = {v for k in calls if k in ledger.entries for v in ledger.entries[k].makes}
    held = dict(_held_by_others(tape, made))
    returned = {s._cdata for t in tensors_in(output) if (s := storage_of(local_of(t))) is not None}
    if not is_gathered or any(s._cdata not in returned for s in held.values()):
        gone = [v for v in made if v not in ledger.held and v in ledger.maker and keeping.is_waited_for(v)]
        ledger.recompute(gone, lambda v: False, lambda locked: None)
        ledger.recomputed.difference_update(gone)
        for value in made.intersection(ledger.held):
            ledger.maker.pop(value, None)
    for value in held:
        if value not in ledger.held and (keeping.is_read(value) or value in needs.handles):
            ledger.hold(value, _whole(held[value]))
        ledger.maker.pop(value, None)


def _held_by_others(tape: Tape, values: set[int]) -> Iterator[tuple[int, torch.UntypedStorage]]:
    """Yield values whose memory others hold too, with the memory."""
    for storage in tape.numbers.living():
        value = tape.numbers.known(storage)
        if value in values:
            ours = 1 + (value in tape.ledger.held)
            if torch._C._storage_Use_Count(storage._cdata) > ours:
                yield value, storage


def _whole(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _tensors(tree: Any) -> list[Tensor]:
    """List the tensors in arguments or results, inside dataclasses too."""
    found: list[Tensor] = []
    for leaf in torch.utils._pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += _tensors([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
    return found
