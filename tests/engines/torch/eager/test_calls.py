"""The engine of calls: what it runs is what plain training runs, and user code runs once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.eager.arguments import Made, template, tensors_given
from autoremat.engines.torch.eager.facts import facts_of_call
from autoremat.engines.torch.eager.listener import Listener
from autoremat.engines.torch.eager.online import FURTHER_RERUNS
from autoremat.engines.torch.eager.room import OfFirstStep
from autoremat.engines.torch.eager.state import State
from autoremat.engines.torch.eager.tape import First, Reports, Tape
from autoremat.engines.torch.world.memory_account import account, resident
from tests.engines.torch.follow import following, recorded

WIDTH = 32


@pytest.fixture(autouse=True)
def engine_of_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    """A block of a transformer, with dropout."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.drop = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x = x + self.drop(self.out(attended))
        return x + self.drop(self.down(F.gelu(self.up(self.norms[1](x)))))


class Gpt(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(x.flatten(0, 1), torch.arange(x.shape[0] * x.shape[1]) % WIDTH)


class Conv(nn.Module):
    """Batch norm, in-place activations and dropout."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [3, 8, 8, 8, 8]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in self.convs)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.dropout(F.relu(norm(conv(x)), inplace=True), 0.1)
        return F.cross_entropy(self.head(x.mean((2, 3))), torch.arange(x.shape[0]) % 10)


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn = kind(8, 8, 2, bidirectional=True, dropout=0.2, batch_first=True)
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0].sin()).square().mean()


class Picks(nn.Module):
    """Sizes that depend on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(x)
            mask = x[:, 0] > 0
            y = torch.zeros_like(h)
            y[mask] = h[mask].exp().sin()
            x = (y * h).tanh() + x
        return x.square().mean()


class Straight(torch.autograd.Function):
    """Rounds, as if it did not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.cos()


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = Straight.apply(layer(x).sin()) + x.tanh()
        return x.square().mean()


class Penalised(nn.Module):
    """A gradient of a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = y = x.clone().requires_grad_()
        for layer in self.layers:
            y = layer(y).sin() * y.cos()
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.mean() + (g.norm(dim=1) - 1).square().mean()


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    data: Callable[[], Tensor]
    autocast: bool = False


CASES = {
    "gpt": Case(Gpt, lambda: torch.randn(2, 16, WIDTH)),
    "gpt under autocast": Case(Gpt, lambda: torch.randn(2, 16, WIDTH), autocast=True),
    "convolutions": Case(Conv, lambda: torch.randn(4, 3, 8, 8)),
    "lstm": Case(lambda: Recurrent(nn.LSTM), lambda: torch.randn(4, 4, 8)),
    "gru": Case(lambda: Recurrent(nn.GRU), lambda: torch.randn(4, 4, 8)),
    "sizes by numbers": Case(Picks, lambda: torch.randn(64, WIDTH)),
    "custom function": Case(Custom, lambda: torch.randn(64, WIDTH)),
    "gradient penalty": Case(Penalised, lambda: torch.randn(64, WIDTH)),
}


def train(model: nn.Module, call: Callable[..., Tensor], case: Case, steps: int = 3) -> list[Tensor]:
    """Everything that a few steps leave behind."""
    seen = []
    for k in range(steps):
        torch.manual_seed(k)
        x = case.data()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            loss = call(x)
        loss.backward()
        seen += [loss.detach().clone(), torch.get_rng_state(), *(b.clone() for b in model.buffers())]
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return seen


def at_the_floor(model: nn.Module, case: Case, seen: list[Any]) -> Any:
    """Train a copy under the smallest budget that all its plans fit into; the checkpointed copy."""
    budget: float = 1
    for _ in range(6):
        mine = copy.deepcopy(model)
        call = autoremat.checkpoint(mine, budget=budget, time_limit_seconds=0.5)
        try:
            seen[:] = train(mine, call, case)
        except autoremat.InfeasibleBudget as error:
            budget = max(budget + 1, error.floor_bytes)
        else:
            return call
    raise AssertionError("no floor")


@pytest.mark.filterwarnings("ignore:autoremat. a step left the path")  # sizes by numbers: others at every step
@pytest.mark.parametrize("name", CASES)
def test_as_plain_training(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(7)
    model = case.model()
    reference = copy.deepcopy(model)
    plain = train(reference, reference, case)
    seen: list[Tensor] = []
    call = at_the_floor(model, case, seen)
    assert all(map(torch.equal, seen, plain))
    assert len(seen) == len(plain)
    assert autoremat.stats(call).reruns > 0
    assert autoremat.stats(call).unplanned == 0


def test_a_custom_operator_that_multiplies_matrices_under_autocast() -> None:
    with torch.library._scoped_library("autoremat_calls", "FRAGMENT"):

        @torch.library.custom_op("autoremat_calls::product", mutates_args=())
        def product(a: Tensor, b: Tensor) -> Tensor:
            return (a @ b).float()

        product.register_autograd(
            lambda ctx, g: (g @ ctx.saved_tensors[1].t(), ctx.saved_tensors[0].t() @ g),
            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        )

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.randn(WIDTH, WIDTH))

            def forward(self, x: Tensor) -> Tensor:
                for _ in range(3):
                    x = F.layer_norm(
                        torch.ops.autoremat_calls.product(torch.tanh(x @ self.w).float(), self.w), (WIDTH,)
                    )
                return F.cross_entropy(x, torch.arange(len(x)) % WIDTH)

        case = Case(Net, lambda: torch.randn(64, WIDTH), autocast=True)
        torch.manual_seed(1)
        model = Net()
        reference = copy.deepcopy(model)
        plain = train(reference, reference, case)
        seen: list[Tensor] = []
        call = at_the_floor(model, case, seen)
        assert all(map(torch.equal, seen, plain))
        assert autoremat.stats(call).reruns > 0


def test_user_code_runs_as_often_as_the_user_runs_it() -> None:
    calls: list[int] = []
    numbers = iter(range(100))

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            calls.append(next(numbers))
            for layer in self.layers:
                x = layer(x).sin() * x.cos()
            return x.square().mean()

    model = autoremat.checkpoint(Counts(), budget=0.8)
    for _ in range(4):
        model.zero_grad()
        model(torch.randn(64, WIDTH)).backward()
    assert calls == [0, 1, 2, 3]
    assert next(numbers) == 4


def test_a_table_in_an_object_with_slots_is_real() -> None:
    @dataclass(slots=True)
    class Cache:
        table: Tensor | None = None

    cache = Cache()

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            if cache.table is None:
                cache.table = torch.arange(WIDTH, dtype=torch.float32).cos()
            for layer in self.layers:
                x = layer(x * cache.table).sin() + x
            return x.square().mean()

    model = autoremat.checkpoint(Cached(), budget=0.9)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(64, WIDTH)).backward()
    optimizer.step()
    assert type(cache.table) is Tensor
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("share", [0.9, 0.7, 0.55])
def test_the_measured_peak_is_the_plans(share: float) -> None:
    torch.manual_seed(0)
    model, x = Gpt(), torch.randn(8, 32, WIDTH)
    autoremat.checkpoint(model, budget=share, time_limit_seconds=1.0)
    for _ in range(3):
        model.zero_grad(set_to_none=False)
        model(x).backward()
    with torch.no_grad():
        before = resident(model, x)
    plan = autoremat.stats(model).plan
    assert plan is not None
    measured = account(lambda: model(x).backward(), before).peak_bytes
    assert measured <= plan.budget_bytes
    assert abs(measured - plan.peak_bytes) <= 1024
    assert autoremat.stats(model).deviations == 0


