"""``check``: a plain step beside a checkpointed one."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoremat
from autoremat.checking import Check
from autoremat.cli import main
from autoremat.engines.torch.operators.timing import Cost
from tests.engines.torch.compare import off_by_a_bit
from tests.zoo import CASES

WIDTH = 32


class Net(nn.Module):
    """Dropout, batch norm and a counter that no tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.norm, self.calls = nn.BatchNorm1d(WIDTH), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.norm(x)
        for layer in self.layers:
            x = nn.functional.dropout(layer(x).sin().exp(), 0.1)
        return x.square().mean()


def state(model: Net) -> list[Any]:
    return [
        model.calls,
        torch.get_rng_state().tolist(),
        [t.tolist() for t in model.state_dict().values()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
    ]


@pytest.mark.slow
@pytest.mark.guard
def test_all_is_the_same_and_afterwards_as_before() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(64, WIDTH)
    model.layers[0].weight.grad = torch.ones(WIDTH, WIDTH)
    before = state(model)
    found = autoremat.check(model, x, budget=0.6)
    assert (found.is_exact, found.is_within_budget, found.kept, found.deviations) == (True, True, (), 0)
    assert found.plan is not None
    assert found.peak_bytes == found.plan.peak_bytes < found.plain_peak_bytes == found.plan.plain_peak_bytes
    assert dict(found.compared) == {"output": 1, "gradient": 14, "buffer": 3, "generator": 1}
    assert state(model) == before
    assert "bit-identical to plain training, within the budget" in str(found)


def test_a_module_without_a_loss_takes_what_the_plan_says() -> None:
    """The gradients that the backward begins with are not held longer than a loss would hold them."""
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.GELU())))
    found = autoremat.check(model, torch.randn(512, 64), budget=0.8)
    assert found.plan is not None
    assert (found.is_exact, found.is_within_budget) == (True, True)
    assert (found.peak_bytes, found.plain_peak_bytes) == (found.plan.peak_bytes, found.plan.plain_peak_bytes)


@pytest.mark.parametrize("outputs", ["two", "dict", "complex", "sparse"])
def test_whatever_is_returned_can_be_checked(outputs: str) -> None:
    """Without a loss, gradients of every output; of sparse ones, too."""
    layer, table = nn.Linear(8, 8), nn.Parameter(torch.eye(8).to_sparse())
    results = {
        "two": lambda y: (y.sin(), y.cos()[:1]),
        "dict": lambda y: {"a": y.sin(), "b": [y.exp()]},
        "complex": lambda y: torch.complex(y.sin(), y.cos()),
        "sparse": lambda y: (y.sin(), table * 2),
    }
    found = autoremat.check(lambda x: results[outputs](layer(x).tanh()), torch.randn(4, 8), budget=1.0)
    assert found.is_exact


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if str(c) in ("pre-activation ResNet", "U-Net")], ids=str)
def test_networks(case: Any) -> None:
    torch.manual_seed(0)
    found = autoremat.check(case.loss(case.model()), *case.inputs(), budget=0.7)
    assert found.is_exact
    assert found.is_within_budget


def test_what_is_checkpointed_already_has_its_budget() -> None:
    model, x = autoremat.checkpoint(Net(), budget=0.7), torch.randn(64, WIDTH)
    assert autoremat.check(model, x).is_exact
    with pytest.raises(ValueError, match="leave the budget out"):
        autoremat.check(model, x, budget=0.5)
    with pytest.raises(ValueError, match="give a budget"):
        autoremat.check(Net(), x)


@pytest.mark.slow
def test_a_difference_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tape whose reruns are wrong in the backward, and a self-check that is blind."""
    off_by_a_bit(monkeypatch)
    for module in ("steps", "under_plan"):
        monkeypatch.setattr(f"autoremat.engines.torch.eager.{module}.SelfCheck", lambda *args: None)
    found = autoremat.check(Net(), torch.randn(64, WIDTH), budget=0.6)
    assert not found.is_exact
    assert all(d.name.startswith("gradient of ") and 0 < d.largest < 1 for d in found.differences)
    assert "NOT the same" in str(found)
    assert found.differences[0].name in str(found)


def test_what_differs_when_it_runs_again_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    off_by_a_bit(monkeypatch, when=lambda entry: entry.func is Tensor.sin)
    with pytest.warns(RuntimeWarning, match="must not run again"):
        found = autoremat.check(Net(), torch.randn(64, WIDTH), budget=0.8)
    assert found.is_exact
    assert found.kept
    assert all("test_checking.py:" in line and line in str(found) for line in found.kept)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("budget", [0.9, 0.8])
@pytest.mark.parametrize("seed", range(2))
def test_what_differs_and_is_overwritten_is_kept_as_well(
    budget: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout makes its mask in place; whatever the plan runs again of that, the check goes on."""
    dice, module = random.Random(seed), sys.modules["autoremat.engines.torch.recording.whole"]
    plain = module.measure_all

    def costs(signatures: Any, *rest: Any, **options: Any) -> list[Cost]:
        return [c._replace(seconds=10 ** dice.uniform(-6, -3)) for c in plain(signatures, *rest, **options)]

    off_by_a_bit(monkeypatch, when=lambda entry: entry.func is Tensor.exp)
    monkeypatch.setattr(module, "measure_all", costs)
    with pytest.warns(RuntimeWarning, match="must not run again"):
        found = autoremat.check(Net(), torch.randn(64, WIDTH), budget=budget, time_limit_seconds=0.1)
    assert found.is_exact
    assert found.kept


