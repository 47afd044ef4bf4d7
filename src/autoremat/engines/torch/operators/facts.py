"""What the recorder and the tape must know of every ATen operator.

Most of it is in the operator's schema: what it writes, which outputs alias which inputs, whether it draws random
numbers. Where schemas are silent, the small tables in this file say the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from autoremat.engines.torch.operators.collectives import communicates, written_by_collective
from autoremat.program.once import Once, Reason

UNINITIALISED: Final = frozenset(
    {"aten.empty", "aten.empty_like", "aten.empty_strided", "aten.empty_permuted", "aten.new_empty",
     "aten.new_empty_strided"}
)  # fmt: skip
"""Operators whose result is whatever the memory held before."""

OVERWRITING: Final = frozenset(
    {"aten.bernoulli_", "aten.uniform_", "aten.normal_", "aten.random_", "aten.exponential_", "aten.geometric_",
     "aten.cauchy_", "aten.log_normal_", "aten.zero_", "aten.fill_", "aten.copy_"}
)  # fmt: skip
"""In-place operators that overwrite their first argument without reading it.

They write every element of it.
"""

BATCH_NORM: Final = frozenset({"aten.native_batch_norm", "aten.cudnn_batch_norm", "aten.miopen_batch_norm"})
"""Operators that write running statistics undeclared in their schema.

Arguments 3 and 4 (running mean and variance) are written when argument 5 (training) is true; ``native_functions.yaml``
of torch 2.13 marks neither as written.
"""

RUNNING_STATISTICS: Final = (3, 4)
TRAINING: Final = 5

FRESH_CONSTANT: Final = frozenset({"aten.lift_fresh", "aten.lift_fresh_copy", "aten.lift"})
"""The operators through which ``torch.tensor(...)`` enters.

Their result existed before any operator ran.
"""

NEVER_AGAIN: Final = {
    "aten._cudnn_rnn": Once.OWN_STATE,
    "aten.miopen_rnn": Once.OWN_STATE,
    "aten.set_": Once.CHANGES_STORAGE,
    "aten.resize_": Once.CHANGES_STORAGE,
    "aten.record_stream": Once.EFFECT,
    "aten.linalg_lstsq": Once.OTHER_BITS,
}
"""ATen operators that must not be rerun, and why."""


@dataclass(frozen=True, slots=True)
class OpFacts:
    """What holds for every call of one operator.

    Attributes:
        name: such as ``aten.mm.default``.
        is_view: every output is a view of an input and nothing is written.
        fresh_constant: the output is a constant from outside.
        written_args: positions of the arguments that the schema says are written.
        written_kwargs: names of the keyword arguments that are written (``out=``).
        random: draws from a random generator.
        batch_norm: writes running statistics although the schema does not say so.
        uninitialised: the result is uninitialised memory.
        overwriting: writes every element of its first argument without reading it.
        once: why it must not run a second time; None where it may.
        communicates: talks to other processes.
    """

    name: str
    is_view: bool
    fresh_constant: bool
    written_args: tuple[int, ...]
    written_kwargs: tuple[str, ...]
    random: bool
    batch_norm: bool
    uninitialised: bool
    overwriting: bool
    once: Reason | None
    communicates: bool

    def written(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """List the tensors that this call writes, declared or not."""
        if not (self.written_args or self.written_kwargs or self.batch_norm):
            return []
        found = [args[i] for i in self.written_args if i < len(args)]
        found += [kwargs[k] for k in self.written_kwargs if k in kwargs]
        if self.batch_norm and args[TRAINING]:
            found += [args[i] for i in RUNNING_STATISTICS]
        return tensors_in(found)


_FACTS: dict[int, tuple[torch._ops.OpOverload, OpFacts]] = {}
"""Facts by the address of the operator.

An address hashes faster than the operator; the entry keeps the operator alive, so its address stays its own.
"""


def facts_of(func: torch._ops.OpOverload) -> OpFacts:
    """Return the facts of one operator; computed once, then looked up."""
    known = _FACTS.get(id(func))
    if known is None:
        known = _FACTS[id(func)] = func, _read_facts(func)
    return known[1]


def _read_facts(func: torch._ops.OpOverload) -> OpFacts:
    """Read the facts off the schema and the tables of this file."""
    schema, packet = func._schema, str(func.overloadpacket)
    arguments = schema.arguments
    written = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
    positions = tuple(i for i, a in enumerate(arguments) if written[i] and not a.kwarg_only)
    aliases = [r.alias_info is not None for r in schema.returns]
    random, batch_norm = torch.Tag.nondeterministic_seeded in func.tags, packet in BATCH_NORM
    once, talks = _once(func, packet, any(written)), communicates(func)
    return OpFacts(
        name=str(func),
        is_view=bool(aliases) and all(aliases) and not any(written) and packet not in FRESH_CONSTANT,
        fresh_constant=packet in FRESH_CONSTANT,
        written_args=positions if (undeclared := written_by_collective(func)) is None else undeclared,
        written_kwargs=tuple(a.name for i, a in enumerate(arguments) if written[i]),
        random=random,
        batch_norm=batch_norm,
        uninitialised=packet in UNINITIALISED,
        overwriting=packet in OVERWRITING,
        once=None if once is None else Reason(once),
        communicates=talks,
    )


def _once(func: torch._ops.OpOverload, packet: str, writes: bool) -> Once | None:
    if communicates(func):
        return Once.COMMUNICATES
    if func.namespace not in ("aten", "prims", "autoremat"):
        return Once.FOREIGN
    if packet in NEVER_AGAIN:
        return NEVER_AGAIN[packet]
    if "batch_norm" in packet and writes and packet not in BATCH_NORM:
        return Once.STATISTICS
    return None


def tensors_in(tree: Any) -> list[Tensor]:
    """List the tensors in nested arguments or results, in order."""
    if type(tree) is Tensor:
        return [tree]
    if isinstance(tree, Tensor):
        return [tree]
    found: list[Tensor] = []
    _collect((tree,), found)
    return found


def tensors_given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """List the tensors among the arguments of an operator, in order."""
    found: list[Tensor] = []
    _collect(args, found)
    if kwargs:
        _collect(kwargs.values(), found)
    return found


def _collect(items: Iterable[Any], found: list[Tensor]) -> None:
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            _collect(item, found)
        elif isinstance(item, dict):
            _collect(item.values(), found)
