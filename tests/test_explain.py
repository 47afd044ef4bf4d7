"""``autoremat.explain`` on recorded networks: byte-exact, and true when somebody does checkpoint a block by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autoremat
from autoremat.demo.models import GPT, GPTConfig
from autoremat.program import Plan
from autoremat.show.explanation import Explanation
from tests.zoo import CASES, Case

pytestmark = pytest.mark.filterwarnings("ignore:.*fake tensor.*")


def assert_exact(e: Explanation) -> None:
    peak = autoremat.simulate(e.program, e.plan).peak_bytes
    assert e.peak_bytes == peak
    assert sum(e.categories.values()) == sum(r.nbytes for r in e.residents) == e.modules.peak_bytes == peak
    assert (e.modules.saved_bytes, e.modules.kept_bytes) == (e.saved_bytes, e.kept_bytes)


SLOW = ("U-Net", "unrolled LSTM", "XOR MLP")


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=pytest.mark.slow if c.name in SLOW else ()) for c in CASES]
)
def test_breakdowns_of_recorded_networks_are_exact(case: Case) -> None:
    torch.manual_seed(0)
    model = case.model()
    e = autoremat.explain(case.loss(model), *case.inputs(), optimizer=torch.optim.Adam(model.parameters()))
    assert_exact(e)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    assert e.categories["parameters"] == parameters
    assert e.categories["optimizer state"] >= 2 * parameters
    assert all(r.dtype and r.shape is not None for r in e.residents if r.category not in ("optimizer state", "scratch"))
    planned = autoremat.explain(autoremat.solve(e.program, 0.85, solver="greedy"))
    assert_exact(planned)
    assert planned.kept_bytes < e.kept_bytes == e.saved_bytes
    assert planned.modules.seconds_again == pytest.approx(autoremat.simulate(e.program, planned.plan).extra_seconds)


class Shifted(nn.Module):
    """Its input, which nobody saves, is as large as what it saves."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 2).sin()


class Wide(nn.Module):
    """Saves four times its input inside."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Net(nn.Module):
    """Blocks behind an operator that saves nothing, so that the block's input stays for its sake alone."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(16, 16), nn.ModuleList(blocks)
        self.by_hand = ""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            x = x + 1
            x = checkpoint(block, x, use_reentrant=False) if self.by_hand == f"blocks.{i}" else block(x)
        return x.sum()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("apart", [True, False], ids=["in a child", "here"])
@pytest.mark.parametrize("block", [Wide, nn.GELU, nn.Tanh, Shifted, lambda: nn.LayerNorm(16)])
def test_what_checkpointing_a_block_by_hand_would_free_is_what_it_frees(
    block: Any, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not apart:
        monkeypatch.setattr("autoremat.engines.torch.recording.step.can_run_apart", lambda: False)
    net, x = Net(block(), nn.Sigmoid(), block()), torch.randn(8, 16)
    plain = autoremat.explain(net, x)
    gains = {b.path: b.gain_bytes for b in plain.blocks}
    for i in (0, 2):
        net.by_hand = f"blocks.{i}"
        by_hand = autoremat.explain(net, x)
        assert plain.saved_bytes - by_hand.saved_bytes == gains[f"blocks.{i}"]


def test_a_useless_checkpoint_is_named() -> None:
    text = str(autoremat.explain(Net(Shifted(), Wide()), torch.randn(512, 16)))
    assert "blocks.0 saves nothing, because its input (32.8 KB) would have to stay" in text
    assert "blocks.1.act saves nothing, because all that it keeps for the backward" in text
    assert "\n  blocks.1 saves" not in text


@cache
def planned() -> Plan:
    """A plan of the step below; nobody changes it."""
    fn, tokens = gpt_step()
    return autoremat.plan(fn, tokens, budget="80%", solver="greedy")


def gpt_step() -> tuple[Any, Tensor]:
    model = GPT(GPTConfig(blocks=4, width=32, context=32))
    tokens = torch.randint(0, 256, (4, 32))
    return lambda x: F.cross_entropy(model(x).flatten(0, 1), x.flatten()), tokens


def test_saved_values_say_for_which_module_and_from_which_line() -> None:
    fn, tokens = gpt_step()
    e = autoremat.explain(fn, tokens)
    saved = {(r.name, r.why) for r in e.residents if r.category == "saved activations"}
    assert ("blocks.1.mlp.0 addmm", "saved for the backward of blocks.1.mlp.1") in saved
    assert all("models.py:" in r.source for r in e.residents if r.module.startswith("blocks.1.mlp") and r.made_by >= 0)
    (blocks,) = [m for m in e.modules.modules if m.name == "blocks.0-3"]
    assert blocks.times == 4
    assert "blocks.0-3.mlp.1 saves nothing" in str(e)


def test_gradients_belong_to_the_module_of_their_parameter() -> None:
    e = autoremat.explain(gpt_step()[0], gpt_step()[1])
    labels = {v.label: v.module for v in e.program.values if v.kind == "gradient"}
    assert labels["blocks.2.mlp.0.weight.grad float32[128, 32]"] == "blocks.2.mlp.0"


def test_lines_of_the_loss_are_those_of_the_caller() -> None:
    fn, tokens = gpt_step()
    sources = {op.name: op.source for op in autoremat.explain(fn, tokens).program.ops}
    assert "test_explain.py:" in sources["aten._log_softmax.default"]
    assert "test_explain.py:" in sources["aten._log_softmax_backward_data.default"]


@pytest.mark.slow
@pytest.mark.guard
def test_a_budget_explains_its_plan() -> None:
    fn, tokens = gpt_step()
    e = autoremat.explain(fn, tokens, budget="70%", recompute="blocks.0.mlp.*")
    assert e.plan is not None
    assert e.peak_bytes <= e.plan.budget_bytes
    assert e.savings.again
    assert "planned by" in str(e)
    assert "Checkpointing by hand" not in str(e)


@pytest.mark.slow
@pytest.mark.guard
def test_programs_and_plans_are_explained_as_they_are() -> None:
    fn, tokens = gpt_step()
    plan = autoremat.plan(fn, tokens, budget="70%", solver="greedy")
    assert autoremat.explain(plan).plan is plan
    assert autoremat.explain(plan.program) == autoremat.explain(fn, tokens)
    assert autoremat.explain(plan.program, budget="70%").plan is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 0.5}, "a plan stands for itself"),
        ({"optimizer": 8}, "a plan stands for itself"),
        ({"keep": "head"}, "give a budget with them"),
    ],
)
def test_what_does_not_go_together_says_so(given: dict[str, Any], message: str) -> None:
    plan, (fn, tokens) = planned(), gpt_step()
    with pytest.raises(TypeError, match=message):
        autoremat.explain(plan, **given)
    with pytest.raises(TypeError, match="a program stands for itself"):
        autoremat.explain(plan.program, tokens)
    with pytest.raises(ValueError, match="accepted are"):
        autoremat.explain(fn, tokens, budget="much")


def test_notebooks_show_html() -> None:
    plan = planned()
    for thing in (plan, autoremat.explain(plan), autoremat.frontier(plan.program, points=2, time_limit_seconds=1)):
        page = thing._repr_html_()
        assert page.startswith("<pre")
        assert str(thing).split()[0] in page
