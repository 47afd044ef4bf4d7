"""Places where a step may keep the tensors that it makes once."""

from __future__ import annotations

import contextvars
import enum
import functools
import threading
import types
import weakref
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