def test_tensors_that_are_not_there() -> None:
    with torch.device("meta"):
        model, x = Net(), torch.randn(64, WIDTH)
    with pytest.raises(ValueError, match="give it real ones"):
        autoremat.check(model, x, budget=0.5)


def test_several_outputs_of_several_dtypes() -> None:
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.complex64, requires_grad=True)

    def step(x: Tensor) -> dict[str, Tensor]:
        y = (x.to(torch.complex64) @ weight).sin().exp()
        return {"complex": y, "real": y.abs(), "chosen": y.abs() > 1}

    assert autoremat.check(step, torch.randn(256, WIDTH, requires_grad=True), budget=0.95).is_exact


@pytest.mark.slow
@pytest.mark.guard
def test_command_line() -> None:
    from click.testing import CliRunner

    done = CliRunner().invoke(main, ["check", "examples/models.py:small_gpt", "--budget", "60%"])
    assert done.exit_code == 0, done.output
    assert "bit-identical to plain training, within the budget" in done.output
    refused = CliRunner().invoke(main, ["check", "examples/models.py:gpt", "--budget", "60%"])
    assert refused.exit_code == 1
    assert "give it real ones" in refused.output


# ---- afterwards all is as before, and nothing is left out ----------------------------------------------------------


def layers(n: int = 5) -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(n)])


def quickly(target: Any, x: Tensor) -> Check:
    return autoremat.check(target, x, budget=0.8, time_limit_seconds=0.1)


def test_tensors_that_only_the_code_knows() -> None:
    weights = [torch.randn(WIDTH, WIDTH, requires_grad=True) for _ in range(5)]

    def step(x: Tensor) -> Tensor:
        for w in weights:
            x = torch.tanh(x @ w)
        return x.square().mean()

    found = quickly(step, torch.randn(256, WIDTH))
    assert (found.is_exact, found.compared["gradient"]) == (True, 5)
    assert [w.grad for w in weights] == [None] * 5


def test_two_modules_with_tensors_of_the_same_names() -> None:
    a, b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    a.weight.grad = torch.ones(WIDTH, WIDTH)

    def step(x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.tanh(b(torch.tanh(a(x))))
        return x.square().mean()

    found = quickly(step, torch.randn(256, WIDTH))
    assert (found.is_exact, found.compared["gradient"]) == (True, 4)
    assert torch.equal(a.weight.grad, torch.ones(WIDTH, WIDTH))
    assert [p.grad for p in (a.bias, b.weight, b.bias)] == [None] * 3


def test_the_graph_behind_an_argument_is_left_alone() -> None:
    encoder = nn.Linear(WIDTH, WIDTH)
    x = encoder(torch.randn(256, WIDTH)).tanh()
    found = quickly(layers(), x)
    assert (found.is_exact, found.compared["gradient"]) == (True, 11)
    assert encoder.weight.grad is None
    x.sum().backward()  # the user's own backward


@pytest.mark.parametrize("in_module", [True, False])
def test_hooks_that_step_an_optimizer_do_not_run(in_module: bool) -> None:
    """Nor do they while a step is recorded that uses tensors which no module has."""
    model = layers()
    optimizers = {p: torch.optim.Adam([p]) for p in model.parameters()}

    def step_now(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    weights = [(layer[0].weight, layer[0].bias) for layer in model]  # type: ignore[index]

    def step(x: Tensor) -> Tensor:
        for weight, bias in weights:
            x = nn.functional.linear(x, weight, bias).tanh()
        return x.square().mean()

    before = [p.detach().clone() for p in model.parameters()]
    found = quickly(model if in_module else step, torch.randn(256, WIDTH))
    assert (found.is_exact, found.compared["gradient"]) == (True, 10)
    assert not any(o.state for o in optimizers.values())
    assert all(map(torch.equal, before, model.parameters()))
    autoremat.plan(step, torch.randn(256, WIDTH), budget=0.8, time_limit_seconds=0.1)
    assert not any(o.state for o in optimizers.values())
    model(torch.randn(256, WIDTH)).sum().backward()
    assert all(o.state for o in optimizers.values())


def test_numbers_that_are_none_in_an_input_that_repeats_itself() -> None:
    x = torch.full((1, 1), float("nan")).expand(256, WIDTH)
    assert quickly(layers(), x).is_exact


def test_buffers_of_every_kind() -> None:
    model = layers()
    model.register_buffer("sparse", torch.eye(WIDTH).to_sparse())
    model.register_buffer("conjugated", torch.randn(3, dtype=torch.complex64).conj())
    model.register_buffer("empty", torch.zeros(0, dtype=torch.bool))
    found = quickly(model, torch.randn(256, WIDTH))
    assert (found.is_exact, found.compared["buffer"]) == (True, 3)


def test_where_gradients_are_switched_off_they_are_compared_all_the_same() -> None:
    with torch.no_grad():
        assert quickly(layers(), torch.randn(256, WIDTH)).compared["gradient"] == 10


def test_modules_that_are_not_initialised_yet() -> None:
    with pytest.raises(ValueError, match="run the lazy modules once before"):
        quickly(nn.Sequential(nn.LazyLinear(WIDTH), *layers()), torch.randn(256, WIDTH))
