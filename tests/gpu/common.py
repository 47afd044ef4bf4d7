"""What the tests of a device share: the devices, worlds on them, and generators to compare."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engines.torch.compare import World, observe, same, seeded

EVERY_DEVICE = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
"""On the CPU the test itself is tested, and the everyday tests have as much already; what it is for is CUDA."""


@contextmanager
def deterministic(*, strict: bool = True) -> Iterator[None]:
    """Deterministic algorithms; those that do not exist are refused, or used as they are."""
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*determinis.*")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def generators(device: str) -> list[torch.Generator]:
    """The default generators of host and device."""
    if device == "cpu":
        return [torch.default_generator]
    torch.cuda.init()
    return [torch.default_generator, torch.cuda.default_generators[torch.cuda.current_device()]]


Within = Callable[[], AbstractContextManager[Any]]


def world(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    loss: Callable[[Any], Tensor],
    device: str,
    forward: Within = nullcontext,
    backward: Within = nullcontext,
) -> World:
    """Steps of SGD, with what forward and backward run within."""
    model = model.to(device)
    placed = tuple(t.to(device) for t in inputs)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def step(call: Any) -> Tensor:
        optimizer.zero_grad()
        with forward():
            value = loss(call(*placed))
        with backward():
            value.backward()
        optimizer.step()
        return value

    return World(model, step, extra=lambda: generators(device))


def skip_unless_plain_repeats(build: Callable[[], World]) -> None:
    """Where plain training differs from run to run, or does not run at all, equality with it means nothing."""
    try:
        first, again = (_observed(seeded(build)) for _ in range(2))
    except RuntimeError as error:
        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
            raise
        pytest.skip(f"not on this device: {error}")
    different = [name for (name, a), (_, b) in zip(first, again, strict=True) if not same(a, b)]
    if different:
        pytest.skip(f"plain training differs from run to run: {different[0]}")


def _observed(made: World) -> list[Any]:
    return observe(made, made.target, 2)
