"""Recordings leave nothing behind, wherever a step keeps its things; and where they cannot help it, they say so."""

from __future__ import annotations

import array
import contextvars
import enum
import functools
import gc
import itertools
import os
import random
import threading
import types
import warnings
import weakref
from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import autoremat
from autoremat.engines.torch.eager.dry_run import record
from autoremat.engines.torch.world import apart

Use = Callable[[Tensor], Any]
Place = Callable[[Path], tuple[Use, Callable[[], Any]]]
"""What the step multiplies with, kept somewhere; and what is kept there now."""

PLACES: dict[str, Place] = {}
GLOBAL: dict[str, Any] = {}
HELD: Any = None


def place(make: Place) -> Place:
    PLACES[make.__name__.strip("_")] = make
    return make


def table(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], dtype=x.dtype).cos()


def kept_in(get: Callable[[], Any], put: Callable[[Tensor], None]) -> tuple[Use, Callable[[], Any]]:
    """A table that is made at the first call and then found where it was put."""

    def use(x: Tensor) -> Tensor:
        if get() is None:
            put(table(x))
        return get()

    return use, get


@place
def module_attribute(_: Path) -> tuple[Use, Callable[[], Any]]:
    module = nn.Identity()
    module.cached = None
    return kept_in(lambda: module.cached, lambda t: setattr(module, "cached", t))


@place
def slots_object(_: Path) -> tuple[Use, Callable[[], Any]]:
    class Slots:
        __slots__ = ("t",)

    kept = Slots()
    return kept_in(lambda: getattr(kept, "t", None), lambda t: setattr(kept, "t", t))


@place
def slots_dataclass(_: Path) -> tuple[Use, Callable[[], Any]]:
    @dataclass(slots=True)
    class Cache:
        t: Any = None

    kept = Cache()
    return kept_in(lambda: kept.t, lambda t: setattr(kept, "t", t))


@place
def weak_key_dictionary(_: Path) -> tuple[Use, Callable[[], Any]]:
    module, kept = nn.Identity(), weakref.WeakKeyDictionary()
    return kept_in(lambda: kept.get(module), lambda t: kept.__setitem__(module, t))


@place
def context_variable(_: Path) -> tuple[Use, Callable[[], Any]]:
    variable = contextvars.ContextVar("kept", default=None)
    return kept_in(variable.get, lambda t: variable.set(t) and None)


@place
def generator_locals(_: Path) -> tuple[Use, Callable[[], Any]]:
    def run() -> Iterator[Any]:
        kept, n = None, 0
        while True:
            x = yield kept, n
            kept, n = table(x) if kept is None else kept, n + 1

    g = run()
    next(g)
    return (lambda x: g.send(x)[0]), lambda: (g.gi_frame.f_locals["kept"], g.gi_frame.f_locals["n"])


@place
def closure_cell(_: Path) -> tuple[Use, Callable[[], Any]]:
    kept = None

    def put(t: Tensor) -> None:
        nonlocal kept
        kept = t

    return kept_in(lambda: kept, put)


@place
def class_attribute(_: Path) -> tuple[Use, Callable[[], Any]]:
    class Kept:
        t: Any = None

    return kept_in(lambda: Kept.t, lambda t: setattr(Kept, "t", t))


@place
def metaclass_attribute(_: Path) -> tuple[Use, Callable[[], Any]]:
    class Meta(type):
        t: Any = None

    class Kept(metaclass=Meta):
        pass

    return kept_in(lambda: Kept.t, lambda t: setattr(Meta, "t", t))


@place
def lru_cache(_: Path) -> tuple[Use, Callable[[], Any]]:
    @functools.lru_cache
    def made(n: int) -> Tensor:
        return torch.arange(n, dtype=torch.float32).cos()

    return (lambda x: made(x.shape[1])), lambda: made.cache_info()[:2]


@place
def cached_property(_: Path) -> tuple[Use, Callable[[], Any]]:
    class Kept:
        @functools.cached_property
        def t(self) -> Tensor:
            return torch.ones(8).cos()

    kept = Kept()
    return (lambda x: kept.t), lambda: vars(kept).get("t")


