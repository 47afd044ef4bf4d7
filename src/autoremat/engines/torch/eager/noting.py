"""Noting: a forward without a plan, every call of which can be made again. In a first step, and off the path."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from autoremat.engines.torch.eager.arguments import (
    Made,
    Outside,
    Seen,
    Statistics,
    template,
    tensors_given,
    tensors_in,
    version_of,
)
from autoremat.engines.torch.eager.entry import Entry, may_be_disturbed
from autoremat.engines.torch.eager.facts import CallFacts, facts_of_call
from autoremat.engines.torch.eager.handle import Handle, Kept
from autoremat.engines.torch.eager.path import Call
from autoremat.engines.torch.eager.state import DRAWING, Replay, State
from autoremat.record.local import local_of
from autoremat.record.values import is_parameter, storage_of
from autoremat.run.entry import _generator_of, checksum
from autoremat.run.settings import state_of

if TYPE_CHECKING:
    from autoremat.engines.torch.eager.tape import Tape

LOOKS: Final = frozenset(
    {"size", "dim", "stride", "numel", "nelement", "element_size", "is_contiguous", "storage_offset", "__len__",
     "is_floating_point", "is_complex", "ndimension", "get_device", "__repr__", "__format__", "__hash__", "item",
     "tolist", "__bool__", "__int__", "__float__", "__index__", "is_same_size", "is_nonzero", "is_signed", "equal",
     "allclose", "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "requires_grad_", "__contains__",
     "is_storage", "is_tensor", "is_inference", "is_conj", "is_neg", "is_pinned", "is_shared", "result_type",
     "broadcast_shapes", "_is_view", "is_distributed", "has_names", "dim_order", "sym_size", "__dir__"}
)  # fmt: skip
"""Calls that only look, and make no tensor."""
ESCAPES: Final = frozenset(
    {"data_ptr", "numpy", "__array__", "__dlpack__", "untyped_storage", "storage", "_typed_storage", "share_memory_",
     "to_dlpack", "__array_wrap__", "__cuda_array_interface__"}
)  # fmt: skip
"""Calls after which something else than torch may know, and change, the memory of a tensor."""
_UNREPEATABLE: Final = "reads what is not there any more, or makes nothing that can be told apart"
_PASSES: Final = frozenset({"backward", "grad"})


class Noting:
    """Notes every call so that it can be made again, and keeps what is held within what is allowed.

    Args:
        tape: whose forward it is.
        path: where the calls are listed; None where nobody wants to know.
    """

    is_following = False

    def __init__(self, tape: Tape, path: list[Call] | None) -> None:
        self._tape, self._path = tape, path
        self._overwritten_outside: set[int] = set()
        self._fresh: list[tuple[int, Handle, Tensor]] = []
        self._busy = False

    # ---- calls ---------------------------------------------------------------------------------------------------

    def heard(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call and take note of it."""
        name = getattr(func, "__name__", "")
        if name in LOOKS or torch._C._functorch.peek_interpreter_stack() is not None:
            return func(*args, **kwargs)  # what is done within torch.func stays out of sight
        if name == "__get__" and not _gives_tensor(func):
            return func(*args, **kwargs)
        if self._tape.listener.is_made_of_others(func):
            return self._tape.listener.look_into(func, args, kwargs)
        if name == "__set__" and not _sets_data(func):
            return func(*args, **kwargs)
        return self._noted(func, name, args, kwargs)

    def _noted(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tape = self._tape
        given = tensors_given(args, kwargs)
        if any(map(torch.nn.parameter.is_lazy, given)):
            return func(*args, **kwargs)
        state = State.now()
        numbers = [tape.number(t) for t in given]
        if tape.check.is_looking:
            tape.look_at(given)
        facts = CallFacts(once="a pass of its own") if _is_pass(func) else facts_of_call(func, args, kwargs, state)
        if name in ESCAPES:
            tape.escape([n for n in numbers if n is not None])
        if facts.written or facts.statistics:
            touched = [given[i] for i in (*facts.written, *facts.statistics)]
            self._rescue([numbers[i] for i in facts.written], [numbers[i] for i in facts.statistics], touched)
        tape.make_room(facts.nbytes)
        call, first = tape.n_calls, tape.n_packs
        tape.n_calls += 1
        before = [version_of(t) for t in given]
        with DRAWING if facts.random else contextlib.nullcontext():
            drawn = _generators(args, kwargs)
            entry = self._prepared(func, args, kwargs, given, numbers, state, facts)
            self._busy = True
            try:
                out = func(*args, **kwargs)
            finally:
                self._busy = False
        drew = [g for g, s in drawn if state_of(g) != s]
        if drew and not facts.random and entry is not None:
            entry = None
        written = {i for i, t in enumerate(given) if version_of(t) != before[i]}.union(facts.written)
        tape.shadowed(func, args, kwargs, out, range(first, tape.n_packs))
        self._take(call, func, given, numbers, sorted(written), facts, entry, out, first)
        return out

    def _prepared(
        self, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor], numbers: Sequence[int | None], state: State,
        facts: CallFacts,
    ) -> Entry | None:  # fmt: skip
        """All that another run needs, if there may be one."""
        tape = self._tape
        if facts.once or None in numbers or any(n is not None and n < 0 for n in (numbers[i] for i in facts.written)):
            return None
        for i, (tensor, n) in enumerate(zip(given, numbers, strict=True)):
            if (
                n is None
                or n in tape.escaped
                or n in self._overwritten_outside
                or (n < 0 and not tape.is_outside(tensor))
            ):
                return None
            if i in facts.written and n not in tape.ledger.maker:
                return None  # what it overwrites will not be there any more
            if n in tape.uninitialised and i not in facts.covered:
                return None
            if n >= 0 and n not in tape.ledger.held and n not in tape.ledger.maker:
                tape.ledger.hold(n, local_of(tensor).detach())
        positions, outside = iter(range(len(given))), list[Outside]()

        def described(tensor: Tensor) -> Any:
            i = next(positions)
            n = numbers[i]
            assert n is not None
            if n >= 0:
                return Made(n, Seen.of(tensor), tensor.requires_grad, i in facts.written)
            if i in facts.statistics:
                return Statistics(tensor)
            outside.append(Outside(tensor))
            return outside[-1]

        generator = _generator_of(args, kwargs) if facts.random else None
        return Entry(
            func, template(list(args), described), template_of(kwargs, described), state, generator,
            None if generator is None else state_of(generator),
            tuple(dict.fromkeys(n for n in numbers if n is not None and n >= 0)), tuple(outside),
        )  # fmt: skip

    def _take(
        self, call: int, func: Any, given: Sequence[Tensor], numbers: Sequence[int | None], written: Sequence[int],
        facts: CallFacts, entry: Entry | None, out: Any, first: int,
    ) -> None:  # fmt: skip
        """Number what a call has made and overwritten; hold what autograd has saved of it."""
        tape = self._tape
        overwritten, effects = self._overwritten(given, numbers, written, facts)
        results = []
        for i, tensor in enumerate(tensors_in(out)):
            number = tape.number_new(tensor)
            if number is not None:
                results.append((i, number))
        saved = []
        for j, _, tensor in self._fresh:
            number = tape.number_new(tensor, j)
            if number is not None:
                saved.append((j - first, number))
        if entry is not None and (not effects or set(effects) <= set(facts.statistics)):
            entry.results, entry.saved = tuple(results), tuple(saved)
            entry.in_place = tuple((new, old) for _, old, new in overwritten)
            if may_be_disturbed(entry.generator):
                tensors = tensors_in(out)
                entry.draws = checksum(tensors[i].untyped_storage() for i, _ in results)
            if entry.makes and (not facts.foreign or self._gives_the_same(entry, given, numbers, out)):
                tape.ledger.enter(call, entry)
        if facts.uninitialised:
            tape.uninitialised.update(n for _, n in results)
        if call not in tape.ledger.entries:
            tape.once(call, facts.once or ("overwrites what the step did not make" if effects else _UNREPEATABLE))
        for position, old, new in overwritten:
            tape.overwritten(old, new, given[position])
        if tape.check.is_looking and not facts.uninitialised:
            tape.check.noted(call, results, tensors_in(out))
        for _, handle, tensor in self._fresh:
            self._hold(handle, tensor)
        self._fresh.clear()
        tape.online.noted(call, facts.seconds)
        tape.online.used([n for n in numbers if n is not None and n >= 0])
        tape.online.used([n for _, n in results])
        if self._path is not None:
            reads = tuple((i, n) for i, n in enumerate(numbers) if n is not None and n >= 0)
            self._path.append(
                Call(func, reads, tuple(results), tuple(saved), tuple(overwritten), tuple(effects), facts.statistics,
                     facts.random, facts.uninitialised, (first, tape.n_packs))
            )  # fmt: skip
        tape.shrink()

    def _gives_the_same(self, entry: Entry, given: Sequence[Tensor], numbers: Sequence[int | None], out: Any) -> bool:
        """Whether a call that is not torch's gives the same when it is made again."""
        memory = {n: local_of(t).detach() for n, t in zip(numbers, given, strict=True) if n is not None and n >= 0}
        first = tensors_in(out)
        try:
            with Replay() as replay:
                again = entry.run(memory, replay, [v for _, v in entry.results])
        except Exception:  # noqa: BLE001 - whatever somebody else's kernel does not like
            return False
        return all(
            checksum([again[v].untyped_storage()]) == checksum([first[i].untyped_storage()]) for i, v in entry.results
        )

    def _overwritten(
        self, given: Sequence[Tensor], numbers: Sequence[int | None], written: Sequence[int], facts: CallFacts
    ) -> tuple[list[tuple[int, int, int]], list[int]]:
        """Triples (position, before, after), each memory once; and positions of what is from outside."""
        found: list[tuple[int, int, int]] = []
        effects = list(facts.statistics)
        done: set[int] = set()
        for i in written:
            old = numbers[i]
            if old is None or old in done:
                continue
            done.add(old)
            if old < 0:
                effects.append(i)
            else:
                new = self._tape.renumber(given[i], old)
                if new != old:
                    found.append((i, old, new))
        return found, effects

    def _rescue(
        self, numbers: Sequence[int | None], statistics: Sequence[int | None], given: Sequence[Tensor]
    ) -> None:  # fmt: skip
        """See to what calls made again would read, and the next call is about to overwrite.

        What is from outside is overwritten again by the next forward, perhaps before this one's backward: so nothing
        that has read it can be made again.
        """
        tape = self._tape
        tensors = {n: t for n, t in zip((*numbers, *statistics), given, strict=True) if n is not None}
        for n in tensors:
            if n < 0:
                if n not in statistics:
                    self._overwritten_outside.add(n)
                tape.freeze(tape.ledger.readers_of(tensors[n]))
            elif n in tape.ledger.held and n not in tape.ledger.maker:
                tape.rescue(n)

    # ---- saved tensors -------------------------------------------------------------------------------------------

    def pack(self, j: int, tensor: Tensor) -> Any:
        """A handle for what autograd wants to save."""
        tape = self._tape
        storage = storage_of(local_of(tensor))
        number = None if storage is None else tape.values.known(storage)
        if tape.shadow is not None:
            tape.saved(j, tensor, self._busy)
        if storage is None or is_parameter(tensor) or (number is not None and number < 0):
            return Kept(tensor)
        if number is None and not self._busy:
            return Kept(tensor)  # made out of sight
        handle = Handle(tape, j, tensor)
        if number is None:
            self._fresh.append((j, handle, tensor))
        else:
            self._hold(handle, tensor)
        return handle

    def _hold(self, handle: Handle, tensor: Tensor) -> None:
        """Hold the value that a handle stands for."""
        tape = self._tape
        storage = storage_of(local_of(tensor))
        number = None if storage is None else tape.values.known(storage)
        assert number is not None
        handle.value = number
        tape.passes.made(handle)
        tape.hold_saved(number, tensor)
        tape.online.used([number])

    def finish(self) -> None:
        """The forward is over."""


def template_of(kwargs: dict[str, Any], change: Callable[[Tensor], Any]) -> dict[str, Any]:
    """Keyword arguments as templates."""
    return {k: template(v, change) for k, v in kwargs.items()}


def _is_pass(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in _PASSES and getattr(func, "__module__", "") in (
        "torch.autograd",
        "torch._tensor",
        "torch.autograd.functional",
    )


def _generators(args: Any, kwargs: Any) -> list[tuple[torch.Generator, bytearray]]:
    """The generators that a call may draw from, with their states."""
    given = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Generator)]
    return [(g, state_of(g)) for g in (*given, torch.default_generator)]


_GETTERS: Final = frozenset({"T", "mT", "H", "mH", "data", "real", "imag", "grad", "_base"})


def _gives_tensor(getter: Any) -> bool:
    return getattr(getter.__self__, "__name__", "") in _GETTERS


def _sets_data(setter: Any) -> bool:
    return getattr(setter.__self__, "__name__", "") == "data"
