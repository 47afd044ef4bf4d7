"""Settings of all tests."""

import os
from contextlib import suppress

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses to be deterministic

with suppress(ModuleNotFoundError):  # the tests for a GPU do without it
    from hypothesis import settings

    settings.register_profile("shared", deadline=None)  # a machine that others use too is slow now and then
    settings.load_profile("shared")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
