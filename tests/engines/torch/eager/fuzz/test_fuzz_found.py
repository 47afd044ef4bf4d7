"""What random programs have found, shrunk: each must be as in plain training."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.eager import facts, handle
from autoremat.engines.torch.eager.dry_run import record
from autoremat.engines.torch.eager.shadow import Shadow
from tests.engines.torch.compare import off_path, plan_that_keeps_nothing
from tests.engines.torch.eager.fuzz.examine import examine
from tests.engines.torch.eager.fuzz.scripts import Do, If, In, Instruction, Script, Step, Way
from tests.engines.torch.follow import following, recorded


def test_what_dies_in_the_middle_of_the_forward_is_no_op_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tape takes the memory of what Python lets go of; that is not to be seen as an op, and left the path."""
    monkeypatch.setattr(handle, "_EMPTY", {})  # as in a process that has not met these types yet
    body = (Do("where", to=1, a=3, b=1), Do("relu", to=1, a=0))
    assert examine(Script(body, steps=(Step(),) * 2)).wrong == []


@pytest.mark.parametrize("seed", [0, 1], ids=["fake", "real"])
def test_an_input_overwritten_with_something_differentiable_leaves_the_graph_of_the_recording(seed: int) -> None:
    body = (Do("copy_", to=2, a=1, b=2),)
    assert examine(Script(body, steps=(Step(),) * 2, way=Way(seed=seed))).wrong == []


