"""Says in words what is missing for ``make gpu``, which uses the environment as it is and installs nothing.

Run: ``python benchmarks/_gpu_needs.py``; the exit status is 1 where something is missing.
"""

from __future__ import annotations

import importlib.util
import sys

PACKAGES = ("numpy", "scipy", "click", "rich", "pytest")


def missing_packages() -> list[str]:
    """Those of the packages that this Python does not find."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def main() -> int:
    """Say what is missing, and how to install it without touching torch."""
    if importlib.util.find_spec("torch") is None:
        print(f"{sys.executable} has no torch. Name a Python that has one: make gpu PYTHON=/path/to/python")
        return 1
    missing = missing_packages()
    if missing:
        names = " ".join(missing)
        print(f"Missing: {names}. None of them touches torch:\n  {sys.executable} -m pip install {names}")
        return 1
    import torch

    if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
        print(f"autoremat asks for torch 2.11 or newer; this is {torch.__version__}. Going on with it.")
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} of {sys.executable} finds no CUDA device")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
