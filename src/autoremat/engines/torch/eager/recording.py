"""Makes the program of a step from the shadow of its forward.

The backward is run on fake tensors, operators are measured, and the path is taken down.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autoremat.engines.torch.eager.composite import Composite
from autoremat.engines.torch.eager.facts import generators_kept, unseen
from autoremat.engines.torch.eager.path import Call, Path
from autoremat.engines.torch.eager.shadow import Shadow
from autoremat.engines.torch.operators.history import is_leaf
from autoremat.engines.torch.operators.timing import Progress
from autoremat.engines.torch.recording.recording import Recording
from autoremat.engines.torch.recording.whole import Whole
from autoremat.engines.torch.world.modules import named_tensors
from autoremat.engines.torch.world.outputs import differentiable_outputs
from autoremat.engines.torch.world.parallel import Parallel, resident_bytes
from autoremat.engines.torch.world.problems import NOTHING, NothingDifferentiable
from autoremat.program import Program


def know_the_world(
    shadow: Shadow, modules: Sequence[nn.Module], args: Any, kwargs: Any, *, with_gradients: bool
) -> None:  # fmt: skip
    """Tell the shadow what exists before the step.

    These are parameters, buffers and inputs; and gradients, if they count. Otherwise the step is recorded as one that
    finds none, and they are added to its program (``world.gradients``).
    """
    for name, kind, tensor in named_tensors(modules):
        if nn.parameter.is_lazy(tensor):
            continue
        module = name.rpartition(".")[0]
        shadow.know(tensor, name, kind, module)
        if with_gradients and is_leaf(tensor) and tensor.grad is not None:
            shadow.know_gradient(tensor, f"{name}.grad", module)
    leaves = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    for i, tensor in enumerate(leaves):
        shadow.know(tensor, f"input {i}", "input")


def record_backward(
    shadow: Shadow, result: Any, named: Sequence[tuple[str, Tensor]], moving: Sequence[Tensor] = (), *,
    with_gradients: bool,
) -> None:  # fmt: skip
    """Run the backward of the shadowed forward on fake tensors.

    Args:
        shadow: that has seen the forward.
        result: of the callable.
        named: parameters by name.
        moving: parameters whose gradients leave their memory as soon as they are complete.
        with_gradients: the backward adds to existing gradients.

    Raises:
        NothingDifferentiable: nothing returned requires grad.
    """
    outputs = differentiable_outputs(result)
    if not outputs:
        raise NothingDifferentiable(NOTHING)
    recorder = shadow.recorder
    cached, end = shadow.forward_ends(), len(recorder.ops)
    twins = [shadow.twin(t) for t in outputs]
    names = {id(shadow.twin(t)): n for n, t in named}
    shadow.forget_graph(frozenset())  # what nobody's result leads to has died by now
    del result, outputs
    with ExitStack() as stack:
        stack.enter_context(generators_kept())
        stack.enter_context(unseen())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(shadow.mode)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(recorder)
        leaves = shadow.twins.leaves()
        if not with_gradients:
            for _, tensor in named:
                shadow.twin(tensor).grad = None
        for leaf in leaves:  # a hook left in place would hold the recorder, in a circle through torch's graph
            stack.callback(leaf.register_hook(recorder.log.accumulates).remove)
        with recorder.seeded(twins) as start:
            recorder.backward = True
            start()
            for leaf in leaves:
                if leaf.grad is not None:
                    name = names.get(id(leaf), "")
                    recorder.log.call_gradient(leaf.grad, name, name.rpartition(".")[0])
            recorder.finish()
            for n in cached:
                if recorder.values[n].forever:
                    recorder.values[n].forever, recorder.values[n].died = False, end
            gone = {id(shadow.twin(t)) for t in moving}
            recorder.log.leave_gradients([leaf.grad for leaf in leaves if leaf.grad is not None and id(leaf) in gone])


def program_of(
    shadow: Shadow, calls: Sequence[Call], name: str, *, optimizer_state_bytes: int, optimizer_scratch_bytes: int,
    parallel: Parallel, progress: Progress | None, limit: Callable[[Program], int] | None, timing: str = "measure",
) -> Program:  # fmt: skip
    """Make the program of a recorded step.

    Operators are measured where there is room for that, else estimated.
    """
    beside = resident_bytes(parallel)
    whole = Whole(
        name, "fake", optimizer_state_bytes, optimizer_scratch_bytes, beside, timing, True, limit, progress
    )  # fmt: skip
    return whole.program(finished(shadow, calls))


def finished(shadow: Shadow, calls: Sequence[Call]) -> Recording:
    """Finish a recording with what the real step knows of its calls."""
    recorder = shadow.recorder
    for op in recorder.ops:
        if op.facts is None or op.backward or op.call < 0:
            continue
        if op.facts.uninitialised and not calls[op.call].uninitialised:
            op.facts = replace(op.facts, uninitialised=False)  # the call itself fills the memory
        if op.call in shadow.once:
            op.facts = replace(op.facts, once=op.facts.once or shadow.once[op.call])
    return recorder.recording()


def largest_op_bytes(shadow: Shadow) -> int:
    """Return the most bytes that measuring one recorded op takes.

    That is what the op reads and makes.
    """
    values = shadow.recorder.values
    return max((sum(values[n].nbytes for n in (*op.reads, *op.writes)) for op in shadow.recorder.ops), default=0)


def path_of(shadow: Shadow, calls: Sequence[Call], n_packs: int, composites: Sequence[Composite]) -> Path:
    """Return the path: calls, what autograd saved, what passes asked for."""
    recorder = shadow.recorder
    asks = tuple(shadow.packs.pack_of.get(op.packed, -1) for op in recorder.ops if op.is_ask)
    last = {shadow.packs.pack_of[op.packed]: op.reads[0] for op in recorder.ops if op.packed in shadow.packs.pack_of}
    packed = tuple(
        v if (v := shadow.packs.number_of.get(j)) is not None and last.get(j, v) == v else None for j in range(n_packs)
    )
    return Path(tuple(calls), packed, asks, tuple(composites))