@place
def hidden_slot_of_a_property(_: Path) -> tuple[Use, Callable[[], Any]]:
    class Kept:
        __slots__ = ("_Kept__t",)

        @property
        def t(self) -> Any:
            return getattr(self, "_Kept__t", None)

        @t.setter
        def t(self, value: Tensor) -> None:
            self.__t = value

    kept = Kept()
    return kept_in(lambda: kept.t, lambda t: setattr(kept, "t", t))


@place
def global_of_a_module(_: Path) -> tuple[Use, Callable[[], Any]]:
    GLOBAL.clear()

    def put(t: Tensor) -> None:
        global HELD
        HELD = t

    put(None)  # type: ignore[arg-type]
    return kept_in(lambda: HELD, put)


@place
def default_argument(_: Path) -> tuple[Use, Callable[[], Any]]:
    def use(x: Tensor, kept: list[Tensor] = []) -> Tensor:  # noqa: B006 - that is the point
        if not kept:
            kept.append(table(x))
        return kept[0]

    return use, lambda: list(use.__defaults__[0])


@place
def default_dict(_: Path) -> tuple[Use, Callable[[], Any]]:
    kept: Any = defaultdict(list)

    def use(x: Tensor) -> Tensor:
        kept[x.shape].append(table(x))
        return kept[x.shape][0]

    return use, lambda: [t for ts in kept.values() for t in ts]


@place
def ordered_dict(_: Path) -> tuple[Use, Callable[[], Any]]:
    kept: Any = OrderedDict()
    return kept_in(lambda: kept.get("t"), lambda t: kept.__setitem__("t", t))


@place
def chain_map(_: Path) -> tuple[Use, Callable[[], Any]]:
    kept: Any = ChainMap({}, {})
    return kept_in(lambda: kept.get("t"), lambda t: kept.__setitem__("t", t))


@place
def user_dict(_: Path) -> tuple[Use, Callable[[], Any]]:
    kept: Any = UserDict()
    return kept_in(lambda: kept.get("t"), lambda t: kept.__setitem__("t", t))


@place
def mapping_proxy(_: Path) -> tuple[Use, Callable[[], Any]]:
    inner: dict[str, Any] = {}
    kept = types.MappingProxyType(inner)
    return kept_in(lambda: kept.get("t"), lambda t: inner.__setitem__("t", t))


@place
def full_deque(_: Path) -> tuple[Use, Callable[[], Any]]:
    kept: Any = deque(maxlen=2)

    def use(x: Tensor) -> Tensor:
        kept.append(table(x))
        return kept[0]

    return use, lambda: list(kept)


@place
def named_tuple_in_a_list(_: Path) -> tuple[Use, Callable[[], Any]]:
    class Pair(NamedTuple):
        n: int
        t: Any

    kept = [Pair(0, None)]

    def use(x: Tensor) -> Tensor:
        kept[0] = Pair(kept[0].n + 1, table(x) if kept[0].t is None else kept[0].t)
        return kept[0].t

    return use, lambda: list(kept[0])


@place
def set_of_tensors(_: Path) -> tuple[Use, Callable[[], Any]]:
    kept: set[Tensor] = set()

    def use(x: Tensor) -> Tensor:
        if not kept:
            kept.add(table(x))
        return next(iter(kept))

    return use, lambda: list(kept)


@place
def thread_local(_: Path) -> tuple[Use, Callable[[], Any]]:
    kept = threading.local()
    return kept_in(lambda: getattr(kept, "t", None), lambda t: setattr(kept, "t", t))


@place
def member_of_an_enum(_: Path) -> tuple[Use, Callable[[], Any]]:
    class Kind(enum.Enum):
        ONE = 1

    return kept_in(lambda: getattr(Kind.ONE, "t", None), lambda t: setattr(Kind.ONE, "t", t))


@place
def partial_object(_: Path) -> tuple[Use, Callable[[], Any]]:
    kept = functools.partial(max)
    return kept_in(lambda: getattr(kept, "t", None), lambda t: setattr(kept, "t", t))


@place
def owner_of_a_bound_method(_: Path) -> tuple[Use, Callable[[], Any]]:
    class Owner:
        __slots__ = ("t",)

        def use(self, x: Tensor) -> Tensor:
            if getattr(self, "t", None) is None:
                self.t = table(x)
            return self.t

    owner = Owner()
    return owner.use, lambda: getattr(owner, "t", None)


