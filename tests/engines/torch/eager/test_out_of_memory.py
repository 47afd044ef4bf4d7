"""The device has less memory than the budget: the forward is tried again under a tighter plan, or an error tells."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.eager import entry

WIDTH = 64


class Capped(nn.Module):
    """Blocks, and a cap that fails the forward in block ``fail_at`` as often as it is told to."""

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.norm = nn.BatchNorm1d(WIDTH) if batch_norm else nn.Identity()
        self.failures = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for k, layer in enumerate(self.layers):
            x = nn.functional.dropout(layer(x).sin().exp(), 0.1)
            if k == 4 and self.failures and not torch._guards.detect_fake_mode((x,)):
                self.failures -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return x.square().mean()


def step(model: Any, x: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(x)
    loss.backward()
    return [loss.detach(), torch.get_rng_state(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.slow
@pytest.mark.guard
def test_a_forward_that_runs_out_is_tried_again_under_a_tighter_plan() -> None:
    x, plain = torch.randn(256, WIDTH), Capped()
    model = autoremat.checkpoint(copy.deepcopy(plain), budget=0.9)
    model(x).backward()
    before = autoremat.stats(model).plan
    model.failures = 2
    assert all(map(torch.equal, step(model, x), step(plain, x)))
    step(model, x)
    stats = autoremat.stats(model)
    assert stats.retries == 2
    assert before is not None
    assert stats.plan is not None
    assert stats.plan.peak_bytes <= 0.9 * 0.9 * before.peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", [False, True])
def test_where_trying_again_does_not_help_the_error_tells(batch_norm: bool) -> None:
    """With batch norm the forward has updated running statistics, and cannot be run once more."""
    x, model = torch.randn(256, WIDTH), Capped(batch_norm)
    autoremat.checkpoint(model, budget=0.9)
    model(x).backward()
    model.failures = 1 if batch_norm else 100
    with pytest.raises(torch.OutOfMemoryError, match=r"autoremat plan whose peak .*: .*parameter [\d,]+.*Tried to"):
        model(x)
    assert bool(autoremat.stats(model).retries) is not batch_norm
    model.failures = 0
    model(x).backward()  # nothing is left behind that would hinder the next step


def capped(code: str) -> str:
    """Run code in a process of its own, in which ``cap(nbytes)`` limits what may still be allocated."""
    begin = """
        import resource, sys, warnings
        import torch, autoremat
        torch.set_num_threads(1)

        def cap(nbytes):
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + nbytes, resource.RLIM_INFINITY))
    """
    program = textwrap.dedent(begin) + textwrap.dedent(code)
    mapped = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # so that what is freed is given back
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=mapped,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space that the kernel enforces")
@pytest.mark.slow
def test_a_real_allocator_that_refuses() -> None:
    out = capped("""
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[m for _ in range(24) for m in (torch.nn.Linear(512, 512), torch.nn.GELU())])
        x = torch.randn(8192, 512)  # 16 MiB per activation
        autoremat.checkpoint(model, budget=0.95)
        loss = model(x).square().mean()
        loss.backward()
        plain = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        del loss
        peak = autoremat.stats(model).plan.peak_bytes
        cap(int(0.75 * peak))
        model(x).square().mean().backward()
        stats = autoremat.stats(model)
        assert stats.retries > 0, (stats.retries, peak)
        assert all(map(torch.equal, plain, (p.grad for p in model.parameters())))
        print("retried", stats.retries, peak)
    """)
    assert "retried" in out


class RefusesAgain:
    """Lets the n-th op that runs again fail for want of memory, ``times`` times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int, times: int) -> None:
        plain: Callable[..., Any] = entry.Entry.run
        self.count, self.left = 0, times

        def run(this: Any, memory: Any, replay: Any, wanted: Any) -> Any:
            self.count += 1
            if self.count >= n and self.left:
                self.left -= 1
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
            return plain(this, memory, replay, wanted)

        monkeypatch.setattr(entry.Entry, "run", run)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_running_again_in_the_backward_that_runs_out(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    x, plain = torch.randn(256, WIDTH), Capped()
    model = autoremat.checkpoint(copy.deepcopy(plain), budget=0.6)
    step(model, x)
    refuses = RefusesAgain(monkeypatch, n, times=1)
    assert all(map(torch.equal, step(model, x), step(plain, x)))
    assert refuses.left == 0


def test_running_again_that_never_fits_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    x, plain = torch.randn(256, WIDTH), Capped()
    model = autoremat.checkpoint(copy.deepcopy(plain), budget=0.6)
    step(model, x)
    refuses = RefusesAgain(monkeypatch, 2, times=100)
    with pytest.raises(torch.OutOfMemoryError, match="autoremat plan whose peak"):
        step(model, x)
    refuses.left = 0
    assert all(map(torch.equal, step(model, x), step(plain, x)))
