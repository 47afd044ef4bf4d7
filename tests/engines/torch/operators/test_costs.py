"""What operators take, kept between processes: found again, never wrong, never in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import autoremat
from autoremat.engines.torch.operators import costs, timing
from autoremat.engines.torch.operators.costs import VARIABLE, Cost, Kept, folder, place_of, text_of
from autoremat.engines.torch.operators.signature import CallSignature, signature_of
from tests.engines.torch.operators.some_calls import PLACE, call

CPU = torch.device("cpu")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for what is kept, and a process that knows nothing yet."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "_MEASURED", {})
    monkeypatch.setattr(timing, "_KEPT", {})
    return tmp_path / "cache"


def the_file(folder: Path) -> Path:
    (found,) = folder.glob("costs-*.jsonl")
    return found


# ---- one file --------------------------------------------------------------------------------------------------------


def test_what_one_has_added_another_finds(kept: Path) -> None:
    cost = Cost(1.5e-6, 64, (128, 0), 3, has_run=True)
    Kept(PLACE).add({call(4, 4): cost})
    assert Kept(PLACE).get(call(4, 4)) == cost
    assert Kept(PLACE).get(call(4, 5)) is None
    assert Kept("another machine").get(call(4, 4)) is None


def test_the_later_one_counts(kept: Path) -> None:
    for seconds in (1.0, 2.0):
        Kept(PLACE).add({call(4, 4): Cost(seconds)})
    assert Kept(PLACE).get(call(4, 4)) == Cost(2.0, has_run=True)


@pytest.mark.parametrize("value", ["off", "0", "", " Off "])
def test_it_can_be_switched_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert folder() is None
    Kept(PLACE).add({call(4, 4): Cost(1.0)})
    assert Kept(PLACE).get(call(4, 4)) is None


def test_without_the_variable_it_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    where = folder()
    assert where is not None
    assert where.name == "autoremat"
    assert sys.platform != "linux" or where.parent == tmp_path


def damaged(lines: list[bytes]) -> dict[str, bytes]:
    middle = lines[1]
    return {
        "cut off": b"\n".join([lines[0], middle[: len(middle) // 2]]),
        "two run together": lines[0] + b"\n" + middle[:40] + lines[2] + b"\n",
        "a digit": b"\n".join([lines[0], middle.replace(b"2.0", b"3.0"), b""]),
        "no text": bytes(range(256)) * 50 + b"\n" + lines[0] + b"\n",
        "of another place": b"\n".join([lines[0], costs._line(text_of(call(2, 2)), Cost(9.0), "elsewhere"), b""]),
        "empty": b"\n" + lines[0],
        "no cost": b"\n".join([lines[0], signed(b'["aten.mm",-1.0,0,[],1]'), signed(b'["aten.mm"]'), signed(b"[")]),
    }


def signed(content: bytes) -> bytes:
    return costs._checksum(content, PLACE) + b" " + content


@pytest.mark.parametrize("how", damaged([b"", b"", b""]))
def test_what_is_damaged_is_not_believed_and_the_rest_is(how: str, kept: Path) -> None:
    for i in range(1, 4):
        Kept(PLACE).add({call(i, i): Cost(float(i))})
    lines = [line for line in the_file(kept).read_bytes().split(b"\n") if line]
    the_file(kept).write_bytes(damaged(lines)[how])
    found = [Kept(PLACE).get(call(i, i)) for i in range(1, 4)]
    assert found[0] == Cost(1.0, has_run=True)
    assert found[1] is None
    Kept(PLACE).add({call(7, 7): Cost(7.0)})  # and it can be written on
    assert Kept(PLACE).get(call(7, 7)) == Cost(7.0, has_run=True)


@pytest.mark.parametrize("kind", ["a file in place of the folder", "a folder in place of the file", "no permission"])
def test_where_nothing_can_be_written_it_goes_on_without(kind: str, kept: Path) -> None:
    if kind.startswith("a file"):
        kept.write_text("")
    elif kind.startswith("a folder"):
        (kept / costs._file_name(PLACE)).mkdir(parents=True)
    else:
        kept.mkdir()
        kept.chmod(0o500)
        if os.access(kept, os.W_OK):
            pytest.skip("this user may write everywhere")
    Kept(PLACE).add({call(4, 4): Cost(1.0)})
    assert Kept(PLACE).get(call(4, 4)) is None


def test_a_large_file_keeps_its_newest_lines(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_MOST_BYTES", 4000)
    for i in range(200):
        Kept(PLACE).add({call(1, i): Cost(float(i))})
        assert the_file(kept).stat().st_size <= 4000
    assert Kept(PLACE).get(call(1, 199)) == Cost(199.0, has_run=True)
    assert Kept(PLACE).get(call(1, 0)) is None
    assert list(kept.iterdir()) == [the_file(kept)]


WRITER = """
import sys, torch
from autoremat.engines.torch.operators.costs import Cost, Kept
from tests.engines.torch.operators.some_calls import PLACE, call
who = int(sys.argv[1])
for i in range(100):
    Kept(PLACE).add({call(who + 1, k + 1): Cost(float(who), k) for k in range(i, i + 3)})
