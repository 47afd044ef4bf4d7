"""New kinds of input that keep coming: few recordings, one warning with a name, every step exact, within its budget."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import autoremat
from autoremat.engines.torch.eager.changing import what_changes
from autoremat.engines.torch.eager.inputs import input_of
from autoremat.engines.torch.eager.newcomers import AT_ONCE, OFTEN, Newcomers
from autoremat.engines.torch.eager.stats import Stats
from autoremat.engines.torch.world.memory_account import account, resident
from tests.fixed import examples

WIDTH, ROWS = 32, 256


class Net(nn.Module):
    """Blocks that come in two ways, of which flags decide, and a mask that may be there; other flags mean nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU()) for _ in range(3))
        self.back = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, flags: Sequence[bool], mask: Tensor | None = None) -> Tensor:
        for up, down, flag in zip(self.blocks, self.back, flags, strict=False):
            x = x + (down(up(x)) if flag else up(x)[:, :WIDTH])
        return (x if mask is None else x * mask).square().mean()


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def flags_of(k: int, n: int = 6) -> list[bool]:
    return [bool(k >> i & 1) for i in range(n)]


class Run:
    """Trains a model plainly and within a budget, step by step, and compares; measures the peak of every few steps."""

    def __init__(
        self, budget: Any, loss: Callable[..., Tensor] = lambda model, *batch: model(*batch), every: int = 1
    ) -> None:
        self.every, self.n = every, 0
        self.plain, self.mine = net(), net()
        model = self.mine

        def step(x: Any, flags: Any = (), mask: Any = None) -> Tensor:
            return loss(model, x, flags, mask)

        self.loss, self.step = loss, autoremat.checkpoint(step, budget=budget)
        self.peaks, self.messages = list[int](), list[str]()

    def __call__(self, *batch: Any) -> None:
        for model in (self.plain, self.mine):
            model.zero_grad()
        expected = self.loss(self.plain, *batch)
        expected.backward()
        results = list[Tensor]()

        def go() -> None:
            out = self.step(*batch)
            out.backward()
            results.append(out.detach())

        planned = self.stats.planned
        tensors = [t for t in torch.utils._pytree.tree_leaves(batch) if isinstance(t, Tensor)]
        is_measured, self.n = self.n % self.every == 0, self.n + 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            peak = account(go, resident(self.mine, *tensors)).peak_bytes if is_measured else go() or 0
        self.messages += [str(w.message) for w in caught if "autoremat" in str(w.message)]
        if self.stats.planned == planned:  # else operators have been measured in between
            self.peaks.append(peak)
        assert torch.equal(results[0], expected.detach())
        gradients = [[p.grad for p in m.parameters() if p.grad is not None] for m in (self.plain, self.mine)]
        assert len(gradients[0]) == len(gradients[1])
        assert all(map(torch.equal, *gradients))

    @property
    def stats(self) -> Stats:
        return autoremat.stats(self.step)


def budget_of(share: float, *batch: Any) -> int:
    model = net()
    return int(share * autoremat.plan(lambda: model(*batch), budget=1.0, timing="measure").plain_peak_bytes)


@pytest.mark.slow
@pytest.mark.guard
def test_flags_that_are_others_at_every_step_are_named_and_not_recorded_for_ever() -> None:
    x = torch.randn(ROWS, WIDTH)
    budget = budget_of(0.7, x, flags_of(63))
    run = Run(budget, every=3)
    for k in range(40):
        run(x, flags_of(k))
    assert run.stats.planned <= AT_ONCE + 1
    assert run.stats.unplanned == 0
    assert max(run.peaks) <= budget
    (message,) = run.messages
    assert "new kinds of input keep coming: argument 'flags'" in message
    hits = run.stats.hits
    run(x, flags_of(0))
    run(x, flags_of(AT_ONCE))
    assert run.stats.hits == hits + 2  # known kinds keep their plans


