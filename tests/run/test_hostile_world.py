"""Attacks from outside torch: global switches, shared memory, caches, other threads and processes, interrupts."""

from __future__ import annotations

import collections
import copy
import ctypes
import functools
import importlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.world.modules import undisturbed
from tests.run.compare import World, exact, quick
from tests.run.test_hostile import ROWS, WIDTH, Net, check_body, data, training
from tests.run.test_hostile_use import check_step, curly, net, nothing_active, tight

__all__ = ["quick"]  # a fixture


class Layers(nn.Module):
    """Layers with ``body(layer number, h)``, a method, after each linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + self.body(i, torch.tanh(layer(x)))
        return x


# ---- global switches that change between forward and backward --------------------------------------------------------


def during(read: Callable[[], Any], write: Callable[[Any], object], value: Any, forward: bool) -> Callable[..., Any]:
    """A step with a switch set for the forward only, or for the backward only."""

    def step(call: Any, x: Tensor) -> Tensor:
        before = read()
        write(value if forward else before)
        try:
            loss = call(x).square().mean()
            write(before if forward else value)
            loss.backward()
            assert read() == (before if forward else value)
        finally:
            write(before)
        return loss

    return step


def deciding(i: int, h: Tensor) -> Tensor:
    """Operators that look at every one of the switches."""
    noise = torch.rand(WIDTH) + torch.full((WIDTH,), 3) / 2 + torch.arange(0.0, 1.6, 0.1)
    tiny = (h.detach() * 1e-40) * 1e38
    kernel = torch.linspace(-1, 1, 4 * 4 * 9, dtype=h.dtype).view(4, 4, 3, 3)
    convolved = F.conv2d(h.view(1, 4, ROWS // 4, WIDTH), kernel, padding=1).view(ROWS, WIDTH)
    return (h * noise.to(h.dtype) + tiny + convolved).sin().exp() * (h @ h.t()).sum(1, keepdim=True).cos()


def flushes_denormals() -> bool:
    return (torch.tensor(1e-40) * 1).item() == 0


SWITCHES = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "denormals": (flushes_denormals, torch.set_flush_denormal, True),
    "mkldnn": (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, False),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
}


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("switch", SWITCHES)
def test_switch_thrown_between_forward_and_backward(switch: str, forward: bool) -> None:
    check_step(during(*SWITCHES[switch], forward=forward), lambda: Net(deciding, 3))


def test_other_number_of_threads_in_the_backward() -> None:
    """A sum over many numbers is split by threads."""

    def build() -> World:
        layers, x = nn.ModuleList(nn.Linear(64, 64) for _ in range(3)), torch.randn(2048, 64)

        def loss(x: Tensor) -> Tensor:
            for layer in layers:
                h = torch.tanh(layer(x))
                x = x + (h * h.mean()).exp().sin() * (h.sum() * 1e-3).cos()
            return x.square().mean()

        def step(call: Any) -> Tensor:
            layers.zero_grad()
            torch.set_num_threads(4)
            out = call(x)
            torch.set_num_threads(1)
            out.backward()
            return out

        return World(loss, step, (layers,))

    exact(build)


@pytest.mark.parametrize("forward", [True, False])
def test_new_precision_switches(forward: bool) -> None:
    """Once one of them is set, torch refuses to read the older ones."""
    matmul = torch.backends.mkldnn.matmul
    step = during(lambda: matmul.fp32_precision, lambda v: setattr(matmul, "fp32_precision", v), "bf16", forward)
    check_step(step)
    torch.get_float32_matmul_precision()  # is readable again


def test_backward_in_inference_mode() -> None:
    def step(call: Any, x: Tensor) -> Tensor:
        loss = call(x).square().mean()
        with torch.inference_mode():
            loss.backward()
        return loss

    check_step(step)


# ---- memory that torch does not know of ------------------------------------------------------------------------------


def test_memory_shared_through_dlpack_or_numpy() -> None:
    """Two storages on one memory: what is written through one changes the other."""

    def body(i: int, h: Tensor) -> Tensor:
        y = h.detach() * 2
        other = torch.from_dlpack(y) if i % 2 else torch.from_numpy(y.numpy())
        a = other.sin()
        y.mul_(2)
        return (h * a.exp()).sin() + y.cos() * h.exp()

    check_body(body)


def test_activation_changed_by_numpy_after_it_was_read() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h.detach() * 2
        b = (y + 1).exp()
        y.numpy()[:] *= 0.5
        return (h * b).sin() * b.cos() * h + y.cos()

    check_body(body)


def test_inputs_on_the_memory_of_one_array() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            h = self.net(x.clone())
            c = y.sin()
            x.mul_(0.5)
            return (self.net(x + h) * c.exp()).sin() * h.exp()

    def build() -> World:
        model, array = Writes(), np.random.rand(ROWS, WIDTH).astype(np.float32)

        def step(call: Any) -> Tensor:
            model.zero_grad()
            loss = call(torch.from_numpy(array), torch.from_numpy(array)).square().mean()
            loss.backward()
            return loss

        return World(model, step)

    exact(build)


def test_written_through_data_ptr() -> None:
    """Compiled code gets real addresses while the step is recorded, never the null pointer of a fake tensor."""

    def body(i: int, h: Tensor) -> Tensor:
        y, filled, source = h.detach() * 2, torch.empty_like(h), h.detach() * 3
        ctypes.memset(y.data_ptr(), 0, y.nbytes // 2)
        ctypes.memmove(filled.data_ptr(), source.data_ptr(), filled.nbytes)
        return (h * y.exp().sin()).sin() * y.cos() * filled.sin().exp()

    check_body(body)


def test_written_through_data_ptr_unless_the_tensor_is_fake() -> None:
    """As kernels with a fake version do it."""

    def body(i: int, h: Tensor) -> Tensor:
        y = h.detach() * 2
        if type(y) is Tensor:
            ctypes.memset(y.data_ptr(), 0, y.nbytes // 2)
        return (h * y.exp().sin()).sin() * y.cos()

    check_body(body)  # that it is about to be written is seen: it asks for the address


def test_custom_operator_that_hides_what_it_writes() -> None:
    with torch.library._scoped_library("autoremat_lies", "FRAGMENT") as library:
        library.define("triple(Tensor x) -> Tensor")
        library.impl("triple", lambda x: x.mul_(3).sum(), "CompositeExplicitAutograd")

        def body(i: int, h: Tensor) -> Tensor:
            y = h.detach() * 2
            torch.ops.autoremat_lies.triple(y)
            return (h * y.exp().sin()).sin() * y.cos()

        check_body(body, differs=True)


def test_another_thread_writes_into_an_activation() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h.detach() * 2
        thread = threading.Thread(target=lambda: y.mul_(3))
        thread.start()
        thread.join()
        return (h * y.exp().sin()).sin() * y.cos()

    check_body(body, differs=True)


@pytest.mark.filterwarnings("ignore:autoremat")
def test_result_changed_by_numpy_after_the_forward() -> None:
    """Autograd has not saved it, so plain training does not mind; a rerun would read it.

    The first step that follows its plan finds out in its backward, too late to go on; then it is exact.
    """

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x: Tensor) -> Any:
            features = []
            for layer in self.layers:
                features.append(layer(x) + 1)
                x = x + (features[-1] + 1).exp().sin()
            return x, features

    def step(call: Any, x: Tensor) -> Tensor:
        y, features = call(x)
        for f in features:
            f.detach().numpy()[:] = 0.5
        y.square().mean().backward()
        return y

    torch.manual_seed(0)
    plain, x = Features(), torch.randn(ROWS, WIDTH)
    model = autoremat.checkpoint(copy.deepcopy(plain), budget=1.0, recompute=("aten.exp*", "aten.add*"))
    refusals = 0
    done = {plain: 0, model: 0}
    for m in (plain, model):
        while done[m] < 3:
            m.zero_grad()
            try:
                step(m, x)
                done[m] += 1
            except RuntimeError as error:  # one operator is found at a time
                refusals += "set the gradients to None and repeat the step" in str(error)
                assert refusals == autoremat.stats(model).differing
    assert refusals > 0
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("between", [True, False])
def test_data_of_weights_swapped_in_the_forward(between: bool) -> None:
    """As binary networks do: autograd's backward sees the data that the weight has by then."""

    class Binary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv1d(4, 4, 3, padding=1) for _ in range(4))
            self.full: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.full = []
            for layer in self.layers:
                full = layer.weight.data
                self.full.append(full)
                layer.weight.data = full.sign() * full.abs().mean()
                x = x + layer(x).exp().sin()
                if not between:
                    layer.weight.data = full
            return x

    def build() -> World:
        model, x = Binary(), torch.randn(8, 4, 64)

        def step(call: Any) -> Tensor:
            model.zero_grad()
            loss = call(x).square().mean()
            for layer, full in zip(model.layers, model.full, strict=True):
                layer.weight.data = full
            loss.backward()
            return loss

        return World(model, step)

    exact(build)


