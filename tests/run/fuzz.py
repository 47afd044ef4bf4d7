"""Random small torch programs, trained plainly and with autoremat, compared to the last bit.

A *script* is a program as data: what the forward does with a pool of tensors, what it returns, how several steps use
it, and how autoremat is to run it. Its ``repr`` is Python that makes it again: a failure that hypothesis has shrunk can
be pasted into a test as it is.
"""

from __future__ import annotations

import random
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import autoremat
from autoremat.engines.torch.eager.first import FirstStep
from autoremat.engines.torch.eager.session import Session
from autoremat.engines.torch.eager.tape import Reports
from autoremat.engines.torch.operators import timing
from autoremat.engines.torch.operators.timing import Cost
from autoremat.engines.torch.world.memory_account import account, resident
from autoremat.planner import beside
from autoremat.planner.beside import Here, Wanted
from autoremat.planner.search.calls import planned_as, unfolded
from autoremat.planner.search.tables import tables_of
from autoremat.planner.search.unrolled import unroll
from autoremat.program import InfeasibleBudget, Plan, Program, Schedule, simulate
from tests.run.compare import frozen, off_path, plan_that_keeps_nothing, same

WIDTH = 8
SCALARS_BYTES = 64
SURPRISING = frozenset({"block", "attention", "gru"})
SLOTS = 5
"""The pool: slots 0 and 1 begin as the inputs, 2 as a linear layer of slot 0, 3 and 4 as views of that one."""


# ---- a script as data --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Do:
    """``pool[to] = op(pool[a], pool[b])``; ``k`` chooses among variants."""

    op: str
    to: int
    a: int
    b: int = 0
    k: int = 0


@dataclass(frozen=True)
class If:
    """A branch that the numbers in a tensor decide."""

    on: int
    then: tuple[Instruction, ...]
    otherwise: tuple[Instruction, ...] = ()


@dataclass(frozen=True)
class In:
    """A region: instructions under a context manager of ``REGIONS``."""

    region: str
    body: tuple[Instruction, ...]


Instruction = Do | If | In


@dataclass(frozen=True)
class Step:
    """One training step: how the forward is used (``USES``), on which inputs, in which mode."""

    use: str = "once"
    rows: int = 4
    sign: int = 1
    training: bool = True
    input_grad: bool = False
    k: int = 0


@dataclass(frozen=True)
class Way:
    """How autoremat runs it.

    ``nothing``: whatever may be computed again is, again and again; ``random``: values drop at random, ``seed``;
    ``budget``: the best plan for a budget, a ``share`` of the way from the floor to the plain peak; ``online``: off the
    path from the first operator on, nothing allowed; ``measured``: as ``budget``, and the peak is measured, too. Where
    three does not divide ``seed``, it is recorded on real tensors, which is faster.
    """

    mode: str = "nothing"
    seed: int = 0
    share: float = 0.0


@dataclass(frozen=True)
class Script:
    """A whole program: the forward's body; what it returns (``RETURNS``) beside a loss of the whole pool; the steps."""

    body: tuple[Instruction, ...]
    returns: str = "loss"
    slots: tuple[int, ...] = (2,)
    steps: tuple[Step, ...] = (Step(), Step())
    way: Way = field(default_factory=Way)


# ---- what an instruction does ------------------------------------------------------------------------------------


class Scale(torch.autograd.Function):
    """Saves its input, and a tensor on ``ctx``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.y = y.detach().tanh()
        return x * ctx.y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * ctx.y, (grad * x).cos()


class Twist(torch.autograd.Function):
    """Saves what it returns, returns two tensors, one of them not differentiable; reads what it saved twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        y, index = x.sigmoid(), x > 0
        ctx.save_for_backward(y, index)
        ctx.mark_non_differentiable(index)
        ctx.k = k
        return y, index

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        y, index = ctx.saved_tensors
        again = ctx.saved_tensors[0]
        return torch.where(index, grad * y, grad * again * ctx.k), None


class Dirty(torch.autograd.Function):
    """Works in place and says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.tanh_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class Half(torch.autograd.Function):
    """Returns a view of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


def fit(y: Tensor, x: Tensor) -> Tensor:
    """Something of ``y`` in the shape of ``x``, a view where possible."""
    if y.shape == x.shape:
        return y
    return y.reshape(-1)[: x.numel()].view(x.shape) if y.numel() >= x.numel() else y.mean()


def rows(x: Tensor) -> Tensor:
    """The tensor as rows of ``WIDTH``, as float32."""
    n = x.numel() // WIDTH
    flat = x.reshape(-1)
    return (flat[: n * WIDTH].view(n, WIDTH) if n else flat[:1].expand(1, WIDTH)).float()


def two(x: Tensor) -> Tensor:
    """The tensor with two dimensions at least."""
    return x if x.dim() >= 2 else x.reshape(1, -1)


