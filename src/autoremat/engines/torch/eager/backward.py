"""The backward of one forward: gives autograd what it asks for.

It goes by the plan's acts, or on demand. When a pass asks for a value that is gone, calls are rerun: none of the user's
code, with the same random numbers, in the same state, in-place calls on copies.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from autoremat.engines.torch.eager.acting import Acting, carry_out
from autoremat.engines.torch.eager.first_stays import FirstStays
from autoremat.engines.torch.eager.handle import Handle, Kept
from autoremat.engines.torch.eager.ledger import NOTHING, Along, Ledger
from autoremat.engines.torch.eager.passes import NO_TASK, Passes, current_task, in_backward, in_python_node
from autoremat.engines.torch.eager.returning import begin_by
from autoremat.engines.torch.eager.room import Nothing, Room
from autoremat.engines.torch.eager.script import Act, Script
from autoremat.engines.torch.world.memory import free_memory, is_out_of_memory

_unseen = torch._C.DisableTorchFunction


class Watch(Protocol):
    """Somebody who wants to know what happens to saved tensors."""

    def asked(self, value: int) -> None:
        """Hear that a pass asks for a value."""

    def gone(self, pack: int) -> None:
        """Hear that autograd has let go of a pack.

        This may come at any moment, in any thread.
        """


class Backward:
    """Serves the passes over one graph.

    Args:
        ledger: what is in memory, and how to recompute the rest.
        passes: the handles and who waits for them.
        rebind: called with a tensor handed out within the forward, and its value.
        out_of_memory: makes the error that tells of memory refused for good.
        script: the plan's acts; None as long as there is no plan.
    """

    def __init__(
        self, ledger: Ledger, passes: Passes, rebind: Callable[[Tensor, int], None],
        out_of_memory: Callable[[BaseException], BaseException], script: Script | None,
    ) -> None:  # fmt: skip
        self._ledger, self._passes, self._rebind, self._out_of_memory = ledger, passes, rebind, out_of_memory
        self._script, self._acting = script, Acting(script)
        self._is_through = False
        """The pass after the forward has begun."""
        self._is_noted = script is None
        """The forward was noted, so even kept values have handles."""
        self._stays = FirstStays()
        self.room: Room | None = None
        """Bounds what is held where no plan does."""
        self.is_forward = True
        self._is_patient = False
        """Deaths of handles change nothing before the next pass, or the last one."""
        self.watch: Watch | None = None
        """Told what passes ask for and what autograd lets go of, if set."""
        self.pinned: set[int] = set()
        """Values that the plan would drop and that must be kept."""

    # ---- between forward and backward ----------------------------------------------------------------------------

    @property
    def is_planned(self) -> bool:
        """Whether the backward goes by a plan."""
        return self._script is not None

    def finish_forward(self) -> None:
        """Note that the forward is over."""
        self._ledger.finish_forward()
        self._acting.finish_forward()
        self.is_forward = False
        self._is_patient = self.is_planned and not self._is_noted
        if not self.is_planned:
            self._passes.needs.count()

    def take_plan(self, script: Script, can_go: Callable[[int], bool], there: Mapping[int, Tensor]) -> None:
        """Go on by a plan made of this forward: hold, drop, recompute.

        Args:
            script: of the plan.
            can_go: whether dropping a held value frees its memory and loses nothing.
            there: values that somebody else holds; nobody has to recompute these now.
        """
        self._script, self._acting = script, Acting(script, is_over=True)
        self._stays.take_plan(script)
        begin_by(script, self._ledger, self._passes.needs, can_go, there, self.room)

    def improvise(self) -> None:
        """Recompute values on demand from here on, within the budget's room."""
        self._script, self._is_patient = None, False
        if not self.is_forward:
            self._settle()
            self._passes.needs.count()

    # ---- what a pass asks for ------------------------------------------------------------------------------------

    def unpack(self, packed: Any) -> Tensor:
        """Return the tensor that was saved, recomputed if it is gone."""
        if isinstance(packed, Tensor):
            return packed
        with _unseen():
            if type(packed) is Kept:
                if packed.handle is None:
                    if packed.backward is not None and in_backward():
                        packed.backward.asked(packed.pack)
                    return packed.get()
                packed = packed.handle
            handle: Handle = packed
            return handle.backward.unpacked(handle)

    def unpacked(self, handle: Handle) -> Tensor:
        """Return a handle's tensor; several threads may go backward at once."""
        passes = self._passes
        with passes.lock:
            try:
                handle.check_unchanged()
                task = current_task()
                if task != passes.task:
                    if task == NO_TASK:  # somebody reads grad_fn._saved_...
                        return handle.seen.on(self._looked_up(passes.now(handle.value)))
                    self._notice_pass(task)
                if handle.stays is not None and handle.served == passes.number:
                    return handle.stays
                value = passes.serve(handle)
                if self.watch is not None:
                    self.watch.asked(value)
                if self._script is None:
                    self._shrink(needed=handle.seen.nbytes if self.is_forward else 0)
                tensor = self._served(handle, value)
                # Keep it like autograd does: until the node is done, including sums over broadcast dimensions.
                handle.stays = tensor if not passes.retained or in_python_node() else None
                if self.is_forward:  # calls of a pass within the forward read this value
                    self._rebind(tensor, value)
                return tensor
            finally:
                if not self._is_patient or passes.are_all_gone:
                    self._settle()

    def asked(self, pack: int) -> None:
        """Act, where the plan does when a kept tensor is wanted."""
        with self._passes.lock:
            task = current_task()
            if task != self._passes.task:
                self._notice_pass(task)
            if self._script is not None and self._acting.is_next(pack):
                self._act()

    def _notice_pass(self, task: int) -> None:
        """Note a new pass; unplanned ones begin the plan's backward again."""
        self._settle()
        self._passes.begin(task)
        self._passes.is_spent = not self.is_forward and not self._passes.retained
        is_planned, self._is_through = self.is_forward or not self._is_through, not self.is_forward
        if is_planned or not self._passes.is_again:
            return
        if self._passes.was_differentiated and self.is_planned:
            self.improvise()
        self._acting.begin_again()
        for value in list(self._ledger.recomputed):
            self._ledger.let_go(value)

    def _served(self, handle: Handle, value: int) -> Tensor:
        try:
            return self._answer(handle, value)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self.improvise()  # the device has no room for the plan's next act: hold as little as possible, and retry
        if self.room is None:
            self.room = Room(Nothing(), self._ledger, self._passes, self._ledger.maker.__contains__)
        self.room.empty()
        free_memory()
        try:
            return self._answer(handle, value)
        except (RuntimeError, MemoryError) as error:
            raise (self._out_of_memory(error) if is_out_of_memory(error) else error) from None

    def _answer(self, handle: Handle, value: int) -> Tensor:
        if self._script is not None:
            if self._acting.is_next(handle.pack):
                act = self._act()
                tensor = handle.seen.on(self._fetched(value))
                if act.drop:
                    self._drop(value)
                return tensor
            packs = self._script.packs
            if handle.pack < len(packs) and packs[handle.pack] is None:
                return handle.seen.on(self._fetched(value))  # a handle of a noted forward, which the plan keeps
            self.improvise()  # the order is not the plan's: recompute on demand from here on
        tensor = handle.seen.on(self._fetched(value))
        if self.room is not None:
            self.room.online.used([value])
        return tensor

    # ---- the plan ------------------------------------------------------------------------------------------------

    def _act(self) -> Act:
        act = self._acting.take()
        self._ledger.away.carry_out(self._ledger, act.moves)
        if act.reruns:
            is_simple = not (self._is_noted or self._passes.retained or self.pinned)
            carry_out(
                act, self._ledger, self._fetched, self._ledger.let_go if is_simple else self._drop, self._still_waiting
            )  # fmt: skip
        return act

    def _still_waiting(self) -> dict[int, int]:
        self._settle()
        return self._passes.waiting

    def _drop(self, value: int) -> None:
        """Drop a value, unless a retained graph needs it irreplaceably."""
        ledger, is_own = self._ledger, value not in self._ledger.recomputed
        if value in self.pinned:
            return
        if self._is_noted:
            if value not in ledger.maker and self._passes.needs.is_needed(value):
                return  # a chain of reruns may begin with this value
            kept = self._script is None or self._stays.last(value)
            if is_own and kept and value in self._passes.needs.handles:
                self._stays.late.add(value)
                return
        if value in ledger.held and not (self._passes.retained and is_own and value not in ledger.maker):
            ledger.let_go(value)

    # ---- on demand -----------------------------------------------------------------------------------------------

    def _shrink(self, locked: Container[int] = (), *, needed: int = 0) -> None:
        """Make room.

        A node of a pass within the forward makes about as much as it asks for.
        """
        if self._script is None and self.room is not None:
            self.room.shrink(locked, needed=needed, in_backward=not self.is_forward)

    def _fetched(self, value: int) -> Tensor:
        script = self._script
        if script is None:
            needs, along = self._passes.needs, _along(self._ledger, self._passes, self.room, self.is_forward)
            return self._ledger.fetch(value, lambda v: v in needs.handles, self._shrink, along)
        if value in self._ledger.held:
            return self._ledger.memory(value)
        self._is_patient = False  # this goes with its last handle
        tensor = self._ledger.fetch(value, lambda v: v in script.kept or v in script.hold, lambda locked: None)
        self._ledger.recomputed.difference_update(script.kept | script.hold)  # these replace the forward's own values
        self._ledger.recomputed.discard(value)
        return tensor

    def _looked_up(self, value: int) -> Tensor:
        held = set(self._ledger.held)
        tensor = self._ledger.fetch(value, lambda v: False, lambda locked: None)
        for v in set(self._ledger.held) - held:
            self._ledger.let_go(v)
        return tensor

    # ---- handles that are gone -----------------------------------------------------------------------------------

    def released(self, handle: Handle) -> None:
        """Note that a handle is gone; drop what only handles needed."""
        self._passes.put_down(handle)
        if self.watch is not None:
            self.watch.gone(handle.pack)
        if self._is_patient and not self._passes.are_all_gone:
            return
        # A finalizer must not wait for the lock: it may have interrupted the very thread that holds it.
        if self._passes.lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._passes.lock.release()

    def _settle(self) -> None:
        unneeded, packs = self._passes.settle()
        if self._is_noted:
            unneeded += self._stays.gone(packs)
        for value in unneeded:
            if self.is_forward or value in self.pinned:
                continue
            if self._script is not None:
                is_due = value in self._stays.late or value not in self._script.hold
                if is_due and value not in self._ledger.recomputed:
                    self._drop(value)
            elif not self._passes.needs.is_needed(value):
                self._ledger.let_go(value)
            if not self._passes.needs.handles:
                self._ledger.close()


def _along(ledger: Ledger, passes: Passes, room: Room | None, is_forward: bool) -> Along:
    """Tell what a rerun call makes that this pass still wants.

    Nothing where there is no room for reruns.
    """
    if room is not None and not room.is_enough(in_backward=not is_forward):
        return NOTHING
    return lambda call: [v for v in ledger.entries[call].makes if passes.waiting.get(v, 0) > 0]
