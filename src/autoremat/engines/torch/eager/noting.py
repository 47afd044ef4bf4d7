"""Noting: a forward without a plan, every call ready for a rerun.

It is used in a first step, and off the path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, UntypedStorage, nn

from autoremat.engines.torch.eager.arguments import tensors_given, tensors_in, version_of
from autoremat.engines.torch.eager.calls import ESCAPES, is_collective, is_out_of_sight, is_pass, looks, name_of
from autoremat.engines.torch.eager.check import DIFFERS
from autoremat.engines.torch.eager.composite import Composite, looked_into
from autoremat.engines.torch.eager.contents import contents_of
from autoremat.engines.torch.eager.draws import Draws
from autoremat.engines.torch.eager.entry import Entry, generators_of, prepared
from autoremat.engines.torch.eager.facts import FOREIGN, CallFacts, facts_of_call
from autoremat.engines.torch.eager.handle import Handle, Kept
from autoremat.engines.torch.eager.passes import in_backward
from autoremat.engines.torch.eager.path import Call, n_elements
from autoremat.engines.torch.eager.purity import gives_the_same
from autoremat.engines.torch.eager.state import DRAWING, State
from autoremat.engines.torch.operators.compiled import in_compiled_code
from autoremat.engines.torch.operators.local import PLAIN, local_of
from autoremat.engines.torch.operators.settings import state_of
from autoremat.engines.torch.operators.values import is_parameter, storage_of
from autoremat.program.once import Once, Reason

if TYPE_CHECKING:
    from autoremat.engines.torch.eager.room import Room
    from autoremat.engines.torch.eager.tape import Tape

_NOT_THERE: Final = Reason(Once.NOT_THERE)
_OVERWRITES: Final = Reason(Once.OVERWRITES_OUTSIDE)
_REGISTER_HOOK: Final = Tensor.register_hook
_PASS: Final = CallFacts(once=Reason(Once.PASS), leaves=True)
_NOTHING: Final = contextlib.nullcontext()
Written = list[tuple[int, int, int]]


class Noting:
    """Prepares every call for a rerun, and keeps memory within bounds.

    Args:
        tape: whose forward it is.
        path: where the calls are listed; None where nobody wants to know.
        is_kept: whether the user wants what an operator of this module and name makes kept.
    """

    is_following = False

    def __init__(
        self, tape: Tape, path: list[Call] | None = None, is_kept: Callable[[str, str], bool] = lambda m, n: False
    ) -> None:
        assert tape.backward.room is not None
        self._tape, self._room, self.path, self._is_kept = tape, tape.backward.room, path, is_kept
        self._funcs = None if tape.script is None else tape.script.funcs
        self.differs_at: int | None = None
        """The first call that differs from the path, if there is one."""
        self.composites: list[Composite] = []
        """Functions that were looked into, where the calls are listed."""
        self._fresh: list[tuple[int, Handle, Tensor]] = []
        self._busy: tuple[int, Draws | None] | None = None
        """While a call runs: its first pack, and its random numbers."""
        self._versions: dict[int, int] = {}
        """By value, its memory's version after the last known change."""

    # ---- calls ---------------------------------------------------------------------------------------------------

    def heard(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call and note it."""
        if looks(func) or is_out_of_sight():
            if func is _REGISTER_HOOK and len(args) > 1 and self._tape.sections is not None:
                args = args[0], self._tape.sections.hooked(*args[:2]), *args[2:]
            return func(*args, **kwargs)
        listener = self._tape.listener
        if listener.is_made_of_others(func):
            return self._looked_into(func, args, kwargs)
        if not self._tape.compiled and in_compiled_code():
            self._tape.met_compiled_code()
        given = tensors_given(args, kwargs)
        is_plain = PLAIN.issuperset(map(type, given))
        if not is_plain and any(map(nn.parameter.is_lazy, given)):
            return func(*args, **kwargs)
        number = self._tape.numbers.of
        numbers = [number(t) for t in given]
        if self._tape.check.is_looking:
            self._tape.look_at(given)
        before, versions = [version_of(t) for t in given], self._versions
        for tensor, n, version in zip(given, numbers, before, strict=True):
            if n in versions and versions[n] != (version if is_plain else version_of(local_of(tensor))):
                self._tape.keeping.has_changed(n, tensor)  # in another thread or a hook, where nobody listens
                self._tape.check.forget(n)
                versions[n] = version_of(local_of(tensor))
        name = name_of(func)
        if name in ESCAPES:
            known = [n for n in numbers if n is not None and n >= 0]
            self._tape.keeping.escape(known)
            self._tape.check.forget(*known)
        state = State.now()
        if is_pass(func, name):
            facts = _PASS
        else:
            facts = facts_of_call(func, args, kwargs, state, is_plain=is_plain and None not in numbers)
        return self._noted(func, args, kwargs, given, numbers, before, facts, state)

    def _looked_into(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        begin = self._tape.n_calls
        out = self._tape.listener.look_into(func, args, kwargs)
        if self.path is not None and (composite := looked_into(func, args, kwargs, out, begin, self._tape.n_calls)):
            self.composites.append(composite)
        return out

    def _noted(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor],
        numbers: Sequence[int | None], before: list[int], facts: CallFacts, state: State,
    ) -> Any:  # fmt: skip
        tape = self._tape
        for i in (*facts.written, *facts.statistics):
            if (n := numbers[i]) is not None:
                tape.keeping.before_writing(n, given[i], statistics=i in facts.statistics)
        self._room.make(facts.nbytes)
        call, first = tape.n_calls, tape.n_packs
        tape.n_calls += 1
        if self._funcs is not None and self.differs_at is None:
            self._compare(call, func)
        with DRAWING if facts.random else _NOTHING:
            unknown = facts.foreign or bool(facts.once)
            drawn = [(g, state_of(g)) for g in generators_of(args, kwargs)] if unknown else []
            entry = self._prepared(func, args, kwargs, given, numbers, facts, state)
            is_tried = not facts.uninitialised and not facts.foreign
            if entry is not None and is_tried and tape.check.is_looking:
                reads = tuple(entry.positions.items())
                tape.check.before(call, given, reads, facts.written, has_room=self._room.has(3 * facts.nbytes))
            untouched = contents_of(given) if facts.foreign and entry is not None else None
            self._busy = first, None if entry is None else entry.draws
            try:
                out = tape.hooked(func, args, kwargs)
            finally:
                self._busy = None
        if drawn and not facts.random and any(state_of(g) != s for g, s in drawn):
            entry = None
        after, written = [version_of(t) for t in given], set(facts.written)
        written.update(() if after == before else (i for i, version in enumerate(after) if version != before[i]))
        if tape.witness.shadow is not None:
            tape.witness.made(func, args, kwargs, out, range(first, tape.n_packs), call, foreign=facts.foreign)
            if entry is not None and any(self._is_kept(*names) for names in tape.witness.names_of(call)):
                entry = None
        changes, effects = self._overwritten(given, numbers, sorted(written), facts) if written else ([], [])
        if entry is not None and not set(effects) <= set(facts.statistics):
            entry = None
        made = tensors_in(out)
        results, saved = self._numbered(made, first)
        nbytes = _counted(self._room, [*(made[i] for i, _ in results), *(t for _, _, t in self._fresh)])
        if entry is not None:
            entry.take(results, saved, changes)
            if entry.draws is not None:
                inside = dict(saved)
                for j, _, tensor in self._fresh:
                    if j - first in inside:
                        entry.draws.note(inside[j - first], tensor)
                entry.draws.end(results, made, changes, given)
            if nbytes > facts.nbytes and not self._room.has(3 * nbytes):
                tape.check.has_no_room()
            if is_tried and tape.check.differs(call, entry, made):
                facts, entry = replace(facts, once=DIFFERS), None
            elif not entry.makes or (
                untouched is not None and not gives_the_same(entry, given, numbers, made, untouched)
            ):
                entry = None
        if facts.uninitialised:
            tape.keeping.uninitialised.update(v for _, v in results)
        self._enter(call, entry, facts, effects)
        self._take_note(func, facts, results, changes, given, made)
        if self.path is not None:
            self.path.append(Call(
                func, tuple((i, n) for i, n in enumerate(numbers) if n is not None and n >= 0), results, saved,
                tuple(changes), tuple(effects), facts.statistics, facts.random, facts.uninitialised, facts.leaves,
                (first, tape.n_packs), n_elements(out),
            ))  # fmt: skip
        self._room.online.noted(call, facts.seconds, facts.nbytes)
        self._room.online.used([n for n in numbers if n is not None and n >= 0] + [v for _, v in results])
        self._room.shrink()
        return out

    def _compare(self, call: int, func: Any) -> None:
        """Notice the first call that is not the one of the path."""
        assert self._funcs is not None
        if call >= len(self._funcs) or (func is not self._funcs[call] and func != self._funcs[call]):
            self.differs_at = call

    def _prepared(
        self, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor], numbers: Sequence[int | None],
        facts: CallFacts, state: State,
    ) -> Entry | None:  # fmt: skip
        """Return all that a rerun needs, if there may be one."""
        keeping, ledger = self._tape.keeping, self._tape.ledger
        if facts.once:
            return None
        for i, (tensor, n) in enumerate(zip(given, numbers, strict=True)):
            if n is None or not keeping.is_readable(n, tensor):
                return None
            if i in facts.written and n not in ledger.maker:
                return None  # the value that it overwrites will be gone
            if n in keeping.uninitialised and i not in facts.covered:
                return None
        for tensor, n in zip(given, numbers, strict=True):
            if n is not None and n >= 0 and n not in ledger.held and n not in ledger.maker:
                ledger.hold(n, local_of(tensor).detach())
        values = {i: n for i, n in enumerate(numbers) if n is not None and n >= 0}
        return prepared(func, args, kwargs, values, facts.written, facts.statistics, state, random=facts.random)

    def _overwritten(
        self, given: Sequence[Tensor], numbers: Sequence[int | None], written: Sequence[int], facts: CallFacts
    ) -> tuple[Written, list[int]]:
        """List (position, before, after) of overwritten values, and effects' positions."""
        found: Written = []
        effects = list(facts.statistics)
        firsts = {n: i for i in reversed(written) if (n := numbers[i]) is not None}
        for old, i in reversed(firsts.items()):
            if old >= 0 and (new := self._tape.numbers.after_write(given[i], old)) != old:
                found.append((i, old, new))
                continue
            effects.append(i)
            if old >= 0:  # the recording did not see it; what nobody has declared is told
                if i not in facts.written:
                    self._tape.look_at([given[i]])
                self._tape.keeping.has_changed(old, given[i])
                self._tape.check.forget(old)
        return found, effects

    def _numbered(self, made: Sequence[Tensor], first: int) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Return (position, number) of results, and of what was saved inside."""
        number = self._tape.numbers.of_new
        results = tuple([(i, n) for i, t in enumerate(made) if (n := number(t)) is not None])
        return results, tuple([(j - first, n) for j, _, t in self._fresh if (n := number(t, j)) is not None])

    def _enter(self, call: int, entry: Entry | None, facts: CallFacts, effects: Sequence[int]) -> None:
        tape = self._tape
        if entry is None:
            otherwise = _OVERWRITES if effects else FOREIGN if facts.foreign else _NOT_THERE
            tape.witness.once(call, facts.once or otherwise)
            return
        tape.ledger.enter(call, entry)
        tape.keeping.enter(call)

    def _take_note(
        self, func: Any, facts: CallFacts, results: tuple[tuple[int, int], ...], changes: Written,
        given: Sequence[Tensor], made: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """Note what a call overwrote and made; hold what autograd saved."""
        tape = self._tape
        for i, n in results:
            self._versions[n] = version_of(local_of(made[i]))
        for i, old, new in changes:
            self._versions[new] = version_of(local_of(given[i]))
            tape.overwritten(old, new, given[i])
        is_full = not facts.uninitialised and not is_collective(func)
        if tape.check.is_looking and is_full and tape.n_calls - 1 not in tape.ledger.entries:
            tape.check.noted(tape.n_calls - 1, results, made)
        for _, handle, tensor in self._fresh:
            self._hold(handle, tensor, tape.numbers.known_tensor(tensor))
        self._fresh.clear()

    # ---- saved tensors -------------------------------------------------------------------------------------------

    def pack(self, j: int, tensor: Tensor) -> Any:
        """Return a handle for what autograd wants to save."""
        tape = self._tape
        storage = storage_of(local_of(tensor))
        number = None if storage is None else tape.numbers.known(storage)
        tape.witness.saved(j, tensor, inside=self._busy is not None)
        if storage is None or is_parameter(tensor) or (number is not None and number < 0):
            return Kept(tensor)
        if number is None and self._busy is None:
            self._out_of_sight(tensor, storage)
            return Kept(tensor)
        handle = Handle(tape.backward, j, tensor)
        if number is None:
            self._fresh.append((j, handle, tensor))
            if in_backward():  # a pass within the forward saves much before its call is over
                self._room.made(tensor)
            if self._busy is not None and self._busy[1] is not None:
                self._busy[1].at(j - self._busy[0])
        else:
            self._hold(handle, tensor, number)
        return handle

    def _out_of_sight(self, tensor: Tensor, storage: UntypedStorage) -> None:
        """Count what no call has made; a plan counts it as fixed."""
        if self._tape.script is None:
            self._tape.has_saved(-storage._cdata, storage.nbytes())
            self._room.made(tensor)

    def _hold(self, handle: Handle, tensor: Tensor, value: int | None) -> None:
        """Hold the value that a handle stands for."""
        tape = self._tape
        if value is None or value < 0:  # a constant of its call: it stays as long as the handle does
            value = tape.numbers.of_nobody()
        handle.value = value
        tape.passes.made(handle)
        if value not in tape.ledger.held:
            local = local_of(tensor)
            tape.ledger.hold(value, local.detach())
            tape.has_saved(value, local.untyped_storage().nbytes())
        self._room.online.used([value])

    def has_changed(self, value: int, tensor: Tensor) -> None:
        """Note that a value was changed behind torch's back."""
        self._tape.keeping.has_changed(value, tensor)

    def finish(self) -> None:
        """Do nothing: a noted forward may end anywhere."""

    def end(self) -> None:
        """Let go of the tape: no more calls will come."""
        del self._tape


def _counted(room: Room, tensors: Sequence[Tensor]) -> int:
    """Count what a call made; return its bytes."""
    for tensor in tensors:
        room.made(tensor)
    storages = [s for t in tensors if (s := storage_of(local_of(t))) is not None]
    return sum({s._cdata: s.nbytes() for s in storages}.values())