"""


@pytest.mark.slow
@pytest.mark.guard
def test_four_processes_write_at_once(kept: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(k)], env=env) for k in range(4)]
    assert [w.wait(120) for w in writers] == [0] * 4
    found = Kept(PLACE)
    for who in range(4):
        for k in range(102):
            assert found.get(call(who + 1, k + 1)) == Cost(float(who), k, has_run=True)


# ---- what is one call, and one place ---------------------------------------------------------------------------------


def test_every_other_call_has_another_text() -> None:
    x, aten = torch.empty(4, 4), torch.ops.aten
    calls = [
        (aten.mm.default, (x, x), {}),
        (aten.mm.default, (x.t(), x), {}),
        (aten.mm.default, (x.double(), x), {}),
        (aten.mul.Tensor, (x, x), {}),
        (aten.mul.Scalar, (x, 1), {}),
        (aten.mul.Scalar, (x, True), {}),
        (aten.mul.Scalar, (x, 1.0), {}),
        (aten.mul.Scalar, (x, 1j), {}),
        (aten.sum.dim_IntList, (x, [0]), {}),
        (aten.sum.dim_IntList, (x, [0], True), {}),
        (aten.sum.dim_IntList, (x, [0]), {"dtype": torch.float64}),
        (aten.sum.dim_IntList, (x, [0]), {"dtype": torch.float32}),
        (aten.gelu.default, (x,), {"approximate": "none"}),
        (aten.gelu.default, (x,), {"approximate": "tanh"}),
        (aten.cat.default, ([x, x],), {}),
        (aten.cat.default, ([x],), {}),
    ]
    texts = [text_of(signature_of(*c)) for c in calls]
    assert None not in texts
    assert len(set(texts)) == len(calls)
    assert texts == [text_of(signature_of(*c)) for c in calls]


def test_operators_that_are_not_torchs_are_not_kept() -> None:
    """Under the same name there may be another one tomorrow."""
    library = torch.library.Library("costs", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    assert text_of(signature_of(torch.ops.costs.twice.default, (torch.empty(4),), {})) is None
    assert text_of(signature_of(torch.ops.aten.relu.default, (object(),), {})) is None


def test_the_place_tells_what_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    here, threads = place_of(CPU), torch.get_num_threads()
    assert torch.__version__ in here
    assert here == place_of(CPU)
    try:
        torch.set_num_threads(threads + 1)
        assert place_of(CPU) != here
    finally:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        assert place_of(CPU) != here
    finally:
        torch.use_deterministic_algorithms(False)
    costs._machine.cache_clear()
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert place_of(CPU) != here
    monkeypatch.undo()
    costs._machine.cache_clear()
    names = {costs._file_name(p) for p in (here, here.replace("1 threads", "2 threads"), here + "x")}
    assert len(names) == 2 + ("1 threads" in here)


# ---- measuring -------------------------------------------------------------------------------------------------------


def watched(monkeypatch: pytest.MonkeyPatch) -> list[CallSignature]:
    """The calls that are run to be measured from now on."""
    run, measure = list[CallSignature](), timing._measure_for_real

    def noted(signature: CallSignature, *rest: object) -> Cost:
        run.append(signature)
        return measure(signature, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(timing, "_measure_for_real", noted)
    return run


def test_a_process_that_knows_nothing_has_nothing_to_measure(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = watched(monkeypatch)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), torch.randn(16, 8)
    first = autoremat.plan(model, x, budget="100%").program
    assert run
    run.clear()
    monkeypatch.setattr(timing, "_MEASURED", {})
    monkeypatch.setattr(timing, "_KEPT", {})
    step = autoremat.checkpoint(model, budget="100%")
    step(x).sum().backward()
    plan = autoremat.stats(step).plan
    assert plan is not None
    assert run == []
    assert [(op.seconds, op.scratch_bytes) for op in first.ops] == [
        (op.seconds, op.scratch_bytes) for op in plan.program.ops
    ]
    assert first.measured_share == plan.program.measured_share == 1.0


@pytest.mark.slow
@pytest.mark.guard
def test_steps_without_numbers_are_filled_in(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = watched(monkeypatch)

    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    x = torch.randn(16, 8)
    real = autoremat.plan(made(), x, budget="100%").program
    run.clear()
    with torch.device("meta"):
        known = autoremat.plan(made(), x.to("meta"), budget="100%").program
        other = autoremat.plan(made(), torch.empty(17, 8), budget="100%").program
        nothing = autoremat.plan(made(), x.to("meta"), budget="100%", timing="estimate").program
    assert run == []
    assert (known.timing, known.measured_share) == ("estimated", 1.0)
    assert known.seconds == real.seconds
    assert 0.0 <= other.measured_share < 1.0
    assert (nothing.timing, nothing.measured_share) == ("estimated", 0.0)


def test_what_has_no_room_is_not_run(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = watched(monkeypatch)
    large, small = call(64, 64), call(2, 2)
    nbytes = 64 * 64 * 4
    for most, expected in ((3 * nbytes - 1, [small]), (3 * nbytes, [large])):  # the small one is known by then
        run.clear()
        found = timing.measure_all([large, small], most_bytes=most, outputs=[nbytes, 16])
        assert run == expected
        assert found[0].has_run == (large in run)
        assert found[0].seconds > 0


def test_the_share_says_how_much_was_timed(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_LEAST_SECONDS", -1.0)
    monkeypatch.setattr(timing, "_STEPS", 0.0)
    monkeypatch.setattr(timing, "_ONCE_SECONDS", -1.0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), torch.randn(16, 8)
    with monkeypatch.context() as patch:
        patch.setattr(timing, "_measure_for_real", REAL)
        program = autoremat.plan(model, x, budget="100%").program
    assert (program.timing, program.measured_share) == ("measured", 0.0)
    assert "measured, but for 100% of it" in str(autoremat.plan(model, x, budget="100%"))


REAL = timing._measure_for_real


def test_a_plan_runs_no_operator_that_is_not_torchs() -> None:
    runs = []

    @torch.library.custom_op("tests_costs::doubled", mutates_args=())
    def doubled(x: torch.Tensor) -> torch.Tensor:
        runs.append(x)
        return 2 * x

    doubled.register_fake(torch.empty_like)
    doubled.register_autograd(lambda ctx, gradient: 2 * gradient)
    linear, x = nn.Linear(8, 8), torch.randn(16, 8)
    program = autoremat.plan(lambda: doubled(linear(x)).square().mean(), budget="100%").program
    assert any(op.name.startswith("tests_costs") for op in program.ops)
    assert not runs
