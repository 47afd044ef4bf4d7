"""Places where a step may keep numbers that are others at every call; with those of tensors, all."""

from __future__ import annotations

import array
import itertools
import os
import random
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.engines.torch.world.places_of_tensors import PLACES, Use, place

__all__ = ["PLACES", "Use"]


def counted(step: Callable[[], float], look: Callable[[], Any]) -> tuple[Use, Callable[[], Any]]:
    """A number that is another one at every call."""
    return (lambda x: 1.0 + 0.1 * step()), look


@place
def iterator_count(_: Path) -> tuple[Use, Callable[[], Any]]:
    kept = itertools.count()
    return counted(lambda: next(kept), lambda: repr(kept))


@place
def iterator_in_a_list(_: Path) -> tuple[Use, Callable[[], Any]]:
    kept = [iter(range(1000))]
    return counted(lambda: next(kept[0]), lambda: kept[0].__length_hint__())


@place
def byte_array(_: Path) -> tuple[Use, Callable[[], Any]]:
    kept = bytearray(1)

    def step() -> int:
        kept[0] += 1
        return kept[0]

    return counted(step, lambda: bytes(kept))


@place
def memory_view(_: Path) -> tuple[Use, Callable[[], Any]]:
    kept = memoryview(bytearray(1))

    def step() -> int:
        kept[0] += 1
        return kept[0]

    return counted(step, kept.tobytes)


@place
def array_of_numbers(_: Path) -> tuple[Use, Callable[[], Any]]:
    kept = array.array("d", [0.0])

    def step() -> float:
        kept[0] += 1
        return kept[0]

    return counted(step, lambda: list(kept))


@place
def numpy_array(_: Path) -> tuple[Use, Callable[[], Any]]:
    kept = np.zeros(1 << 18)

    def step() -> float:
        kept[0] += 1
        return float(kept[0])

    return counted(step, lambda: float(kept[0]))


@place
def counter_of_calls(_: Path) -> tuple[Use, Callable[[], Any]]:
    kept: Counter[str] = Counter()

    def step() -> int:
        kept.update(["calls"])
        return kept["calls"]

    return counted(step, lambda: dict(kept))


@place
def random_object_in_slots(_: Path) -> tuple[Use, Callable[[], Any]]:
    class Kept:
        __slots__ = ("random",)

    kept = Kept()
    kept.random = random.Random(0)
    return counted(kept.random.random, lambda: kept.random.getstate())


@place
def file_written_to(folder: Path) -> tuple[Use, Callable[[], Any]]:
    path = folder / "log"
    path.write_text("")
    file = path.open("a")

    def step() -> int:
        file.write("line\n")
        file.flush()
        return 1

    weakref.finalize(step, file.close)
    return counted(step, path.read_text)


@place
def file_opened_and_written_to(folder: Path) -> tuple[Use, Callable[[], Any]]:
    path = folder / "log"

    def step() -> int:
        with path.open("a") as file:
            file.write("line\n")
        return len(path.read_text())

    return counted(step, lambda: path.read_text() if path.exists() else "")


@place
def file_read_from(folder: Path) -> tuple[Use, Callable[[], Any]]:
    path = folder / "data"
    path.write_bytes(bytes(range(200)))
    fd = os.open(path, os.O_RDONLY)
    return counted(lambda: os.read(fd, 1)[0], lambda: os.lseek(fd, 0, os.SEEK_CUR))


@place
def pipe_read_from(_: Path) -> tuple[Use, Callable[[], Any]]:
    reading, writing = os.pipe()
    os.write(writing, bytes(range(100)))
    kept = [0]

    def step() -> int:
        kept[0] += 1
        return (os.read(reading, 1) or b"\1")[0]

    return counted(step, lambda: kept[0])
