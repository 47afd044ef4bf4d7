"""A better plan is looked for beside the training: in another process, which leaves nothing behind."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import logging
import os
import pickle
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import autoremat
from autoremat.checkpointed import session_of
from autoremat.engines.torch.eager.kinds import Prepared
from autoremat.engines.torch.eager.options import Options
from autoremat.planner import Wishes, beside, clock
from autoremat.planner.beside import Beside, Here, Search, SearchFailed, Wanted
from autoremat.program import Once, Op, Plan, Program, Value, simulate, verify
from autoremat.program.once import Reason


def chain(n: int = 12) -> Program:
    """A chain of ops of unequal sizes and seconds, forward and backward."""
    sizes = [100 + 37 * i % 90 for i in range(n)]
    values = [
        Value("x", 10, fixed=True),
        *(Value(f"a{i}", s) for i, s in enumerate(sizes)),
        *(Value(f"g{i}", 10) for i in range(n)),
    ]
    ops = [Op(f"f{i}", (i,), (i + 1,), 1.0 + 0.1 * (i * i % 7)) for i in range(n)]
    for i in reversed(range(n)):
        reads = (i, i + 1) if i == n - 1 else (i, i + 1, n + 2 + i)
        ops.append(Op(f"b{i}", reads, (n + 1 + i,), 2.0, phase="backward", once=Once.BACKWARD))
    return Program("chain", tuple(values), tuple(ops))


def model() -> nn.Module:
    """Layers of several widths that take turns, so that what the greedy drops is not the best."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(32, 64)]
    for wide in (128, 32, 256, 64):
        layers += [nn.GELU(), nn.Linear(64, wide), nn.Tanh(), nn.Softmax(-1), nn.Linear(wide, 64), nn.SiLU()]
    return nn.Sequential(*layers)


class Late:
    """A search that ends when it is told to."""

    ends = False
    begun: ClassVar[list[Wanted]] = []

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        Late.begun.append(wanted)

    def is_over(self) -> bool:
        return Late.ends

    def plan(self) -> Plan | None:
        return self.wanted.found()


@contextmanager
def searching(search: Callable[[Wanted], Search | None]) -> Iterator[None]:
    """Better plans are wanted at once, and looked for so."""
    Late.ends, Late.begun = False, []
    with patch.object(beside, "begun", search), patch.object(Prepared, "lost_by_now", 1e9):
        yield


def losses(call: Any, n: int, x: Tensor) -> list[Tensor]:
    """Losses and the sum of gradients of so many steps."""
    found = []
    for _ in range(n):
        x.grad = None
        if isinstance(call, nn.Module):
            call.zero_grad()
        loss = call(x).square().mean()
        loss.backward()
        found += [loss.detach(), x.grad.clone()]
    return found