@place
def attribute_of_a_tensor(_: Path) -> tuple[Use, Callable[[], Any]]:
    kept = torch.zeros(1)
    return kept_in(lambda: getattr(kept, "cached", None), lambda t: setattr(kept, "cached", t))


@place
def attribute_of_a_function(_: Path) -> tuple[Use, Callable[[], Any]]:
    def use(x: Tensor) -> Tensor:
        if not hasattr(use, "t"):
            use.t = table(x)  # type: ignore[attr-defined]
        return use.t  # type: ignore[attr-defined]

    return use, lambda: getattr(use, "t", None)


@place
def weak_finalizer(_: Path) -> tuple[Use, Callable[[], Any]]:
    called: list[int] = []

    class Thing:
        pass

    def use(x: Tensor) -> Tensor:
        weakref.finalize(Thing(), called.append, 1)
        return table(x)

    return use, lambda: len(called)


@place
def simple_queue(_: Path) -> tuple[Use, Callable[[], Any]]:
    import queue

    kept: Any = queue.SimpleQueue()

    def use(x: Tensor) -> Tensor:
        t = table(x) if kept.empty() else kept.get()
        kept.put(t)
        return t

    return use, kept.qsize


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


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)


def step_with(use: Use, net: Net) -> Callable[[Tensor], Tensor]:
    def step(x: Tensor) -> Tensor:
        h = torch.tanh(net.one(x) * use(x))
        return torch.sin(net.two(h).exp()).sum()

    return step