def half(x: Tensor, k: int) -> Tensor:
    """A slice of the tensor: rows or columns, from some place on, all or every second one."""
    x, dim = two(x), k % 2
    if x.size(dim) < 2:
        return x
    begin = (k >> 1) % 2
    return x[begin :: 1 + (k >> 2)] if dim == 0 else x[:, begin :: 1 + (k >> 2)]


def part(x: Tensor, k: int, how: Callable[[Tensor], tuple[Tensor, ...]]) -> Tensor:
    """One of several tensors."""
    found = how(x)
    return found[k % len(found)]


def set_item(x: Tensor, y: Tensor, k: int) -> Tensor:
    view = half(x, k)
    view[:] = fit(y, view)
    return x


def indices(x: Tensor, k: int) -> Tensor:
    """Some indices of rows, which the numbers decide."""
    return (two(x).detach().float().sum(1) * 7).abs().long() % two(x).size(0) if k % 2 else torch.arange(two(x).size(0))


def indexed(x: Tensor, y: Tensor, k: int) -> Tensor:
    """A row or more written by index, in place."""
    if x.dim() < 1:
        return x.add_(1)
    index = torch.arange(x.size(0)).flip(0)[: 1 + k % 2]
    value = fit(y, x[index]).to(x.dtype)
    if k < 4:
        return x.index_put_((index,), value, accumulate=k % 2 == 0)
    return x.index_add_(0, index, value.expand_as(x[index]))


def complexes(x: Tensor, k: int) -> Tensor:
    """Through complex numbers and lazy conjugation."""
    z = torch.view_as_complex(rows(x).reshape(-1, 2))
    z = z * z.conj() if k % 2 else z.conj() * 1j
    return z.imag if k & 2 else torch.view_as_real(z.resolve_conj())


def attention(m: Model, x: Tensor, y: Tensor, k: int) -> Tensor:
    q, kv = rows(x)[None, None], rows(y)[None, None]
    return F.scaled_dot_product_attention(q, kv, kv, dropout_p=0.3 if k % 2 and m.training else 0.0)[0, 0]


def under_no_grad(call: Callable[[], Any]) -> None:
    with torch.no_grad():
        call()


def swapped(x: Tensor, y: Tensor) -> Tensor:
    """Another tensor's memory under the same name."""
    x.data = fit(y, x).detach().to(x.dtype).expand_as(x).clone()
    return x


def kept(m: Model, x: Tensor, k: int) -> Tensor:
    """Something that outlives the step, in a list of the module."""
    m.kept[k % 2] = x if k & 2 else x.detach()
    return x


def buffered(m: Model, x: Tensor, k: int) -> Tensor:
    """A buffer that the forward overwrites."""
    with torch.no_grad():
        m.level.copy_(x.mean()) if k % 2 else m.level.mul_(0.9).add_(x.mean())
    return x * m.level if k & 2 else x


def with_gradient_inside(x: Tensor, y: Tensor) -> Tensor:
    """A backward pass inside the forward."""
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad((z.sigmoid() * z).sum(), z)
    return x * grad


Operation = Callable[["Model", Tensor, Tensor, int], Tensor]

