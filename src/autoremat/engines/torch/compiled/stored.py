"""Plans beside torch's cache of compiled code: a second process has both, and plans nothing.

Torch does not call a partitioner where it has the code of a graph already; so what was planned for it must be kept
apart. A file for each graph has the plan and a token; the token is a part of the key under which torch keeps the code.
So torch's code is used only together with the plan that it was compiled for: where the file is gone, the graph is
planned and compiled anew, under another token.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx

from autoremat.engines.torch.compiled.sizes import number_of
from autoremat.engines.torch.operators.costs import folder, place_of
from autoremat.program import InvalidProgram, Plan, Program
from autoremat.program.json_format import plan_to_data

_FOLDER: Final = "compiled"
_VERSION: Final = 3
"""Of what the files say, and of how graphs are planned: another one finds nothing."""


@dataclass(frozen=True)
class PlannedGraph:
    """One graph of the compiler's, and what became of it.

    Attributes:
        backend: who has compiled it.
        plan: which it follows.
        scheduled_peak_bytes: the peak as the backend will run it.
        tries: how many schedules of the backend's were looked at.
        is_stored: whether an earlier process has planned it.
    """

    backend: str
    plan: Plan
    scheduled_peak_bytes: int
    tries: int = 0
    is_stored: bool = False

    def serves(self, program: Program) -> bool:
        """Whether the plan is one of this program, whatever its operators are measured to take."""
        return _shape(self.plan.program) == _shape(program)


@dataclass(frozen=True)
class Place:
    """Where the plan of one graph is kept.

    Attributes:
        path: of the file; None where nothing is kept.
        token: part of the key of torch's own cache.
        known: what the file says; None where there is none.
    """

    path: Path | None
    token: str
    known: PlannedGraph | None = None

    def keep(self, graph: PlannedGraph) -> None:
        """Write what has been planned, at once and whole; where that is not possible, the next process plans anew."""
        if self.path is None:
            return
        data = {
            "token": self.token, "backend": graph.backend, "scheduled_peak_bytes": graph.scheduled_peak_bytes,
            "tries": graph.tries, "plan": plan_to_data(graph.plan),
        }  # fmt: skip
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
                json.dump(data, file)
            os.replace(file.name, self.path)


def place_of_graph(module: fx.GraphModule, inputs: Sequence[Any], wishes: Sequence[Any]) -> Place:
    """Where the plan of a graph of the compiler's is kept, and the plan if it is there.

    Args:
        module: the graph.
        inputs: examples of its inputs.
        wishes: all that a plan depends on beside the graph.
    """
    where = folder()
    if where is None:
        return Place(None, "")
    known = (
        _VERSION,
        torch.__version__,
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        *sorted({place_of(t.device) for t in inputs if isinstance(t, Tensor)}),
        *wishes,
    )
    text = "\n".join((module.code, *map(_described, inputs), *map(repr, known)))
    path = where / _FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    return _read(path) or Place(path, os.urandom(16).hex())


def _described(given: Any) -> str:
    """An input, without its numbers."""
    if not isinstance(given, Tensor):
        return repr(number_of(given))
    sizes = [number_of(n) for n in (*given.shape, *given.stride())]
    return f"{given.dtype} {sizes} {given.device} {given.requires_grad}"


def _read(path: Path) -> Place | None:
    """What a file says; None where it is not there, or damaged."""
    try:
        data = json.loads(path.read_text())
        plan, peak_bytes = Plan.from_json(data["plan"]), int(data["scheduled_peak_bytes"])
        graph = PlannedGraph(str(data["backend"]), plan, peak_bytes, int(data["tries"]), is_stored=True)
        return Place(path, str(data["token"]), graph)
    except (OSError, ValueError, KeyError, TypeError, InvalidProgram):
        return None


def _shape(program: Program) -> tuple[object, ...]:
    """All of a program that a schedule depends on; what operators take depends on the place, and that is known."""
    values = tuple((v.nbytes, v.fixed, v.held) for v in program.values)
    return values, tuple((op.name, op.reads, op.writes, op.once) for op in program.ops)