def test_what_is_made_again_without_a_plan_is_bounded() -> None:
    """Even where nothing may be held at all."""
    torch.manual_seed(0)
    model, x = Gpt(6), torch.randn(2, 16, WIDTH)
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    plain(x).backward()
    tape = Tape(First(OfFirstStep(lambda saved: 0.0)))
    torch.manual_seed(1)
    with tape.forward():
        loss = model(x)
    loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert 0 < tape.ledger.reruns < (FURTHER_RERUNS + 3) * tape.n_calls


def test_the_listener_looks_into_functions_of_torch() -> None:
    heard: list[str] = []

    def hear(func: Any, args: Any, kwargs: Any) -> Any:
        if listener.is_made_of_others(func):
            return listener.look_into(func, args, kwargs)
        heard.append(func.__name__)
        return func(*args, **kwargs)

    listener = Listener(hear)
    x = torch.randn(4, 4)
    with listener:
        F.normalize(x)
    assert len(heard) > 1
    assert "normalize" not in heard


def test_what_a_call_does_is_found_out_on_fake_tensors() -> None:
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    state = State.now()
    assert facts_of_call(Tensor.add_, (x, y), {}, state).written == (0,)
    assert facts_of_call(torch.mul, (x, y), {"out": torch.empty(4, 4)}, state).written == (2,)
    assert facts_of_call(F.dropout, (x, 0.5), {}, state).random
    assert facts_of_call(torch.empty, (3,), {}, state).uninitialised
    statistics = torch.zeros(4), torch.ones(4)
    norm = facts_of_call(F.batch_norm, (x, *statistics), {"training": True}, state)
    assert (norm.written, norm.statistics) == ((), (1, 2))
    assert facts_of_call(torch.sin, (x,), {}, state).once is None


def test_arguments_are_templates_without_memory() -> None:
    x, y = torch.randn(4, 4), torch.randn(4)
    args = ([x, (y, 3)], "text")
    assert tensors_given(args, {}) == [x, y]
    numbers = {id(x): 0, id(y): 1}
    made = template(list(args), lambda t: numbers[id(t)])
    assert made.content[1] == "text"
    assert made.content[0].content[0] == 0
    assert Made  # what stands for a tensor of the step in real templates


@pytest.mark.slow
@pytest.mark.guard
def test_what_was_made_again_stays_until_the_plan_drops_it() -> None:
    """Its last handle may go before a later call that is made again reads it."""
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.1, "gelu", batch_first=True) for _ in range(6)]
    model, x = nn.Sequential(*layers), torch.randn(4, 16, WIDTH)
    program, path = recorded(lambda x: model(x).square().mean(), (x,))
    with pytest.raises(autoremat.InfeasibleBudget) as caught:
        autoremat.solve(program, 1)
    plan = autoremat.solve(program, caught.value.floor_bytes)
    left: list[str] = []
    reruns: list[float] = []
    for tape in (None, following(plan, path, Reports(lambda reason, growth: left.append(reason), reruns.append))):
        torch.manual_seed(1)
        model.zero_grad()
        with tape.forward() if tape is not None else nullcontext():
            loss = model(x).square().mean()
        loss.backward()
        seen = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        if tape is None:
            plain = seen
    assert all(map(torch.equal, seen, plain))
    assert not left
    assert len(reruns) > 6
