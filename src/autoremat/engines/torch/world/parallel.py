"""Deals with DistributedDataParallel and FSDP2 (``fully_shard``) around a model.

Both do their work in the forward's Python code and in autograd hooks: they copy, gather, free and reduce parameters,
buffers and gradients. None of that is the model's computation. So a recording leaves it out (the model has its whole
parameters there, and nothing is sent), a run hides it from the tape, and the account has its bytes as a fixed value.

With FSDP2 a *unit* is what is gathered and freed together. Where a unit frees its parameters after the forward, an
operator that reads them may be rerun only between the unit's gathering in the backward and the end of its backward:
when the backward asks for something that was saved inside the unit.

The private names used here are those of ``torch/nn/parallel/distributed.py`` and
``torch/distributed/fsdp/_fully_shard``, in the versions of torch that ``versions.py`` names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_OF_DDP = ("_pre_forward", "_sync_buffers", "_clear_grad_buffer")
_OF_STATE = ("_root_pre_forward", "_register_pre_backward_hook")
_OF_GROUP = ("pre_forward", "post_forward", "unshard", "wait_for_unshard", "reshard")


class NotSupported(RuntimeError):
    """This way of training with several processes cannot be planned.

    The message says which one it is, and what to do.
    """


@dataclass(frozen=True, eq=False)
class Unit:
    """Parameters that FSDP2 gathers and frees together.

    Attributes:
        group: FSDP2's own object.
        modules: the modules that ``fully_shard`` was called on.
        frees: whether the parameters are freed after the forward, and gathered again for the backward.
        lasting: whether the parameters, or their gradients, are in memory while other units are at work.
    """

    group: Any
    modules: tuple[nn.Module, ...]
    frees: bool
    lasting: bool

    def parameters(self) -> Iterator[tuple[nn.Module, str, Any]]:
        """Yield module, name and FSDP2's object of every parameter.

        A shared parameter comes under each of its names.
        """
        for parameter in self.group.fsdp_params:
            info = parameter._module_info
            yield info.module, info.param_name, parameter
            for module, name in zip(info.shared_modules, info.shared_param_names, strict=True):
                yield module, name, parameter


@dataclass(frozen=True)
class Parallel:
    """What ``torch.distributed`` does around some modules.

    Attributes:
        replicas: the DistributedDataParallel modules among the modules or around them.
        states: FSDP2's state of every module that has one.
        units: FSDP2's units.
        moving: module and name of the parameters whose gradients do not stay where the backward makes them, but move
            into shards or buckets.
    """

    replicas: tuple[nn.parallel.DistributedDataParallel, ...] = ()
    states: tuple[Any, ...] = ()
    units: tuple[Unit, ...] = ()
    moving: tuple[tuple[nn.Module, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.replicas or self.states)


def parallel_of(modules: Sequence[nn.Module]) -> Parallel:
    """Find what is done around these modules and those inside."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Parallel()
    inner = list({id(m): m for root in modules for m in root.modules()}.values())
    ddp = nn.parallel.DistributedDataParallel
    replicas = [m for m in inner if isinstance(m, ddp)]
    active = ddp._get_active_ddp_module()
    if active is not None and active not in replicas and any(m is r for m in active.modules() for r in modules):
        replicas.append(active)
    states = _states(inner)
    units = _units(states)
    return Parallel(tuple(replicas), states, units, (*_in_buckets(replicas), *_in_shards(units)))


def _states(inner: Sequence[nn.Module]) -> tuple[Any, ...]:
    from torch.distributed.fsdp._fully_shard._fsdp_state import _get_module_fsdp_state

    states = (_get_module_fsdp_state(m) for m in inner)
    return tuple({id(s): s for s in states if s is not None}.values())


def _in_buckets(replicas: Sequence[nn.parallel.DistributedDataParallel]) -> Iterator[tuple[nn.Module, str]]:
    views = [r for r in replicas if r.gradient_as_bucket_view and r.require_backward_grad_sync]
    reduced = {id(p) for r in views for p in r._module_parameters}
    for module in (m for r in views for m in r.modules()):
        yield from ((module, name) for name, p in module._parameters.items() if id(p) in reduced)


def _in_shards(units: Sequence[Unit]) -> Iterator[tuple[nn.Module, str]]:
    return ((module, name) for unit in units for module, name, _ in unit.parameters())


