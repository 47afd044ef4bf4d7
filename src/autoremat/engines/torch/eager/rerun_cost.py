"""Measures what a rerun takes beside its kernels.

A call that will be rerun is prepared in the forward and made by Python in the backward. Where operators take some 10 us
that is most of a rerun's time, so a plan that ignored it would rerun many small calls in place of a few large ones.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from autoremat.engines.torch.eager.entry import prepared
from autoremat.engines.torch.eager.ledger import Ledger
from autoremat.engines.torch.eager.state import Rerunning, State

_TIMES: Final = 7
_BETWEEN_BYTES: Final = 1 << 24
"""Written before each timed rerun, as kernels do: without it, all that Python looks at would still be in the caches."""


@lru_cache(maxsize=1)
def rerun_cost_seconds() -> float:
    """Time a rerun of a call that computes next to nothing.

    Its kernel's time is subtracted. The least of several counts: what else the machine does only adds. It takes some
    30 ms and 16 MiB, once per process; ask before a step begins.
    """
    x, between = torch.ones(1), torch.empty(_BETWEEN_BYTES, dtype=torch.uint8)
    reruns, kernels = list[float](), list[float]()
    for _ in range(_TIMES):
        between.zero_()
        reruns.append(_rerun_seconds(x))
        between.zero_()
        kernels.append(_kernel_seconds(x))
    return max(0.0, min(reruns) - min(kernels))


def _rerun_seconds(x: Tensor) -> float:
    ledger = Ledger()
    begin = time.perf_counter()
    entry = prepared(torch.neg, (x,), {}, {0: 0}, (), (), State.now(), random=False)
    entry.take(((0, 1),), (), ())
    ledger.enter(0, entry)
    ledger.hold(0, x.detach())
    with Rerunning() as rerunning:
        ledger.run(0, (1,), rerunning)
    ledger.let_go(1)
    return time.perf_counter() - begin


def _kernel_seconds(x: Tensor) -> float:
    begin = time.perf_counter()
    torch.neg(x)
    return time.perf_counter() - begin
