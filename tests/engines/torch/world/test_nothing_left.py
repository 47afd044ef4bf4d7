"""Recordings leave nothing behind, wherever a step keeps its things; and where they cannot help it, they say so."""

from __future__ import annotations

import gc
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import autoremat
from autoremat.engines.torch.eager.dry_run import record
from autoremat.engines.torch.world import apart
from tests.engines.torch.world.places_of_numbers import PLACES, Use


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)


def step_with(use: Use, net: Net) -> Callable[[Tensor], Tensor]:
    def step(x: Tensor) -> Tensor:
        h = torch.tanh(net.one(x) * use(x))
        return torch.sin(net.two(h).exp()).sum()

    return step


@pytest.fixture(autouse=True, scope="module")
def everybody_may_hold_something(what_is_old_is_not_looked_through: None) -> None:
    """Show the garbage collector all objects again: whoever holds a fake tensor is found through it."""
    gc.unfreeze()


@pytest.fixture
def forked() -> None:
    """Only where a child can be made."""
    if not apart.can_run_apart():
        pytest.skip("no child can be made in this process")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No child is made."""
    monkeypatch.setattr(apart._Here, "cannot", True)


def reachable_fakes() -> list[FakeTensor]:
    gc.collect()
    return [t for t in gc.get_objects() if type(t) is FakeTensor]


def as_data(state: Any) -> Any:
    assert not isinstance(state, FakeTensor)
    if isinstance(state, Tensor):
        return state.tolist()
    return [as_data(v) for v in state] if isinstance(state, (list, tuple)) else state


@pytest.mark.one_in(7)
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("name", PLACES)
def test_nothing_is_left_wherever_a_step_keeps_its_things(name: str, tmp_path: Path) -> None:
    before = len(reachable_fakes())
    (tmp_path / "plain").mkdir()
    plain_use, plain_look = PLACES[name](tmp_path / "plain")
    inputs = [torch.randn(16, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    net, losses = Net(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    plain = step_with(plain_use, net)
    for x in inputs:
        optimizer.zero_grad()
        losses.append(plain(x))
        losses[-1].backward()
        optimizer.step()
    expected = as_data(plain_look())

    use, look = PLACES[name](tmp_path)
    net2, x = Net(), inputs[0]
    step = step_with(use, net2)
    fresh = as_data(look())
    autoremat.plan(step, x, budget=1.0, time_limit_seconds=0.1)
    autoremat.explain(step, x)
    autoremat.frontier(step, x, points=2, time_limit_seconds=0.1)
    autoremat.max_batch(step, lambda n: torch.randn(n, 8), budget="1MB", most=2, time_limit_seconds=0.1)
    assert autoremat.check(step, x, budget=1.0, time_limit_seconds=0.1).is_exact
    assert as_data(look()) == fresh
    assert len(reachable_fakes()) == before

    optimizer2 = torch.optim.SGD(net2.parameters(), lr=0.01)
    checkpointed = autoremat.checkpoint(step, budget=1.0, optimizer=optimizer2, time_limit_seconds=0.2)
    for x, loss in zip(inputs, losses, strict=True):
        optimizer2.zero_grad()
        ours = checkpointed(x)
        ours.backward()
        optimizer2.step()
        assert type(ours) is Tensor
        assert torch.equal(ours, loss)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), net2.parameters(), strict=True))
    assert as_data(look()) == expected
    assert len(reachable_fakes()) == before


# ---- in this process -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("slots_object", "the attribute t of a"),
        ("slots_dataclass", "the attribute t of a"),
        ("hidden_slot_of_a_property", "the attribute _Kept__t of a"),
        ("weak_key_dictionary", "the item"),
        ("generator_locals", "the variable 'kept' of"),
        ("attribute_of_a_tensor", "the attribute 'cached' of a"),
    ],
)
def test_who_holds_a_fake_is_named(name: str, says: str, tmp_path: Path) -> None:
    use, _ = PLACES[name](tmp_path)
    net = Net()
    step = step_with(use, net)
    with pytest.raises(ValueError, match="one is still held by") as caught:
        autoremat.plan(step, torch.randn(16, 8), budget=1.0)
    assert says in str(caught.value)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.usefixtures("here")
def test_what_can_be_put_back_is_no_error(tmp_path: Path) -> None:
    for name in ("module_attribute", "closure_cell", "class_attribute", "default_dict", "ordered_dict", "lru_cache"):
        use, look = PLACES[name](tmp_path)
        fresh = as_data(look())
        autoremat.plan(step_with(use, Net()), torch.randn(16, 8), budget=1.0, time_limit_seconds=0.1)
        if name != "lru_cache":
            assert as_data(look()) == fresh


# ---- the child -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("forked")
def test_an_error_keeps_its_type_even_one_of_a_function() -> None:
    class Odd(Exception):
        pass

    def step(x: Tensor) -> Tensor:
        raise Odd("here")

    with pytest.raises(Odd, match="here"):
        record(step, (torch.randn(2),))


@pytest.mark.usefixtures("forked")
def test_an_error_that_cannot_be_sent_is_told_by_name() -> None:
    class Odd(Exception):
        def __init__(self, a: int, b: Any) -> None:
            super().__init__(f"{a}")
            self.b = b

    def step(x: Tensor) -> Tensor:
        raise Odd(1, lambda: None)

    with pytest.raises(RuntimeError, match="Odd: 1"):
        record(step, (torch.randn(2),))


@pytest.mark.usefixtures("forked")
def test_a_child_that_dies_is_an_error_in_words_and_not_tried_again() -> None:
    calls = torch.zeros(1).share_memory_()

    def step(x: Tensor) -> Tensor:
        calls.numpy()[0] += 1
        os.abort()

    with pytest.raises(apart.RecordingDied, match="SIGABRT"):
        record(step, (torch.randn(2),))
    assert calls.item() == 1


@pytest.mark.usefixtures("forked")
def test_warnings_are_shown_once_and_lines_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    weight = torch.randn(4, 4, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        print("printed")  # noqa: T201
        warnings.warn("mind the step", UserWarning, stacklevel=1)
        return (x @ weight).sum() * (1 if x.sum() > -1e9 else 2)  # looks at numbers: recorded on real tensors

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        record(step, (torch.randn(2, 4),), timing="estimate")
    assert [str(w.message) for w in caught] == ["mind the step"]
    assert "printed" not in capfd.readouterr().out


@pytest.mark.usefixtures("forked")
def test_an_interrupt_ends_the_child() -> None:
    import signal
    import time

    before = set(os.listdir("/proc"))
    main = os.getpid()

    def step(x: Tensor) -> Tensor:
        time.sleep(0.5)  # until the parent waits: Python may miss a signal right before that, until the wait ends
        os.kill(main, signal.SIGINT)
        time.sleep(60)
        return x

    begin = time.monotonic()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            record(step, (torch.randn(2),))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - begin < 30
    children = Path(f"/proc/{main}/task/{main}/children")
    if children.exists():
        assert not [p for p in children.read_text().split() if p not in before]


@pytest.mark.usefixtures("forked")
def test_both_ways_give_the_same_program(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = (
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.1)),
        torch.randn(16, 8),
    )
    programs = []
    for cannot in (False, True):
        monkeypatch.setattr(apart._Here, "cannot", cannot)
        programs.append(record(net, (x,), timing="estimate"))
    assert programs[0] == programs[1]


def test_another_thread_means_no_child() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert not apart.can_run_apart()
    finally:
        done.set()
        thread.join()


# ---- walks -----------------------------------------------------------------------------------------------------------

NUMBERS = list(range(2_000_000))
NESTED = [[float(i)] * 100 for i in range(20_000)]


@pytest.mark.usefixtures("here")
def test_no_walk_through_millions_of_numbers() -> None:
    import time

    net = nn.Linear(8, 8)

    def step(x: Tensor) -> Tensor:
        return net(x).sum() * len(NUMBERS) * len(NESTED)

    record(step, (torch.randn(2, 8),), timing="estimate")
    begin = time.monotonic()
    record(step, (torch.randn(2, 8),), timing="estimate")
    assert time.monotonic() - begin < 8