@pytest.fixture
def forked() -> None:
    """Only where a child can be made."""
    if not apart.can_run_apart():
        pytest.skip("no child can be made in this process")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No child is made."""
    monkeypatch.setattr(apart._Here, "cannot", True)


def reachable_fakes() -> list[FakeTensor]:
    gc.collect()
    return [t for t in gc.get_objects() if type(t) is FakeTensor]


def as_data(state: Any) -> Any:
    assert not isinstance(state, FakeTensor)
    if isinstance(state, Tensor):
        return state.tolist()
    return [as_data(v) for v in state] if isinstance(state, (list, tuple)) else state


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("name", PLACES)
def test_nothing_is_left_wherever_a_step_keeps_its_things(name: str, tmp_path: Path) -> None:
    before = len(reachable_fakes())
    (tmp_path / "plain").mkdir()
    plain_use, plain_look = PLACES[name](tmp_path / "plain")
    inputs = [torch.randn(16, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    net, losses = Net(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    plain = step_with(plain_use, net)
    for x in inputs:
        optimizer.zero_grad()
        losses.append(plain(x))
        losses[-1].backward()
        optimizer.step()
    expected = as_data(plain_look())

    use, look = PLACES[name](tmp_path)
    net2, x = Net(), inputs[0]
    step = step_with(use, net2)
    fresh = as_data(look())
    autoremat.plan(step, x, budget=1.0, time_limit_seconds=0.1)
    autoremat.explain(step, x)
    autoremat.frontier(step, x, points=2, time_limit_seconds=0.1)
    autoremat.max_batch(step, lambda n: torch.randn(n, 8), budget="1MB", most=2, time_limit_seconds=0.1)
    assert autoremat.check(step, x, budget=1.0, time_limit_seconds=0.1).is_exact
    assert as_data(look()) == fresh
    assert len(reachable_fakes()) == before

    optimizer2 = torch.optim.SGD(net2.parameters(), lr=0.01)
    checkpointed = autoremat.checkpoint(step, budget=1.0, optimizer=optimizer2, time_limit_seconds=0.2)
    for x, loss in zip(inputs, losses, strict=True):
        optimizer2.zero_grad()
        ours = checkpointed(x)
        ours.backward()
        optimizer2.step()
        assert type(ours) is Tensor
        assert torch.equal(ours, loss)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), net2.parameters(), strict=True))
    assert as_data(look()) == expected
    assert len(reachable_fakes()) == before


# ---- in this process -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("slots_object", "the attribute t of a"),
        ("slots_dataclass", "the attribute t of a"),
        ("hidden_slot_of_a_property", "the attribute _Kept__t of a"),
        ("weak_key_dictionary", "the item"),
        ("generator_locals", "the variable 'kept' of"),
        ("attribute_of_a_tensor", "the attribute 'cached' of a"),
    ],
)
def test_who_holds_a_fake_is_named(name: str, says: str, tmp_path: Path) -> None:
    use, _ = PLACES[name](tmp_path)
    net = Net()
    step = step_with(use, net)
    with pytest.raises(ValueError, match="one is still held by") as caught:
        autoremat.plan(step, torch.randn(16, 8), budget=1.0)
    assert says in str(caught.value)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.usefixtures("here")
def test_what_can_be_put_back_is_no_error(tmp_path: Path) -> None:
    for name in ("module_attribute", "closure_cell", "class_attribute", "default_dict", "ordered_dict", "lru_cache"):
        use, look = PLACES[name](tmp_path)
        fresh = as_data(look())
        autoremat.plan(step_with(use, Net()), torch.randn(16, 8), budget=1.0, time_limit_seconds=0.1)
        if name != "lru_cache":
            assert as_data(look()) == fresh


# ---- the child -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("forked")
def test_an_error_keeps_its_type_even_one_of_a_function() -> None:
    class Odd(Exception):
        pass

    def step(x: Tensor) -> Tensor:
        raise Odd("here")

    with pytest.raises(Odd, match="here"):
        record(step, (torch.randn(2),))


@pytest.mark.usefixtures("forked")
def test_an_error_that_cannot_be_sent_is_told_by_name() -> None:
    class Odd(Exception):
        def __init__(self, a: int, b: Any) -> None:
            super().__init__(f"{a}")
            self.b = b

    def step(x: Tensor) -> Tensor:
        raise Odd(1, lambda: None)

    with pytest.raises(RuntimeError, match="Odd: 1"):
        record(step, (torch.randn(2),))


@pytest.mark.usefixtures("forked")
def test_a_child_that_dies_is_an_error_in_words_and_not_tried_again() -> None:
    calls = torch.zeros(1).share_memory_()

    def step(x: Tensor) -> Tensor:
        calls.numpy()[0] += 1
        os.abort()

    with pytest.raises(apart.RecordingDied, match="SIGABRT"):
        record(step, (torch.randn(2),))
    assert calls.item() == 1


@pytest.mark.usefixtures("forked")
def test_warnings_are_shown_once_and_lines_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    weight = torch.randn(4, 4, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        print("printed")  # noqa: T201
        warnings.warn("mind the step", UserWarning, stacklevel=1)
        return (x @ weight).sum() * (1 if x.sum() > -1e9 else 2)  # looks at numbers: recorded on real tensors

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        record(step, (torch.randn(2, 4),), timing="estimate")
    assert [str(w.message) for w in caught] == ["mind the step"]
    assert "printed" not in capfd.readouterr().out


@pytest.mark.usefixtures("forked")
def test_an_interrupt_ends_the_child() -> None:
    import signal
    import time

    before = set(os.listdir("/proc"))
    main = os.getpid()

    def step(x: Tensor) -> Tensor:
        os.kill(main, signal.SIGINT)
        time.sleep(60)
        return x

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        record(step, (torch.randn(2),))
    assert time.monotonic() - begin < 30
    children = Path(f"/proc/{main}/task/{main}/children")
    if children.exists():
        assert not [p for p in children.read_text().split() if p not in before]


@pytest.mark.usefixtures("forked")
def test_both_ways_give_the_same_program(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = (
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.1)),
        torch.randn(16, 8),
    )
    programs = []
    for cannot in (False, True):
        monkeypatch.setattr(apart._Here, "cannot", cannot)
        programs.append(record(net, (x,), timing="estimate"))
    assert programs[0] == programs[1]


def test_another_thread_means_no_child() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert not apart.can_run_apart()
    finally:
        done.set()
        thread.join()


# ---- walks -----------------------------------------------------------------------------------------------------------

NUMBERS = list(range(2_000_000))
NESTED = [[float(i)] * 100 for i in range(20_000)]


@pytest.mark.usefixtures("here")
def test_no_walk_through_millions_of_numbers() -> None:
    import time

    net = nn.Linear(8, 8)

    def step(x: Tensor) -> Tensor:
        return net(x).sum() * len(NUMBERS) * len(NESTED)

    record(step, (torch.randn(2, 8),), timing="estimate")
    begin = time.monotonic()
    record(step, (torch.randn(2, 8),), timing="estimate")
    assert time.monotonic() - begin < 8
