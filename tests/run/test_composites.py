"""Operators made of others that run others where a dispatch mode is active, as it is under autoremat.

Torch's own code asks in places whether a mode is active. What it then does must give the same numbers to the last bit;
this keeps watch over which operators those are. ``autoremat.record.smoothing`` puts the one right that does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.run.module_sweep import MODULES, cases
from tests.run.sweep import OPERATORS, leaf, name_of, quiet, samples

OTHERWISE = {
    "quantile": "checks of its arguments are left out",
    "nanquantile": "checks of its arguments are left out",
    "nn.functional.scaled_dot_product_attention": "adds the mask out of place instead of in place",
    "nn.TransformerEncoder": "attention is in it",
    "nn.TransformerEncoderLayer": "attention is in it",
    "nn.LinearCrossEntropyLoss": "adds up the weights of smoothed labels in another order: put right",
}
"""What runs other operators under a mode, and how."""

OF_NO_MATTER = {
    "PythonDispatchMode", "aten::detach", "detach", "aten::resolve_conj", "aten::resolve_neg",
    "aten::_reshape_alias", "aten::view", "aten::as_strided",
}  # fmt: skip
"""Views, and what a mode is made of."""


class Bystander(TorchDispatchMode):
    """Looks on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def operators_of(call: Callable[[], Any]) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.name for event in profile.events()} - OF_NO_MATTER


def calls() -> Iterator[tuple[str, Callable[..., Any], Any, Any]]:
    for op in OPERATORS:
        for s in samples(op, torch.float32, 6):
            yield name_of(op), op.get_op(), (s.input, *s.args), dict(s.kwargs)
    for info in MODULES:
        for case in cases(info, torch.float32, 6):
            yield info.name, case.module, case.args, case.kwargs


def runs_others(call: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether a call runs other operators under a mode; not where plain torch refuses it."""
    args, kwargs = tree_map_only(Tensor, leaf, (args, kwargs))
    whole = partial(call, *args, **kwargs)
    try:
        plainly = operators_of(whole)
    except RuntimeError:
        return False
    with Bystander():
        return operators_of(whole) != plainly


@pytest.mark.slow
def test_operators_that_run_others_under_a_mode_are_known() -> None:
    with quiet():
        found = {name for name, call, args, kwargs in calls() if runs_others(call, args, kwargs)}
    assert found == set(OTHERWISE)
