"""Finds the modules a step can reach and restores what recording changes.

A recording runs the user's Python code once more. Here the modules that the code can reach get fake parameters and
buffers for that time. Afterwards everything that the code may have changed is put back: module attributes, gradients of
leaves, random generators of torch, Python and NumPy.
"""

from __future__ import annotations

import functools
import operator
import random
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autoremat.engines.torch.operators.history import node_made

Convert = Callable[[Tensor], Tensor]
_CONTAINERS = (OrderedDict, dict, list, set, deque)
DATA_SET_ITEMS: Final = 10_000
"""A container with more items is taken for data and not searched."""
LOOKED_AT_ITEMS: Final = 200_000
"""The search stops after this many objects; the rest is not restored."""
_WITHOUT_INSIDE: Final = frozenset({int, float, bool, complex, str, bytes, type(None)})
"""Types of plain data, which contain nothing to search."""
SMALL_ARRAY_BYTES: Final = 1 << 20
"""NumPy arrays up to this size are restored after a recording.

They are counters and histograms, not data sets.
"""


def reachable_modules(fn: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> list[nn.Module]:
    """Find the outermost modules a callable can reach, without running it.

    Looks at the callable itself, what it is bound to, its closure, defaults, partial arguments, the globals that its
    code names, at the arguments, and one level into objects that are neither modules nor tensors.
    """
    found: dict[int, nn.Module] = {}
    for thing in _mentioned(fn, args, kwargs or {}):
        for module in _modules_of(thing):
            found[id(module)] = module
    inner = {id(m) for root in found.values() for m in root.modules() if m is not root}
    return [m for i, m in found.items() if i not in inner]


def _mentioned(fn: Any, args: Sequence[Any], kwargs: Mapping[str, Any], depth: int = 3) -> Iterator[Any]:
    """Yield the objects that the callable or its arguments mention."""
    yield fn
    yield from args
    yield from kwargs.values()
    if isinstance(fn, functools.partial):
        yield from _mentioned(fn.func, fn.args, fn.keywords, depth)
    if isinstance(fn, types.MethodType):
        yield fn.__self__
        fn = fn.__func__
    fn = getattr(fn, "__wrapped__", fn)
    if isinstance(fn, types.FunctionType) and depth:
        named = [fn.__globals__[n] for n in _global_names(fn.__code__) if n in fn.__globals__]
        mentioned = [*named, *_cells(fn), *(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
        for thing in mentioned:
            yield thing
            if isinstance(thing, (types.FunctionType, types.MethodType, functools.partial)):
                yield from _mentioned(thing, (), {}, depth - 1)


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _global_names(const)


def _cells(fn: types.FunctionType) -> Iterator[Any]:
    for cell in fn.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name that is not bound yet
            continue


def _modules_of(thing: Any) -> Iterator[nn.Module]:
    if isinstance(thing, nn.Module):
        yield thing
    elif isinstance(thing, (list, tuple, dict)):
        if _plain(thing).__len__(thing) <= DATA_SET_ITEMS:
            items = thing.values() if isinstance(thing, dict) else thing
            yield from (m for m in items if isinstance(m, nn.Module))
    elif not isinstance(thing, (Tensor, type, types.ModuleType, types.FunctionType)) and hasattr(thing, "__dict__"):
        yield from (m for m in vars(thing).values() if isinstance(m, nn.Module))


def named_tensors(modules: Sequence[nn.Module]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield ``(name, kind, tensor)`` of all parameters and buffers.

    The kind is ``parameter`` or ``buffer``.
    """
    seen: set[int] = set()
    for module in modules:
        both = [("parameter", module.named_parameters()), ("buffer", module.named_buffers())]
        for kind, pairs in both:
            for name, tensor in pairs:
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield name, kind, tensor


@contextmanager
def undisturbed(
    modules: Sequence[nn.Module], fn: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Restore, at the end of the block, what the code can reach.

    These are module attributes, random generators, lists, dicts and sets.
    """
    with ExitStack() as stack:
        stack.enter_context(_generators_kept())
        stack.enter_context(without_caches())
        stack.enter_context(_same_gradients(modules))
        for thing in _mutable_things(modules, fn, args, kwargs or {}):
            stack.callback(*_way_back(thing))
        for module in {id(m): m for root in modules for m in root.modules()}.values():
            stack.callback(_restore_attributes, module, _attributes(module))
        yield


def _attributes(module: nn.Module) -> list[tuple[str, Any, Any]]:
    """List name, object and, for containers, a shallow copy of every attribute."""
    return [
        (k, v, _content(v) if isinstance(v, _CONTAINERS) else None) for k, v in vars(module).items()
    ]  # the containers of nn.Module itself (_parameters, _buffers, _modules) are among them


def _restore_attributes(module: nn.Module, attributes: list[tuple[str, Any, Any]]) -> None:
    state = vars(module)
    for name in set(state) - {name for name, _, _ in attributes}:
        del state[name]
    for name, value, content in attributes:
        state[name] = value
        if content is not None:
            _refill(value, content)


def _mutable_things(modules: Sequence[nn.Module], fn: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """List the objects that may change while the callable runs.

    They are found from the callable, and from the modules' attributes, code and hooks: containers, random generators,
    small arrays, attributes of the user's objects and classes, names that functions share, caches of functions.
    """
    pending = list(_mentioned(fn, args, kwargs))
    for module in {id(m): m for root in modules for m in root.modules()}.values():
        pending += [h for table in _hook_tables(module) for h in table.values()]
        pending += type(module).__mro__
        pending += (v for k, v in vars(module).items() if k not in _MODULE_TABLES)
    found: dict[int, Any] = {}
    looked_at = 0
    while pending and looked_at < LOOKED_AT_ITEMS:
        thing = pending.pop()
        looked_at += 1
        if id(thing) not in found and not (isinstance(thing, dict) and "__builtins__" in thing):
            inside = _inside(thing)
            if inside is not None:
                found[id(thing)] = thing
                pending += [v for v in inside if type(v) not in _WITHOUT_INSIDE]
    return list(found.values())


def _inside(thing: Any) -> list[Any] | None:
    """List what a mutable object leads to.

    None for what cannot change, or does not belong to the user.
    """
    if isinstance(thing, (*_CONTAINERS, tuple)):
        if isinstance(thing, tuple):
            return list(tuple.__iter__(thing))
        if _plain(thing).__len__(thing) > DATA_SET_ITEMS:
            return []
        return [v for _, v in _content(thing)] if isinstance(thing, dict) else _content(thing)
    if isinstance(thing, (*_generator_types(), bytearray)) or _is_small_array(thing):
        return []
    if isinstance(thing, functools._lru_cache_wrapper):
        return [thing.__wrapped__]
    if isinstance(thing, (staticmethod, classmethod, property, functools.partial, types.MethodType)):
        return [getattr(thing, n) for n in ("__func__", "__self__", "fget", "func", "args") if hasattr(thing, n)]
    if isinstance(thing, types.FunctionType):
        return None if _is_foreign(thing.__module__) else [thing, *_mentioned(thing, (), {}, depth=1)]
    if isinstance(thing, type):
        return None if _is_foreign(thing.__module__) else list(vars(thing).values())
    if isinstance(thing, (Tensor, nn.Module, types.ModuleType)) or not hasattr(thing, "__dict__"):
        return None
    own = isinstance(thing, (types.SimpleNamespace, threading.local)) or not _of_a_library(type(thing).__module__)
    return [vars(thing)] if own else None


def _of_a_library(module: str | None) -> bool:
    """Tell whether code is Python's, torch's, NumPy's or ours.

    What such code keeps is not ours to restore.
    """
    root = _root(module)
    return root != "__main__" and (root in sys.stdlib_module_names or root in ("torch", "numpy", "autoremat"))


@functools.lru_cache(maxsize=4096)
def _is_foreign(module: str | None) -> bool:
    """Tell whether code is a library's, or keeps no tensors.

    An installed file that does not know torch keeps none. From one import to the next such files would lead through
    everything that is installed.
    """
    return _of_a_library(module) or (_is_installed(module) and not _knows_torch(module))


def _is_installed(module: str | None) -> bool:
    """Tell whether a file lies where installers put it."""
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _knows_torch(module: str | None) -> bool:
    names = list(vars(sys.modules[module or ""]).values())
    modules = (v.__name__ for v in names if isinstance(v, types.ModuleType))
    owners = (v.__module__ for v in names if isinstance(v, (type, types.FunctionType)))
    return any(_root(name) == "torch" for name in (*modules, *owners))


def _root(module: str | None) -> str:
    return (module or "").split(".")[0]


def _is_small_array(thing: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(thing, numpy.ndarray) and thing.nbytes <= SMALL_ARRAY_BYTES


_MODULE_TABLES = frozenset(vars(nn.Module()))


def _hook_tables(module: nn.Module) -> Iterator[Mapping[Any, Any]]:
    for name, table in vars(module).items():
        if name.endswith("_hooks") and isinstance(table, Mapping):
            yield table


def _generator_types() -> tuple[type, ...]:
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    of_numpy = (numpy_random.Generator, numpy_random.RandomState) if numpy_random is not None else ()
    return (random.Random, torch.Generator, *of_numpy)


def _way_back(thing: Any) -> tuple[Any, ...]:
    """Return a function, with arguments, that restores an object's present state."""
    if isinstance(thing, _CONTAINERS):
        return _refill, thing, _content(thing)
    if isinstance(thing, types.FunctionType):
        return _rebind, thing, _bindings(thing)
    if isinstance(thing, type):
        return _restore_class, thing, dict(vars(thing))
    if isinstance(thing, functools._lru_cache_wrapper):
        return _clear_if_used, thing, thing.cache_info().misses
    if isinstance(thing, bytearray) or _is_small_array(thing):
        return thing.__setitem__, slice(None) if isinstance(thing, bytearray) else ..., thing.copy()
    if isinstance(thing, random.Random) and not isinstance(thing, random.SystemRandom):  # SystemRandom has no state
        return thing.setstate, thing.getstate()
    if isinstance(thing, torch.Generator) or hasattr(thing, "set_state"):
        return thing.set_state, thing.get_state()
    if hasattr(thing, "bit_generator"):
        return setattr, thing.bit_generator, "state", thing.bit_generator.state
    return (lambda: None,)  # the object itself needs nothing; it leads to others that do


def _bindings(fn: types.FunctionType) -> tuple[list[tuple[types.CellType, Any]], dict[str, Any]]:
    """Return what the names in a function's closure and globals mean."""
    cells = []
    for cell in fn.__closure__ or ():
        with suppress(ValueError):  # a name that is not bound yet
            cells.append((cell, cell.cell_contents))
    return cells, {n: fn.__globals__[n] for n in _global_names(fn.__code__) if n in fn.__globals__}


def _rebind(fn: types.FunctionType, bindings: tuple[list[tuple[types.CellType, Any]], dict[str, Any]]) -> None:
    for cell, content in bindings[0]:
        cell.cell_contents = content
    fn.__globals__.update(bindings[1])


def _restore_class(cls: type, attributes: Mapping[str, Any]) -> None:
    for name in [n for n, v in vars(cls).items() if n not in attributes or attributes[n] is not v]:
        if name in attributes:
            setattr(cls, name, attributes[name])
        else:
            delattr(cls, name)


def _clear_if_used(cached: Any, misses: int) -> None:
    """Clear a function's cache if the recording has used it.

    What it had cached before the recording is lost, too, and is computed anew.
    """
    if cached.cache_info().misses != misses:
        cached.cache_clear()


def _plain(container: Any) -> Any:
    """Return the built-in class that a container derives from.

    Its methods are used, because a subclass may do something else when it is read: load modules, make objects, count.
    """
    return next(base for base in (*_CONTAINERS, tuple) if isinstance(container, base))


def _content(container: Any) -> list[Any]:
    """List a container's items, or its pairs of key and value."""
    plain = _plain(container)
    return list(plain.items(container) if isinstance(container, dict) else plain.__iter__(container))


def _refill(container: Any, content: list[Any]) -> None:
    """Give a container its former content, if that has changed."""
    if _is_unchanged(container, content):
        return
    plain = _plain(container)
    plain.clear(container)
    if isinstance(container, dict):
        for key, value in content:
            plain.__setitem__(container, key, value)
    else:
        (plain.update if isinstance(container, set) else plain.extend)(container, content)


def _is_unchanged(container: Any, content: list[Any]) -> bool:
    """Tell whether a container has the same objects in the same order.

    It is fast even for millions of items.
    """
    plain = _plain(container)
    if plain.__len__(container) != len(content):
        return False
    if not isinstance(container, dict):
        return all(map(operator.is_, plain.__iter__(container), content))
    keys, values = zip(*content, strict=True) if content else ((), ())
    same_keys = all(map(operator.is_, plain.keys(container), keys))
    return same_keys and all(map(operator.is_, plain.values(container), values))


@contextmanager
def _same_gradients(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Restore gradients that the code may drop (``optimizer.zero_grad()``)."""
    kept = [(t, t.grad) for _, kind, t in named_tensors(modules) if kind == "parameter" and t.is_leaf]
    try:
        yield
    finally:
        for tensor, grad in kept:
            if tensor.grad is not grad:
                tensor.grad = grad


def scripted_in(modules: Sequence[nn.Module]) -> str:
    """Return the path of the first ScriptModule; "" without one.

    A ScriptModule keeps its parameters in C++.
    """
    named = (pair for root in modules for pair in root.named_modules())
    return next((name or type(m).__name__ for name, m in named if isinstance(m, torch.jit.ScriptModule)), "")


@contextmanager
def without_caches() -> Iterator[None]:
    """Set the cache of ``torch.nn.utils.parametrize.cached()`` aside for the block.

    What it holds belongs to the outside, and no fake tensor must stay in it.
    """
    before, parametrize._cache = parametrize._cache, {}
    try:
        yield
    finally:
        parametrize._cache = before


@contextmanager
def _generators_kept() -> Iterator[None]:
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    python_state = random.getstate()
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy_random is not None:
                numpy_random.set_state(numpy_state)


def swap_tensors(modules: Sequence[nn.Module], convert: Convert) -> None:
    """Give modules converted parameters and buffers, in place.

    ``undisturbed`` puts the old ones back.
    """
    for module in {id(m): m for root in modules for m in root.modules()}.values():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = convert(tensor)  # type: ignore[assignment]


def map_tensors(tree: Any, convert: Convert) -> Any:
    """Convert every tensor in arguments: tuples, lists, dicts, registered containers."""
    return torch.utils._pytree.tree_map_only(Tensor, convert, tree)


def leaves_of(outputs: Sequence[Tensor], since: Any) -> list[Tensor]:
    """List the leaves whose gradients the outputs' graph accumulates.

    Args:
        outputs: tensors of the graph.
        since: a node; the graph must not reach nodes that were made before it.

    Raises:
        RuntimeError: the graph reaches nodes that were made before the node ``since``.
    """
    pending = [node for t in outputs if (node := node_made(t)) is not None]
    seen, leaves = set(pending), []
    while pending:
        node = pending.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves.append(variable)
        elif node._sequence_nr() < since._sequence_nr():
            raise RuntimeError(
                f"a tensor that is no argument was computed outside, with gradients ({node.name()}); pass it as an "
                "argument, or compute it inside"
            )
        for successor, _ in node.next_functions:
            if successor is not None and successor not in seen:
                seen.add(successor)
                pending.append(successor)
    return leaves


@contextmanager
def gradients_kept(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Restore the gradients of leaves, and silence their hooks until then."""
    kept = [(leaf, leaf.grad, {name: t for name in _HOOKS if (t := getattr(leaf, name))}) for leaf in leaves]
    try:
        for leaf, _, hooks in kept:
            for name in hooks:
                setattr(leaf, name, {})  # None would leave the post-accumulate hooks in place
        yield
    finally:
        for leaf, grad, hooks in kept:
            for name, table in hooks.items():
                setattr(leaf, name, table)
            if leaf.grad is not grad:
                leaf.grad = grad


_HOOKS: Final = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""Attributes in which a tensor keeps its hooks."""