def _units(states: Sequence[Any]) -> tuple[Unit, ...]:
    below = {id(s): {id(m) for top in s._modules for m in top.modules()} - {id(top) for top in s._modules}
             for s in states}  # fmt: skip
    units = []
    for state in states:
        own = {id(m) for m in state._modules}
        inside_another = any(own & below[id(s)] for s in states)
        has_others = any(id(m) in below[id(state)] for s in states if s is not state for m in s._modules)
        stays = state._is_root is None and not inside_another and state._auto_reshard_after_forward
        for group in groups_of(state):
            frees = group.post_forward_mesh_info is not None and not stays
            units.append(Unit(group, tuple(state._modules), frees, not frees or has_others))
    return tuple(units)


def groups_of(state: Any) -> list[Any]:
    """List a state's groups of parameters.

    Versions of torch without ``_fsdp_param_groups`` have one group at most.
    """
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is not None:
        return list(groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def check_supported(found: Parallel, modules: Sequence[nn.Module]) -> None:
    """Refuse what cannot be planned.

    Raises:
        NotSupported: FSDP1; mixed precision of DDP; FSDP2 with DTensor parameters, on the CPU, or of quantized ones.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    inner = [m for root in modules for m in root.modules()]
    if any(isinstance(m, FullyShardedDataParallel) for m in inner):
        raise NotSupported("FullyShardedDataParallel (FSDP1) flattens parameters; use fully_shard (FSDP2)")
    if any(r.mixed_precision is not None for r in found.replicas):
        raise NotSupported("mixed_precision of DistributedDataParallel replaces parameters; use torch.autocast")
    if any(r._delay_all_reduce_all_params or r._use_python_reducer for r in found.replicas):
        raise NotSupported("this way of reducing gradients of DistributedDataParallel is not known")
    for unit in found.units:
        if any(p.is_dtensor for p in unit.group.fsdp_params):
            raise NotSupported("fully_shard around parameters that are DTensors already")
        if any(p.offload_to_cpu for p in unit.group.fsdp_params):
            raise NotSupported("fully_shard with its parameters offloaded to the CPU")
        if any(hasattr(p._sharded_local_tensor, "fsdp_pre_all_gather") for p in unit.group.fsdp_params):
            raise NotSupported("fully_shard with an all-gather of the parameters' own")


# ---- recordings ------------------------------------------------------------------------------------------------------


@contextmanager
def absent(parallel: Parallel) -> Iterator[None]:
    """Switch off what is done around the modules, within this block.

    The modules themselves compute what they always compute.
    """
    with ExitStack() as stack:
        for replica in parallel.replicas:
            replaced(stack, replica, "_pre_forward", lambda *args, **kwargs: (args, kwargs))
            replaced(stack, replica, "_post_forward", _cloned if hands_out_clones(replica) else _first)
        for state in parallel.states:
            replaced(stack, state, "_training_state", state._training_state)
            replaced(stack, state, "_root_pre_forward", _inputs)
            replaced(stack, state, "_register_pre_backward_hook", _first)
            replaced(stack, state, "_states_to_forward_prefetch", [])
            to_run = state._modules_to_run_forward  # FSDP2's hooks hold this very set
            stack.callback(to_run.update, set(to_run))
            stack.callback(to_run.clear)
        for unit in parallel.units:
            replaced(stack, unit.group, "pre_forward", _inputs)
            replaced(stack, unit.group, "post_forward", lambda module, inputs, output: output)
        yield


def hands_out_clones(replica: nn.parallel.DistributedDataParallel) -> bool:
    """Tell whether DistributedDataParallel's next forward returns clones.

    They are clones of what its module returns (``_DDPSink`` in ``torch/nn/parallel/distributed.py``, 2.13).
    """
    first = replica.static_graph and not replica._static_graph_delay_allreduce_enqueued
    sink = (replica.find_unused_parameters and not replica.static_graph) or first
    return bool(sink and replica._ddp_sink_clone)


def _inputs(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return args, kwargs


def _first(output: Any) -> Any:
    return output


class _Clone(torch.autograd.Function):
    """Does what ``_DDPSink`` of DistributedDataParallel does in the forward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        return tuple(t.clone() if isinstance(t, Tensor) else t for t in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads


def _cloned(output: Any) -> Any:
    leaves, structure = torch.utils._pytree.tree_flatten(output)
    clones = _Clone.apply(*leaves)
    kept = [x if isinstance(x, Tensor) and x.grad_fn is None else c for x, c in zip(leaves, clones, strict=True)]
    return torch.utils._pytree.tree_unflatten(kept, structure)


def whole_parameter(unit: Unit, parameter: Any) -> Tensor:
    """Make a parameter of full size, as if gathered, with arbitrary content."""
    made = torch.empty(parameter._orig_size, dtype=_dtype(parameter), device=unit.group.device)
    return nn.Parameter(made, requires_grad=parameter.sharded_param.requires_grad)


def _dtype(parameter: Any) -> torch.dtype:
    return parameter.mp_policy.param_dtype or parameter.sharded_param.dtype


# ---- the account -----------------------------------------------------------------------------------------------------


def resident_bytes(parallel: Parallel) -> dict[str, int]:
    """Bound the bytes at any moment of a step, by purpose.

    For DistributedDataParallel these are its buckets. For FSDP2 they are the shards of parameters and gradients; the
    whole parameters and gradients of units that keep them; and, for the other units, the most that is in memory while
    one of them is at work: its gathered parameters, together with those of the next unit or the buffer that they come
    from, its gradients, and the buffer of a reduction.
    """
    found = {
        "buckets of DistributedDataParallel": sum(map(_bucket_bytes, parallel.replicas)),
        "shards of fully_shard": sum(map(_shard_bytes, parallel.units)),
        "parameters and gradients gathered by fully_shard": _gathered_bytes(parallel.units),
    }
    return {label: nbytes for label, nbytes in found.items() if nbytes}


def _bucket_bytes(replica: nn.parallel.DistributedDataParallel) -> int:
    """Add up the buckets of a replica.

    Where buckets are the gradients themselves, existing gradients are not counted again.
    """
    parameters = [p for p in replica._module_parameters if p.requires_grad]
    total = sum(p.nbytes for p in parameters)
    if replica.gradient_as_bucket_view:  # existing gradients are counted as gradients already
        total -= sum(p.nbytes for p in parameters if p.grad is not None)
    return total


def _shard_bytes(unit: Unit) -> int:
    return sum(p._sharded_param_data.nbytes * (1 + p.sharded_param.requires_grad) for p in unit.group.fsdp_params)


def _gathered_bytes(units: Sequence[Unit]) -> int:
    if not units:
        return 0
    whole, gradients, reduced = zip(*map(_unit_bytes, units), strict=True)
    stays = sum(w + g for w, g, u in zip(whole, gradients, units, strict=True) if u.lasting)
    unreduced = sum(r for r, u in zip(reduced, units, strict=True) if keeps_whole_gradients(u))
    buffers = max(getattr(u.group, "reduce_scatter_max_input_buffers", 1) for u in units)
    buffers += any(u.group._is_hsdp for u in units)
    forward = 3 * max(whole)
    backward = 2 * max(whole) + max(gradients) + buffers * max(reduced)
    return stays + unreduced + max(forward, backward)


def keeps_whole_gradients(unit: Unit) -> bool:
    """Tell whether whole gradients wait for a later step to reduce them."""
    waiting = any(p.unsharded_accumulated_grad is not None for p in unit.group.fsdp_params)
    return waiting or not unit.group.reduce_grads


def _unit_bytes(unit: Unit) -> tuple[int, int, int]:
    """Return whole parameters, gradients, and gradients in the reduction's type, in bytes."""
    whole = gradients = reduced = 0
    for p in unit.group.fsdp_params:
        n = p.padded_sharded_param_size.numel() * unit.group.mesh_info.mesh.size()
        dtype = _dtype(p)
        whole += n * dtype.itemsize
        if p.sharded_param.requires_grad:
            gradients += n * dtype.itemsize
            reduced += n * (p.mp_policy.reduce_dtype or dtype).itemsize
    return whole, gradients, reduced


# ---- runs ------------------------------------------------------------------------------------------------------------


@contextmanager
def hidden(parallel: Parallel) -> Iterator[None]:
    """Hide what is done around the modules from function modes."""
    with ExitStack() as stack:
        for thing, names in (
            *((r, _OF_DDP) for r in parallel.replicas),
            *((s, _OF_STATE) for s in parallel.states),
            *((u.group, _OF_GROUP) for u in parallel.units),
        ):
            for name in names:
                replaced(stack, thing, name, _unseen(getattr(thing, name)))
        yield


def _unseen(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return method(*args, **kwargs)

    return run


def replaced(stack: ExitStack, thing: Any, name: str, value: Any) -> None:
    """Replace an attribute of this one object until the stack unwinds."""
    attributes: dict[str, Any] = vars(thing)
    if name in attributes:
        stack.callback(attributes.__setitem__, name, attributes[name])
    else:
        stack.callback(attributes.pop, name, None)
    attributes[name] = value


def signature(parallel: Parallel) -> tuple[Any, ...]:
    """Describe what may change between steps and matters to a plan.

    It decides which operators run, or what is in memory.
    """
    replicas = [(hands_out_clones(r), r.require_backward_grad_sync) for r in parallel.replicas]
    units = [(u.frees, keeps_whole_gradients(u)) for u in parallel.units]
    return (*replicas, *units)
