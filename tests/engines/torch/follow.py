"""A step recorded as its first step is, and the tape that carries out a plan of that recording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from autoremat.engines.torch.eager.check import NoCheck, SelfCheck
from autoremat.engines.torch.eager.first import FirstStep
from autoremat.engines.torch.eager.path import Path
from autoremat.engines.torch.eager.script import Script
from autoremat.engines.torch.eager.scripts import script_of
from autoremat.engines.torch.eager.tape import Reports, Tape
from autoremat.engines.torch.world.parallel import Parallel
from autoremat.program import Plan, Program


def recorded(
    fn: Callable[..., Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None, *, timing: str = "estimate"
) -> tuple[Program, Path]:
    """The program of a step, and the path of its calls; the forward runs once, and nothing is let go of."""
    step = FirstStep(
        fn, args, kwargs or {}, Parallel(), lambda fixed: lambda plain: float("inf"), lambda module, name: False,
        Reports(), NoCheck(),
    )  # fmt: skip
    step.backward(step.forward())
    program = step.program(optimizer_state_bytes=0, optimizer_scratch_bytes=0, progress=None, limit=None, timing=timing)
    return program, step.path()


def following(plan: Plan, path: Path, reports: Reports | None = None, *, check: bool = False) -> Tape:
    """A tape that carries out a plan, with every call that is made again tried twice if it is to be checked."""
    script = script_of(plan, path)
    reports = reports or Reports()
    ready = [k for k, work in enumerate(script.works) if work is not None and work.ready]
    return Tape(
        script, reports, SelfCheck(ready, lambda k, why: reports.deviated(f"call {k} {why}", 1.0)) if check else None
    )


def reruns_of(script: Script) -> int:
    """How many calls a plan makes again."""
    return sum(bool(rerun.install) for act in script.acts for rerun in act.reruns)
