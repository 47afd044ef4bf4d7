"""A call of the forward, ready for a rerun.

It has the arguments without tensors, the state, and the state of the generator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoremat.engines.torch.eager.arguments import (
    AS_THEY_ARE,
    Made,
    Outside,
    Seen,
    Statistics,
    resolved,
    template,
    tensors_in,
)
from autoremat.engines.torch.eager.draws import Draws
from autoremat.engines.torch.eager.state import Rerunning, State, generator_of, heard_by_classes
from autoremat.engines.torch.operators.local import local_of
from autoremat.engines.torch.operators.settings import state_of

_push_hooks = torch._C._autograd._push_saved_tensors_default_hooks
_pop_hooks = torch._C._autograd._pop_saved_tensors_default_hooks


class Enough(Exception):
    """Ends a rerun once what is wanted has been saved.

    Its argument is the position of the tensor that was saved last.
    """


@dataclass(slots=True)
class Entry:
    """A call, ready for a rerun; not frozen, for speed.

    Attributes:
        func: what was called.
        args: templates of its arguments.
        kwargs: templates of its keyword arguments.
        state: in which it was made.
        generator: that it draws from.
        generator_state: of that before the call.
        positions: the values of its tensor arguments that view one, by position.
        outside: those of its arguments that the step did not make.
        results: pairs (position among the tensors of the result, value).
        saved: pairs (position among what autograd saves inside the call, value), for values made and saved inside.
        in_place: pairs (made, overwritten).
        draws: what tells that a rerun has drawn the same numbers, where other threads might have drawn in between.
    """

    func: Callable[..., Any]
    args: Any
    kwargs: Any
    state: State
    generator: torch.Generator | None
    generator_state: bytearray | None
    positions: Mapping[int, int]
    outside: tuple[Outside, ...] = ()
    results: tuple[tuple[int, int], ...] = ()
    saved: tuple[tuple[int, int], ...] = ()
    in_place: tuple[tuple[int, int], ...] = ()
    draws: Draws | None = None
    reads: tuple[int, ...] = ()
    """The values among its arguments."""
    makes: tuple[int, ...] = ()
    """The values that a rerun can make."""
    stops: frozenset[int] = frozenset()
    """Values, final once saved, after which a rerun may end."""

    def take(
        self, results: tuple[tuple[int, int], ...], saved: tuple[tuple[int, int], ...],
        written: Sequence[tuple[int, int, int]],
    ) -> None:  # fmt: skip
        """Note what the call has made, after its first run."""
        self.results, self.saved = results, saved
        self.makes = tuple([v for _, v in results])
        if saved or written:
            self.in_place = tuple([(new, old) for _, old, new in written])
            self.makes += (*(v for _, v in saved), *(new for new, _ in self.in_place))

    def run(self, memory: dict[int, Tensor], rerunning: Rerunning, wanted: Collection[int]) -> dict[int, Tensor]:
        """Rerun the call, or as much of it as is wanted.

        Args:
            memory: of the values that it reads; what it overwrites is its own copy.
            rerunning: the block in which this happens.
            wanted: values that it makes.

        Returns:
            The memory of every wanted value.
        """
        found: dict[int, Tensor] = {}
        if self.generator is not None and self.generator_state is not None:
            rerunning.draw(self.generator, self.generator_state)
        with rerunning.use(self.state):
            stopped_at = self._make(memory, wanted, found)
        if self.draws is None:
            return found
        self.draws.check(found, stopped_at, self.func)
        return {v: t for v, t in found.items() if v in wanted}

    def _make(self, memory: Mapping[int, Tensor], wanted: Collection[int], found: dict[int, Tensor]) -> int | None:
        """Make the call; return the last saved position if it ended early."""
        inner = {i: v for i, v in self.saved if v in wanted} if self.saved else {}
        enough = len(inner) if self.stops.issuperset(wanted) else None
        wanted = wanted if self.draws is None else self.makes  # what else it makes tells whether it drew alike
        args = [resolved(a, memory) for a in self.args]
        kwargs = {k: resolved(a, memory) for k, a in self.kwargs.items()} if self.kwargs else {}
        hooked = self.state.settings.grad_enabled
        catch = _catcher(inner, enough, found)
        try:
            if hooked:
                _push_hooks(catch, _never)  # within: Ctrl-C may come right after it
            with heard_by_classes():
                made = self.func(*args, **kwargs)
        except Enough as end:
            return int(end.args[0])
        finally:
            if hooked:
                _pop_hooks()
        out = tensors_in(made)
        found.update((v, local_of(out[i]).detach()) for i, v in self.results if v in wanted)
        found.update((new, memory[old]) for new, old in self.in_place if new in wanted)
        return None


def prepared(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], values: Mapping[int, int],
    written: Collection[int], statistics: Collection[int], state: State, *, random: bool,
) -> Entry:  # fmt: skip
    """Note what a rerun of a call needs, before its first run.

    Args:
        func: what is called.
        args: its arguments.
        kwargs: its keyword arguments.
        values: the values of the tensors given that view a value of the step, by position.
        written: positions of those that the call overwrites.
        statistics: positions of running statistics.
        state: of this moment.
        random: it draws from a generator.
    """
    outside: list[Outside] = []
    position = -1

    def described(tensor: Tensor) -> Any:
        nonlocal position
        position += 1
        value = values.get(position)
        if value is not None:
            return Made(value, Seen.of(tensor), tensor.requires_grad, position in written)
        if position in statistics:
            return Statistics(tensor)
        outside.append(Outside(tensor))
        return outside[-1]

    generator = generator_of(args, kwargs) if random else None
    draws = Draws.of(generator)  # before the generator is read, so that a thread that starts in between is noticed
    return Entry(
        func, [a if type(a) in AS_THEY_ARE else template(a, described) for a in args],
        {k: template(a, described) for k, a in kwargs.items()} if kwargs else kwargs,
        state, generator, None if generator is None else state_of(generator),
        values, tuple(outside), draws=draws, reads=tuple(dict.fromkeys(values.values())),
    )  # fmt: skip


def generators_of(args: Any, kwargs: Any) -> list[torch.Generator]:
    """List the generators that a call may draw from."""
    given = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Generator)]
    return [*given, torch.default_generator]


def _catcher(inner: Mapping[int, int], enough: int | None, found: dict[int, Tensor]) -> Callable[[Tensor], None]:
    """Make a pack hook that keeps only what is wanted.

    It raises ``Enough`` after the last wanted tensor.
    """
    n = 0

    def catch(tensor: Tensor) -> None:
        nonlocal n
        value = inner.get(n)
        if value is not None:
            found[value] = local_of(tensor).detach()
            if enough is not None and len(found) >= enough:
                raise Enough(n)
        n += 1

    return catch


def _never(packed: Any) -> Tensor:
    raise RuntimeError("autoremat: nobody goes backward through a call that is made again; this is a bug in autoremat")
