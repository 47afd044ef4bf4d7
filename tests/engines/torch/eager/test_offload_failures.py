"""What goes wrong with a tier: a clear error or the numbers of plain training, and nothing left behind."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.eager.away import Away
from autoremat.engines.torch.world import tier
from autoremat.engines.torch.world.tier import Disk, OffloadFailed
from tests.alone import goes_on_alone
from tests.engines.torch.eager.moved_steps import (
    Put,
    fast,
    inputs,
    loss_of,
    network,
    numbers,
    plain,
    plan,
    program,
    same,
    step,
    with_stores,
)
from tests.engines.torch.eager.stores import AtRandom, Late

__all__ = ["fast", "with_stores"]  # fixtures


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


# ---- a real tier ---------------------------------------------------------------------------------------------------


def what_is_left() -> tuple[list[str], list[threading.Thread]]:
    """Files without a name that are open, and threads that copy, once those have had the time to end."""
    gc.collect()
    for _ in range(500):
        threads = [t for t in threading.enumerate() if t.name == "autoremat tier"]
        if not threads:
            break
        time.sleep(0.01)
    files = [f for f in Path("/proc/self/fd").iterdir() if f.is_symlink()]
    return [link for f in files if "(deleted)" in (link := os.readlink(f))], threads


@dataclass
class OnDisk:
    """A model under a plan that moves to a file, past its first step."""

    model: nn.Module
    call: Callable[[Tensor], Tensor]


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnDisk]:
    """Once a test is through, the next step is exact, and nothing is left."""
    monkeypatch.setattr(tier, "_IDLE_SECONDS", 0.05)
    monkeypatch.setattr(tier, "_LOOK_SECONDS", 0.05)
    before = what_is_left()
    model = network()
    here = OnDisk(model, autoremat.checkpoint(loss_of(model), plan=plan(), offload=f"disk:{tmp_path}"))
    del model
    for _ in range(2):
        assert same(step(here.model, here.call), plain())
    assert len(what_is_left()[0]) > len(before[0])
    yield here
    assert same(step(here.model, here.call), plain())
    assert list(tmp_path.iterdir()) == []
    del here.model, here.call
    files, threads = what_is_left()
    assert set(files) <= set(before[0])
    assert threads == []


def test_a_file_that_may_grow_no_further_leaves_values_in_memory(tmp_path: Path) -> None:
    """As a disk does that somebody else fills in the middle of a step: the system refuses to write on."""
    model = network()
    call = autoremat.checkpoint(loss_of(model), plan=plan(), offload=f"disk:{tmp_path}")
    assert same(step(model, call), plain())
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.warns(RuntimeWarning, match="could not be written to the tier .* File too large"):
            assert same(step(model, call), plain())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(step(model, call), plain())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python only prints one in a __del__
@pytest.mark.slow
def test_ctrl_c_at_any_moment_leaves_the_next_step_exact(on_disk: OnDisk, request: pytest.FixtureRequest) -> None:
    """In a process of its own: it may also come while torch enters or leaves a block of its own."""
    if goes_on_alone(request, needed=True):
        return
    model, call = on_disk.model, on_disk.call
    begin = time.perf_counter()
    step(model, call)
    seconds, before, hits = time.perf_counter() - begin, signal.getsignal(signal.SIGALRM), 0
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for k in range(12):
            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-5, seconds * k / 12))
                step(model, call)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hits += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert same(step(model, call), plain())
    finally:
        signal.signal(signal.SIGALRM, before)
    assert hits > 0


@pytest.mark.parametrize("at", [1, 8])
def test_a_thread_that_dies_costs_no_number(on_disk: OnDisk, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    model, call = on_disk.model, on_disk.call
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    made, carry_out = [0], tier.Copy.carry_out

    def dies(copy: tier.Copy) -> None:
        made[0] += 1
        if made[0] == at:
            raise SystemExit
        carry_out(copy)

    monkeypatch.setattr(tier.Copy, "carry_out", dies)
    with pytest.warns(RuntimeWarning, match="the thread that copies has died"):
        assert same(step(model, call), plain())
    monkeypatch.setattr(tier.Copy, "carry_out", carry_out)


def test_a_fork_between_forward_and_backward_is_an_error_in_the_child_alone(on_disk: OnDisk) -> None:
    model, call = on_disk.model, on_disk.call
    model.zero_grad()
    torch.manual_seed(7)
    loss = call(inputs())
    pid = os.fork()
    if pid == 0:
        try:
            warnings.simplefilter("ignore")  # that what was to go yet has stayed
            with pytest.raises(OffloadFailed, match="forked between forward and backward"):
                loss.backward()
            assert same(step(model, call), plain())
        except BaseException:  # noqa: BLE001 - the exit code tells
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    loss.backward()
    assert same([p.grad for p in model.parameters() if p.grad is not None], plain()[1:-1])


def test_forwards_that_are_abandoned_leave_no_copies(on_disk: OnDisk) -> None:
    call = on_disk.call
    for _ in range(5):
        del_me = call(inputs())
        del del_me


def test_a_folder_that_is_removed_under_way_is_not_missed(tmp_path: Path) -> None:
    """The file has no name anyway."""
    folder, model = tmp_path / "gone", network()
    folder.mkdir()
    call = autoremat.checkpoint(loss_of(model), plan=plan(), offload=f"disk:{folder}")
    for _ in range(2):
        assert same(step(model, call), plain())
    folder.rmdir()
    assert same(step(model, call), plain())


def test_a_folder_that_cannot_be_written_to_is_refused_in_words() -> None:
    """Nobody may make a file in ``/proc``, not even root."""
    with pytest.raises(ValueError, match=r"in which no file can be made .* name one on a disk with room"):
        autoremat.checkpoint(loss_of(network()), budget=0.6, offload="disk:/proc")(inputs())
    with pytest.raises(ValueError, match="in which no file can be made"):
        autoremat.plan(loss_of(network()), inputs(), budget=0.6, offload="disk:/proc")


def test_a_disk_that_is_too_small_is_refused_before_the_step(tmp_path: Path) -> None:
    """A real one of 900 kB, where this process may mount one."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        (tmp_path / "ballast").write_bytes(bytes(700_000))
        model = network()
        call = autoremat.checkpoint(loss_of(model), plan=plan(), offload=f"disk:{tmp_path}")
        assert same(step(model, call), plain())
        with pytest.raises(OffloadFailed, match="make room there"):
            step(model, call)
        (tmp_path / "ballast").unlink()
        assert same(step(model, call), plain())
        del call
        gc.collect()
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
