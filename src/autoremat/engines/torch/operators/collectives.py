"""Collectives: operators that talk to other processes. They run only once.

A recording does not run them at all. It happens in one process, the others may be anywhere, and a collective that only
one process calls waits for ever. So during a recording every collective returns what it would return if each of the
other processes contributed what this one does: shapes, and the path through the callable, are right; nothing is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

NAMESPACES: Final = ("c10d", "_c10d_functional", "_dtensor")
"""Namespaces of the operators that talk to other processes."""

WITHOUT_OUTPUT: Final = frozenset({"c10d.send", "c10d.barrier", "c10d.monitored_barrier_", "c10d.check_for_nan"})


def communicates(func: torch._ops.OpOverload) -> bool:
    """Tell whether the operator talks to other processes."""
    return func.namespace in NAMESPACES


def written_by_collective(func: torch._ops.OpOverload) -> tuple[int, ...] | None:
    """Return the positions of the arguments that a collective writes.

    None where the schema declares what is written. Schemas of ``c10d`` do not declare it
    (``torch/csrc/distributed/c10d/Ops.cpp``, torch 2.13).
    """
    if func.namespace != "c10d":
        return None
    packet = str(func.overloadpacket)
    return (0,) if packet.endswith("_") and packet not in WITHOUT_OUTPUT else ()


def run_alone(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a collective gives if all processes contribute the same."""
    with torch.no_grad():
        return _of_c10d(func, args) if func.namespace == "c10d" else _functional(func, args, kwargs)


def _of_c10d(func: torch._ops.OpOverload, args: Sequence[Any]) -> Any:
    if written_by_collective(func):
        sent = _flat(args[1]) if len(args) > 1 else []
        for out in _flat(args[0]):
            _fill(out, sent)
    work = torch._C._distributed_c10d.FakeWork().boxed()
    returned = len(func._schema.returns)
    return ((), work, (args[0], work))[returned]


def _functional(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    name = func._schema.name.partition("::")[2]
    if name == "wait_tensor" or name.endswith("_") or "mesh_get" in name:
        return args[0] if "mesh_get" not in name else func(*args, **kwargs)
    sent = _flat(args[0])
    if any(isinstance(t, FakeTensor) for t in sent):
        return func(*args, **kwargs)  # its fake kernel
    on_meta = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (tuple(args), dict(kwargs)))
    shapes = func(*on_meta[0], **on_meta[1])
    made = torch.utils._pytree.tree_map_only(Tensor, lambda t: torch.empty_like(t, device=sent[0].device), shapes)
    for out, own in zip(_flat(made), sent, strict=False):
        _fill(out, [own])
    return made


def _fill(out: Tensor, sent: Sequence[Tensor]) -> None:
    """Overwrite a tensor with what was sent, repeated as needed."""
    given = sum(t.numel() for t in sent)
    if given and out.numel():
        flat = torch.cat([t.reshape(-1) for t in sent])
        out.copy_(flat.repeat(-(-out.numel() // given))[: out.numel()].view(out.shape))


def _flat(tree: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]