def inputs() -> Tensor:
    """For the model."""
    return torch.randn(512, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()


# ---- in another process ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.real_seconds
def test_another_process_finds_the_same_plan_as_this_one() -> None:
    program = chain(6)
    wanted = Wanted(program, 700, 10.0, wishes=Wishes(recompute=("f3",)))
    search = Beside(wanted)
    found = search.plan()
    assert found is not None
    assert search.is_over()
    assert found.program is program
    assert not list(verify(program, found))
    assert found.overhead == wanted.found().overhead


def planned_by_a_clock(seconds_a_look: float, effort: float) -> Plan:
    """What ``plan`` says, where each look at the clock finds it so much later."""
    ticks = itertools.count()
    with patch.object(clock, "now", lambda: next(ticks) * seconds_a_look):
        x = torch.randn(256, 32, device="meta")
        return autoremat.plan(
            model().to("meta"), x, budget="70%", timing="estimate", time_limit_seconds=1e9, effort=effort
        )


def test_a_plan_of_an_effort_is_the_same_on_a_slow_machine() -> None:
    quick, slow = planned_by_a_clock(1e-6, 0.05), planned_by_a_clock(50.0, 0.05)
    assert quick.overhead > 0
    assert quick.to_json() == slow.to_json()


def test_the_effort_of_a_training_is_that_of_its_last_search() -> None:
    """Earlier ones take a share of the time, and do the same share of the work."""
    options = Options(0.8, None, (), (), 20.0, effort=0.5)
    assert options.wanted(chain(), 900, 20.0).effort == 0.5
    assert options.wanted(chain(), 900, 2.0).effort == pytest.approx(0.05)
    assert options.arguments["effort"] == 0.5
    assert Options(0.8, None, (), (), 20.0).wanted(chain(), 900, 2.0).effort == pytest.approx(0.2)


@pytest.mark.parametrize("budget", [0.5, 0.35])
def test_the_first_plan_is_the_same_on_a_slow_machine(budget: float) -> None:
    """It was cut after a tenth of the time limit, and took whatever had been found by then."""

    def planned(seconds_a_look: float) -> Plan:
        ticks, program = itertools.count(), chain(400)
        with patch.object(clock, "now", lambda: next(ticks) * seconds_a_look):
            return Options(budget, None, (), (), 10.0).solve(program, int(budget * simulate(program).peak_bytes))

    quick, slow = planned(1e-6), planned(0.5)
    assert not quick.stopped
    assert quick.to_json() == slow.to_json()


def test_the_other_process_does_as_much_work() -> None:
    little = Wanted(chain(40), 1800, 1e6, effort=0.001)
    assert Beside(little).plan().to_json() == little.found().to_json()  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.guard
def test_what_does_not_fit_is_no_plan() -> None:
    assert Beside(Wanted(chain(), 10, 0.1)).plan() is None
    assert Here(Wanted(chain(), 10, 0.1)).plan() is None


@pytest.mark.parametrize("kind", [Beside, Here])
def test_an_error_in_a_search_is_told(kind: Callable[[Wanted], Search]) -> None:
    search = kind(Wanted(chain(), 900, 0.1, wishes=Wishes(keep=("nowhere",))))
    with pytest.raises(SearchFailed, match="nowhere"):
        search.plan()


def test_there_is_one_search_at_a_time() -> None:
    first = beside_begun(Wanted(chain(40), 900, 5.0))
    assert isinstance(first, Beside)
    assert beside_begun(Wanted(chain(), 900, 0.1)) is None
    del first
    gc.collect()
    assert beside_begun(Wanted(chain(), 900, 0.1)) is not None


beside_begun = beside.begun


def test_a_search_ends_when_nobody_waits_for_it() -> None:
    search = Beside(Wanted(chain(60), 900, 30.0))
    process = search._process
    assert process.poll() is None
    del search
    gc.collect()
    assert process.poll() is not None


@pytest.mark.parametrize("executable", ["", "/usr/sbin/nginx"])
def test_where_python_is_built_into_a_program_the_search_is_here(
    executable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    assert isinstance(beside_begun(Wanted(chain(), 900, 0.1)), Here)


def test_where_there_can_be_no_process_the_search_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert isinstance(beside_begun(Wanted(chain(), 900, 0.1)), Here)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_leaves_the_search_to_its_parent() -> None:
    search = Beside(Wanted(chain(60), 900, 30.0))
    process = search._process
    pid = os.fork()
    if not pid:
        ok = search.is_over() and search.plan() is None
        del search
        gc.collect()
        os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert process.poll() is None
    assert not search.is_over()


def test_a_first_plan_needs_no_scipy() -> None:
    """Importing it takes longer than such a plan."""
    script = (
        "import sys, autoremat; plan = autoremat.solve(autoremat.Program.from_json(sys.argv[1]), 4000, first=True); "
        "sys.exit(plan.solver != 'greedy' or 'scipy' in sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(autoremat.__file__).parent.parent)}
    assert not subprocess.run([sys.executable, "-c", script, chain(60).to_json()], env=env, check=False).returncode


def test_nothing_is_left_when_the_process_ends(tmp_path: Path) -> None:
    """Of a training that ends, or fails, while a plan is looked for."""
    script = tmp_path / "training.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from autoremat.planner.beside import Beside, Wanted
            from autoremat.program import Program
            search = Beside(Wanted(Program.from_json(sys.argv[1]), 900, 60.0))
            print(search._process.pid, flush=True)
            """
        )
    )
    path = str(Path(autoremat.__file__).parent.parent)
    out = subprocess.run(
        [sys.executable, str(script), chain(60).to_json()], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert not out.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(out.stdout), 0)


# ---- beside a training -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.guard
def test_a_better_plan_is_followed_once_it_is_there() -> None:
    plain = losses(model(), 7, inputs())
    with searching(Late):
        mine = autoremat.checkpoint(model(), budget=0.6)
        x = inputs()
        found = losses(mine, 4, x)
        quick = autoremat.stats(mine)
        assert len(Late.begun) == 1
        assert quick.plan is not None
        Late.ends = True
        found += losses(mine, 3, x)
        stats = autoremat.stats(mine)
    assert stats.plan is not None
    assert stats.plan.overhead < quick.plan.overhead
    assert stats.planned == quick.planned + 1
    assert not stats.deviations
    assert all(map(torch.equal, found, plain))


def test_a_plan_that_is_no_better_is_not_followed() -> None:
    class NoBetter(Late):
        def plan(self) -> Plan | None:
            return replace(autoremat.solve(self.wanted.program, self.wanted.budget_bytes, first=True), overhead=1.0)

    with searching(NoBetter):
        mine = autoremat.checkpoint(model(), budget=0.6)
        Late.ends = True
        losses(mine, 4, inputs())
        stats = autoremat.stats(mine)
    assert stats.plan is not None
    assert stats.plan.overhead < 1.0


def test_a_search_that_fails_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    class Fails(Late):
        def plan(self) -> Plan | None:
            raise SearchFailed("ZeroDivisionError: by zero")

    plain = losses(model(), 5, inputs())
    with searching(Fails), caplog.at_level(logging.WARNING, "autoremat"):
        mine = autoremat.checkpoint(model(), budget=0.6)
        Late.ends = True
        found = losses(mine, 5, inputs())
    said = [r.message for r in caplog.records if "by zero" in r.message]
    assert len(said) == 1
    assert "goes on" in said[0]
    assert len(Late.begun) == 1, "it would only fail again"
    assert all(map(torch.equal, found, plain))


def test_the_search_for_an_old_recording_is_dropped() -> None:
    """What is found out about a step makes a new plan at once; what was looked for before is about another program."""
    with searching(Late):
        mine = autoremat.checkpoint(model(), budget=0.6)
        x = inputs()
        losses(mine, 2, x)
        session = session_of(mine)
        assert session is not None
        (kind,) = next(iter(session._families.values())).kinds()
        search = kind.prepared.search
        kind.prepared.differing[1] = Reason(Once.GIVEN, "because this test says so")
        Late.ends = True
        losses(mine, 1, x)
        assert kind.plan is not None
        assert kind.plan.program is not search.wanted.program
        assert kind.prepared.search is not search


def test_a_search_keeps_no_model_alive() -> None:
    with searching(Late):
        mine = autoremat.checkpoint(model(), budget=0.6)
        losses(mine, 3, inputs())
        (wanted,) = Late.begun
        alive = weakref.ref(mine)
        del mine
        gc.collect()
    assert alive() is None
    assert wanted.program.ops


@pytest.mark.real_seconds
def test_a_model_is_copied_and_pickled_while_a_plan_is_looked_for() -> None:
    with searching(beside_begun):
        mine = autoremat.checkpoint(model(), budget=0.6)
        x = inputs()
        first = losses(mine, 2, x)
        for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
            assert all(map(torch.equal, losses(other, 2, inputs()), first))
        buffer = io.BytesIO()
        torch.save(mine.state_dict(), buffer)


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.real_seconds
def test_two_models_are_trained_beside_a_search() -> None:
    """One search at a time; both models get their better plan in the end, and both are exact."""
    plain = losses(model(), 1, inputs())
    with searching(beside_begun):
        both = [autoremat.checkpoint(model(), budget=0.6, time_limit_seconds=2.0) for _ in range(2)]
        end = time.monotonic() + 60
        while any(is_quick(m) for m in both) and time.monotonic() < end:
            for m in both:
                assert all(map(torch.equal, losses(m, 1, inputs()), plain))
        assert not any(is_quick(m) for m in both)


def is_quick(mine: Any) -> bool:
    """Whether no search for a model has come to its end."""
    session = session_of(mine)
    assert session is not None
    kinds = [kind for family in session._families.values() for kind in family.kinds()]
    return not kinds or kinds[0].prepared.tried_seconds < 0.1
