"""Attacks with operators that torch makes up otherwise where a dispatch mode is active."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import autoremat
from autoremat.engines.torch.eager.dry_run import record
from tests.engines.torch.compare import exact, off_path, quick
from tests.engines.torch.eager.attacks.networks import ROWS, WIDTH, Net, check_body, training

__all__ = ["quick"]  # a fixture


class Bystander(TorchDispatchMode):
    """Looks on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


# ---- a composite operator that adds up in another order where a dispatch mode is active ------------------------------


class Smoothed(nn.Module):
    """Class weights, label smoothing, and targets that are ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.register_buffer("weights", torch.rand(WIDTH))
        self.register_buffer("targets", torch.where(torch.rand(ROWS) < 0.3, -100, torch.randint(0, WIDTH, (ROWS,))))

    def forward(self, x: Tensor) -> Tensor:
        loss = torch.zeros(())
        for layer in self.layers:
            x = torch.tanh(layer(x)).exp().sin() * x.cos()
            loss = loss + F.cross_entropy(x, self.targets, self.weights, label_smoothing=0.1).exp().sin()
        return loss


def test_weights_of_smoothed_labels_are_added_up_as_without_a_dispatch_mode() -> None:
    exact(lambda: training(Smoothed(), loss=lambda loss: loss))


def test_who_writes_the_masked_sum_himself_gets_it() -> None:
    """Only torch's own function is put right."""

    def body(i: int, h: Tensor) -> Tensor:
        ignored = h.detach()[0] > 0.1
        filled = torch.arange(WIDTH).masked_fill(ignored, 0)
        weights = h.detach().exp()[0].gather(0, filled).masked_fill_(ignored, 0)
        return (h * weights.sum()).sin()

    check_body(body)


# ---- operators that torch makes up otherwise where a dispatch mode is active -----------------------------------------