POINTWISE: dict[str, Operation] = {
    "relu": lambda m, x, y, k: x.relu(),
    "gelu": lambda m, x, y, k: F.gelu(x),
    "silu": lambda m, x, y, k: F.silu(x),
    "sigmoid": lambda m, x, y, k: x.sigmoid(),
    "tanh": lambda m, x, y, k: x.tanh(),
    "sin": lambda m, x, y, k: x.sin(),
    "exp": lambda m, x, y, k: x.clamp(-3, 3).exp(),
    "square": lambda m, x, y, k: x.tanh().square(),
    "sqrt": lambda m, x, y, k: (x.abs() + 1).sqrt(),
    "scale": lambda m, x, y, k: x * (0.5 + k),
    "softmax": lambda m, x, y, k: two(x).softmax(k % 2),
    "add": lambda m, x, y, k: x + fit(y, x),
    "mul": lambda m, x, y, k: x * fit(y, x).sigmoid(),
    "product": lambda m, x, y, k: x * fit(y, x),
    "div": lambda m, x, y, k: x / (fit(y, x).abs() + 1),
    "where": lambda m, x, y, k: torch.where(x > 0, x, fit(y, x)),
    "maximum": lambda m, x, y, k: torch.maximum(x, fit(y, x).to(x.dtype)),
    "lerp": lambda m, x, y, k: torch.lerp(x, fit(y, x).to(x.dtype), 0.25),
    "clone": lambda m, x, y, k: x.clone(),
    "cast": lambda m, x, y, k: x.to((torch.bfloat16, torch.float64, torch.float32)[k % 3]),
    "constant": lambda m, x, y, k: x + torch.tensor([1.0, 2.0])[k % 2],
    "ones": lambda m, x, y, k: torch.ones_like(x) * fit(y, x),
    "empty": lambda m, x, y, k: torch.empty_like(x).copy_(fit(y, x)),
}
SHAPES: dict[str, Operation] = {
    "sum": lambda m, x, y, k: two(x).sum(k % 2, keepdim=k > 3),
    "mean": lambda m, x, y, k: x.mean(),
    "cumsum": lambda m, x, y, k: two(x).cumsum(k % 2) / 8,
    "sort": lambda m, x, y, k: two(x).sort(k % 2).values,
    "max": lambda m, x, y, k: two(x).max(k % 2).values,
    "cat": lambda m, x, y, k: torch.cat([two(x), two(fit(y, x).expand_as(x)).to(x.dtype)], k % 2)[:16, :16],
    "stack": lambda m, x, y, k: torch.stack([rows(x), rows(x).sin()])[k % 2],
    "gather": lambda m, x, y, k: two(x)[indices(y if two(y).size(0) <= two(x).size(0) else x, k)],
    "norm": lambda m, x, y, k: x / (x.norm() + 1),
    "complex": lambda m, x, y, k: complexes(x.contiguous(), k),
    "fft": lambda m, x, y, k: torch.fft.rfft(rows(x)).abs(),
}
LAYERS: dict[str, Operation] = {
    "linear": lambda m, x, y, k: m.linears[k % 2](rows(x)),
    "matmul": lambda m, x, y, k: rows(x) @ rows(x).t() @ rows(x) / 8,
    "tied": lambda m, x, y, k: F.linear(rows(x), m.linears[k % 2].weight.t()),
    "conv": lambda m, x, y, k: m.conv(rows(x).t()[None])[0],
    "batch_norm": lambda m, x, y, k: m.batch_norm[k % 2](torch.cat([rows(x), rows(x).sin()])),
    "layer_norm": lambda m, x, y, k: m.layer_norm(rows(x)),
    "embedding": lambda m, x, y, k: m.embedding(indices(rows(x), 1) % 4),
    "attention": attention,
    "gru": lambda m, x, y, k: m.gru(rows(x)[:2])[0],
    "block": lambda m, x, y, k: m.block(rows(x)),
}
VIEWS: dict[str, Operation] = {
    "half": lambda m, x, y, k: half(x, k),
    "t": lambda m, x, y, k: two(x).transpose(0, 1),
    "reshape": lambda m, x, y, k: x.reshape(-1) if k % 2 else x.reshape(2, -1) if x.numel() % 2 == 0 else x,
    "select": lambda m, x, y, k: x[k % x.size(0)] if x.dim() else x[None],
    "expand": lambda m, x, y, k: (x.reshape(-1)[:4, None].expand(-1, 3)) if k % 2 else x.expand(2, *x.shape)[k % 2],
    "chunk": lambda m, x, y, k: part(two(x), k, lambda t: t.chunk(2, k & 1)),
    "unbind": lambda m, x, y, k: part(two(x), k, lambda t: t.unbind(0)),
    "diagonal": lambda m, x, y, k: two(x).diagonal(),
    "as_strided": lambda m, x, y, k: x.as_strided((2, 2), (2, 1)) if x.numel() > 3 and x.is_contiguous() else x,
    "view_as": lambda m, x, y, k: x.view_as(x),
    "detach": lambda m, x, y, k: x.detach(),
    "same": lambda m, x, y, k: x,
}
IN_PLACE: dict[str, Operation] = {
    "add_": lambda m, x, y, k: x.add_(fit(y, x)),
    "mul_": lambda m, x, y, k: x.mul_(fit(y, x).detach() if k % 2 else 0.5),
    "relu_": lambda m, x, y, k: x.relu_(),
    "tanh_": lambda m, x, y, k: x.tanh_(),
    "zero_": lambda m, x, y, k: x.zero_(),
    "fill_": lambda m, x, y, k: x.fill_(0.5),
    "copy_": lambda m, x, y, k: x.copy_(fit(y, x)),
    "clamp_": lambda m, x, y, k: x.clamp_(-1, 1),
    "masked_fill_": lambda m, x, y, k: x.masked_fill_(x.detach() > 0.5, 0.5),
    "set_item": lambda m, x, y, k: set_item(x, y, k),
    "index_": lambda m, x, y, k: indexed(x, y, k),
    "half_": lambda m, x, y, k: (half(x, k).mul_(2), x)[1],
    "half_tanh_": lambda m, x, y, k: (half(half(x, k), k >> 1).tanh_(), x)[1],
    "view_of_clone_": lambda m, x, y, k: half(x.clone(), k).add_(1),
    "clone_": lambda m, x, y, k: set_item(x.clone(), y, k),
    "out": lambda m, x, y, k: torch.add(x.detach(), 1, out=torch.empty_like(x)) * fit(y, x),
    "detached_": lambda m, x, y, k: (under_no_grad(lambda: x.mul_(0.5)), x)[1],
    "data_": lambda m, x, y, k: (x.data.mul_(0.5), x)[1],
}
RANDOM: dict[str, Operation] = {
    "dropout": lambda m, x, y, k: F.dropout(x, 0.3, m.training),
    "dropout_": lambda m, x, y, k: F.dropout(x.clone() if k % 2 else x, 0.3, m.training, inplace=True),
    "noise": lambda m, x, y, k: x + torch.randn(x.shape) * 0.1,
    "own_noise": lambda m, x, y, k: x * torch.rand(x.shape, generator=m.generator),
    "bernoulli": lambda m, x, y, k: x * torch.bernoulli(fit(y, x).detach().float().sigmoid(), generator=m.generator),
    "uniform_": lambda m, x, y, k: x * torch.empty(x.shape).uniform_(generator=m.generator if k % 2 else None),
    "normal_": lambda m, x, y, k: x.clone().normal_(generator=m.generator if k % 2 else None) + x,
    "rrelu": lambda m, x, y, k: F.rrelu(x, training=m.training),
    "permuted": lambda m, x, y, k: two(x)[torch.randperm(two(x).size(0), generator=m.generator if k % 2 else None)],
    "seed": lambda m, x, y, k: (torch.manual_seed(k), x + torch.rand(()))[1],
    "python_random": lambda m, x, y, k: x * random.random(),
}
OTHERS: dict[str, Operation] = {
    "scale_function": lambda m, x, y, k: Scale.apply(x, fit(y, x).expand_as(x)),
    "twist_function": lambda m, x, y, k: Twist.apply(x, k)[0],
    "dirty_function": lambda m, x, y, k: Dirty.apply(x.clone() if k % 2 else x),
    "view_function": lambda m, x, y, k: Half.apply(x),
    "kept": lambda m, x, y, k: kept(m, x, k),
    "kept_before": lambda m, x, y, k: x + fit(m.kept[k % 2].detach(), x).to(x.dtype),
    "buffer": lambda m, x, y, k: buffered(m, x, k),
    "parameter_": lambda m, x, y, k: (under_no_grad(lambda: m.scale.mul_(0.9)), x * m.scale)[1],
    "parameter": lambda m, x, y, k: x * m.scale,
    "leaf": lambda m, x, y, k: x.detach().clone().requires_grad_(),
    "swapped": lambda m, x, y, k: swapped(x.clone(), y),
    "numpy": lambda m, x, y, k: x + torch.from_numpy(np.sin(x.detach().float().numpy())),
    "item": lambda m, x, y, k: x * x.detach().float().tanh().mean().item(),
    "nonzero": lambda m, x, y, k: torch.cat([x[x > 0], x.reshape(-1)[:1]]),
    "foreach": lambda m, x, y, k: torch._foreach_mul([x, x.sin()], 0.5)[k % 2],
    "foreach_": lambda m, x, y, k: (torch._foreach_add_([x, x.clone()], 0.5), x)[1],
    "list": lambda m, x, y, k: torch.stack([t * 2 for t in two(x).unbind(0)][::-1]),
    "gradient": lambda m, x, y, k: with_gradient_inside(x, y),
    "hook": lambda m, x, y, k: hooked(x * 2),
    "checkpoint": lambda m, x, y, k: torch.utils.checkpoint.checkpoint(m.checkpoint, rows(x), use_reentrant=False),
}
GROUPS: dict[str, dict[str, Operation]] = {
    "pointwise": POINTWISE, "shapes": SHAPES, "layers": LAYERS, "views": VIEWS, "in place": IN_PLACE,
    "random": RANDOM, "others": OTHERS,
}  # fmt: skip
OPS: dict[str, Operation] = {name: op for group in GROUPS.values() for name, op in group.items()}

