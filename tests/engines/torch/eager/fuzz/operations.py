"""What the instructions of a script do, by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.engines.torch.eager.fuzz.scripts import WIDTH

if TYPE_CHECKING:
    from tests.engines.torch.eager.fuzz.model import Model

SURPRISING = frozenset({"block", "attention", "gru"})


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