def batch_by_one(h: Tensor) -> Tensor:
    """A batch of matrices times a single one that needs no gradient."""
    one = torch.randn(1, 33, 65, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return h.double().flatten()[: 3 * 17 * 33].view(3, 17, 33) @ one


def test_a_batch_of_matrices_times_one_is_multiplied_as_without_a_dispatch_mode() -> None:
    check_body(lambda i, h: h * batch_by_one(h).sin().mean().float())


@pytest.mark.parametrize("shapes", [((3, 4, 5), (1, 5, 6)), ((1, 4, 5), (3, 5, 6)), ((0, 4, 5), (1, 5, 6)),
                                    ((3, 4, 5), (5, 6)), ((2, 3, 4, 5), (1, 5, 6))], ids=str)  # fmt: skip
@pytest.mark.parametrize("grad", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("within", [False, True], ids=["", "within autocast"])
def test_the_same_operators_multiply_matrices_as_without_a_dispatch_mode(
    shapes: Any, grad: tuple[bool, bool], within: bool
) -> None:
    a, b = (torch.randn(shape, requires_grad=g) for shape, g in zip(shapes, grad, strict=True))

    def product() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            return a @ b

    def operators(call: Any) -> tuple[Tensor, list[str]]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out = call()
        seen = {event.name for event in profile.events()}
        return out, sorted(seen & {"aten::mm", "aten::bmm", "aten::mv", "aten::squeeze"})

    plain, plainly = operators(product)
    with off_path().forward():
        product()  # what it does is found out on fake tensors once
    with off_path().forward():
        ours, by_us = operators(product)
    assert by_us == plainly
    assert (ours.dtype, ours.shape, ours.stride()) == (plain.dtype, plain.shape, plain.stride())
    assert torch.equal(ours, plain)
    assert [ours.grad_fn and ours.grad_fn.name()] == [plain.grad_fn and plain.grad_fn.name()]


@pytest.mark.parametrize("values", [torch.linalg.svdvals, torch.linalg.eigvalsh,
                                    lambda a: torch.linalg.eigvals(a).abs(), torch.linalg.cond])  # fmt: skip
def test_values_without_vectors(values: Any) -> None:
    """With them another algorithm computes the values, and any dispatch mode has torch compute them."""

    def body(i: int, h: Tensor) -> Tensor:
        with torch.no_grad():
            norm = values(h.t() @ h).max()
        return (h / (1 + norm)).sin() + h

    check_body(body)


def test_bilinear_layers_within_autocast() -> None:
    """Autocast leaves the operator alone and treats the matrix products inside its kernel."""

    class Twofold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Bilinear(WIDTH, WIDTH, WIDTH) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                for layer in self.layers:
                    x = torch.tanh(layer(x.exp().sin(), x.cos())).exp() * x
            return x

    exact(lambda: training(Twofold()))


def test_what_autocast_has_cast_as_a_whole_it_does_not_cast_inside() -> None:
    """In inference mode a composite operator gets to a dispatch mode in one piece, once autocast has treated it."""
    a = torch.randn(4, 3)

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            inverse = torch.pinverse(a + 0)
        return (x.exp() * inverse.clone().sum()).sum(), inverse

    x = torch.randn(3, requires_grad=True)
    plain = step(x)
    with off_path().forward():
        ours = step(x)
    assert [t.dtype for t in ours] == [t.dtype for t in plain]
    assert all(map(torch.equal, ours, plain))


FORMULAS = {
    "median": torch.median,
    "min": torch.min,
    "prod": lambda h: (1 + h / 100).prod(1).sum(),
    "cumprod": lambda h: (1 + h / 100).cumprod(0).sum(),
    "masked_fill": lambda h: h.masked_fill(h > 0, h.mean()).sin().sum(),
}
"""Reductions whose gradients torch computes otherwise where a dispatch mode is active."""


@pytest.mark.one_in(7, guard=True)
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("direct", [False, True], ids=["", "of the input"])
def test_gradients_in_the_forward_that_torch_computes_otherwise(name: str, direct: bool) -> None:
    """Followed or off the path, they are those of plain training."""

    def penalised(model: Any, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        out = FORMULAS[name](x if direct else model(x)) + model(x).sum() * 0.01
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        return out + (grad * grad).sum()

    torch.manual_seed(0)
    model, x = Net(lambda i, h: h.exp().sin()), torch.randn(8, WIDTH)

    def trained(step: Any, around: Any) -> list[Tensor]:
        model.zero_grad()
        with around:
            loss = step(x)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    plain = trained(partial(penalised, model), nullcontext())
    unplanned = trained(partial(penalised, model), off_path().forward())
    assert all(map(torch.equal, plain, unplanned))
    checkpointed = autoremat.checkpoint(partial(penalised, model), budget=1.0)
    for _ in range(3):
        assert all(map(torch.equal, plain, trained(checkpointed, nullcontext())))
    assert autoremat.stats(checkpointed).unplanned == 0
    assert record(partial(penalised, model), (x,)).ops


def test_torch_func_multiplies_matrices_as_always() -> None:
    one = torch.randn(1, WIDTH, WIDTH)

    def body(i: int, h: Tensor) -> Tensor:
        rows = h.view(ROWS // 4, 4, WIDTH)
        return torch.vmap(lambda row: row.unsqueeze(0) @ one)(rows).sin().view(ROWS, WIDTH) * h

    check_body(body)


def test_nothing_is_left_in_the_thread() -> None:
    keys = (torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set)
    before = [str(key()) for key in keys]
    model = Net(lambda i, h: h.exp().sin())
    checkpointed = autoremat.checkpoint(model, budget=0.8)
    checkpointed(torch.randn(ROWS, WIDTH)).sum().backward()
    tape = off_path()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), tape.forward():
        model(torch.randn(ROWS, WIDTH + 1))
    assert [str(key()) for key in keys] == before


# What is unlike plain training under any mode: complex numbers tell how matrices were multiplied.
SQUARE = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
MANY = torch.randn(2, 3, 3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
ONE = torch.randn(1, 5, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(2))


def looked_at_by_another_mode(h: Tensor) -> Tensor:
    with Bystander():
        return torch.linalg.svdvals(SQUARE).sum() * h


def within_a_dual_level(h: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return (torch.linalg.svdvals(SQUARE).sum() + ((MANY[0] * 1).conj() @ ONE.mH).abs().sum()) * h


def with_what_vmap_does_not_map(h: Tensor) -> Tensor:
    return torch.vmap(lambda x: (x * 1).conj() @ ONE.mH)(MANY).abs().sum() * h


def into_a_given_tensor(h: Tensor) -> Tensor:
    out = torch.empty(3, 3, 5, dtype=torch.complex64)
    with torch.no_grad():
        torch.matmul(MANY[0].conj(), ONE.mH, out=out)
    return out.abs().sum() * h


def overwritten_by_a_hook_of_a_formula(h: Tensor) -> Tensor:
    x = (h * 1.5).sigmoid()
    z = x * 2
    for _ in range(8):
        x = x.sin()
    y = (x + 0.1).prod(1)

    def overwrite(*_: Any) -> None:
        with torch.no_grad():
            z.mul_(3.0)

    y.grad_fn.register_hook(overwrite)  # type: ignore[union-attr]
    (grad,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    w = z.sin()
    for _ in range(8):
        w = w.sin()
    return grad.detach().sum() * w


@pytest.mark.parametrize(
    "body",
    [looked_at_by_another_mode, within_a_dual_level, with_what_vmap_does_not_map, into_a_given_tensor,
     overwritten_by_a_hook_of_a_formula],
)  # fmt: skip
def test_off_the_path_with_nothing_held(body: Any) -> None:
    x, seen = torch.randn(60, 70, requires_grad=True), []
    for around in (nullcontext(), off_path().forward()):
        x.grad = None
        with around:
            out = body(x)
        out.sum().backward()
        seen.append((out.detach(), x.grad))
    assert all(map(torch.equal, *seen))
