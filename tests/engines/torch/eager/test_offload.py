"""Steps whose values move to a tier and back: the numbers of plain training, whatever the tier does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import autoremat
from autoremat.engines.torch.world.memory_account import account, resident
from autoremat.engines.torch.world.tier import Disk
from autoremat.program import Link, verify
from tests.engines.torch.eager.moved_steps import (
    Put,
    fast,
    inputs,
    loss_of,
    network,
    peak_of,
    plain,
    plan,
    program,
    same,
    step,
    with_stores,
)
from tests.engines.torch.eager.stores import AtOnce, AtRandom, Late

__all__ = ["fast", "with_stores"]  # fixtures


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
