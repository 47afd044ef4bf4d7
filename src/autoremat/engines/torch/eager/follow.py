"""Follows a plan by position: call k is the path's call k.

In the same way saved tensor j is the j-th saved tensor of the recording. Calls that the plan has nothing to do with are
made as they are: neither their arguments nor what autograd saves of them is looked at. Calls that will be rerun keep
their arguments; there the values are compared, so that a call or a saved tensor that differs is noticed before anything
wrong can be handed out.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoremat.engines.torch.eager.arguments import tensors_given, tensors_in
from autoremat.engines.torch.eager.calls import is_out_of_sight, looks, name_of
from autoremat.engines.torch.eager.composite import Composite
from autoremat.engines.torch.eager.draws import Draws
from autoremat.engines.torch.eager.entry import Entry, prepared
from autoremat.engines.torch.eager.facts import is_overridden
from autoremat.engines.torch.eager.handle import Handle, Kept
from autoremat.engines.torch.eager.path import Call, n_elements
from autoremat.engines.torch.eager.script import Script, Work
from autoremat.engines.torch.eager.spare import Spare
from autoremat.engines.torch.eager.state import DRAWING, State
from autoremat.engines.torch.operators.local import PLAIN, local_of
from autoremat.engines.torch.operators.values import storage_of

if TYPE_CHECKING:
    from autoremat.engines.torch.eager.tape import Tape
    from autoremat.engines.torch.eager.values import Numbers

_unseen, _n_modes = torch._C.DisableTorchFunction, torch._C._len_torch_function_stack
_NOTHING = contextlib.nullcontext()
_END: Any = object()
"""Comes after the last call, and equals no function."""


class Follow:
    """The policy while the forward goes as recorded.

    Args:
        tape: whose forward it is.
        script: to follow.
        spare: what is prepared beyond that, should the path be left; None where it is not expected to be.
    """

    is_following = True

    def __init__(self, tape: Tape, script: Script, spare: Spare | None = None) -> None:
        self._tape, self._script, self.spare = tape, script, spare
        works = script.works if spare is None else script.spare_works
        self._funcs, self._works, self._packs = (*script.funcs, _END), works, script.packs
        self._draws: Draws | None = None
        """Of the running random call, where other threads may draw too."""
        self._numels, self._n_funcs = script.numels, len(script.funcs)
        is_cursory = spare is None and not tape.check.is_looking
        self._composites = script.composites if is_cursory else {}

    def looked(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hear a call, but first look at its arguments (self-check)."""
        if not is_out_of_sight():
            self._tape.look_at(tensors_given(args, kwargs))
        return self.heard(func, args, kwargs)

    def heard(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the next call of the path, or leave the path."""
        tape = self._tape
        k = tape.n_calls
        expected = self._funcs[k]
        if (func is expected or func == expected) and not is_out_of_sight():
            work = self._works[k]
            if work is None:
                tape.n_calls = k + 1
                out = func(*args, **kwargs)
            else:
                out = self._at_work(k, work, func, args, kwargs)
            numel = out.numel() if type(out) is Tensor else n_elements(out)
            if numel > self._numels[k] and tape.policy is self:
                self._outgrown(k, numel)
            return out
        return self._other(func, args, kwargs)

    def _other(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make another call than the path's next, or leave the path."""
        if looks(func) or is_out_of_sight():
            return func(*args, **kwargs)
        k = self._tape.n_calls
        if self._tape.listener.is_made_of_others(func):
            composite = self._composites.get(k)
            if composite is not None and composite.is_met_by(func, args, kwargs):
                return self._composite(composite, args, kwargs)
            return self._tape.listener.look_into(func, args, kwargs)
        wanted = "nothing more" if k >= self._n_funcs else name_of(self._funcs[k])
        return self._left(f"call {k} is {name_of(func)}, the recorded forward had {wanted}", func, args, kwargs)

    def _composite(self, composite: Composite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a function's calls, none of which needs to be heard."""
        self._tape.n_calls = composite.end
        with DRAWING if composite.random else _NOTHING:
            out = composite.func(*args, **kwargs)
        if n_elements(out) > composite.numel:
            self._outgrown(composite.end - 1, n_elements(out))
        return out

    def _outgrown(self, k: int, numel: int) -> None:
        """Leave the path: a result is larger than the plan allows."""
        recorded = self._numels[k]
        where = self._script.where[k]
        self._tape.leave_path(
            f"{where or f'call {k}'} gives {numel:,} elements, {recorded:,} in the recorded forward", numel / recorded
        )

    def _left(self, reason: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._tape.leave_path(reason)
        return self._tape.policy.heard(func, args, kwargs)

    def _at_work(self, k: int, work: Work, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tape, call = self._tape, work.call
        tape.ledger.away.carry_out(tape.ledger, work.moves)
        if work.draws_only:
            tape.n_calls = k + 1
            with DRAWING:
                return func(*args, **kwargs)
        given: list[Tensor] = []
        is_ready, is_right = work.ready, True
        outside = call.overwrites_outside if call.effects else ()
        if is_ready or work.spare or call.written or outside or self._script.loose:
            with _unseen():
                given = tensors_given(args, kwargs)
                is_right = max(outside, default=-1) < len(given) and self._is_as_recorded(work, given)
                is_ready = is_ready or (work.spare and _reads_as_recorded(tape.numbers, call, given))
        if not is_right:
            return self._left(f"call {k} ({name_of(func)}) is given other tensors than recorded", func, args, kwargs)
        if call.effects or call.leaves:
            tape.has_effects = True  # before it runs: it may run out of memory half-way
        for i in outside:
            tape.keeping.overwrites_outside(tape.numbers.of(given[i]))
        tape.n_calls = k + 1
        with DRAWING if call.random else _NOTHING:
            entry = None
            if is_ready:
                with _unseen():
                    entry = prepared(
                        func, args, kwargs, work.values, work.written, call.statistics, State.now(), random=call.random
                    )  # fmt: skip
                    if work.ready:
                        tape.check.before(k, given, call.reads, work.written)
                    self._draws = entry.draws
            if not work.hooked:
                out = func(*args, **kwargs)
            else:
                tape.n_packs = call.packs[0]
                out = tape.hooked(func, args, kwargs)
                if tape.n_packs != call.packs[1]:
                    tape.leave_path(f"call {k} ({name_of(func)}) saves other tensors than recorded")
        with _unseen():
            self._take(k, work, func, given, entry, out)
        return out

    def _is_as_recorded(self, work: Work, given: Sequence[Tensor]) -> bool:
        known, call = self._tape.numbers.known_tensor, work.call
        if self._script.loose and self._tape.n_packs != call.packs[0]:
            return False
        if work.ready and not _reads_as_recorded(self._tape.numbers, call, given):
            return False
        for position, old, _ in call.written:
            if position >= len(given):
                return False
            number = known(given[position])
            if number is not None and number != old:
                return False
        return True

    def _take(self, k: int, work: Work, func: Any, given: Sequence[Tensor], entry: Entry | None, out: Any) -> None:
        """Number what a call made and overwrote; hold what is needed."""
        tape, call = self._tape, work.call
        numbers, ledger = tape.numbers, tape.ledger
        made = tensors_in(out)
        if entry is not None:
            entry.take(call.results, call.saved, call.written)
            if entry.draws is not None:
                entry.draws.end(call.results, made, call.written, given)
                self._draws = None
            entry.stops = work.stops
            ledger.enter(k, entry)
            if tape.policy is not self:  # the call has left the path
                tape.keeping.enter(k)
            elif self.spare is not None and not work.ready:
                self.spare.entered(k)
        for position, old, new in call.written:
            numbers.rebind_tensor(given[position], new)
            tape.overwritten(old, new, given[position])
        for i, value in call.results:
            if i >= len(made) or not numbers.agrees(made[i], value):
                tape.leave_path(f"call {k} ({name_of(func)}) gives other tensors than recorded")
                break
            if value in work.hold:
                ledger.hold(value, local_of(made[i]).detach())
        for position, _, new in call.written:
            if new in work.hold and new not in ledger.held:
                ledger.hold(new, local_of(given[position]).detach())
        if work.ready and entry is not None and not call.uninitialised and tape.check.differs(k, entry, made):
            self._pin(entry, made, given, call)

    def _pin(self, entry: Entry, made: Sequence[Tensor], given: Sequence[Tensor], call: Call) -> None:
        """Keep what a call made: a rerun would make something else."""
        tape = self._tape
        for i, value in entry.results:
            tape.ledger.hold(value, local_of(made[i]).detach())
        for i, _, new in call.written:
            tape.ledger.hold(new, local_of(given[i]).detach())
        tape.backward.pinned.update(entry.makes)

    # ---- saved tensors -------------------------------------------------------------------------------------------

    def pack(self, j: int, tensor: Tensor) -> Any:
        """Return the tensor itself, or a handle where its memory may go."""
        tape, value = self._tape, self._packs[j] if j < len(self._packs) else None
        if value is None:
            kept = Kept(tensor, tape.backward, j) if j in self._script.asked else Kept(tensor)
            if self.spare is not None:
                self._note_kept(self.spare, j, tensor, kept)
            if j in self._script.hold_at:
                self._hold_saved(j, tensor)
            if j == self._script.last:
                tape.last = weakref.ref(kept)
            return kept
        number = tape.numbers.known_tensor(tensor)
        is_new = number != value and self._is_saved_inside(j, value, number)
        if is_new:
            if self._draws is not None:
                self._note_draws(self._draws, j, value, tensor)
            tape.numbers.rebind_tensor(tensor, value)
            number = value
        if number != value:
            tape.leave_path(f"saved tensor {j} is another one than recorded")
            return tape.policy.pack(j, tensor)
        handle = Handle(tape.backward, j, tensor)
        handle.value = value
        tape.passes.made(handle)
        if is_new and value in self._script.hold:  # saved once more, the plan may have let go of it
            tape.ledger.hold(value, local_of(tensor).detach())
        return handle

    def _note_kept(self, spare: Spare, j: int, tensor: Tensor, kept: Kept) -> None:
        """Note which value autograd saved, although the plan keeps it."""
        value = self._script.packed[j] if j < len(self._script.packed) else None
        if value is None:
            return
        storage, numbers = storage_of(local_of(tensor)), self._tape.numbers
        number = None if storage is None else numbers.known(storage)
        if number != value:
            if storage is None or not self._is_saved_inside(j, value, number):
                return
            if self._draws is not None:
                self._note_draws(self._draws, j, value, tensor)
            numbers.rebind(storage, value)
        spare.saved(j, value, kept)

    def _note_draws(self, draws: Draws, j: int, value: int, tensor: Tensor) -> None:
        """Note what will tell that a rerun up to here drew alike."""
        work = self._works[self._tape.n_calls - 1]
        if work is not None and value in work.stops:
            draws.at(j - work.call.packs[0])
            draws.note(value, tensor)

    def _hold_saved(self, j: int, tensor: Tensor) -> None:
        """Hold a value that is made and saved inside a call."""
        value = self._script.hold_at[j]
        self._tape.numbers.rebind_tensor(tensor, value)
        self._tape.ledger.hold(value, local_of(tensor).detach())

    def _is_saved_inside(self, j: int, value: int, number: int | None) -> bool:
        """Tell whether the running call makes this value and saves it here."""
        k = self._tape.n_calls - 1
        work = self._works[k] if 0 <= k < self._n_funcs else None
        if work is None or not (work.ready or work.spare or value in self._script.away):
            return False
        if number is not None:
            return any((old, new) == (number, value) for _, old, new in work.call.written)
        return (j - work.call.packs[0], value) in work.call.saved or any(v == value for _, v in work.call.results)

    def has_changed(self, value: int, tensor: Tensor) -> None:
        """Hold a value that was changed behind torch's back."""
        self._tape.ledger.hold(value, local_of(tensor).detach())

    def end(self) -> None:
        """Let go of the tape: no more calls will come."""
        del self._tape

    def finish(self) -> None:
        """Compare the end of the forward with the end of the path."""
        tape = self._tape
        if tape.n_calls < self._n_funcs:
            tape.leave_path(f"the forward ended after {tape.n_calls} of {self._n_funcs} calls")
        elif self._script.loose and tape.n_packs != len(self._packs):
            tape.leave_path(f"autograd saved {tape.n_packs} tensors, {len(self._packs)} in the recorded forward")
        elif self.spare is not None:
            self.spare.forget()


def _reads_as_recorded(numbers: Numbers, call: Call, given: Sequence[Tensor]) -> bool:
    """Tell whether a call can be rerun and is given recorded values."""
    if not PLAIN.issuperset(map(type, given)) and any(map(is_overridden, given)):
        return False
    if _n_modes() and State.now().has_modes_of_others:
        return False
    known, n = numbers.known_tensor, len(given)
    for position, value in call.reads:  # noqa: SIM110 - a generator is slower
        if position >= n or known(given[position]) != value:
            return False
    return True