@pytest.mark.one_in(3)
@pytest.mark.parametrize("apart", [True, False], ids=["in a child", "here"])
@pytest.mark.parametrize("branch", [False, True], ids=["fake", "real"])
def test_a_tensor_of_a_closure_is_no_part_of_the_graph_of_the_recording(
    branch: bool, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do its numbers change, where the recording runs on real tensors."""
    if not apart:
        monkeypatch.setattr("autoremat.engines.torch.recording.step.can_run_apart", lambda: False)
    weight, state = torch.ones(8, requires_grad=True), torch.zeros(4, 8)

    def loss_fn(x: Tensor) -> Tensor:
        state[1:].add_(1)
        state.add_(x * weight)
        if branch and x.sum() < 0:
            x = x + 1
        return (x * weight * state).sum()

    program = record(loss_fn, (torch.ones(4, 8),), timing="estimate")
    assert program.recorded == ("real" if branch else "fake")
    assert not state.requires_grad
    assert not state.any()


@pytest.mark.parametrize("mode", ["nothing", "online"])
def test_saved_tensors_modified_by_foreach_operators_are_an_error(mode: str) -> None:
    """Inside a dispatch mode these operators do not count up version counters, so that nobody would notice."""
    outcome = examine(Script((Do("relu", 0, 2), Do("foreach_", 0, 0)), steps=(Step(),), way=Way(mode)))
    assert (outcome.error, outcome.wrong) == ("RuntimeError", [])


def test_constants_made_in_inference_mode_are_put_back_after_a_recording_on_real_tensors() -> None:
    branch = If(0, (Do("relu", 0, 0),), (Do("relu", 0, 0),))
    script = Script(
        (In("inference", (Do("relu", 0, 0), Do("constant", 0, 0))), branch), steps=(Step(),), way=Way("nothing")
    )
    assert examine(script).wrong == []


def test_composite_operators_on_tensors_of_inference_mode_are_not_refused_inside_a_dispatch_mode() -> None:
    """So torch does not refuse them under autoremat, either; such a tensor has no gradient that could be wrong."""
    outcome = examine(Script((In("inference", (Do("relu", 0, 0),)), Do("dropout_", 0, 0)), steps=(Step(),)))
    assert (outcome.error, outcome.wrong) == ("RuntimeError", [])


@pytest.mark.parametrize("mode", ["nothing", "online"])
@pytest.mark.parametrize("op", ["gru", "square"])
@pytest.mark.parametrize("seed", [0, 1], ids=["fake", "real"])
def test_autocast_treats_what_operators_in_inference_mode_are_made_up_of(op: str, seed: int, mode: str) -> None:
    """Such an operator gets to a dispatch mode in one piece."""
    body = (In("inference", (Do(op, 0, 0),)), If(1, (Do("relu", 1, 1),), (Do("sin", 1, 1),)))
    steps = (Step(), Step("within autocast"), Step("within autocast", sign=-1))
    outcome = examine(Script(body, returns="tuple", steps=steps, way=Way(mode, seed=seed)))
    assert (outcome.wrong, outcome.error, outcome.unplanned) == ([], "", "")


@pytest.mark.parametrize("mode", ["nothing", "online"])
@pytest.mark.parametrize("returns", ["loss", "tuple"])
@pytest.mark.parametrize(
    "after", [(Do("clone", 0, 0),), (Do("sum", 0, 0), Do("cat", 0, 0)), (Do("cast", 0, 0),), ()], ids=str
)
def test_what_is_made_of_a_leaf_of_inference_mode_requires_gradients_as_without_us(
    after: tuple[Do, ...], returns: str, mode: str
) -> None:
    """Such a tensor does not lead to autograd's kernel, but those do that the operator is made up of."""
    script = Script((In("inference", (Do("leaf", 0, 0),)), *after), returns, (0,), (Step(rows=4),) * 2, Way(mode))
    assert examine(script).wrong == []


def test_a_step_that_finds_what_an_earlier_one_has_left_on_the_module_is_recorded_too() -> None:
    """The shape of what is kept decides how it is made to fit."""
    found = examine(Script((Do("kept_before", 0, 0), Do("kept", 0, 0)), steps=(Step(), Step()), way=Way("nothing")))
    assert (found.wrong, found.deviations) == ([], 0)


def test_what_only_a_dead_part_of_the_graph_has_saved_goes_with_it_although_it_is_made_again_later() -> None:
    body = (Do("relu", 0, 0), Do("div", 0, 0, 2), Do("relu", 0, 2))
    outcome = examine(Script(body, steps=(Step(rows=64, training=False),), way=Way("measured")))
    assert outcome.wrong == []


def test_what_dies_in_inference_mode_within_autocast_is_no_op_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking its memory asks torch a question that is a composite operator, and in a finalizer that was refused."""
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(64, 8)

    def loss_fn(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            dead = torch.sigmoid(x @ weight).exp()
            with torch.inference_mode():
                del dead
            return torch.tanh(x @ weight).float().tanh().sum()

    loss_fn(x).backward()
    gradient = weight.grad
    lost: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    for way in ("nothing", "online"):
        weight.grad = None
        program, path = recorded(loss_fn, (x,))
        tape = following(plan_that_keeps_nothing(program), path) if way == "nothing" else off_path()
        with tape.forward():
            loss = loss_fn(x)
        loss.backward()
        assert torch.equal(weight.grad, gradient)
    assert lost == []


@pytest.mark.parametrize("mode", ["nothing", "online"])
@pytest.mark.parametrize("seed", [0, 1], ids=["fake", "real"])
@pytest.mark.parametrize("op", ["batch_norm", "dropout"])
def test_composite_operators_in_inference_mode_are_taken_apart(op: str, seed: int, mode: str) -> None:
    """In one piece it would not be seen that they update statistics or draw, which they must not do twice."""
    body = (In("inference", (Do("relu", 0, 0), Do(op, 0, 0))),)
    assert examine(Script(body, steps=(Step(), Step(sign=-1)), way=Way(mode, seed=seed))).wrong == []


@pytest.mark.parametrize("mode", ["nothing", "online"])
@pytest.mark.parametrize("seed", [0, 1], ids=["fake", "real"])
@pytest.mark.parametrize("op", ["view_as", "reshape", "chunk", "expand", "dropout_"])
def test_views_of_the_graph_outside_taken_in_inference_mode_require_gradients_as_without_us(
    op: str, seed: int, mode: str
) -> None:
    """Any dispatch mode loses that, unless what composite operators are made up of gets to torch's own layers."""
    body = (Do("relu", 0, 1), In("inference", (Do("relu", 1, 0), Do(op, 0, 0, 0, 1))))
    steps = (Step(input_grad=True), Step(input_grad=True, sign=-1))
    assert examine(Script(body, steps=steps, way=Way(mode, seed=seed))).wrong == []


@pytest.mark.parametrize("seed", [0, 1], ids=["fake", "real"])
def test_a_branch_on_a_gradient_computed_in_the_forward_is_recorded_as_it_is_taken(seed: int) -> None:
    """A recording on real tensors keeps no numbers for the backward, but a backward inside the forward needs them."""
    never = (Do("index_", 0, 0),)
    body = (Do("gradient", 0, 0), If(0, (Do("relu", 0, 0),), (*never, Do("sin", 0, 0))), Do("gradient", 0, 0))
    found = examine(Script(body, steps=(Step(), Step(sign=-1)), way=Way("nothing", seed=seed)))
    assert found.wrong == []
    assert found.deviations == 0


def test_inputs_from_a_graph_outside_that_are_overwritten_are_planned() -> None:
    """No recording that runs the callable by itself could be made of them."""
    body = (If(0, (Do("relu", 1, 1),), (Do("relu", 1, 1),)), Do("add_", 0, 0, 1))
    found = examine(Script(body, steps=(Step("from graph"),), way=Way("nothing", seed=1)))
    assert found.wrong == []
    assert found.unplanned == ""


def test_what_fails_on_fake_tensors_is_not_reported_to_the_user(caplog: pytest.LogCaptureFixture) -> None:
    """Torch logs a traceback; the step is recorded on real tensors instead."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        with contextlib.suppress(RuntimeError):
            torch.view_as_complex((x * 2).t())  # the last dimension has another stride than 1
        return (x * x.sum().item()).sum()

    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(caplog.handler)
    try:
        assert record(loss, (torch.ones(2, 3, requires_grad=True),), timing="estimate").recorded == "real"
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.records == []
    assert not logger.disabled


def test_a_value_that_only_a_dead_handle_stood_for_is_not_held_once_it_is_overwritten() -> None:
    """Its memory holds another value then, and the plan lets go of that."""
    body = (Do("gelu", 1, 2), Do("relu", 1, 0), Do("zero_", 0, 3))
    found = examine(Script(body, steps=(Step(rows=64, training=False),), way=Way("measured")))
    assert found.wrong == []
    assert found.peak is not None
    assert found.peak[0] == found.peak[1]


def test_off_the_path_what_is_held_and_cannot_be_made_again_stays_for_what_needs_it() -> None:
    """Its maker is known, but begins with a value that is gone."""
    relu, other = Do("relu", 0, 0), (Do("relu", 0, 0), Do("relu", 0, 0))
    branch = In("enable_grad", (If(0, (relu,), (*other, Do("embedding", 0, 0))),))
    body = (Do("relu", 2, 0), Do("data_", 0, 0), branch, *other, If(1, (relu,), other))
    assert examine(Script(body, steps=(Step(sign=-1), Step()), way=Way("random", seed=0))).wrong == []


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("mode", ["nothing", "online"])
def test_dropout_on_tensors_of_inference_mode_is_torchs_own(mode: str, training: bool) -> None:
    """The one for the compiler makes a copy in evaluation."""
    inside = Do("relu", 0, 0), Do("dropout", 0, 2)
    body = (*inside, In("no_grad", (In("inference", inside),)), Do("relu", 1, 0))
    assert examine(Script(body, steps=(Step(training=training),), way=Way(mode))).wrong == []


def test_what_dropout_in_evaluation_makes_of_a_tensor_of_inference_mode_is_one_of_inference_mode() -> None:
    body = (In("inference", (Do("relu", 0, 0),)), Do("dropout", 0, 0), Do("linear", 0, 0))
    found = examine(Script(body, steps=(Step(training=False),), way=Way("nothing")))
    assert (found.error, found.wrong) == ("RuntimeError", [])


def test_a_node_behind_an_in_place_op_on_a_view_runs_twice_in_the_second_backward() -> None:
    """Once in its CopySlices, once by itself, for the penalty: what it saved has to be there for both."""
    body = (Do("relu", 0, 0), Do("relu", 0, 0), Do("half_tanh_", 0, 2))
    assert examine(Script(body, steps=(Step("double"),), way=Way("random", seed=51))).wrong == []


def test_an_op_that_overwrites_a_buffer_in_place_of_the_recorded_one_is_no_error() -> None:
    """The step leaves its path behind it; what the op read of the buffer is gone then, and nobody asks for it."""
    relus = (Do("relu", 0, 0),) * 8
    branch = If(1, (Do("half", 0, 0), Do("mul_", 0, 0)), (Do("buffer", 0, 0),))
    steps = (Step(), Step(), Step(sign=-1))
    assert examine(Script((Do("add_", 0, 1), *relus, branch), steps=steps, way=Way("nothing"))).wrong == []


@pytest.mark.parametrize("budget", ["100%", 0.9])
def test_a_view_of_whose_history_torch_does_not_tell(budget) -> None:
    """Made without gradients, its base then overwritten with them: it may be read without gradients, and returned."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))))

    def loss_of(model, x):
        h = torch.relu(model(x)) * 2
        with torch.no_grad():
            view = h[::2]
        h.mul_(3)
        with torch.no_grad():
            mean = view.mean()
        return torch.tanh(h).sum() + mean, view

    plain, mine = build(), build()
    step = autoremat.checkpoint(lambda x: loss_of(mine, x), budget=budget)
    for _ in range(3):
        x = torch.randn(256, 16)
        results = []
        for model, call in ((plain, lambda x: loss_of(plain, x)), (mine, step)):
            model.zero_grad()
            loss, view = call(x)
            loss.backward()
            results.append((loss, view.detach(), *(p.grad for p in model.parameters())))
        assert all(map(torch.equal, *results))
    stats = autoremat.stats(step)
    assert (stats.unplanned, stats.deviations) == (0, 0)


@pytest.mark.one_in(13)
@pytest.mark.parametrize(
    "way", [Way("nothing", 0), Way("nothing", 1), Way("online"), Way("measured"), Way("random", 3)]
)
@pytest.mark.parametrize("op", ["add_", "half_", "detached_"])
@pytest.mark.parametrize("view", [2, 3, 4])
def test_nobody_makes_the_node_of_an_overwritten_view_before_the_call_that_reads_it(
    op: str, view: int, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch makes it anew when it is asked for. Two nodes the other way round: gradients are added up otherwise."""
    monkeypatch.setattr(facts, "_KNOWN", {})  # as in a process that has met no call yet
    monkeypatch.setattr(facts, "_OF_OTHER_SIZES", {})
    write = Do(op, 0, view, 1)
    for body in ((write,), (In("no_grad", (write,)), Do("silu", 0, 4, 2)), (write, Do("cast", 1, 4, 0, 2))):
        assert examine(Script(body, steps=(Step(),), way=way)).wrong == []


@pytest.mark.parametrize("mode", ["nothing", "moved"])
def test_what_a_function_has_saved_is_no_part_of_the_checkpoint_by_hand_that_reads_its_result(mode: str) -> None:
    """Its twin gets its history when the checkpointed part reads it first: the step could not be recorded."""
    branch = If(3, (Do("zero_", 0, 0, 1, 2),), otherwise=(Do("tied", 3, 3, 1, 4), Do("clamp_", 1, 1, 4, 5)))
    body = (Do("scale_function", 3, 3, 2, 3), Do("checkpoint", 0, 4, 4, 6), branch)
    assert examine(Script(body, steps=(Step(),) * 2, way=Way(mode))).wrong == []


@pytest.mark.parametrize("mode", ["moved", "random"])
@pytest.mark.parametrize("seed", range(1, 7))
def test_what_is_prepared_beyond_the_plan_is_given_up_as_a_whole(mode: str, seed: int) -> None:
    """A call that the plan does not rerun was taken for one that it does, and outlived what it reads."""
    branch = If(0, (Do("relu", 0, 0),), otherwise=(Do("where", 3, 0, 1),))
    body = (Do("set_item", 1, 2), Do("masked_fill_", 0, 1), Do("seed", 3, 0), branch)
    steps = (Step(rows=4), Step(rows=4, sign=-1))
    assert examine(Script(body, returns="loss", slots=(0,), steps=steps, way=Way(mode, seed, 0.0))).wrong == []


@pytest.mark.parametrize("b", [0, 1, 2])
def test_what_a_custom_function_made_is_overwritten_by_the_next_call(b: int) -> None:
    """Its twin was a view, which must not be overwritten: the self-check took the change for an unseen one."""
    body = (Do("scale_function", to=3, a=2), Do("add_", to=3, a=3, b=b))
    assert examine(Script(body, steps=(Step(),) * 2)).wrong == []


@pytest.mark.parametrize("mode", ["nothing", "random", "budget"])
def test_a_write_that_cannot_be_recorded_is_no_unseen_one(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_fakes = Shadow._on_fakes

    def without_add_(self: Shadow, func: Any, *others: Any) -> list[Tensor]:
        if func is Tensor.add_:
            raise RuntimeError("no fake kernel")
        return on_fakes(self, func, *others)

    monkeypatch.setattr(Shadow, "_on_fakes", without_add_)
    body = Do("linear", to=3, a=2), Do("add_", to=3, a=3, b=0), Do("sin", to=1, a=3), Do("mul", to=2, a=1, b=3)
    assert examine(Script(body, steps=(Step(),) * 3, way=Way(mode=mode))).wrong == []


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            (Do("add_", to=0, a=2, b=0), In("inference", (Do("linear", to=0, a=3),))), id="of something overwritten"
        ),
        pytest.param(
            (Do("relu", to=4, a=0), In("inference", (Do("reshape", to=0, a=2), Do("dirty_function", to=0, a=0)))),
            id="overwritten",
        ),
        pytest.param((In("inference", (Do("complex", to=0, a=2),)),), id="complex"),
        pytest.param((In("no_grad", (Do("half", to=2, a=2),)), Do("scale_function", to=0, a=2)), id="differentiated"),
    ],
)
def test_views_made_without_gradients_are_recorded(body: tuple[Instruction, ...]) -> None:
    """They say that they require grad, and have no history."""
    assert examine(Script(body, slots=(0,), steps=(Step(),) * 2)).wrong == []


def test_a_view_from_which_nothing_may_go_on_is_recorded() -> None:
    """What it looks at is overwritten, and it is one view of several by one function."""
    body = Do("chunk", to=0, a=2), Do("add_", to=0, a=2, b=0)
    assert examine(Script(body, slots=(0,), steps=(Step(),) * 2)).wrong == []


def test_a_part_checkpointed_by_hand_whose_input_is_overwritten_is_an_error_of_torchs() -> None:
    """No program can be made of such a step: that is not the user's business."""
    body = Do("checkpoint", to=0, a=2), Do("add_", to=0, a=2, b=0)
    outcome = examine(Script(body, slots=(0,), steps=(Step(),) * 2))
    assert outcome.wrong == []
    assert outcome.error == "RuntimeError"


def test_weights_that_autocast_keeps_from_an_earlier_call_are_known() -> None:
    """The first call converts and saves them; where its backward does not ask for them, the second one's does."""
    body = Do("gru", to=1, a=0), Do("gru", to=1, a=0)
    steps = (Step("within autocast", training=True),) * 3
    assert examine(Script(body, slots=(0,), steps=steps, way=Way("nothing"))).wrong == []
