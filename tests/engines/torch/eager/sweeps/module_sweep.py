"""One sample of one module of torch's own database: trained plainly and with everything computed again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleInfo, ModuleInput, module_db
from torch.utils._pytree import tree_map_only

from tests.engines.torch.compare import same
from tests.engines.torch.eager.sweeps.sweep import (
    SEED,
    Outcome,
    Place,
    Step,
    examine_step,
    leaf,
    observe,
    quiet,
    wrong_off_path,
)
from tests.engines.torch.torch_checkpoint import Checkpointed

MODULES: tuple[ModuleInfo, ...] = tuple(module_db)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class Case:
    """A module, lazy parameters included, and what it is called with; always the same numbers."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(info: ModuleInfo, sample: ModuleInput, dtype: torch.dtype, training: bool) -> Case:
        torch.manual_seed(SEED)
        given, called = sample.constructor_input, sample.forward_input
        module = info.module_cls(*given.args, **given.kwargs).to(dtype).train(training)
        if info.is_lazy:
            with torch.no_grad():
                module(*called.args, **called.kwargs)
        return Case(module, called.args, called.kwargs)

    @property
    def step(self) -> Step:
        return Step(self.module, lambda out: out)


def cases(info: ModuleInfo, dtype: torch.dtype, at_most: int | None = None) -> Iterator[Case]:
    """Some samples of a module, from all over its list, or all of them; in training and in evaluation."""
    if dtype not in info.supported_dtypes("cpu"):
        return
    for training in (True, False):
        torch.manual_seed(SEED)
        found = info.module_inputs_func(info, "cpu", dtype, True, training)
        n = len(found) if at_most is None else min(at_most, len(found))
        for k in range(n):
            yield Case.of(info, found[(2 * k + 1) * len(found) // (2 * n)], dtype, training)


def sweep(info: ModuleInfo, dtype: torch.dtype, at_most: int | None = None) -> list[Outcome]:
    """The outcomes of the samples that are differentiable."""
    with quiet():
        found = [examine_step(case.step, case.args, case.kwargs) for case in cases(info, dtype, at_most)]
    return [outcome for outcome in found if outcome is not None]


def wrong_at(place: Place, dtype: torch.dtype, at_most: int) -> dict[str, list[list[str]]]:
    """For every module and some of its samples what is not as in plain training where it stands in this place."""
    with quiet():
        found = {
            info.name: [
                wrong_off_path(place.step(case.module, lambda out: out), case.args, case.kwargs)
                for case in cases(info, dtype, at_most)
            ]
            for info in MODULES
        }
    return {name: [wrong for wrong in of if wrong is not None] for name, of in found.items()}


def beside(case: Case, form: str) -> str | None:
    """What becomes of a case under one form of ``torch.utils.checkpoint``: "", what differs, or the error.

    None where plain torch refuses the case or nothing is differentiable.
    """
    args, kwargs = tree_map_only(Tensor, leaf, (case.args, case.kwargs))
    try:
        plain = observe(case.step, args, kwargs)
    except RuntimeError:
        return None
    if plain is None:
        return None
    try:
        got = observe(Step(Checkpointed(case.module, form), lambda out: out), args, kwargs)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
        return f"error: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    if got is None:
        return "no gradient"
    values = zip(plain.items(), got.values(), strict=True)
    return ", ".join(name.replace("operator.call.", "") for (name, a), b in values if not same(a, b))
