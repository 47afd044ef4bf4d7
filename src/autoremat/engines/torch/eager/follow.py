"""Following a plan by position: the k-th call is the k-th of the path, the j-th saved tensor the j-th of the recording.

Only calls that will be made again keep their arguments, and only there is it looked at which value is which: a call or
a saved tensor that differs is noticed before anything wrong can be handed out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from autoremat.engines.torch.eager.arguments import (
    Made,
    Outside,
    Seen,
    Statistics,
    template,
    tensors_given,
    tensors_in,
)
from autoremat.engines.torch.eager.entry import Entry, may_be_disturbed
from autoremat.engines.torch.eager.handle import Handle, Kept
from autoremat.engines.torch.eager.noting import LOOKS, _gives_tensor, _sets_data, template_of
from autoremat.engines.torch.eager.path import Call
from autoremat.engines.torch.eager.script import Script, Work
from autoremat.engines.torch.eager.state import DRAWING, State
from autoremat.record.local import local_of
from autoremat.record.values import is_parameter, storage_of
from autoremat.run.entry import _generator_of, checksum
from autoremat.run.settings import state_of

if TYPE_CHECKING:
    from autoremat.engines.torch.eager.tape import Tape


class Follow:
    """The plan, as long as the forward goes as recorded."""

    is_following = True

    def __init__(self, tape: Tape, script: Script) -> None:
        self._tape, self._script = tape, script
        self._funcs, self._works, self._packs = script.funcs, script.works, script.packs
        self._n_funcs, self._n_packs = len(script.funcs), len(script.packs)

    def looked(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As ``heard``, in a step that is checked: look at all that a call is given before it is made."""
        self._tape.look_at(tensors_given(args, kwargs))
        return self.heard(func, args, kwargs)

    def heard(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the next call of the path; leave it where this is another one."""
        tape = self._tape
        k = tape.n_calls
        if k < self._n_funcs:
            expected = self._funcs[k]
            if func is expected or func == expected:
                work = self._works[k]
                if work is None:
                    tape.n_calls = k + 1
                    return func(*args, **kwargs)
                return self._at_work(work, func, args, kwargs)
        return self._other(func, args, kwargs)

    def _other(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that is not the next one: a look, a function made of others, or the end of the path."""
        name = getattr(func, "__name__", "")
        if name in LOOKS or (name == "__get__" and not _gives_tensor(func)):
            return func(*args, **kwargs)
        if name == "__set__" and not _sets_data(func):
            return func(*args, **kwargs)
        if self._tape.listener.is_made_of_others(func):
            return self._tape.listener.look_into(func, args, kwargs)
        k = self._tape.n_calls
        wanted = "nothing more" if k >= self._n_funcs else _name(self._funcs[k])
        self._tape.leave_path(f"call {k} is {_name(func)}, the recorded forward had {wanted}")
        return self._tape.policy.heard(func, args, kwargs)

    def _at_work(self, work: Work, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tape, call = self._tape, work.call
        given = tensors_given(args, kwargs)
        if not self._is_as_recorded(call, given, work.ready):
            tape.leave_path(f"call {tape.n_calls} ({_name(func)}) is given other tensors than in the recorded forward")
            return tape.policy.heard(func, args, kwargs)
        if call.effects:
            tape.has_effects = True  # before it runs: it may run out of memory half-way
        k, first = tape.n_calls, tape.n_packs
        tape.n_calls = k + 1
        with DRAWING if call.random and work.ready else contextlib.nullcontext():
            entry = None
            if work.ready:
                entry = self._prepared(call, func, args, kwargs, given)
                tape.check.before(k, given, call.reads, {i for i, _, _ in call.written})
            out = func(*args, **kwargs)
        made = tensors_in(out)
        if entry is not None:
            self._enter(k, entry, work, made)
        for position, old, new in call.written:
            tape.values.rebind_tensor(given[position], new)
            tape.overwritten(old, new, given[position])
        for i, value in call.results:
            if i >= len(made):
                tape.leave_path(f"call {k} ({_name(func)}) gives fewer tensors than in the recorded forward")
                break
            if tape.values.known_tensor(made[i]) not in (None, value):
                tape.leave_path(f"call {k} ({_name(func)}) gives another tensor than in the recorded forward")
                break
            tape.values.rebind_tensor(made[i], value)
            if value in work.hold:
                tape.ledger.hold(value, local_of(made[i]).detach())
        for position, _, new in call.written:
            if new in work.hold and new not in tape.ledger.held:
                tape.ledger.hold(new, local_of(given[position]).detach())
        if tape.n_packs - first != call.packs[1] - call.packs[0]:
            tape.leave_path(f"call {k} ({_name(func)}) saves other tensors than in the recorded forward")
        if entry is not None and not call.uninitialised and tape.check.differs(k, entry, made):
            tape.pin(k, entry, made, given, call)
        return out

    def _is_as_recorded(self, call: Call, given: Sequence[Tensor], ready: bool) -> bool:
        known, tape = self._tape.values.known_tensor, self._tape
        if tape.n_packs != call.packs[0]:
            return False
        if ready:
            for position, value in call.reads:
                if position >= len(given) or known(given[position]) != value:
                    return False
        for position, old, _ in call.written:
            if position >= len(given):
                return False
            number = known(given[position])
            if number is not None and number != old:
                return False
        return True

    def _prepared(self, call: Call, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor]) -> Entry:
        state = State.now()
        values = dict(call.reads)
        written = {position for position, _, _ in call.written}
        positions, outside = iter(range(len(given))), list[Outside]()

        def described(tensor: Tensor) -> Any:
            i = next(positions)
            value = values.get(i)
            if value is not None:
                return Made(value, Seen.of(tensor), tensor.requires_grad, i in written)
            if i in call.statistics:
                return Statistics(tensor)
            outside.append(Outside(tensor))
            return outside[-1]

        generator = _generator_of(args, kwargs) if call.random else None
        return Entry(
            func, template(list(args), described), template_of(kwargs, described), state, generator,
            None if generator is None else state_of(generator), tuple(dict.fromkeys(values.values())),
            tuple(outside),
        )  # fmt: skip

    def _enter(self, k: int, entry: Entry, work: Work, made: Sequence[Tensor]) -> None:
        call = work.call
        entry.results, entry.saved, entry.stops = call.results, call.saved, work.stops
        entry.in_place = tuple((new, old) for _, old, new in call.written)
        if may_be_disturbed(entry.generator):
            entry.draws = checksum(made[i].untyped_storage() for i, _ in call.results if i < len(made))
        self._tape.ledger.enter(k, entry)

    # ---- saved tensors -------------------------------------------------------------------------------------------

    def pack(self, j: int, tensor: Tensor) -> Any:
        """The tensor itself, or a handle where its memory may go."""
        tape = self._tape
        value = self._packs[j] if j < self._n_packs else None
        if value is None:
            if is_parameter(tensor):
                return tensor
            if j in self._script.hold_at:
                self._hold_saved(j, tensor)
            return Kept(tensor, tape, j) if j in self._script.asked else Kept(tensor)
        storage = storage_of(local_of(tensor))
        number = None if storage is None else tape.values.known(storage)
        if storage is not None and number != value and self._is_saved_inside(j, value, number):
            tape.values.rebind(storage, value)
            number = value
        if number != value:
            tape.leave_path(f"saved tensor {j} is another one than in the recorded forward")
            return tape.policy.pack(j, tensor)
        handle = Handle(tape, j, tensor)
        handle.value = value
        tape.passes.made(handle)
        if value in self._script.hold and value not in tape.ledger.held:
            tape.ledger.hold(value, local_of(tensor).detach())
        return handle

    def _hold_saved(self, j: int, tensor: Tensor) -> None:
        """Hold a value that is made and saved inside a call."""
        value, storage = self._script.hold_at[j], storage_of(local_of(tensor))
        if storage is not None:
            self._tape.values.rebind(storage, value)
            self._tape.ledger.hold(value, local_of(tensor).detach())

    def _is_saved_inside(self, j: int, value: int, number: int | None) -> bool:
        """Whether the call that runs now makes this value, and saves it at this place; ``number`` is what it was."""
        k = self._tape.n_calls - 1
        work = self._works[k] if 0 <= k < self._n_funcs else None
        if work is None or not work.ready:
            return False
        if number is not None:
            return any((old, new) == (number, value) for _, old, new in work.call.written)
        return (j - work.call.packs[0], value) in work.call.saved or any(v == value for _, v in work.call.results)

    def finish(self) -> None:
        """The forward is over."""
        tape = self._tape
        if tape.n_calls < self._n_funcs:
            tape.leave_path(f"the forward ended after {tape.n_calls} of {self._n_funcs} calls")
        elif tape.n_packs != self._n_packs:
            tape.leave_path(f"autograd saved {tape.n_packs} tensors, {self._n_packs} in the recorded forward")


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))
