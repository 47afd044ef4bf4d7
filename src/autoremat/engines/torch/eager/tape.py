"""The tape: one forward and its backward. It hands events on; policy, ledger and passes deal with them.

While the forward runs, a function mode hears every call, and saved-tensor hooks turn what autograd wants to save into
handles. Afterwards the handles hold the tape. When the backward asks a handle for a value that is gone, calls are made
again: none of the user's code, the same random numbers, the same state, in-place calls on copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

import torch
from torch import Tensor

from autoremat.engines.torch.eager.check import NoCheck
from autoremat.engines.torch.eager.entry import Entry
from autoremat.engines.torch.eager.follow import Follow
from autoremat.engines.torch.eager.handle import Handle, Kept
from autoremat.engines.torch.eager.ledger import Ledger
from autoremat.engines.torch.eager.listener import Listener
from autoremat.engines.torch.eager.noting import Noting
from autoremat.engines.torch.eager.online import Online
from autoremat.engines.torch.eager.passes import Passes, in_backward, in_python_node
from autoremat.engines.torch.eager.path import Call
from autoremat.engines.torch.eager.script import Script
from autoremat.engines.torch.eager.shadow import Shadow
from autoremat.engines.torch.eager.state import Replay
from autoremat.engines.torch.eager.values import Values
from autoremat.record.local import local_of
from autoremat.record.values import View, is_parameter, storage_of
from autoremat.run.memory import free_memory, is_out_of_memory

_SLACK: Final = 0.05
"""How far apart the backward of the plan and one off its path may be, as a share of all requests ..."""
_MORE: Final = 8
"""... and so many requests more."""


@dataclass
class Reports:
    """What the tape tells others: a deviation, a call made again, memory refused for good, a recording that failed."""

    deviated: Callable[[str], None] = lambda reason: None
    rerun: Callable[[float], None] = lambda seconds: None
    out_of_memory: Callable[[BaseException], BaseException] = lambda error: error
    unlike: Callable[[BaseException], None] = lambda error: None


class Tape:
    """One forward under a plan, or noted for one, and its backward.

    Args:
        script: what to follow; None in a first step.
        room: without a script, what the values held may take, given what plain training would hold.
        shadow: where every call is made once more, on fake tensors.
        outside: storages of parameters, buffers and inputs, by address.
        reports: whom to tell.
        check: compares what runs again with what ran first.
    """

    def __init__(
        self, script: Script | None = None, *, room: Callable[[int], float] | None = None, shadow: Shadow | None = None,
        outside: Collection[int] = (), reports: Reports | None = None, check: Any = None,
    ) -> None:  # fmt: skip
        self.reports = reports or Reports()
        self.ledger = Ledger(self.reports.rerun, lambda k, entry, made: self.check.remade(k, entry, made))
        self.passes, self.online, self.values = Passes(self.ledger), Online(self.ledger), Values()
        self.check = check or NoCheck()
        self.listener = Listener(self._looked if self.check.is_looking else self._heard)
        self.script, self.shadow = script, shadow
        self.escaped: set[int] = set()
        self.uninitialised: set[int] = set()
        """Values that are whatever the memory held before: made again they would be something else."""
        self.pinned: set[int] = set()
        """Values that the plan would drop and that turned out to be kept."""
        self.path: list[Call] | None = None
        self.has_effects = False
        self.n_calls = self.n_packs = 0
        self._room, self._outside = room, outside
        self._largest_bytes = 0
        self._plain_bytes = 0
        self._plainly: set[int] = set()
        self._is_forward = True
        self._cursor = 0
        self._late: set[int] = set()
        if script is None:
            self.path = []
            self.policy: Follow | Noting = Noting(self, self.path)
        else:
            self.policy = Follow(self, script)
        self._acts = script.acts if script is not None else ()
        self.is_planned = script is not None
        """Whether the backward goes by the plan."""

    # ---- forward -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """The block in which the forward runs."""
        hooks = torch.autograd.graph.saved_tensors_hooks(self._packed, self.unpack)
        with self.listener, hooks:
            yield
        self.policy.finish()
        if self.check.is_looking:
            with torch._C.DisableTorchFunction():
                self._look_at_all()
        self.ledger.finish_forward()
        self._is_forward = False
        if not self.is_planned:
            self.passes.needs.count()

    def _heard(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.policy.heard(func, args, kwargs)

    def _looked(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(self.policy, Follow):
            return self.policy.looked(func, args, kwargs)
        return self.policy.heard(func, args, kwargs)

    def _packed(self, tensor: Tensor) -> Any:
        j = self.n_packs
        self.n_packs = j + 1
        with torch._C.DisableTorchFunction():
            return self.policy.pack(j, tensor)

    def leave_path(self, reason: str) -> None:
        """Go on without the plan: from now on note every call, and hold what the budget has room for."""
        if self.is_planned or isinstance(self.policy, Follow):
            self.policy, self.is_planned = Noting(self, None), False
            self.reports.deviated(reason)

    def take_plan(self, script: Script) -> None:
        """Go on by a plan that was made of this very forward: let go of what it does not keep."""
        self.script, self._acts, self.is_planned = script, script.acts, True
        kept = script.kept | script.hold
        for value in list(self.ledger.held):
            if value not in kept and value in self.ledger.maker and value not in self.uninitialised:
                self.ledger.let_go(value)

    # ---- values --------------------------------------------------------------------------------------------------

    def number(self, tensor: Tensor) -> int | None:
        """The number of the value that a tensor looks at; negative for one from outside; None if it cannot be seen."""
        storage = None if torch.nn.parameter.is_lazy(tensor) else storage_of(local_of(tensor))
        if storage is None:
            return None
        number = self.values.known(storage)
        if self.shadow is not None:
            try:
                shadowed = self.shadow.number(tensor)
                if number is None:
                    self.values.rebind(storage, shadowed)
                    return shadowed
                if shadowed != number:
                    raise RuntimeError("the memory of a tensor was exchanged out of sight")
            except Exception as error:  # noqa: BLE001 - whatever a fake tensor cannot do
                self._give_up(error)
        return self.values.number(storage) if number is None else number

    def number_new(self, tensor: Tensor, pack: int | None = None) -> int | None:
        """The number of a value that a call has just made; None if it was there before, or cannot be seen.

        ``pack``: it was saved inside the call, as the pack of this number.
        """
        storage = storage_of(local_of(tensor))
        if storage is None or self.values.known(storage) is not None:
            return None
        if self.shadow is None:
            return self.values.bind_made(storage)
        number = self.shadow.number(tensor) if pack is None else self.shadow.saved.get(pack)
        if number is None:
            number = self.values.bind_outside(storage)
        self.values.rebind(storage, number)
        return number if number >= 0 else None  # a constant, such as torch.tensor makes

    def hold_saved(self, value: int, tensor: Tensor) -> None:
        """Hold a value that autograd saves."""
        if value not in self.ledger.held:
            local = local_of(tensor)
            self.ledger.hold(value, local.detach())
            if value not in self._plainly:
                self._plainly.add(value)
                self._plain_bytes += local.untyped_storage().nbytes()

    def renumber(self, tensor: Tensor, old: int) -> int:
        """The number of the value that a memory holds after a call has overwritten it."""
        storage = storage_of(local_of(tensor))
        assert storage is not None
        if self.shadow is None:
            return self.values.bind_made(storage)
        number = self.shadow.number(tensor)
        self.values.rebind(storage, number)
        return number if number >= 0 else old  # what it is now is from outside, as far as can be seen

    def is_outside(self, tensor: Tensor) -> bool:
        """Whether another run may take a tensor from outside as it is: it lives longer than the step, or is small."""
        if is_parameter(tensor) or tensor.is_leaf:
            return True
        storage = storage_of(local_of(tensor))
        return storage is not None and storage._cdata in self._outside

    def overwritten(self, old: int, new: int, tensor: Tensor) -> None:
        """The memory of a value holds another one now."""
        held = self.ledger.held.get(old)
        if held is not None and _same_memory(held, tensor):
            self.ledger.let_go(old)
        self.passes.move(old, new)
        self.check.forget(old)
        if new in self.passes.needs.handles and new not in self.ledger.held:
            self.ledger.hold(new, local_of(tensor).detach())

    def rescue(self, value: int) -> None:
        """Copy a value that calls made again may read, because it is about to be overwritten."""
        if self._is_read(value):
            held = self.ledger.held[value]
            with torch.no_grad():
                self.ledger.hold(value, View.of(held).on(held.untyped_storage().clone()))

    def look_at(self, tensors: Sequence[Tensor]) -> None:
        """Keep, as it is now, what something that torch does not see has changed: nothing can make it again."""
        for tensor in tensors:
            value = self.values.known_tensor(tensor)
            if value is not None and value >= 0 and self.check.has_changed(value, tensor):
                self.pinned.add(value)
                self.ledger.hold(value, local_of(tensor).detach())

    def pin(self, k: int, entry: Entry, made: Sequence[Tensor], given: Sequence[Tensor], call: Call) -> None:
        """Keep what a call has made: made again, it would be something else."""
        for i, value in entry.results:
            self.pinned.add(value)
            self.ledger.hold(value, local_of(made[i]).detach())
        for i, _, new in call.written:
            self.pinned.add(new)
            self.ledger.hold(new, local_of(given[i]).detach())
        self.pinned.update(v for _, v in entry.saved)

    def escape(self, values: Sequence[int]) -> None:
        """Something else than torch gets to know the memory of these values: they stay as they are."""
        self.escaped.update(values)
        for value in values:
            self.check.forget(value)
        entries = self.ledger.entries
        self.freeze([k for k, e in entries.items() if any(v in e.reads or v in e.makes for v in values)])
        if self.shadow is not None:
            self.shadow.recorder.changed_unseen.update(values)

    def freeze(self, calls: Sequence[int]) -> None:
        """These calls cannot be made again any more: what they have made stays, and is made now if it is gone."""
        for k in calls:
            for value in self.ledger.entries[k].makes:
                if value not in self.ledger.held and (value in self.passes.needs.handles or self._is_read(value)):
                    self.ledger.fetch(value, lambda v: False, lambda locked: None)
                    self.ledger.remade.discard(value)
        for k in calls:
            self.ledger.withdraw(k)
            self.once(k, "reads what the step overwrites, or what something else than torch may change")

    def _is_read(self, value: int) -> bool:
        return any(value in entry.reads for entry in self.ledger.entries.values())

    def shadowed(self, func: Any, args: Any, kwargs: Any, out: Any, packs: range) -> None:
        """Make the call on fake tensors, too."""
        if self.shadow is not None:
            try:
                self.shadow.make(func, args, kwargs, out, packs, self.n_calls - 1)
                self.shadow.packed_here.clear()
            except Exception as error:  # noqa: BLE001 - whatever a fake tensor cannot do
                self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        """There will be no recording of this step; it goes on."""
        self.shadow = None
        self.reports.unlike(error)

    def once(self, call: int, reason: str) -> None:
        """A call must not be made again."""
        if self.shadow is not None:
            self.shadow.once[call] = reason

    def saved(self, pack: int, tensor: Tensor, inside: bool) -> None:
        """Autograd saves a tensor, inside a call or, for a custom function, outside of all."""
        if self.shadow is None:
            return
        if inside:
            self.shadow.packed_here[pack] = tensor
        else:
            try:
                self.shadow.loose(pack, tensor)
            except Exception as error:  # noqa: BLE001 - whatever a fake tensor cannot do
                self._give_up(error)

    def _look_at_all(self) -> None:
        """Look at every value that is still in memory."""
        for storage in self.values.living():
            value = self.values.known(storage)
            if value is not None and value >= 0:
                self.look_at([torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)])

    # ---- room ----------------------------------------------------------------------------------------------------

    def make_room(self, nbytes: int) -> None:
        """A call is about to take so many bytes."""
        self._largest_bytes = max(self._largest_bytes, nbytes)
        self.shrink(needed=nbytes)

    def shrink(self, locked: Collection[int] = (), needed: int = 0) -> None:
        """Off the path: let go of what can be made again until what is held is within what is allowed."""
        if self.is_planned:
            return
        allowed = self._allowed()
        if allowed is not None:
            self.online.shrink(allowed - needed, {*locked, *self.uninitialised})

    def _allowed(self) -> float | None:
        """Bytes that may be held: what the budget leaves beside everything else."""
        script = self.script
        if script is None:
            return None if self._room is None else self._room(self._plain_bytes) - 2 * self._largest_bytes
        if script.budget_bytes is None:
            return None
        begin, end = 0, 1
        if not self._is_forward:  # as far into the backward as this one is, and a little around that
            progress = self.passes.n_served / max(1, self.passes.n_made)
            last = len(script.beside_bytes) - 1
            begin, end = int((progress - _SLACK) * last) - _MORE, 1 + ceil((progress + _SLACK) * last) + _MORE
        beside = max(script.beside_bytes[max(0, begin) : end])
        return script.budget_bytes - beside - 2 * self._largest_bytes

    # ---- backward ------------------------------------------------------------------------------------------------

    def unpack(self, packed: Any) -> Tensor:
        """The tensor that was saved, made again if it is gone."""
        if isinstance(packed, Tensor):
            return packed
        with torch._C.DisableTorchFunction():
            if isinstance(packed, Kept):
                if packed.tape is not None and in_backward():
                    packed.tape.asked(packed.pack)
                return packed.get()
            return self._unpacked_alone(packed)

    def _unpacked_alone(self, handle: Handle) -> Tensor:
        """What a handle stands for; several threads may go backward through one graph."""
        with self.passes.lock:
            try:
                handle.check_unchanged()
                if not in_backward():  # somebody looks at grad_fn._saved_...
                    return handle.seen.on(self._looked_up(self.passes.now(handle.value)))
                self._notice_pass()
                if handle.served == self.passes.number and handle.stays is not None:
                    return handle.stays
                value = self.passes.serve(handle)
                self.shrink()
                tensor = self._served(handle, value)
                handle.stays = tensor if in_python_node() else None
                if self._is_forward:  # a pass within the forward: what it does reads this value
                    self.values.rebind_tensor(tensor, value)
                return tensor
            finally:
                self._settle()

    def asked(self, pack: int) -> None:
        """A pass asks for something kept at which the plan does something."""
        with self.passes.lock:
            self._notice_pass()
            if self.is_planned and self._cursor < len(self._acts) and self._acts[self._cursor].pack == pack:
                self._act()

    def _notice_pass(self) -> None:
        if self.passes.begins():
            self._cursor = 0
            for value in list(self.ledger.remade):
                self.ledger.let_go(value)
        if self.passes.was_differentiated and self.is_planned:  # a node may now run twice in one pass
            self._improvise()

    def _served(self, handle: Handle, value: int) -> Tensor:
        try:
            return self._answer(handle, value)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self._improvise()  # the device has no room for what the plan does next: hold as little as possible, once more
        self.online.shrink(0.0)
        free_memory()
        try:
            return self._answer(handle, value)
        except (RuntimeError, MemoryError) as error:
            raise (self.reports.out_of_memory(error) if is_out_of_memory(error) else error) from None

    def _answer(self, handle: Handle, value: int) -> Tensor:
        if self.is_planned:
            if self._cursor < len(self._acts) and self._acts[self._cursor].pack == handle.pack:
                act = self._act()
                tensor = handle.seen.on(self._fetched(value))
                if act.drop:
                    self._drop(value)
                return tensor
            assert self.script is not None
            if handle.pack < len(self.script.packs) and self.script.packs[handle.pack] is None:
                return handle.seen.on(self._fetched(value))  # in a first step what is kept has a handle, too
            self._improvise()  # another order than the plan's: make on demand from here on
        tensor = handle.seen.on(self._fetched(value))
        self.online.used([value])
        return tensor

    def _act(self) -> Any:
        act = self._acts[self._cursor]
        self._cursor += 1
        if act.reruns:
            with Replay() as replay:
                for rerun in act.reruns:
                    if not self._can_run(rerun.call):
                        continue
                    install = {v for v in rerun.install if v not in self.ledger.held}
                    if install:
                        self.ledger.run(rerun.call, install, replay, rerun.drops - self._awaited(rerun.drops))
                    for value in rerun.drops:
                        self._drop(value)
        return act

    def _can_run(self, call: int) -> bool:
        """Whether the plan's rerun can be done: in a first step some of what it reads may not be there."""
        entry = self.ledger.entries.get(call)
        if entry is None:
            return False
        for value in entry.reads:
            if value not in self.ledger.held:
                self._fetched(value)
        return True

    def _awaited(self, values: Collection[int]) -> set[int]:
        return {v for v in values if self.passes.waiting.get(v, 0) > 0}

    def _drop(self, value: int) -> None:
        """Let go of a value, unless the graph is to be gone through once more and it is the forward's own."""
        if value in self.pinned or (value not in self.ledger.maker and self._is_source(value)):
            return
        if isinstance(self.policy, Noting) and value not in self.ledger.remade and value in self.passes.needs.handles:
            self._late.add(value)  # in a first step what is kept has handles, too
            return
        if value in self.ledger.held and not (self.passes.retained and value not in self.ledger.remade):
            self.ledger.let_go(value)

    def _is_source(self, value: int) -> bool:
        """Whether, in a step that has been noted, calls that may be needed begin with this value."""
        return isinstance(self.policy, Noting) and self.passes.needs.is_needed(value)

    def _improvise(self) -> None:
        """From here on make values on demand, and hold what the budget has room for."""
        self.is_planned = False
        if not self._is_forward:
            self.passes.needs.count()

    def _fetched(self, value: int) -> Tensor:
        needs = self.passes.needs
        if not self.is_planned:
            return self.ledger.fetch(value, lambda v: v in needs.handles, self._after_each)
        tensor = self.ledger.fetch(value, lambda v: False, lambda locked: None)
        self.ledger.remade.discard(value)  # it takes the place of the forward's own
        return tensor

    def _after_each(self, locked: Collection[int]) -> None:
        self.shrink(locked)

    def _looked_up(self, value: int) -> Tensor:
        held = set(self.ledger.held)
        tensor = self.ledger.fetch(value, lambda v: False, lambda locked: None)
        for v in set(self.ledger.held) - held:
            self.ledger.let_go(v)
        return tensor

    def released(self, handle: Handle) -> None:
        """A handle is gone; what only handles needed may go when the last one has."""
        self.passes.put_down(handle)
        if self.passes.lock.acquire(
            blocking=False
        ):  # a finalizer cannot wait: it may have interrupted who holds the lock
            try:
                self._settle()
            finally:
                self.passes.lock.release()

    def _settle(self) -> None:
        for value in self.passes.settle():
            if self._is_forward or value in self.pinned:
                continue
            if self.is_planned:
                is_due = value in self._late or (self.script is not None and value not in self.script.hold)
                if is_due and value not in self.ledger.remade:
                    self._drop(value)
            elif not self.passes.needs.is_needed(value):
                self.ledger.let_go(value)

    # ---- out of memory -------------------------------------------------------------------------------------------

    def has_made(self, tensor: Tensor) -> bool:
        """Whether this forward has made what the tensor looks at."""
        number = self.values.known_tensor(tensor)
        return number is not None and number >= 0


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == local_of(b).untyped_storage()._cdata
