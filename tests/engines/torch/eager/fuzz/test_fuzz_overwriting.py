"""What random programs have found about histories and overwritten memory, shrunk: each must be as in plain training."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import autoremat
from tests.engines.torch.compare import plan_that_keeps_nothing
from tests.engines.torch.eager.fuzz.examine import examine
from tests.engines.torch.eager.fuzz.scripts import Do, If, In, Script, Step, Way
from tests.engines.torch.follow import following, recorded


@pytest.mark.parametrize("region", ["no_grad", "inference", "autocast"])
def test_what_a_custom_function_made_is_read_first_without_gradients(region: str) -> None:
    """The twin of its input lost its history in there, and the node that stands for the function with it."""
    body = Do("relu", to=0, a=0), Do("scale_function", to=0, a=0, b=2), In(region, (Do("relu", to=0, a=0),))
    assert examine(Script(body, slots=(0,), steps=(Step(),) * 2, way=Way("nothing"))).wrong == []


def test_what_a_step_overwrites_before_it_leaves_the_path_is_read_by_no_rerun() -> None:
    """The next forward overwrites the input once more, and the first one's backward complained."""
    branch = If(0, (Do("relu", 0, 0),), otherwise=(Do("relu", 1, 0),))
    body = Do("relu", 0, 0), Do("add_", to=0, a=1, b=1), branch, Do("relu", 0, 0), Do("linear", 0, 0)
    steps = Step("two forwards", rows=4), Step("two forwards", rows=4, sign=-1)
    assert examine(Script(body, slots=(0,), steps=steps, way=Way("nothing"))).wrong == []


def test_a_parameter_that_changes_before_the_backward_is_an_error_as_in_plain_training() -> None:
    """Saved in a call whose input the plan drops, it was handed out as it was by then, and the gradient was wrong."""
    scale, x = torch.nn.Parameter(torch.ones(32)), torch.randn(256, 32)

    def loss_of(x: Tensor) -> Tensor:
        return (torch.sin(x * shift) * scale).sum()

    shift = torch.nn.Parameter(torch.ones(32))
    program, path = recorded(loss_of, (x,))
    with following(plan_that_keeps_nothing(program), path).forward():
        loss = loss_of(x)
    with torch.no_grad():
        scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_custom_function_under_no_grad_returns_the_memory_it_was_given() -> None:
    """Its twin had memory of its own, with the same number, so that what overwrote it could not be recorded."""
    body = In("no_grad", (Do("dirty_function", to=0, a=2),)), Do("add_", to=0, a=0, b=0)
    assert examine(Script(body, slots=(0,), steps=(Step(),) * 2, way=Way("nothing"))).wrong == []


def test_in_inference_mode_a_dropout_that_does_nothing_overwrites_nothing() -> None:
    """Operators made of others are not taken apart there: the recording saw one that is said to overwrite its input."""
    body = In("inference", (Do("relu", 0, 0),)), Do("dropout_", to=0, a=0), Do("relu", 0, 0)
    steps = Step(rows=4, training=False), Step(rows=4, sign=-1, training=False)
    assert examine(Script(body, slots=(0,), steps=steps, way=Way("nothing"))).wrong == []


@pytest.mark.parametrize("seed", range(4))
def test_a_weight_that_autocast_has_kept_from_a_call_that_does_not_save_it_stays(seed: int) -> None:
    """The input wants no gradient, so only the second call saves the weight; no rerun of the first one hands it out."""
    steps = Step("within autocast"), Step("within autocast", sign=-1)
    script = Script((Do("linear", to=0, a=2),), slots=(0,), steps=steps, way=Way("random", seed, 0.0))
    assert examine(script).wrong == []


def test_a_call_that_writes_into_what_it_is_given_may_be_given_nothing_to_write_into() -> None:
    """By then it is another call than the recorded one, of the same function."""
    weight, out, is_given = torch.randn(16, 16, requires_grad=True), torch.zeros(256, 16), [True]

    def loss_of(x: Tensor) -> Tensor:
        h = (x @ weight).tanh().sin()
        with torch.no_grad():
            torch.add(x, x, **({"out": out} if is_given[0] else {}))
        for _ in range(4):
            h = (h @ weight).tanh().sin()
        return h.square().sum()

    step = autoremat.checkpoint(loss_of, budget="85%")
    for k in range(5):
        is_given[0] = k < 3
        x = torch.randn(256, 16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (mine,) = torch.autograd.grad(step(x), weight)
        assert torch.equal(mine, torch.autograd.grad(loss_of(x), weight)[0])
    assert autoremat.stats(step).deviations
