"""Real data that every machine with Python already has.

The standard library's source text, scikit-learn's digits.

Both come in a fixed order with a fixed split, and batches are drawn with a generator of their own, so that the same
call gives the same numbers everywhere and PyTorch's global generator is never touched.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Third-party code is not the standard library, tests and generated tables are not what one would want to read.
_SKIP = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"})


def stdlib_files(root: str | Path | None = None) -> list[Path]:
    """List the standard library's ``*.py`` files by path.

    The paths are relative to ``root``.

    Raises:
        FileNotFoundError: there is no source text below ``root`` (some embedded Pythons ship bytecode only).
    """
    top = Path(root or sysconfig.get_paths()["stdlib"])
    paths = [p for p in top.rglob("*.py") if _SKIP.isdisjoint(p.relative_to(top).parts)]
    if not paths:
        raise FileNotFoundError(f"no *.py files below {top}; pass the folder of another Python's standard library")
    return sorted(paths, key=lambda p: p.relative_to(top).as_posix())


def stdlib_bytes(split: str = "train", *, root: str | Path | None = None, max_bytes: int = 8_000_000) -> Tensor:
    """Read the source text as at most ``max_bytes`` bytes of ``uint8``.

    Every tenth file is in the ``"validation"`` split, all others in ``"train"``.

    Raises:
        ValueError: an unknown split.
        FileNotFoundError: see ``stdlib_files``.
    """
    files = stdlib_files(root)
    if split not in ("train", "validation"):
        raise ValueError(f"unknown split {split!r}; choose 'train' or 'validation'")
    wanted = files[::10] if split == "validation" else [p for i, p in enumerate(files) if i % 10]
    text = bytearray()
    for path in wanted:
        text += path.read_bytes()
        if len(text) >= max_bytes:
            break
    return torch.frombuffer(text, dtype=torch.uint8)[:max_bytes].clone()


def text_batches(text: Tensor, batch: int, context: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches ``(x, y)`` without end.

    Both are ``int64[batch, context]``; ``y`` is ``x`` moved on by one byte.

    Raises:
        ValueError: the text is not longer than ``context``.
    """
    if len(text) <= context:
        raise ValueError(f"a context of {context} needs more than {len(text)} bytes of text; take a shorter context")
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(context + 1)
    while True:
        starts = torch.randint(len(text) - context, (batch, 1), generator=generator)
        window = text[starts + offsets].long()
        yield window[:, :-1].contiguous(), window[:, 1:].contiguous()


def digits(split: str = "train", *, size: int = 32) -> tuple[Tensor, Tensor]:
    """Scikit-learn's handwritten digits, enlarged to ``size`` pixels: ``float32[N, 1, size, size]``, ``int64[N]``.

    Values lie in 0..1. Every fifth image is in the ``"validation"`` split, all others in ``"train"``.

    Raises:
        ValueError: an unknown split.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"unknown split {split!r}; choose 'train' or 'validation'")
    from sklearn.datasets import load_digits

    raw = load_digits()
    fifth = torch.arange(len(raw.target)) % 5 == 0
    chosen = fifth if split == "validation" else ~fifth
    small = torch.from_numpy(raw.images).float()[chosen].unsqueeze(1) / 16
    images = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    return images, torch.from_numpy(raw.target).long()[chosen]


def image_batches(images: Tensor, labels: Tensor, batch: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches ``(float32[batch, ...], int64[batch])``, each epoch in a new random order.

    Raises:
        ValueError: there are fewer images than ``batch``.
    """
    if len(images) < batch:
        raise ValueError(f"a batch of {batch} needs at least as many images, got {len(images)}; take a smaller batch")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator)
        for chunk in order.split(batch):
            if len(chunk) == batch:
                yield images[chunk], labels[chunk]
