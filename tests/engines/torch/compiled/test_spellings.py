"""However a user writes it: the same plan, the same bits; and what is not ours stays torch's."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import autoremat
from autoremat.backend import autoremat as backend
from tests.engines.torch.compiled.cases import MLP, Broken, Regression, built, layers, peak, plain, rows, same, train

SHARE = 0.8


def first(model: nn.Module) -> object:
    return torch.compile(autoremat.checkpoint(model, budget=SHARE, time_limit_seconds=1), backend="aot_eager")


def first_in_place(model: nn.Module) -> object:
    autoremat.checkpoint(model, budget=SHARE, time_limit_seconds=1).compile(backend="aot_eager")
    return model


def first_whole(model: nn.Module) -> object:
    checkpointed = autoremat.checkpoint(model, budget=SHARE, time_limit_seconds=1)
    return torch.compile(checkpointed, backend="aot_eager", fullgraph=True)


def first_of_a_function(model: nn.Module) -> object:
    @autoremat.checkpoint(budget=SHARE, time_limit_seconds=1)
    def step(x: Tensor, y: Tensor) -> Tensor:
        return model(x, y)

    return torch.compile(step, backend="aot_eager")


def second(model: nn.Module) -> object:
    return autoremat.checkpoint(torch.compile(model, backend="aot_eager"), budget=SHARE, time_limit_seconds=1)


def second_in_place(model: nn.Module) -> object:
    model.compile(backend="aot_eager")
    return autoremat.checkpoint(model, budget=SHARE, time_limit_seconds=1)


def second_of_a_function(model: nn.Module) -> object:
    step = torch.compile(lambda x, y: model(x, y), backend="aot_eager")
    return autoremat.checkpoint(step, budget=SHARE, time_limit_seconds=1)


def third(model: nn.Module) -> object:
    options = {"budget": SHARE, "time_limit_seconds": 1, "backend": "aot_eager"}
    return torch.compile(model, backend=backend, options=options)


SPELLINGS = [first, second, third, first_whole] + [
    pytest.param(s, marks=pytest.mark.slow)
    for s in (first_in_place, first_of_a_function, second_in_place, second_of_a_function)
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_keeps_the_budget(spelling: object) -> None:
    left = plain(MLP)
    torch._dynamo.reset()
    model, data = built(MLP)
    call = spelling(model)  # type: ignore[operator]
    assert same(train(model, call, data), left)
    plan = autoremat.stats(call).plan
    assert plan is not None
    assert plan.budget_bytes == int(SHARE * plan.plain_peak_bytes)
    assert plan.peak_bytes - 64 <= peak(model, call, data) <= plan.peak_bytes < plan.plain_peak_bytes


def test_compiled_before_it_is_checkpointed_and_run_in_between() -> None:
    """What was compiled without a plan is not used any more; and, restored, it is used again."""
    torch.manual_seed(0)
    model, data = Regression(), rows()
    call = torch.compile(model, backend="aot_eager")
    before = train(model, call, data)
    full = peak(model, call, data)
    assert autoremat.checkpoint(call, budget=SHARE, time_limit_seconds=1) is call
    assert same(train(model, call, data), before)
    assert peak(model, call, data) < full
    assert autoremat.restore(call) is call
    assert peak(model, call, data) == full


def test_a_restored_function_is_compiled_as_it_was() -> None:
    model, data = Regression(), rows()
    step = autoremat.checkpoint(torch.compile(model.forward, backend="aot_eager"), budget=SHARE)
    with pytest.raises(ValueError, match="not checkpointed"):
        autoremat.stats(autoremat.restore(step))
    assert autoremat.restore(step)(*data).grad_fn is not None


def test_other_models_are_compiled_as_ever() -> None:
    """Nothing is set for the compiler as a whole."""
    model, other = Regression(), Regression()
    call = torch.compile(autoremat.checkpoint(model, budget=SHARE, time_limit_seconds=1), backend="aot_eager")
    call(*rows()).backward()
    seen = []

    def watching(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        seen.append((torch._inductor.config.custom_partitioner_fn, torch._functorch.config.joint_custom_pass))
        return graph.forward

    torch.compile(other, backend=watching)(*rows()).backward()
    assert seen == [(None, None)]


def test_a_backend_that_splits_no_graph_steps_aside() -> None:
    model, data = autoremat.checkpoint(Regression(), budget=SHARE), rows()
    with pytest.warns(RuntimeWarning, match=r"inside torch\.compile"):
        torch.compile(model, backend="eager")(*data).backward()
    assert autoremat.stats(model).unplanned == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a budget"),
        ({"budget": 0.5, "backned": "inductor"}, "no option 'backned'"),
        ({"budget": 0.5, "backend": "eager"}, "not built on AOTAutograd"),
        ({"budget": 0.5, "backend": "nobody"}, "knows no backend 'nobody'"),
        ({"budget": "much"}, "cannot read 'much'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    from autoremat.backend import backend_of

    with pytest.raises(ValueError, match=message):
        backend_of(options)


def test_checkpointed_twice() -> None:
    call = autoremat.checkpoint(torch.compile(layers(), backend="aot_eager"), budget=SHARE)
    with pytest.raises(ValueError, match="checkpointed by autoremat already"):
        autoremat.checkpoint(call, budget=SHARE)


@pytest.mark.parametrize("is_broken_around", [False, True])
def test_a_checkpointed_module_inside_a_larger_function(is_broken_around: bool) -> None:
    """What else is in its graph is planned with it; a graph break around it does not matter."""

    def build(model: nn.Module) -> object:
        def work(x: Tensor, y: Tensor) -> Tensor:
            x = 1.5 * x
            if is_broken_around:
                torch._dynamo.graph_break()
            loss = model(x, y)
            if is_broken_around:
                torch._dynamo.graph_break()
            return loss.sin()

        return torch.compile(work, backend="aot_eager")

    model, data = built(MLP)
    left = train(model, build(model), data)  # type: ignore[arg-type]
    torch._dynamo.reset()
    model, data = built(MLP)
    call = build(autoremat.checkpoint(model, budget=SHARE, time_limit_seconds=1))
    assert same(train(model, call, data), left)  # type: ignore[arg-type]
    stats = autoremat.stats(model)
    assert (stats.graphs, stats.fallbacks, stats.executed_by) == (1, 0, "aot_eager")
    assert stats.reruns > 0


@pytest.mark.slow
@pytest.mark.guard
def test_several_graphs_are_compiled_without_a_plan() -> None:
    """With a warning that names the break, and the bits of plain training."""
    torch.manual_seed(0)
    model, data = Broken(), rows()
    left = train(model, torch.compile(model, backend="aot_eager"), data)
    torch._dynamo.reset()
    call = torch.compile(autoremat.checkpoint(model, budget=SHARE), backend="aot_eager")
    with pytest.warns(RuntimeWarning, match=r"several graphs, because of .*graph_break.* at .*cases\.py:\d+"):
        assert same(train(model, call, data), left)
    assert autoremat.stats(model).graphs == 0


def test_regions_checkpointed_by_hand_are_left_to_torch() -> None:
    model, data = Regression(), rows()
    inner = model.layers[1].forward
    model.layers[1].forward = lambda x: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)  # type: ignore[method-assign]
    call = torch.compile(autoremat.checkpoint(model, budget=SHARE), backend="aot_eager")
    with pytest.warns(RuntimeWarning, match=r"without a plan: it has regions of torch\.utils\.checkpoint"):
        call(*data).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_the_compiler_runs_as_it_is_is_said_to_have_no_plan() -> None:
    """It makes no graph at all of a recurrent module, and says nothing; a budget must not be lost in silence."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(8, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0].sum()

    call = torch.compile(autoremat.checkpoint(Recurrent(), budget=SHARE), backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="compiled without a plan: torch.compile has made no graph of it"):
        call(torch.randn(4, 3, 8)).backward()
    assert autoremat.stats(call).unplanned == 1
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        call(torch.randn(4, 3, 8))
    assert autoremat.stats(call).unplanned == 1
