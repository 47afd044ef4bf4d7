"""The tape: one forward, whose events it hands on.

While the forward runs, a function mode hears every call, and saved-tensor hooks turn what autograd wants to save into
handles. Policy, ledger and passes deal with these events. Afterwards the handles hold what the backward needs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from autoremat.engines.torch.eager.backward import Backward
from autoremat.engines.torch.eager.check import NoCheck
from autoremat.engines.torch.eager.composite import Composite
from autoremat.engines.torch.eager.follow import Follow
from autoremat.engines.torch.eager.handle import Kept
from autoremat.engines.torch.eager.keeping import Keeping
from autoremat.engines.torch.eager.ledger import Ledger
from autoremat.engines.torch.eager.listener import Listener
from autoremat.engines.torch.eager.noting import Noting
from autoremat.engines.torch.eager.passes import Passes
from autoremat.engines.torch.eager.path import Call
from autoremat.engines.torch.eager.room import OfFirstStep, OfScript, Room
from autoremat.engines.torch.eager.script import Script
from autoremat.engines.torch.eager.sections import Sections
from autoremat.engines.torch.eager.shadow import Shadow
from autoremat.engines.torch.eager.spare import Spare
from autoremat.engines.torch.eager.values import Numbers
from autoremat.engines.torch.eager.witness import Witness
from autoremat.engines.torch.recording.frames import user_line

_push_hooks = torch._C._autograd._push_saved_tensors_default_hooks
_pop_hooks = torch._C._autograd._pop_saved_tensors_default_hooks
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_pop_function_mode = torch._C._pop_torch_function_stack
_hooks_disabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message


@dataclass
class Reports:
    """What the tape tells others.

    It tells of a deviation, of a rerun, of memory refused for good, and of a recording that failed.
    """

    deviated: Callable[[str, float], None] = lambda reason, growth: None
    rerun: Callable[[float], None] = lambda seconds: None
    out_of_memory: Callable[[BaseException], BaseException] = lambda error: error
    unlike: Callable[[BaseException], None] = lambda error: None


@dataclass(frozen=True)
class First:
    """What a step without a plan has instead.

    It is a first step, or one that is not recorded.

    Attributes:
        allowance: what the budget leaves for what it makes.
        shadow: where every call is repeated on fake tensors; None where nobody records.
        storages: the memory that is there before the step.
        is_kept: whether the user wants what an operator of this module and name makes kept.
    """

    allowance: OfFirstStep | OfScript
    shadow: Shadow | None = None
    storages: Collection[torch.UntypedStorage] = ()
    is_kept: Callable[[str, str], bool] = lambda module, name: False


class Forward:
    """The block in which a tape hears a forward.

    No generator: one that Ctrl-C ends half-way would go on later, when it is collected.
    """

    __slots__ = ("_tape",)

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def __enter__(self) -> None:
        tape = self._tape
        if tape.throughout:
            _push_hooks(tape.packed, tape.backward.unpack)
        tape.listener.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        tape = self._tape
        try:
            if tape.listener in _get_current_function_mode_stack()[-1:]:  # else Ctrl-C came while torch had it off
                tape.listener.__exit__(None, None, None)
            if tape.throughout:
                _pop_hooks()
            if kind is None:
                tape.finish()
        finally:
            tape.policy.end()


def unheard(n_modes: int) -> None:
    """Take away listeners and hooks that Ctrl-C has left behind.

    Args:
        n_modes: function modes that were active before.
    """
    while torch._C._len_torch_function_stack() > n_modes:
        _pop_function_mode()
    while (hooks := _top_hooks(True)) is not None and isinstance(getattr(hooks[0], "__self__", None), Tape):
        _pop_hooks()


class Tape:
    """One forward under a plan, or noted for one.

    Args:
        script: to follow; in a first step, what that has instead.
        reports: whom to tell.
        check: compares reruns with first runs.
        others_bytes: what the graphs of earlier calls hold.
        wary: the path may be left; prepare for that.
    """

    def __init__(
        self, script: Script | First, reports: Reports | None = None, check: NoCheck | None = None,
        others_bytes: int = 0, *, wary: bool = False,
    ) -> None:  # fmt: skip
        self._others_bytes, self.reports, self.check = others_bytes, reports or Reports(), check or NoCheck()
        self.ledger = Ledger(self.reports.rerun, self.check.remade if self.check.is_looking else None)
        self.passes = Passes(self.ledger)
        self.has_effects = False
        self.n_calls = self.n_packs = 0
        self.allowance: OfFirstStep | None = None
        self.last: weakref.ref[Kept] | None = None
        """Stands for the tensor that is asked for last, if kept."""
        self.compiled = ""
        """Where the forward met compiled code."""
        first = script if isinstance(script, First) else None
        self.script = None if isinstance(script, First) else script
        self.witness = Witness() if first is None else Witness(first.shadow, self.reports.unlike)
        self.numbers = Numbers(self.witness)
        self.sections = None if first is None or first.shadow is None else Sections(first.shadow)
        storages = () if first is None else first.storages
        self.keeping = Keeping(self.ledger, self.passes, self.witness, storages)
        self.backward = Backward(
            self.ledger, self.passes, self.numbers.rebind_tensor, self.reports.out_of_memory, self.script
        )
        self.policy: Follow | Noting
        if self.script is None:
            assert first is not None
            self.allowance = first.allowance if isinstance(first.allowance, OfFirstStep) else None
            self.backward.room = Room(first.allowance, self.ledger, self.passes, self.keeping.may_go)
            self.policy = Noting(self, None if self.allowance is None else [], first.is_kept)
        else:
            spare = Spare(self.ledger, self.numbers, self.passes, self.backward) if wary else None
            self.policy, self.ledger.where = Follow(self, self.script, spare), self.script.where
        self.throughout = self.script is None or self.script.loose
        """What autograd saves outside of all calls matters, too."""
        self.listener = Listener(self._heard())

    # ---- the forward ---------------------------------------------------------------------------------------------

    def forward(self) -> Forward:
        """Return the block in which the forward runs."""
        return Forward(self)

    def finish(self) -> None:
        """Finish a forward that came to its end."""
        self.policy.finish()
        if self.check.is_looking:
            with torch._C.DisableTorchFunction():
                self._look_at_all()
        self.backward.finish_forward()

    def hooked(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call with our saved-tensor hooks, unless others are active."""
        if self.throughout or _top_hooks(True) is not None or _hooks_disabled():
            return func(*args, **kwargs)
        try:
            _push_hooks(self.packed, self.backward.unpack)  # within: Ctrl-C may come right after it
            return func(*args, **kwargs)
        finally:
            _pop_hooks()

    def _heard(self) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
        """Return the method that hears the calls."""
        if isinstance(self.policy, Follow) and self.check.is_looking:
            return self.policy.looked
        return self.policy.heard

    def packed(self, tensor: Tensor) -> Any:
        """Return what autograd saves in place of a tensor."""
        j = self.n_packs
        self.n_packs = j + 1
        with torch._C.DisableTorchFunction():
            return self.policy.pack(j, tensor)

    def leave_path(self, reason: str, growth: float = 1.0) -> None:
        """Leave the plan: note every call, within the budget's room.

        ``growth``: the factor by which results are larger than recorded.
        """
        if isinstance(self.policy, Noting):
            return
        self.note_all(growth)
        assert isinstance(self.policy, Noting)
        self.policy.differs_at = self.n_calls
        self.reports.deviated(reason, growth)

    def note_all(self, growth: float = 1.0) -> None:
        """Note every call from here on; recompute on demand."""
        assert self.script is not None
        self.ledger.away.come_back(self.ledger)
        spare = self.policy.spare if isinstance(self.policy, Follow) else None
        if spare is not None and not spare.is_worth(self.script.budget_bytes or 0):
            spare.forget()
            spare = None
        if spare is not None:
            spare.left()
        allowance = OfScript(self.script, self.n_calls, growth, self._others_bytes)
        n_calls = self.n_calls - len(self.ledger.entries)
        room = Room(allowance, self.ledger, self.passes, self.keeping.may_go, n_calls, spare)
        for call in self.ledger.entries:
            room.online.noted(call, *self.script.costs[call])
        self.backward.room = room
        self.policy = Noting(self)
        for call in self.ledger.entries:
            self.keeping.enter(call)
        self.listener.heard = self._heard()
        self.backward.improvise()

    def take_plan(self, script: Script, living: Iterable[Tensor] = ()) -> None:
        """Go on by a plan that was made of this very forward.

        ``living``: tensors that somebody else holds.
        """
        self.script, self.ledger.where = script, script.where
        with torch._C.DisableTorchFunction():
            there = {n: t for t in living if (n := self.numbers.known_tensor(t)) is not None and n >= 0}
            self.backward.take_plan(script, self.keeping.may_go, there)
        sections, self.sections, self.backward.watch = self.sections, None, None
        if sections is not None and sections.open():
            self.sections = self.backward.watch = sections

    # ---- what happens to values ------------------------------------------------------------------------------------

    def has_saved(self, value: int, nbytes: int) -> None:
        """Note that autograd has saved a value for the first time."""
        if self.allowance is not None:
            self.allowance.saved(value, nbytes)

    def overwritten(self, old: int, new: int, tensor: Tensor) -> None:
        """Note that the memory of a value holds another one now."""
        self.keeping.overwritten(old, new, tensor)
        self.check.forget(old)

    def look_at(self, tensors: Sequence[Tensor]) -> None:
        """Keep values as they are if changed behind torch's back."""
        for tensor in tensors:
            value = self.numbers.known_tensor(tensor)
            if value is not None and value >= 0 and self.check.has_changed(value, tensor):
                self.backward.pinned.add(value)
                self.policy.has_changed(value, tensor)

    def _look_at_all(self) -> None:
        """Look at every value that is still in memory."""
        for storage in self.numbers.living():
            value = self.numbers.known(storage)
            if value is not None and value >= 0:
                self.look_at([torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)])

    def met_compiled_code(self) -> None:
        """Note that compiled code makes the call that comes next."""
        self.compiled = self.compiled or user_line() or "a function"

    # ---- afterwards ------------------------------------------------------------------------------------------------

    def life(self) -> Callable[[], bool]:
        """Return what tells whether this graph still awaits its backward."""
        last, passes = self.last, weakref.ref(self.passes)

        def is_alive() -> bool:
            if last is not None and last() is not None:
                return True
            there = passes()
            return there is not None and not there.are_all_gone and not there.is_spent

        return is_alive

    @property
    def way(self) -> tuple[int, int] | None:
        """First call off the path and number of calls, or None."""
        if isinstance(self.policy, Noting) and self.script is not None:
            at = self.policy.differs_at
            at = self.n_calls if at is None and self.n_calls != len(self.script.funcs) else at
            return None if at is None else (at, self.n_calls)
        return None

    @property
    def held_bytes(self) -> tuple[int, int]:
        """What this graph holds, and would hold in plain training."""
        if self.backward.room is not None:
            held = self.backward.room.online.meter.nbytes
            return held, held if self.allowance is None else self.allowance.plain_bytes
        return (0, 0) if self.script is None else self.script.held_bytes

    def has_made(self, tensor: Tensor) -> bool:
        """Tell whether this forward has made what the tensor looks at."""
        number = self.numbers.known_tensor(tensor)
        return number is not None and number >= 0

    @property
    def path(self) -> list[Call]:
        """The calls of a forward that was noted."""
        assert isinstance(self.policy, Noting)
        assert self.policy.path is not None
        return self.policy.path

    @property
    def composites(self) -> list[Composite]:
        """The functions that a noted forward was looked into at."""
        assert isinstance(self.policy, Noting)
        return self.policy.composites