# ---- what the recording, which runs the forward once more, must put back ---------------------------------------------

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


# ---- threads and processes -------------------------------------------------------------------------------------------


def test_backwards_of_several_threads_through_one_graph() -> None:
    def step(call: Any, x: Tensor) -> Any:
        weights = [layer.weight for layer in call.layers]
        loss = call(x).square().mean()
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda _: torch.autograd.grad(loss, weights, retain_graph=True), range(12)))

    for _ in range(2):
        check_step(step)


def test_half_of_the_graph_in_every_thread() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(net(3) for _ in range(4))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [head(x) for head in self.heads]

    def step(call: Any, x: Tensor) -> None:
        losses = [y.square().mean() for y in call(x)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(Tensor.backward, losses))

    check_step(step, Heads)


def test_threads_inside_the_forward() -> None:
    """What they compute is not seen, so it is kept."""

    def body(i: int, h: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            a, b = pool.map(lambda s: (h * s).exp().sin(), (0.5, 0.25))
        return (a * b).cos() * h.sin()

    check_body(body)


def test_threads_inside_the_forward_without_gradients() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            a = pool.submit(lambda t: (t * 0.5).exp().sin(), h.detach()).result()
        return (a * h).cos() * h.sin()

    check_body(body)


def run(script: str) -> str:
    """Run a script in a process of its own, warnings being errors there, too."""
    done = subprocess.run(
        # The warning is about the machine: fewer processors than workers.
        [sys.executable, "-W", "error", "-W", "ignore:This DataLoader", "-c", textwrap.dedent(script)],
        capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


PRELUDE = """
    import os, torch, autoremat
    from torch import nn
    def make():
        torch.manual_seed(0)
        return nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2))])
    class Data(torch.utils.data.Dataset):
        def __len__(self): return 64
        def __getitem__(self, i): return torch.full((16,), i / 64)
    def train(call, model, batches):
        torch.manual_seed(1)
        out = []
        for x in batches:
            model.zero_grad()
            call(x.repeat(32, 1)).square().mean().backward()
            out += [p.grad.clone() for p in model.parameters()]
        return out
    plain, model = make(), make()
    batches = [torch.rand(8, 16, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    autoremat.checkpoint(model, budget=0.75, time_limit_seconds=0.2)
    def same():
        a, b = train(plain, plain, batches), train(model, model, batches)
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and autoremat.stats(model).reruns > 0
"""


def test_fork_after_use_and_data_loader_workers_beside() -> None:
    script = """
    assert same()
    children = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = 0 if same() else 2
            finally:
                os._exit(code)
        children.append(pid)
    assert all(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in children)
    def loader():
        torch.manual_seed(3)
        return torch.utils.data.DataLoader(Data(), batch_size=8, num_workers=2, shuffle=True)
    a, b = train(plain, plain, loader()), train(model, model, loader())
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert same()
    print("all the same")
    """
    assert "all the same" in run(PRELUDE + script)


# ---- interrupts ------------------------------------------------------------------------------------------------------


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("where", ["recording", "forward", "backward", "planning"])
def test_ctrl_c(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves nothing behind, and the next step is exact."""
    due: list[str] = []

    class Interrupts(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            if due and due[0] == ("forward" if type(x) is Tensor else "recording"):
                due.clear()
                interrupt()
            return x * 1

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            if due and due[0] == "backward" and type(g) is Tensor:
                due.clear()
                interrupt()
            return g * 1

    def body(i: int, h: Tensor) -> Tensor:
        return curly(i, Interrupts.apply(h) if i == 2 else h)

    solve = autoremat.engines.torch.eager.options.solve

    def interrupted_solve(*args: Any, **kwargs: Any) -> Any:
        if due and due[0] == "planning":
            due.clear()
            interrupt()
        return solve(*args, **kwargs)

    monkeypatch.setattr(autoremat.engines.torch.eager.options, "solve", interrupted_solve)

    def build() -> World:
        model, x = Net(body), data()

        def step(call: Any) -> Tensor:
            for failing in (True, False, True, False):
                model.zero_grad()
                fresh = torch.cat([x] * (2 if failing else 1))[: ROWS + failing]
                due[:] = [where] * failing
                state = torch.get_rng_state()
                try:
                    call(fresh).square().mean().backward()
                except KeyboardInterrupt:
                    assert nothing_active()
                    torch.set_rng_state(state)
                due.clear()
            return call(x)

        return World(model, step)

    exact(build)


def test_abandoned_in_every_way() -> None:
    """Forwards without a backward, half a backward, a graph kept for ever: the next steps do not mind."""
    kept: list[Tensor] = []

    def step(call: Any, x: Tensor) -> Tensor:
        call(x)
        kept.append(call(x * 2))
        y = call(x * 3)
        torch.autograd.grad(y.mean(), call.layers[4].weight)
        loss = call(x).square().mean()
        loss.backward()
        return loss

    check_step(step)


def test_nothing_is_left_of_a_step_whose_graph_is_gone() -> None:
    world, call = tight(lambda: training(Net(lambda i, h: F.dropout(h, 0.1).exp().sin())))
    for _ in range(3):
        world.step(call)
    assert nothing_active()
    assert all(type(p.grad) is Tensor for p in world.target.parameters())
