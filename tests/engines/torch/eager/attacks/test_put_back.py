"""Attacks on what a recording, which runs the forward once more, must put back."""

from __future__ import annotations

import collections
import functools
import importlib
import random
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from autoremat.engines.torch.world.modules import undisturbed
from tests.engines.torch.compare import World, exact, quick
from tests.engines.torch.eager.attacks.networks import (
    WIDTH,
    Layers,
    Net,
    curly,
    data,
    training,
)

__all__ = ["quick"]  # a fixture

COUNT = 0


def test_state_in_objects_of_every_kind() -> None:
    class Stateful(Layers):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.recent: Any = collections.deque(maxlen=8)
            self.space = types.SimpleNamespace(n=0, seen=[])
            self.array, self.raw = np.zeros(4), bytearray(4)
            self.counter: Any = collections.Counter()
            self.default: Any = collections.defaultdict(int)

        def body(self, i: int, h: Tensor) -> Tensor:
            global COUNT
            COUNT += 1
            type(self).calls += 1
            self.recent.append(COUNT)
            self.space.n += 1
            self.space.seen.append(i)
            self.array[i] += 1
            self.raw[i] += 1
            self.counter[i] += 1
            self.default[i] += 1
            scale = COUNT + self.calls + self.space.n + float(self.array[i]) + self.counter[i] + len(self.recent)
            return (h * (1 + 0.01 * scale)).exp().sin() * h.cos()

    def build() -> World:
        global COUNT
        COUNT = Stateful.calls = 0
        model = Stateful()
        world = training(model)
        world.extra = lambda: (
            COUNT, Stateful.calls, list(model.recent), model.space.n, model.space.seen, model.array.tolist(),
            bytes(model.raw), dict(model.counter), dict(model.default),
        )  # fmt: skip
        return world

    exact(build, steps=3)


def test_count_in_a_closure() -> None:
    def build() -> World:
        n = 0

        def body(i: int, h: Tensor) -> Tensor:
            nonlocal n
            n += 1
            return (h * (1 + 0.01 * n)).exp().sin() * h.cos()

        world = training(Net(body))
        world.extra = lambda: n
        return world

    exact(build, steps=3)


class Table:
    """Makes a table when it is asked for the first time, as rotary embeddings do."""

    def __init__(self) -> None:
        self.cos: Tensor | None = None

    def __call__(self, n: int) -> Tensor:
        if self.cos is None or self.cos.shape[0] < n:
            self.cos = torch.arange(n).mul(0.1).cos()
        return self.cos[:n]


@functools.lru_cache
def positions(n: int) -> Tensor:
    return torch.arange(n) * 0.1


def positions_kept(n: int, known: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006 - that it is mutable is the point
    if n not in known:
        known[n] = torch.arange(n) * 0.1
    return known[n]


class Cached(Layers):
    """Every place where people keep tensors that are made once; fake tensors must not stay in any."""

    tables: dict[str, Tensor] = {}  # noqa: RUF012 - shared by all of the class, on purpose

    def __init__(self, local: threading.local) -> None:
        super().__init__()
        self.table, self.config, self.local = Table(), {"rope": Table(), "more": [Table()]}, local

    @staticmethod
    @functools.lru_cache
    def static(n: int) -> Tensor:
        return torch.arange(n) * 0.2

    @functools.cached_property
    def frequencies(self) -> Tensor:
        return torch.arange(WIDTH) * 0.3

    def body(self, i: int, h: Tensor) -> Tensor:
        if "cos" not in self.tables:
            self.tables["cos"] = torch.arange(WIDTH).cos()
        if not hasattr(self.local, "sin"):
            self.local.sin = torch.arange(WIDTH).sin()
        h = h + positions(WIDTH) + self.static(WIDTH) + positions_kept(WIDTH) + self.frequencies + self.tables["cos"]
        h = h + self.table(WIDTH) + self.config["rope"](WIDTH) + self.config["more"][0](WIDTH) + self.local.sin
        return h.sin() * h.cos().exp()


def test_tensors_in_caches() -> None:
    def build() -> World:
        positions.cache_clear(), Cached.static.cache_clear(), Cached.tables.clear()
        positions_kept.__defaults__[0].clear()
        return training(Cached(threading.local()))

    exact(build, steps=4)  # the second call finds in the caches what the first has made: it is recorded, too


class Activations(collections.OrderedDict):
    """Makes an object whenever it is read, as registries of libraries do."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


class Lazy(dict):
    """Loads something else at the first look, and may fail to."""

    def values(self) -> Any:
        raise ImportError("a library that is not installed")

    items = __iter__ = copy = __len__ = values


ACTIVATIONS, LAZY, SYSTEM = Activations(sin=lambda: torch.sin, cos=lambda: torch.cos), Lazy(a=1), random.SystemRandom()


def test_containers_that_do_something_when_they_are_read() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        dict.__setitem__(LAZY, "seen", i)
        ACTIVATIONS[f"layer {i}"] = lambda: torch.tanh
        assert SYSTEM.random() < 1
        return ACTIVATIONS["sin"](h).exp() * ACTIVATIONS["cos"](h) + ACTIVATIONS[f"layer {i}"](h)

    def build() -> World:
        dict.clear(LAZY)
        for name in [n for n in ACTIVATIONS if n.startswith("layer")]:
            del ACTIVATIONS[name]
        world = training(Net(body))
        world.extra = lambda: (sorted(dict.items(LAZY)), list(ACTIVATIONS))
        return world

    exact(build, steps=3)
    with undisturbed([], body):
        dict.update(LAZY, a=2, b=3)
        ACTIVATIONS.move_to_end("sin")
    assert dict.get(LAZY, "b") is None
    assert next(iter(ACTIVATIONS)) == "sin"


def test_of_installed_packages_only_what_knows_torch_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the way leads from import to import through all that is installed, and empties its caches."""
    site = tmp_path / "site-packages"
    site.mkdir()
    cache = "import functools\n\n@functools.cache\ndef square(n):\n    return n * n\n"
    (site / "algebra_of_others.py").write_text(f"{cache}\ndef ninth_power(n):\n    return square(square(n)) * n\n")
    (site / "package_of_models.py").write_text(
        f"{cache}\nimport torch\nfrom algebra_of_others import ninth_power\n\nclass Model(torch.nn.Module):\n"
        "    def forward(self, x):\n        return x * square(3) * ninth_power(2)\n"
    )
    monkeypatch.syspath_prepend(site)
    models, algebra = (importlib.import_module(name) for name in ("package_of_models", "algebra_of_others"))
    model = models.Model()
    with undisturbed([model], model):
        model(torch.ones(1))
    assert models.square.cache_info().currsize == 0
    assert algebra.square.cache_info().currsize == 2


def test_hooks_on_leaves_that_are_no_arguments_do_not_see_the_recording() -> None:
    def build() -> World:
        w, seen = torch.rand(WIDTH, requires_grad=True), []
        w.register_hook(lambda g: seen.append(g.clone()))
        optimizer = torch.optim.SGD([w], 0.1)
        w.register_post_accumulate_grad_hook(lambda p: optimizer.step())

        def step(call: Any) -> Any:
            w.grad = None
            loss = call(data())
            loss.backward()
            return loss, w, w.grad

        world = World(lambda x: curly(0, curly(0, curly(0, x * w))).mean(), step)
        world.extra = lambda: seen
        return world

    exact(build, steps=3)