@pytest.mark.slow
@pytest.mark.guard
def test_a_kind_that_comes_back_often_has_a_plan_in_the_end() -> None:
    x = torch.randn(ROWS, WIDTH)
    run = Run(budget_of(0.7, x, flags_of(63)), every=100)
    for k in range(AT_ONCE + 1):
        run(x, flags_of(k))
    before = run.stats
    for _ in range(OFTEN + 3):
        run(x, flags_of(60))
    after = run.stats
    assert after.planned == before.planned + 1
    assert after.hits >= before.hits + 3
    assert after.deviations <= OFTEN


@pytest.mark.slow
def test_sizes_that_decide_which_calls_are_made_do_not_make_plans_for_ever() -> None:
    def loss(model: Net, x: Tensor, *_: Any) -> Tensor:
        for _ in range(1 + len(x) // 8 % 4):
            x = model.back[0](model.blocks[0](x))
        return x.square().mean()

    run = Run("1.2MB", loss, every=3)
    for k in range(30):
        run(torch.randn(128 + 8 * (17 * k % 30), WIDTH))
    assert run.stats.planned <= AT_ONCE + 1
    assert run.stats.unplanned == 0
    assert max(run.peaks) <= 1_200_000


KINDS = st.tuples(
    st.integers(0, 63), st.sampled_from((ROWS, ROWS // 2)), st.sampled_from(("none", "float", "bool")), st.booleans()
)


@pytest.mark.slow
@given(st.lists(KINDS, min_size=12, max_size=30), st.sampled_from((0.6, 0.8)))
@examples(2)
def test_any_kinds_in_any_order(kinds: list[tuple[int, int, str, bool]], share: float) -> None:
    budget = budget_of(share, torch.randn(ROWS, WIDTH), flags_of(63), torch.ones(ROWS, WIDTH))
    run = Run(budget, every=2)
    for k, rows, mask, requires_grad in kinds:
        masks = {"none": None, "float": torch.ones(rows, WIDTH), "bool": torch.ones(rows, WIDTH, dtype=torch.bool)}
        run(torch.randn(rows, WIDTH).requires_grad_(requires_grad), flags_of(k), masks[mask])
    assert run.stats.planned <= 2 * (1 + AT_ONCE + len(kinds) / OFTEN)  # a larger input may be foreseen with each
    assert run.stats.unplanned == 0
    assert max(run.peaks, default=0) <= budget
    told = [m.split("(")[0] for m in run.messages]
    assert len(told) == len(set(told)) <= 4


@given(st.lists(st.one_of(st.none(), st.integers(0, 40)), max_size=400))
@examples(100)
def test_recordings_are_few_whatever_comes(steps: list[int | None]) -> None:
    newcomers, known, recordings = Newcomers(), set[int](), 0
    for step in steps:
        if step is None or step in known:
            newcomers.has_followed()
        elif newcomers.may_record(step):
            known.add(step)
            recordings += 1
    assert recordings <= AT_ONCE + len(steps) / OFTEN
    assert all(steps.count(k) <= OFTEN for k in set(steps) - known if k is not None)


def test_the_time_that_a_kind_has_taken_pays_for_its_recording() -> None:
    newcomers = Newcomers()
    for k in range(AT_ONCE):
        assert newcomers.may_record(k)
    newcomers.has_recorded(*input_of(lambda x: x, (torch.ones(2),), {}), seconds=1.0)
    assert not newcomers.may_record("a")
    newcomers.has_noted("a", 0.6)
    assert not newcomers.may_record("a")
    newcomers.has_noted("a", 0.6)
    assert newcomers.may_record("a")
    assert not newcomers.may_record("b")


class Colour(Enum):
    RED = 1
    BLUE = 2


X = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("first", "second", "name", "how"),
    [
        ((X, True), (X, False), "argument 'flag'", "it was True and is False"),
        ((X, [True, X]), (X, [False, X]), "argument 'flag'", "[0] was True and is False"),
        ((X, Colour.RED), (X, Colour.BLUE), "argument 'flag'", "it was Colour.RED and is Colour.BLUE"),
        ((X, None), (X, X), "argument 'flag'", "it was None and is a tensor of 2 dimensions"),
        ((X, {"a": X}), (X, {"b": X}), "argument 'flag'", "2 different ones in 2 kinds"),
        ((X, (1,)), (X, (1, 2)), "argument 'flag'", "it was 1 items and is 2 items"),
        ((X,), (X.double(),), "argument 'x'", "dtype was torch.float32 and is torch.float64"),
        ((X,), (X.clone().requires_grad_(),), "argument 'x'", "requires_grad was False and is True"),
        ((X,), (X.T.contiguous().T,), "argument 'x'", "order"),
        ((X,), (torch.ones(5, 4),), "argument 'x'", "it was of size 4 x 4 and is of size 5 x 4"),
        ((X, 3), (X, 4), "argument 'flag'", "it was of size 3 and is of size 4"),
    ],
)
def test_what_changes_is_named(first: Any, second: Any, name: str, how: str) -> None:
    def fn(x: Tensor, flag: Any = None) -> None:
        pass

    kinds = [input_of(fn, args, {}) for args in (first, second)]
    found = what_changes(fn, second, {}, kinds)
    assert found[0] == name
    assert how in found[1]


def test_what_changes_in_the_model_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    kinds = [input_of(model, (X,), {})]
    model[1].eval()
    kinds.append(input_of(model, (X,), {}))
    assert what_changes(model, (X,), {}, kinds)[0] == "train() and eval() of the modules"
    kinds = [kinds[-1]]
    model[0].bias.requires_grad_(False)
    kinds.append(input_of(model, (X,), {}))
    assert what_changes(model, (X,), {}, kinds)[0] == "parameters and buffers of the model"


def test_a_module_names_the_argument_of_its_forward() -> None:
    x, model = torch.randn(8, WIDTH), net()
    autoremat.checkpoint(model, budget=1.0)
    for k in range(AT_ONCE + 1):
        model(x, flags_of(k)).backward()
    with pytest.warns(RuntimeWarning, match="keep coming: argument 'flags'"):
        model(x, flags_of(AT_ONCE + 1))


@pytest.mark.slow
@pytest.mark.guard
def test_steps_that_are_not_recorded_count_what_autograd_has_saved_and_put_nothing_off() -> None:
    """Gradients that accumulate, and calls before one backward, as in steps with a plan."""
    x = torch.randn(ROWS, WIDTH)
    budget = budget_of(0.8, x, flags_of(63))
    plain, mine = net(), net()
    step = autoremat.checkpoint(lambda flags: mine(x, flags), budget=budget)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(24):
            plain(x, flags_of(k)).backward()
            step(flags_of(k)).backward()
    assert autoremat.stats(step).planned <= AT_ONCE + 3
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), mine.parameters(), strict=True))  # type: ignore[arg-type]


def test_dropout_in_a_step_that_is_not_recorded_draws_the_same_numbers() -> None:
    def loss(model: nn.Module, x: Tensor, flags: Sequence[bool]) -> Tensor:
        for flag in flags:
            x = F.dropout(F.gelu(x), 0.3) if flag else x.sin()
        return model(x).square().mean()

    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, WIDTH)
    mine, x = copy.deepcopy(plain), torch.randn(ROWS, WIDTH, requires_grad=True)
    step = autoremat.checkpoint(lambda flags: loss(mine, x, flags), budget="240KB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(20):
            states, gradients = [], []
            for call in (lambda flags: loss(plain, x, flags), step):
                torch.manual_seed(k)
                x.grad = None
                call(flags_of(k)).backward()
                states.append(torch.get_rng_state())
                gradients.append(x.grad)
            assert torch.equal(*states)
            assert torch.equal(*gradients)  # type: ignore[arg-type]
    assert autoremat.stats(step).reruns > 0