GROUP_OF = {name: group for group, ops in GROUPS.items() for name in ops}

REGIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "hooks": torch.autograd.graph.save_on_cpu,
}


def hooked(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda grad: grad * 0.5)
    return x


class Block(nn.Module):
    """A module within the module."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.norm = linear, nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(F.gelu(self.linear(self.norm(x))), 0.2, self.training)


PARTS: dict[str, Callable[[Any], nn.Module]] = {
    "conv": lambda m: nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
    "batch_norm": lambda m: nn.ModuleList([nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH, momentum=None)]),
    "layer_norm": lambda m: nn.LayerNorm(WIDTH),
    "embedding": lambda m: nn.Embedding(4, WIDTH),
    "gru": lambda m: nn.GRU(WIDTH, WIDTH),
    "block": lambda m: Block(m.linears[0]),
    "checkpoint": lambda m: Block(m.linears[1]),
}
"""Modules that ops of the same name use."""


def leaves_of(body: tuple[Instruction, ...]) -> Iterator[Do]:
    """The instructions of a body, those in branches and regions included."""
    for i in body:
        if isinstance(i, Do):
            yield i
        elif isinstance(i, If):
            yield from leaves_of(i.then + i.otherwise)
        else:
            yield from leaves_of(i.body)


class Interruption(Exception):
    """Not an error of torch's."""


