"""Steps whose values move to a tier and back: the numbers of plain training, whatever the tier does."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.eager.away import Away
from autoremat.engines.torch.world.memory_account import account, resident
from autoremat.engines.torch.world.tier import Disk, OffloadFailed
from autoremat.program import Link, Plan, Program, Schedule, simulate, verify
from tests.engines.torch.eager.stores import AtOnce, AtRandom, Late, TierOfStores
from tests.engines.torch.follow import recorded
from tests.planner.random_offloads import with_random_offloads

ROWS, WIDTH = 256, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.gelu(self.up(self.norm(x)))
        return x + nn.functional.dropout(self.down(h), 0.1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(4)))


def inputs() -> Tensor:
    return torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH)


def loss_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().mean()


def numbers(model: nn.Module, call: Callable[[Tensor], Tensor], backward: Callable[[Tensor], None]) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    loss = call(inputs())
    backward(loss)
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None), torch.get_rng_state()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def step(model: nn.Module, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return numbers(model, call, Tensor.backward)


@cache
def plain() -> list[Tensor]:
    model = network()
    return step(model, loss_of(model))


@cache
def program() -> Program:
    return replace(recorded(loss_of(network()), (inputs(),))[0], link=Link(1e9, 1e9, name="disk:a test"))


@cache
def plan(seed: int = 0) -> Plan:
    """Most of what may move moves; nothing is recomputed."""
    schedule = with_random_offloads(program(), Schedule.plain(program()), random.Random(seed))
    assert verify(program(), schedule) == ()
    timeline = simulate(program(), schedule)
    peak, plain_peak = timeline.peak_bytes, simulate(program()).peak_bytes
    overhead = timeline.overhead_seconds / program().seconds
    assert len(schedule.offloads) > 5
    return Plan(program(), schedule, peak, peak, plain_peak, peak, overhead, 0.0, "moved")


@pytest.fixture
def with_stores(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Late]], TierOfStores]:
    """Put a tier of test stores in place of the user's."""

    def put(make: Callable[[], Late]) -> TierOfStores:
        tier = TierOfStores(make)
        monkeypatch.setattr("autoremat.engines.torch.eager.options.TierOf", lambda name, budget: tier)
        return tier

    return put


Put = Callable[[Callable[[], Late]], TierOfStores]


