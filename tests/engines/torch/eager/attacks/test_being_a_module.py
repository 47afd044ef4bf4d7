"""Attacks on what a module is: copies, signatures, replaced forwards, arguments and results of every kind."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoremat
from tests.engines.torch.compare import at_the_floor, quick
from tests.engines.torch.eager.attacks.networks import WIDTH, Net, check_step, data, net, training

__all__ = ["quick"]  # a fixture


def test_the_module_stays_what_it_was() -> None:
    model = net()
    names, signature = list(model.state_dict()), inspect.signature(model.forward)
    again = autoremat.checkpoint(model, budget=0.7, time_limit_seconds=0.1)
    assert again is model
    assert type(model) is Net
    assert isinstance(model, nn.Module)
    assert list(model.state_dict()) == names
    assert inspect.signature(model.forward) == signature
    assert [n for n, _ in model.named_modules()] == [n for n, _ in net().named_modules()]
    x = data()
    model(x).mean().backward()
    model.eval().train().to("cpu").half().float()
    assert autoremat.restore(model) is model
    assert "forward" not in vars(model)
    assert inspect.signature(model.forward) == signature
    with pytest.raises(ValueError, match="nothing to restore"):
        autoremat.restore(model)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *[m for _ in range(5) for m in (nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1))]
        )

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.layers(x) * scale


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_copies_are_checkpointed_on_their_own(how: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Plain(), data()
    autoremat.checkpoint(model, budget=0.7, time_limit_seconds=0.1)
    model(x).mean().backward()
    twin = how(model)
    twin.zero_grad()
    assert autoremat.stats(twin).calls == 0
    torch.manual_seed(1)
    twin(x).mean().backward()
    assert autoremat.stats(twin).reruns > 0
    before = autoremat.stats(model).calls
    model.zero_grad()
    torch.manual_seed(1)
    model(x).mean().backward()
    assert autoremat.stats(model).calls == before + 1
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p is not q
        assert torch.equal(p.grad, q.grad)
    autoremat.restore(twin)
    assert autoremat.stats(model).plan is not None


def test_forward_replaced_before_and_restored_after() -> None:
    model, x = Plain(), data()
    plain = model.forward
    model.forward = lambda x: plain(x) * 2
    autoremat.checkpoint(model, budget=0.9, time_limit_seconds=0.1)
    torch.manual_seed(0)
    y = model(x)
    autoremat.restore(model)
    torch.manual_seed(0)
    assert torch.equal(model(x), y)


class Trainer:
    def __init__(self) -> None:
        self.model = Plain()

    @autoremat.checkpoint(budget=0.7, time_limit_seconds=0.1)
    def loss(self, x: Tensor, *, power: int = 2) -> Tensor:
        """The loss."""
        return self.model(x).pow(power).mean()


def test_decorated_methods() -> None:
    torch.manual_seed(0)
    trainers, x = [Trainer(), Trainer()], data()
    assert Trainer.loss.__doc__ == "The loss."
    assert list(inspect.signature(Trainer.loss).parameters) == ["self", "x", "power"]
    for trainer in trainers:
        for power in (2, 4):
            trainer.model.zero_grad()
            torch.manual_seed(1)
            trainer.loss(x, power=power).backward()
            got = [p.grad for p in trainer.model.parameters()]
            trainer.model.zero_grad()
            torch.manual_seed(1)
            autoremat.restore(Trainer.loss)(trainer, x, power=power).backward()
            assert all(torch.equal(a, p.grad) for a, p in zip(got, trainer.model.parameters(), strict=True))
    assert autoremat.stats(Trainer.loss).reruns > 0


@dataclasses.dataclass
class Output:
    loss: Tensor | None
    logits: Tensor
    hidden: dict[str, list[Tensor]]


def test_nested_arguments_and_dataclass_outputs() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, batch: dict[str, Any], *more: Tensor, mask: Tensor | None = None, flag: str = "") -> Output:
            h = self.net(batch["x"][0] + sum(more)) * (1 if mask is None else mask)
            return Output(None if flag else h.square().mean(), h, {"all": [h.sin(), h.cos()]})

    def step(call: Any, x: Tensor) -> Any:
        mask = torch.ones(WIDTH)
        one = call({"x": [x, None], "y": {"z": (1, "a")}}, x, x, mask=mask)
        one.loss.backward()
        two = call({"x": [x], "y": None}, flag="no loss")
        (two.logits.mean() + two.hidden["all"][1].mean()).backward()
        return one.loss, two.logits

    check_step(step, Nested)


def test_backward_under_other_modes() -> None:
    def step(call: Any, x: Tensor) -> Tensor:
        loss = call(x).square().mean()
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            loss.backward()
        torch.set_default_dtype(torch.float64)
        try:
            call(x).square().mean().backward()
        finally:
            torch.set_default_dtype(torch.float32)
        return loss

    check_step(step)


def test_the_floor_can_be_reached_again() -> None:
    build = lambda: training(net())  # noqa: E731
    at_the_floor(build, 2)
    at_the_floor(build, 2)


@pytest.mark.parametrize("as_view", [True, False])
def test_an_input_with_a_history_is_recorded_on_fake_tensors(as_view: bool) -> None:
    """A block in the middle of a model: where its input comes from is no part of it."""
    block = nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True) * 2
    program = autoremat.plan(block, x.view(4, 8) if as_view else x, budget=1.0).program
    assert program.recorded == "fake"