class Model(nn.Module):
    """Runs the body of a script."""

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        for name in {i.op for i in leaves_of(script.body)}.intersection(PARTS):
            setattr(self, name, PARTS[name](self))
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("level", torch.ones(()))
        self.generator = torch.Generator().manual_seed(3)
        self.kept: list[Tensor] = [torch.zeros(()), torch.ones(())]
        self.fails_at = -1

    def forward(self, x: Tensor, y: Tensor) -> Any:
        h = self.linears[0](x)
        pool = [x, y, h, h[: 1 + x.size(0) // 2], h.t()]
        self.run(self.script.body, pool)
        found = [pool[s] for s in self.script.slots]
        loss = loss_of(pool) + self.scale.square()
        del pool, h
        return RETURNS[self.script.returns](loss, found)

    def run(self, body: tuple[Instruction, ...], pool: list[Tensor]) -> None:
        for n, i in enumerate(body):
            if n == self.fails_at:
                raise Interruption
            if isinstance(i, Do):
                pool[i.to] = OPS[i.op](self, pool[i.a], pool[i.b], i.k)
            elif isinstance(i, If):
                self.run(i.then if pool[i.on].detach().float().mean() > 0 else i.otherwise, pool)
            else:
                with REGIONS[i.region]():
                    self.run(i.body, pool)


def loss_of(tensors: list[Tensor]) -> Tensor:
    """A number that depends on every element of what is differentiable."""
    return sum((t.float().tanh().square().mean() for t in tensors if t.requires_grad), torch.zeros(()))


RETURNS: dict[str, Callable[[Tensor, list[Tensor]], Any]] = {
    "loss": lambda loss, found: loss,
    "tuple": lambda loss, found: (loss, *found, found[0].detach()),
    "dict": lambda loss, found: {"loss": loss, "found": found, "n": len(found), "nothing": None},
    "tensors": lambda loss, found: [*found, loss + 1, {"again": (found[0], found[-1])}],
}


def objective(result: Any, k: int) -> Tensor:
    """What the backward starts from: everything returned that is differentiable, or a part of it."""
    tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    tensors = tensors if k % 2 == 0 else tensors[:1] if k % 4 == 1 else tensors[::-1][:1]
    return sum((t.float().sum() if t.numel() == 1 else t.float().sin().mean() for t in tensors), torch.zeros(()))


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


USES: dict[str, Callable[[Call, Model, list[Tensor], int], Any]] = {
    "once": once, "two forwards": two_forwards, "joint": joint, "twice": twice, "piecewise": piecewise,
    "gradients": gradients, "double": double, "some inputs": some_inputs, "abandoned": abandoned,
    "evaluated": evaluated, "from graph": from_graph, "within autocast": within_autocast,
    "accumulate": once, "interrupted": interrupted, "frozen": frozen_part,
}  # fmt: skip


# ---- running a script --------------------------------------------------------------------------------------------


def _kind_of(error: Exception) -> str:
    """The kind that plain torch knows: ours are kinds of those."""
    return next(c.__name__ for c in type(error).__mro__ if not c.__module__.startswith("autoremat"))


def train(script: Script, wrap: Callable[[Model], Call]) -> Iterator[tuple[str, Any]]:
    """The steps of a script; every number that can be seen, under its name. An error of torch's ends it."""
    torch.manual_seed(0)
    random.seed(0)
    model = Model(script)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    call = wrap(model)
    for n, step in enumerate(script.steps):
        model.train(step.training)
        xs = inputs_of(step, n)
        if step.use != "accumulate":
            optimizer.zero_grad()
        try:
            result = USES[step.use](call, model, xs, step.k)
            optimizer.step()
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            yield f"step {n}, error", (_kind_of(error), str(error))
            return
        for name, seen in visible(model, xs, result):
            yield f"step {n}, {name}", frozen(seen)


def inputs_of(step: Step, n: int) -> list[Tensor]:
    own = torch.Generator().manual_seed(n)
    xs = [torch.randn(step.rows, WIDTH, generator=own) * step.sign for _ in range(2)]
    xs[1].requires_grad_(step.input_grad)
    return xs


def visible(model: Model, xs: list[Tensor], result: Any) -> Iterator[tuple[str, Any]]:
    for i, leaf in enumerate(tree_leaves(result)):
        yield f"result {i}", leaf
    yield "order of nodes", nodes_in_order(result)
    for name, p in model.named_parameters():
        yield f"gradient of {name}", p.grad
        yield f"parameter {name}", p
    yield from model.named_buffers()
    for i, x in enumerate(xs):
        yield f"input {i}", x
        yield f"gradient of input {i}", x.grad
    for i, t in enumerate(model.kept):
        yield f"kept {i}", t
    yield "generator", model.generator
    yield "torch's generator", torch.get_rng_state()
    yield "python's generator", random.getstate()


def nodes_in_order(result: Any) -> tuple[str, ...]:
    """The names of the nodes behind a result, as they were made: that order decides how gradients are added up."""
    found: dict[Any, None] = {}
    pending = [t.grad_fn for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    while pending:
        node = pending.pop()
        if node is not None and node not in found and not hasattr(node, "variable"):
            found[node] = None
            pending += [n for n, _ in node.next_functions]
    return tuple(node.name() for node in sorted(found, key=lambda node: node._sequence_nr()))


COSTS: dict[Any, Cost] = {}
MEASURE = timing._measure_for_real


@contextmanager
def scratch_only() -> Iterator[None]:
    """Operators are measured for what they allocate; all of them take as long."""
    quick = {"_MEASURED": COSTS, "_CACHE_BYTES": 0, "_time_once": lambda *call: 1e-6, "_MAX_REPEATS": 1}
    quick["_LEAST_SECONDS"] = float("inf")
    quick["_measure_for_real"] = MEASURE
    with patch.multiple(timing, **quick):
        yield


class Planner:
    """Plans as a way says."""

    time_limit_seconds = 0.02
    given = None

    def __init__(self, way: Way) -> None:
        self.way = way

    def first(self, fixed_bytes: int) -> Callable[[int], float]:
        share = 0.0 if self.way.mode == "nothing" else self.way.share
        return lambda plain_bytes: share * plain_bytes

    def is_kept(self, module: str, name: str) -> bool:
        return False

    def assembled(self, first: FirstStep) -> Program:
        measured = self.way.mode == "measured"
        with scratch_only() if measured else nullcontext():
            return first.program(
                optimizer_state_bytes=0, optimizer_scratch_bytes=0, progress=None, limit=None,
                timing="measure" if measured else "estimate",
            )  # fmt: skip

    def budget_bytes(self, program: Program, plain_peak_bytes: int, *, anew: bool = False) -> int:
        return plain_peak_bytes

    def share_bytes(self, program: Program, plain_peak_bytes: int) -> int:
        return plain_peak_bytes

    def wanted(self, program: Program, budget: int, seconds: float) -> Wanted:
        return WantedOf(program, budget, seconds, planner=self)

    def solve(self, program: Program, budget: int, seconds: float | None = None) -> Plan:
        if self.way.mode == "nothing":
            return plan_that_keeps_nothing(program)
        if self.way.mode == "random":
            return random_plan(program, random.Random(self.way.seed))
        solver = "auto" if self.way.seed % 4 == 0 else "greedy"
        plain_peak, floor, share = simulate(program).peak_bytes, 0, self.way.share
        while True:
            budget = max(1, min(plain_peak, floor + int(share * (plain_peak - floor))))
            try:
                return autoremat.solve(program, budget, solver=solver, time_limit_seconds=0.02)
            except InfeasibleBudget as error:  # once to know the floor; where the time did not suffice, again
                floor, share = error.floor_bytes, share if not floor else share + 0.1


@dataclass(frozen=True)
class WantedOf(Wanted):
    """A plan that is looked for as the way says, in this process."""

    planner: Planner | None = None

    def found(self) -> Plan:
        assert self.planner is not None
        return self.planner.solve(self.program, self.budget_bytes, self.seconds)


def random_plan(program: Program, random: random.Random) -> Plan:
    """Values stay, go, and go again at random."""
    planned = planned_as(program)
    droppable = sorted(tables_of(planned).droppable)
    keep = frozenset(v for v in droppable if random.random() < 0.3)
    again = tuple(frozenset(v for v in droppable if random.random() < 0.5) for _ in range(random.randrange(3)))
    schedule = unfolded(program, Schedule.from_order(planned, unroll(planned, keep, drop_again=again)))
    peak, plain_peak = simulate(program, schedule).peak_bytes, simulate(program).peak_bytes
    return Plan(program, schedule, peak, peak, plain_peak, peak, 0.0, 0.0, "random")


@dataclass
class Outcome:
    """What became of a script.

    Attributes:
        wrong: what is not as in plain training, or what autoremat should not have said.
        error: what plain torch raised; "" if nothing.
        reruns: operators run again.
        deviations: steps that left the path.
        unplanned: why the step ran without checkpointing.
        peak: budget and peak where that was measured.
    """

    wrong: list[str] = field(default_factory=list)
    error: str = ""
    reruns: int = 0
    deviations: int = 0
    unplanned: str = ""
    peak: tuple[int, int] | None = None


def examine(script: Script) -> Outcome:
    """Run a script plainly and with autoremat."""
    outcome, sessions = Outcome(), list[Session]()

    def wrap(model: Model) -> Call:
        if script.way.mode == "online":
            return _online(model, outcome)
        session = Session(model, Planner(script.way))
        sessions.append(session)
        return lambda *args: session.call(args, {})

    with quiet() as messages, patch.object(beside, "begun", Here):
        plain = dict(train(script, lambda model: model))
        compare(outcome, dict(train(script, wrap)), plain)
        for session in sessions:
            judge(outcome, script, session, [str(w.message) for w in messages])
            if script.way.mode == "measured" and not outcome.wrong and not outcome.error:
                measure(outcome, script, session)
    return outcome


def _online(model: Model, outcome: Outcome) -> Call:
    def rerun(seconds: float) -> None:
        outcome.reruns += 1

    def call(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return model(*args)
        with off_path(Reports(rerun=rerun)).forward():
            return model(*args)

    return call


NOT_REFUSED = "Inplace update to inference tensor outside InferenceMode"
"""What torch itself does not refuse of composite operators while a dispatch mode is active (docs/limits.md)."""


def compare(outcome: Outcome, got: dict[str, Any], plain: dict[str, Any]) -> None:
    refused, mine = ([seen for name, seen in of.items() if name.endswith("error")] for of in (plain, got))
    if refused and not mine and NOT_REFUSED in refused[0][1]:
        outcome.error = refused[0][0]
        return
    for name in got | plain:
        if name not in got or name not in plain:
            error = (got | plain)[name] if name.endswith("error") else ""
            outcome.wrong.append(f"{name} only in {'autoremat' if name in got else 'plain'} {error}")
        elif name.endswith("error"):
            outcome.error = plain[name][0]
            if got[name][0] != plain[name][0]:
                outcome.wrong.append(f"{name}: {got[name]} instead of {plain[name]}")
        elif not same(got[name], plain[name]):
            outcome.wrong.append(name)


def judge(outcome: Outcome, script: Script, session: Session, messages: list[str]) -> None:
    """What autoremat must not say of a valid script."""
    stats, failed = session.stats(), bool(outcome.error)
    outcome.reruns, outcome.deviations = stats.reruns, stats.deviations
    said = [m for m in messages if "autoremat" in m]
    if stats.unplanned:
        outcome.unplanned = next((m for m in said if "without checkpointing" in m), "?")
    if stats.differing:
        outcome.wrong.append(f"the self-check found a difference: {said}")
    if stats.deviations and not may_vary(script.body) and not failed:
        outcome.wrong.append(f"a step left the path: {said}")
    failed |= any(step.use == "interrupted" for step in script.steps)
    if stats.unplanned and not failed and NOT_PLANNED not in outcome.unplanned:
        outcome.wrong.append(f"not planned: {said}")


NOT_PLANNED = "a leaf Variable that requires grad is being used in an in-place operation"
"""Why autoremat runs valid programs plainly: inputs from a graph outside are overwritten."""


def may_vary(body: tuple[Instruction, ...]) -> bool:
    """Whether numbers, or what an earlier step has left on the module, decide which operators run, or on how much."""
    branches = any(isinstance(i, If) or (isinstance(i, In) and may_vary(i.body)) for i in body)
    ops = {i.op for i in leaves_of(body)}
    return branches or "nonzero" in ops or ops >= {"kept", "kept_before"}


def measure(outcome: Outcome, script: Script, session: Session) -> None:
    """The peak of one more step by the allocator's account; what it runs must be the whole step."""
    model, xs, plan = session.fn, inputs_of(script.steps[0], 0), session.stats().plan
    assert isinstance(model, Model)
    assert plan is not None
    model.zero_grad()
    model.train(script.steps[0].training)
    before = resident(model, *xs)
    peak = account(lambda: session.call(xs, {}).backward(), before).peak_bytes
    outcome.peak = plan.budget_bytes, peak
    allowed = max(plan.budget_bytes + SCALARS_BYTES, before + torch.get_rng_state().nbytes)  # copied at the beginning
    if session.stats().deviations == 0 and peak > allowed:
        outcome.wrong.append(f"a peak of {peak} bytes under a budget of {plan.budget_bytes}")


@contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


# ---- random scripts ----------------------------------------------------------------------------------------------

WEIGHTS = {"pointwise": 6, "shapes": 2, "layers": 4, "views": 4, "in place": 3, "random": 2, "others": 2}

SIGNS = ((1, -1), (1, 1, -1), (-1, 1))

slot = st.integers(0, SLOTS - 1)
names = st.sampled_from([g for g, n in WEIGHTS.items() for _ in range(n)]).flatmap(
    lambda g: st.sampled_from(list(GROUPS[g]))
)
dos = st.builds(Do, names, slot, slot, slot, st.integers(0, 7))


def bodies(depth: int, size: int) -> st.SearchStrategy[tuple[Instruction, ...]]:
    one: st.SearchStrategy[Instruction] = dos
    if depth:
        inner = bodies(depth - 1, 4)
        branch = st.builds(If, slot, inner, inner)
        region = st.builds(In, st.sampled_from(list(REGIONS)), inner)
        one = st.integers(0, 19).flatmap(lambda n: branch if n == 19 else region if n >= 17 else dos)
    return st.lists(one, min_size=1, max_size=size).map(tuple)


uses = st.one_of(st.just("once"), st.sampled_from(list(USES)))
steps = st.builds(
    Step, uses, st.sampled_from([4, 4, 4, 6]), st.sampled_from([1, 1, -1]), st.sampled_from([True, True, False]),
    st.booleans(), st.integers(0, 7),
)  # fmt: skip
histories = st.one_of(  # mostly several of one kind: a new kind takes a recording
    st.builds(lambda step, signs: tuple(replace(step, sign=s) for s in signs), steps, st.sampled_from(SIGNS)),
    st.lists(steps, min_size=2, max_size=3).map(tuple),
)
shares = st.sampled_from([0.0, 0.0, 0.1, 0.3, 0.5, 0.8])
ways = st.builds(
    Way, st.sampled_from(["nothing", "nothing", "random", "random", "budget", "online", "online"]),
    st.integers(0, 99), shares,
)  # fmt: skip
scripts = st.builds(
    Script,
    st.builds(lambda first, then: first + then, bodies(2, 12), bodies(2, 12)),
    st.sampled_from(list(RETURNS)),
    st.lists(slot, min_size=1, max_size=3).map(tuple),
    histories,
    ways,
)


predictable = st.sampled_from([n for g in WEIGHTS if g not in ("random", "others") for n in GROUPS[g]]).filter(
    lambda name: name not in SURPRISING
)
measured_scripts = st.builds(
    Script,
    st.lists(st.builds(Do, predictable, slot, slot, slot, st.integers(0, 7)), min_size=3, max_size=20).map(tuple),
    st.just("loss"),
    st.lists(slot, min_size=1, max_size=3).map(tuple),
    st.builds(lambda training: (Step(rows=64, training=training),), st.booleans()),
    st.builds(Way, st.just("measured"), st.integers(0, 99), shares),
)
"""Whole steps in which nothing is random: the states of generators take more than these tensors."""


def features(script: Script) -> Counter[str]:
    """What a script has, each counted once."""
    found = Counter({f"way: {script.way.mode}", f"returns: {script.returns}", *(f"use: {s.use}" for s in script.steps)})

    def look(body: tuple[Instruction, ...]) -> None:
        for i in body:
            if isinstance(i, Do):
                found[f"op: {GROUP_OF[i.op]}"] = 1
            elif isinstance(i, If):
                found["branch on data"] = 1
                look(i.then + i.otherwise)
            else:
                found[f"region: {i.region}"] = 1
                look(i.body)

    look(script.body)
    return found


# ---- looking at many ---------------------------------------------------------------------------------------------


class Failure(AssertionError):
    """A script that is not as in plain training."""


def look_at(strategy: st.SearchStrategy[Script], n: int, number: int) -> list[tuple[Script, Outcome]]:
    """Scripts of one seed and what became of them: ``n``, or those up to a failure and what it took to shrink that."""
    found: list[tuple[Script, Outcome]] = []

    @seed(number)
    @settings(
        max_examples=n, database=None, deadline=None, report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def look(script: Script) -> None:
        found.append((script, outcome_of(script)))
        if found[-1][1].wrong:
            raise Failure

    with suppress(Failure, Flaky):
        look()
    return found


def outcome_of(script: Script) -> Outcome:
    """What became of a script; an error of ours is an outcome, too."""
    try:
        return examine(script)
    except Exception:  # noqa: BLE001 - whatever went wrong is what we are looking for
        return Outcome(wrong=[traceback.format_exc()])


def smallest_failure(found: list[tuple[Script, Outcome]]) -> str:
    """The last failure, to which hypothesis has shrunk the first, to be pasted into a test; "" if there is none."""
    failures = [f"{script!r}\n{outcome.wrong}" for script, outcome in found if outcome.wrong]
    return failures[-1] if failures else ""
