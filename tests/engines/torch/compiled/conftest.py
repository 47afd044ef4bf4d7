"""What every test of the compiled engine needs: a compiler that has forgotten what others compiled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The compiler imports what torch calls deprecated, and looks at the gradient of every tensor."""
    for item in items:
        if HERE in item.path.parents:
            for category in ("DeprecationWarning", "FutureWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore:`torch.jit:{category}"))
            item.add_marker(pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"))


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    """Every test compiles for itself."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor generates stays apart from the user's."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))
