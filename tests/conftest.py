"""Settings of all tests: what is drawn at random, and what takes the place of seconds."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.fixed import MOST_EXAMPLES, fixed_planning, fixed_seconds, is_thorough, seed

os.environ["AUTOREMAT_CACHE"] = "off"  # tests neither read nor write what the user's trainings have measured
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses to be deterministic

with suppress(ModuleNotFoundError):  # the tests for a GPU do without it
    from hypothesis import settings

    settings.register_profile("everyday", max_examples=MOST_EXAMPLES, derandomize=True, database=None, deadline=None)
    settings.register_profile("thorough", database=None, deadline=None, print_blob=True)
    settings.load_profile("thorough" if is_thorough() else "everyday")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test marked ``one_in`` leave a few to every day; the others are slow, and guard if asked to."""
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("one_in")
        if mark is None or item.get_closest_marker("slow"):
            continue
        name = item.nodeid.split("[")[0]
        if seen[name] % mark.args[0]:
            item.add_marker("slow")
            if mark.kwargs.get("guard"):
                item.add_marker("guard")
        seen[name] += 1


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a device that is not there."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def pytest_report_header(config: pytest.Config) -> str:
    """Which examples; of random ones what it takes to have them again."""
    if not is_thorough():
        return "examples: the same ones every time"
    return f"examples: random ones; to have them again: make test-all SEED={seed()}"


@pytest.fixture(autouse=True, scope="module")
def what_is_old_is_not_looked_through() -> None:
    """Keep the garbage collector from all that was there before the module.

    It is called before every step whose memory is measured; with several frameworks loaded it took most of the time.
    What has died since the last module goes first.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def the_same_every_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test depends on how fast or busy the machine is, but those marked ``real_seconds``."""
    if request.node.get_closest_marker("real_seconds"):
        yield
        return
    with fixed_seconds(), fixed_planning():
        yield
