"""Settings of all tests: what is drawn at random, and what takes the place of seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.fixed import fixed_planning, fixed_seconds, is_thorough, seed

settings.register_profile("everyday", derandomize=True, database=None, deadline=None)
settings.register_profile("thorough", database=None, deadline=None, print_blob=True)
settings.load_profile("thorough" if is_thorough() else "everyday")


def pytest_report_header(config: pytest.Config) -> str:
    """Which examples; of random ones what it takes to have them again."""
    if not is_thorough():
        return "examples: the same ones every time"
    return f"examples: random ones; to have them again: make test-all SEED={seed()}"


@pytest.fixture(autouse=True)
def the_same_every_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test depends on how fast or busy the machine is, but those marked ``real_seconds``."""
    if request.node.get_closest_marker("real_seconds"):
        yield
        return
    with fixed_seconds(), fixed_planning():
        yield
