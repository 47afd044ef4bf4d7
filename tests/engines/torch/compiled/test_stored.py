"""Plans beside torch's cache: what a second process finds, and what it does not take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import autoremat
from autoremat.engines.torch.compiled.stored import place_of_graph
from tests.engines.torch.compiled.cases import MLP, Regression, built, rows, same, train

SCRIPT = """
import json, sys, torch, autoremat
from unittest.mock import patch
from torch._dynamo.utils import counters
from autoremat.engines.torch.eager.options import Options
from tests.engines.torch.compiled.cases import Regression, rows
torch.manual_seed(0)
model, data = Regression(0.3), rows()
solved, solve = [], Options.solve
def counted(*args):
    solved.append(args)
    return solve(*args)
with patch.object(Options, "solve", counted):
    checkpointed = autoremat.checkpoint(model, budget=float(sys.argv[1]), time_limit_seconds=1)
    loss = torch.compile(checkpointed, backend=sys.argv[2])(*data)
    loss.backward()
plan = autoremat.stats(model).plan
print(json.dumps([float(loss), len(solved), counters["aot_autograd"]["autograd_cache_hit"], plan.peak_bytes,
                  plan.solver, len(str(autoremat.explain(plan)))]))
"""


def process(folder: Path, share: float, backend: str) -> list[float]:
    here = {"AUTOREMAT_CACHE": str(folder / "plans"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    env = os.environ | here | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, str(share), backend]
    return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_second_process_plans_nothing(tmp_path: Path, backend: str) -> None:
    first = process(tmp_path, 0.8, backend)
    second = process(tmp_path, 0.8, backend)
    assert first[1] >= 1
    assert second[1] == 0
    assert second[2] == (backend == "inductor")  # aot_eager has no code that could be kept
    assert (second[0], *second[3:]) == (first[0], *first[3:])
    other = process(tmp_path, 0.9, backend)
    assert other[1] >= 1
    assert other[2] == 0
    assert other[0] == first[0]


@pytest.mark.slow
@pytest.mark.guard
def test_the_plan_of_an_earlier_training_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graph, the same wishes: its plan is read, and what it leaves is the same; damaged, it is made anew."""
    monkeypatch.setenv("AUTOREMAT_CACHE", str(tmp_path))

    def trained() -> tuple[list[torch.Tensor], autoremat.Plan, int]:
        torch._dynamo.reset()
        model, data = built(MLP)
        checkpointed = autoremat.checkpoint(model, budget=0.8, time_limit_seconds=1)
        with patch.object(type(checkpointed.forward.options), "solve", autospec=True, side_effect=solve) as solved:
            left = train(model, torch.compile(checkpointed, backend="aot_eager"), data)
        plan = autoremat.stats(model).plan
        assert plan is not None
        return left, plan, solved.call_count

    from autoremat.engines.torch.eager.options import Options

    solve = Options.solve
    left, plan, n = trained()
    assert n == 1
    again, read, n = trained()
    assert n == 0
    assert same(again, left)
    assert (read.schedule, read.budget_bytes) == (plan.schedule, plan.budget_bytes)
    (file,) = (tmp_path / "compiled").glob("*.json")
    file.write_text(file.read_text()[:-100])
    again, _, n = trained()
    assert n == 1
    assert same(again, left)


def test_places_differ_where_plans_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOREMAT_CACHE", str(tmp_path))
    graph = torch.fx.symbolic_trace(Regression())
    x, y = rows()

    def path(*wishes: object, inputs: tuple[torch.Tensor, ...] = (x, y)) -> Path | None:
        return place_of_graph(graph, inputs, wishes).path

    assert path(0.5) == path(0.5)
    assert path(0.5) != path(0.6)
    assert path(0.5) != path(0.5, inputs=(x[:64], y[:64]))
    assert path(0.5) != path(0.5, inputs=(x.double(), y))
    plain = path(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert path(0.5) != plain
    monkeypatch.setenv("AUTOREMAT_CACHE", "off")
    assert path(0.5) is None
