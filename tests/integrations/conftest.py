"""Everyday runs do not import the libraries, which takes longer than those tests that need them may."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    everyday = "not slow" in str(config.getoption("markexpr"))
    return True if everyday and collection_path.name.startswith("test_") else None