@pytest.mark.parametrize("make", [Late, AtOnce, *(lambda k=k: AtRandom(k) for k in range(3))])
def test_steps_are_exact_whenever_copies_happen(with_stores: Put, make: Callable[[], Late]) -> None:
    for seed in (0, 1):
        tier, model = with_stores(make), network()
        call = autoremat.checkpoint(loss_of(model), plan=plan(seed))
        for _ in range(3):
            assert same(step(model, call), plain())
        assert autoremat.stats(call).deviations == 0
        assert [store.moved for store in tier.stores] == [len(plan(seed).schedule.offloads)] * 2  # not the first one
        assert all(store.is_closed for store in tier.stores)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a test is as fast as these ops take a fast device to be."""
    link = Link(1e12, 1e12)
    monkeypatch.setattr(
        Disk, "link", lambda disk: replace(link, name=f"disk:{disk.folder}", tier_bytes=disk.most_bytes)
    )


@pytest.mark.usefixtures("fast")
def test_the_peak_is_the_plans_to_the_byte_and_within_the_budget(tmp_path: Path) -> None:
    model = network()
    call = autoremat.checkpoint(loss_of(model), budget=0.6, offload=f"disk:{tmp_path}")
    for _ in range(2):
        assert same(step(model, call), plain())
    made, x = autoremat.stats(call).plan, inputs()
    assert made is not None
    assert made.schedule.offloads
    assert verify(made.program, made) == ()
    model.zero_grad()
    assert account(lambda: call(x).backward(), resident(model, x)).peak_bytes == made.peak_bytes <= made.budget_bytes


def peak_of(model: nn.Module, call: Callable[[Tensor], Tensor]) -> int:
    model.zero_grad()
    x = inputs()
    return account(lambda: call(x).backward(), resident(model, x)).peak_bytes


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("share", [0.75, 0.35])
def test_the_first_step_stays_within_the_budget_as_without_a_tier(tmp_path: Path, share: float) -> None:
    """Nothing of it has moved in its forward, so its backward does not go by a plan in which things have."""
    model = network()
    call = autoremat.checkpoint(loss_of(model), budget=share, offload=f"disk:{tmp_path}")
    first, second = peak_of(model, call), peak_of(model, call)
    made = autoremat.stats(call).plan
    assert made is not None
    assert made.schedule.offloads
    assert first <= made.budget_bytes
    assert second == made.peak_bytes
    assert same(step(model, call), plain())


@pytest.mark.usefixtures("fast")
def test_below_the_floor_of_recomputation_the_first_step_says_that_it_takes_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    call = autoremat.checkpoint(loss_of(model), budget=0.5, keep="*", offload=f"disk:{tmp_path}")
    assert same(step(model, call), plain())
    assert "this once, the step takes more" in caplog.text
    caplog.clear()
    made = autoremat.stats(call).plan
    assert made is not None
    assert peak_of(model, call) == made.peak_bytes <= made.budget_bytes
    assert same(step(model, call), plain())
    assert not caplog.text


@pytest.mark.usefixtures("fast")
def test_below_the_floor_with_a_tier_the_refusal_names_that_floor(tmp_path: Path) -> None:
    tier = f"disk:{tmp_path}"
    model = network()
    with pytest.raises(autoremat.InfeasibleBudget) as refused:
        step(model, autoremat.checkpoint(loss_of(model), budget=0.1, keep="*", offload=tier))
    floor, text = refused.value.floor_bytes, str(refused.value)
    assert f"Give a budget of at least {floor} bytes" in text
    assert "moved to the tier" in text
    assert "under the constraints keep=" in text
    call = autoremat.checkpoint(loss_of(model), budget=floor, keep="*", offload=tier)
    assert same(step(model, call), plain())
    assert peak_of(model, call) <= floor
    with pytest.raises(autoremat.InfeasibleBudget):
        step(model, autoremat.checkpoint(loss_of(model), budget=floor - 1, keep="*", offload=tier))


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.usefixtures("fast")
def test_a_plan_from_a_file_names_its_tier(tmp_path: Path) -> None:
    model = network()
    made = autoremat.plan(loss_of(model), inputs(), budget=0.6, timing="estimate", offload=f"disk:{tmp_path}")
    made.to_json(tmp_path / "plan.json")
    call = autoremat.checkpoint(loss_of(model), plan=tmp_path / "plan.json")
    assert same(step(model, call), plain())
    assert same(step(model, call), plain())
    followed = autoremat.stats(call).plan
    assert followed is not None
    assert followed.schedule.offloads == made.schedule.offloads != ()


def test_a_plan_whose_tier_has_no_name_needs_one() -> None:
    unnamed = replace(plan(), program=replace(program(), link=Link(1e9, 1e9)))
    with pytest.raises(ValueError, match='say which one is meant: offload="disk:/path"'):
        autoremat.checkpoint(network(), plan=unnamed)


def test_without_a_tier_nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Disk, "__init__", lambda *given: pytest.fail("a file was made"))
    model = network()
    call = autoremat.checkpoint(loss_of(model), budget=0.6)
    assert same(step(model, call), plain())


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_what_cannot_be_written_stays_and_is_exact(with_stores: Put) -> None:
    tier, model = (
        with_stores(lambda: Late(lambda way, n: OSError("disk full") if way == "out" and n > 2 else None)),
        network(),
    )
    call = autoremat.checkpoint(loss_of(model), plan=plan())
    assert same(step(model, call), plain())
    with pytest.warns(RuntimeWarning, match="could not be written to the tier"):
        assert same(step(model, call), plain())
    assert same(step(model, call), plain())
    assert [store.moved for store in tier.stores] == [2, 2]  # of what was written


def test_what_cannot_be_read_back_is_an_error_and_the_next_step_is_exact(with_stores: Put) -> None:
    failing = [False]
    with_stores(lambda: Late(lambda way, n: OSError("short read") if way == "in" and failing[0] else None))
    model = network()
    call = autoremat.checkpoint(loss_of(model), plan=plan())
    for _ in range(6):  # behind the steps in which everything is prepared to be recomputed
        assert same(step(model, call), plain())
    failing[0] = True
    with pytest.raises(OffloadFailed, match=r"could not be read back .* short read"):
        step(model, call)
    failing[0] = False
    assert same(step(model, call), plain())
    assert same(step(model, call), plain())


def test_what_cannot_be_read_back_is_recomputed_where_that_is_prepared(with_stores: Put) -> None:
    with_stores(lambda: Late(lambda way, n: OSError("short read") if way == "in" and n == 1 else None))
    model = network()
    below = autoremat.solve(program(), 290_000, effort=0.01)  # what recomputation alone cannot do, at the first step
    call = autoremat.checkpoint(loss_of(model), plan=below)
    with pytest.warns(RuntimeWarning, match="It is computed again"):
        assert same(step(model, call), plain())


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_step_that_is_interrupted_leaves_nothing(
    with_stores: Put, where: str, error: type[BaseException]
) -> None:  # fmt: skip
    tier, model, raising = with_stores(lambda: AtRandom(1)), network(), [False]

    def maybe(x: Tensor) -> Tensor:
        if raising[0]:
            raise error
        return x

    def fn(x: Tensor) -> Tensor:
        h = model[:3](x)
        if where == "backward":
            h.register_hook(maybe)
        else:
            maybe(h)
        return model[3](h).square().mean()

    call = autoremat.checkpoint(fn, budget=0.6, offload="auto")
    assert same(step(model, call), plain())
    assert same(step(model, call), plain())
    raising[0] = True
    with pytest.raises(error):
        step(model, call)
    raising[0] = False
    gc.collect()
    assert all(store.is_closed for store in tier.stores)
    assert same(step(model, call), plain())


def test_a_forward_that_is_abandoned_ends_its_copies(with_stores: Put) -> None:
    tier, model = with_stores(Late), network()
    call = autoremat.checkpoint(loss_of(model), plan=plan())
    step(model, call)
    loss = call(inputs())
    assert not tier.stores[-1].is_closed
    del loss
    assert tier.stores[-1].is_closed
    assert same(step(model, call), plain())


def test_two_steps_at_once_do_not_meet(with_stores: Put) -> None:
    tier, model = with_stores(lambda: AtRandom(2)), network()
    call = autoremat.checkpoint(loss_of(model), plan=plan())
    step(model, call)
    model.zero_grad()
    torch.manual_seed(7)
    first = call(inputs())
    torch.manual_seed(7)
    second = call(inputs())
    first.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert same(gradients, plain()[1:-1])
    model.zero_grad()
    second.backward()
    assert same([p.grad for p in model.parameters() if p.grad is not None], plain()[1:-1])
    assert all(store.is_closed for store in tier.stores)


def test_a_graph_that_is_kept_serves_a_second_backward(with_stores: Put) -> None:
    with_stores(Late)
    model = network()
    call = autoremat.checkpoint(loss_of(model), plan=plan())

    def twice(loss: Tensor) -> None:
        loss.backward(retain_graph=True)
        model.zero_grad()
        loss.backward()

    for _ in range(3):
        assert same(numbers(model, call, twice), plain())


def test_a_step_that_leaves_its_path_fetches_everything_back(with_stores: Put) -> None:
    with_stores(lambda: AtRandom(3))
    model, turned = network(), [False]

    def fn(x: Tensor) -> Tensor:
        h = model[:3](x)
        if turned[0]:
            h = h * 2 / 2
        return model[3](h).square().mean()

    reference = network()
    turned_plain = step(reference, lambda x: reference[3](reference[:3](x) * 2 / 2).square().mean())
    call = autoremat.checkpoint(fn, budget=0.6, offload="auto")
    for _ in range(7):  # behind the steps that are followed with spare
        assert same(step(model, call), plain())
    turned[0] = True
    with pytest.warns(RuntimeWarning, match="left the path"):
        assert same(step(model, call), turned_plain)


def test_a_value_that_is_overwritten_while_it_is_copied_stays() -> None:
    from autoremat.engines.torch.eager.ledger import Ledger
    from autoremat.program.schedule import Gone, Send

    ledger, store, said = Ledger(), Late(), list[str]()
    away = Away(store, "a test", said.append)
    ledger.hold(3, torch.ones(4))
    away.carry_out(ledger, [Send(3)])
    ledger.held[3].mul_(2)
    away.carry_out(ledger, [Gone(3)])
    assert ledger.held[3].tolist() == [2.0] * 4


def test_memory_is_free_once_a_value_is_gone(tmp_path: Path) -> None:
    from autoremat.engines.torch.eager.ledger import Ledger
    from autoremat.program.schedule import Fetch, Gone, Here, Send

    ledger = Ledger()
    away = Away(Disk(str(tmp_path)).open(1 << 20), "a test", pytest.fail)
    ledger.hold(0, torch.arange(6.0).view(2, 3).t())
    memory = weakref.ref(ledger.held[0].untyped_storage())
    away.carry_out(ledger, [Send(0), Gone(0)])
    assert memory() is None
    assert 0 not in ledger.held
    away.carry_out(ledger, [Fetch(0), Here(0)])
    assert torch.equal(ledger.held[0], torch.arange(6.0).view(2, 3).t())
    assert not ledger.held[0].is_contiguous()


@pytest.mark.usefixtures("fast")
def test_a_copy_of_the_model_opens_a_tier_of_its_own(tmp_path: Path) -> None:
    import copy

    model = autoremat.checkpoint(network(), budget=0.7, offload=f"disk:{tmp_path}", offload_budget="1GiB")
    other = copy.deepcopy(model)
    for module in (model, other):
        for _ in range(2):
            assert same(step(module, lambda x, m=module: m(x).square().mean()), plain())  # type: ignore[misc]


@pytest.mark.usefixtures("fast")
def test_a_tier_without_bytes_moves_nothing(tmp_path: Path) -> None:
    model = network()
    call = autoremat.checkpoint(loss_of(model), budget=0.8, offload=f"disk:{tmp_path}", offload_budget=0)
    assert same(step(model, call), plain())
    made = autoremat.stats(call).plan
    assert made is not None
    assert made.schedule.offloads == ()
