"""How a step of a script uses the forward, by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.engines.torch.eager.fuzz.model import Interruption, Model, objective

# ---- how a step uses the forward ---------------------------------------------------------------------------------

Call = Callable[..., Any]


def once(call: Call, m: Model, xs: list[Tensor], k: int) -> Any:
    result = call(*xs)
    objective(result, k).backward()
    return result


def two_forwards(call: Call, m: Model, xs: list[Tensor], k: int) -> Any:
    results = [call(*xs), call(xs[0] * 0.5, xs[1])]
    for result in results if k % 2 else results[::-1]:
        objective(result, 0).backward()
    return results


def joint(call: Call, m: Model, xs: list[Tensor], k: int) -> Any:
    results = [call(*xs), call(xs[0] * 0.5, xs[1])]
    (objective(results[0], 0) * objective(results[1], 0)).backward()
    return results


def twice(call: Call, m: Model, xs: list[Tensor], k: int) -> Any:
    result = call(*xs)
    objective(result, k).backward(retain_graph=True)
    objective(result, k if k < 4 else k + 1).backward()
    return result


def piecewise(call: Call, m: Model, xs: list[Tensor], k: int) -> Any:
    """One backward per output, the last or the first one first."""
    result = call(*xs)
    tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    for t in tensors if k % 2 else tensors[::-1]:
        t.float().sin().sum().backward(retain_graph=True)
    return result


def gradients(call: Call, m: Model, xs: list[Tensor], k: int) -> Any:
    result = call(*xs)
    return result, torch.autograd.grad(objective(result, 0), list(m.parameters()), allow_unused=True)


def double(call: Call, m: Model, xs: list[Tensor], k: int) -> Any:
    """A gradient penalty."""
    result = call(*xs)
    parameters = [m.linears[0].weight, m.scale, m.linears[1].weight]
    found = torch.autograd.grad(objective(result, 0), parameters, create_graph=True, allow_unused=True)
    penalty = sum((g.square().sum() for g in found if g is not None), torch.zeros(()))
    (penalty + objective(result, 0)).backward()
    return result


def some_inputs(call: Call, m: Model, xs: list[Tensor], k: int) -> Any:
    result = call(*xs)
    objective(result, 0).backward(inputs=[m.linears[0].weight, m.scale])
    return result


def abandoned(call: Call, m: Model, xs: list[Tensor], k: int) -> Any:
    call(*xs)
    return once(call, m, xs, k)


def evaluated(call: Call, m: Model, xs: list[Tensor], k: int) -> Any:
    with torch.no_grad():
        before = call(*xs)
    return before, once(call, m, xs, k)


def interrupted(call: Call, m: Model, xs: list[Tensor], k: int) -> Any:
    """An error in the middle of a forward; then the step itself."""
    m.fails_at = k
    with suppress(Interruption):
        call(*xs)
    m.fails_at = -1
    return once(call, m, xs, 0)


def frozen_part(call: Call, m: Model, xs: list[Tensor], k: int) -> Any:
    m.linears[k % 2].requires_grad_(False)
    try:
        return once(call, m, xs, 0)
    finally:
        m.linears[k % 2].requires_grad_()


def from_graph(call: Call, m: Model, xs: list[Tensor], k: int) -> Any:
    """Inputs that come from a graph outside."""
    result = call(m.linears[1](xs[0]), xs[1] * m.scale)
    objective(result, k).backward()
    return result


def within_autocast(call: Call, m: Model, xs: list[Tensor], k: int) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        result = call(*xs)
    objective(result, k).backward()
    return result


def other_memory(call: Call, m: Model, xs: list[Tensor], k: int) -> Any:
    """Parameters get other memory before the backward; saved ones are read there as they are by then."""
    result = call(*xs)
    for p in list(m.parameters())[k % 2 :: 2]:
        p.data = p.data * 0.9
    objective(result, 0).backward()
    return result


def batched(call: Call, m: Model, xs: list[Tensor], k: int) -> Any:
    """Two gradients at once."""
    result = call(*xs)
    both = torch.stack([objective(result, 0), objective(result, k).square()])
    found = torch.autograd.grad(both, list(m.parameters()), torch.eye(2), allow_unused=True, is_grads_batched=True)
    return result, found


def other_settings(call: Call, m: Model, xs: list[Tensor], k: int) -> Any:
    """A backward in another thread, with other seeds, another default dtype, under autocast and without gradients."""
    result = call(*xs)
    loss = objective(result, k)
    torch.manual_seed(k)
    torch.set_default_dtype(torch.float64)
    failed: list[Exception] = []

    def backward() -> None:
        try:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                loss.backward()
        except Exception as error:  # noqa: BLE001 - a thread hands it on
            failed.append(error)

    try:
        thread = Thread(target=backward)
        thread.start()
        thread.join()
    finally:
        torch.set_default_dtype(torch.float32)
    for error in failed:
        raise error
    return result


USES: dict[str, Callable[[Call, Model, list[Tensor], int], Any]] = {
    "once": once, "two forwards": two_forwards, "joint": joint, "twice": twice, "piecewise": piecewise,
    "gradients": gradients, "double": double, "some inputs": some_inputs, "abandoned": abandoned,
    "evaluated": evaluated, "from graph": from_graph, "within autocast": within_autocast,
    "other memory": other_memory, "batched": batched, "other settings": other_settings,
    "accumulate": once, "interrupted": interrupted, "frozen": frozen_part,
}  # fmt: skip
