"""Settings of the tests of the engine for JAX."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _compiled_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have LLVM optimize nothing where no figure is at stake: what XLA does before is the same."""
    import jax

    if request.node.get_closest_marker("slow"):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
