"""How operators run within a dispatch mode so that they compute what they compute in plain training.

Under a mode torch does some things otherwise. Kernels find lazy conjugation and autocast switched off for what they
call; composite operators get to the mode in one piece in ``torch.inference_mode``; and some ask whether a mode is
active (``at::isTensorSubclassLike``) and then go a way that is meant for tensors without memory: ``matmul`` folds a
batch, ``svdvals`` computes the vectors, too. They ask above autograd, where no mode is asked. So these few have a
second kernel here, at a dispatch key that stands above all others (torch itself uses it in its tests alone), and that
only :func:`as_plain` includes. The formulas of some gradients ask, too, where a gradient is computed in the forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._ops import OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import enable_reentrant_dispatch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from autoremat.record.facts import AUTOCAST_DEVICES, OpFacts, has_kernel, tensors_given, treated_inside

_aten = torch.ops.aten
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_exclude = torch._C._dispatch_tls_set_dispatch_key_excluded
_is_included = torch._C._dispatch_tls_is_dispatch_key_included
_include = torch._C._dispatch_tls_set_dispatch_key_included
_as_python_called: Any = torch._C._RestorePythonTLSSnapshot  # type: ignore[attr-defined]

# ---- autocast --------------------------------------------------------------------------------------------------------

Autocast: TypeAlias = tuple[tuple[DispatchKey, str, torch.dtype], ...]
"""The devices for which autocast is on: torch's key, the device's type and the precision."""

_AUTOCAST: Final = tuple(zip((DispatchKey.AutocastCPU, DispatchKey.AutocastCUDA), AUTOCAST_DEVICES, strict=True))


class _State(threading.local):
    """What this thread is in the middle of."""

    autocast: Autocast = ()
    """Around the operator that is running, if it is one of ``_NOTED``."""
    treated: frozenset[str] = frozenset()
    """The devices on which an operator runs that autocast treats as a whole, and so leaves alone what is in it."""
    cast: bool = False
    """Whether an operator is taken apart that autocast has treated as a whole."""


_STATE: Final = _State()


def _autocast_now() -> Autocast:
    return tuple([(k, d, torch.get_autocast_dtype(d)) for k, d in _AUTOCAST if torch.is_autocast_enabled(d)])


def autocast_around(facts: OpFacts) -> Autocast:
    """Autocast where the operator was called that a mode sees now, as far as it matters to its kernel.

    Inside the mode it is always off. An operator that is known to need it takes note above everything
    (``_take_note_of_autocast``); of others torch keeps the state in which Python called into it, which is theirs unless
    an operator between has switched autocast off for what it is made of.
    """
    if not facts.treated_inside:
        return ()
    if facts.name in _NOTED:
        around = _STATE.autocast
    else:
        with _as_python_called():
            around = _autocast_now()
        around = tuple([a for a in around if a[1] not in _STATE.treated])
    return tuple([a for a in around if a[1] in facts.treated_inside])


# ---- within the mode -------------------------------------------------------------------------------------------------


def run_op(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], autocast: Autocast = ()) -> Any:
    """Run an operator from within a dispatch mode, as its kernel runs without one.

    Inside a mode torch switches lazy conjugation, lazy negation and zero tensors off, also for the operators that a
    kernel calls itself: the pseudo-inverse of a complex matrix then lacks a conjugation, under any mode at all.
    """
    if autocast:
        return _run_within(autocast, func, args, kwargs)
    if not _is_excluded(DispatchKey.Conjugate):  # a mode switches all three off
        return func._op(*args, **kwargs)
    _exclude(DispatchKey.Conjugate, False)  # three guards of torch's would take as long as a small operator
    _exclude(DispatchKey.Negative, False)
    _exclude(DispatchKey.ZeroTensor, False)
    try:
        return func._op(*args, **kwargs)
    finally:
        _exclude(DispatchKey.Conjugate, True)
        _exclude(DispatchKey.Negative, True)
        _exclude(DispatchKey.ZeroTensor, True)


def _run_within(autocast: Autocast, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The same with autocast on for what the kernel calls."""
    before = [(key, device, _is_excluded(key), torch.get_autocast_dtype(device)) for key, device, _ in autocast]
    try:
        for key, device, dtype in autocast:
            _exclude(key, False)
            torch.set_autocast_dtype(device, dtype)
        return run_op(func, args, kwargs)
    finally:
        for key, device, off, dtype in before:
            _exclude(key, off)
            torch.set_autocast_dtype(device, dtype)


def is_in_one_piece(facts: OpFacts, args: Any, kwargs: Any) -> bool:
    """Whether torch's own layers would see what the operator is made up of, but for the mode that has it now."""
    if not facts.explicit:
        return facts.composite
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        return False
    tensors = tensors_given(args, kwargs)  # those of inference mode do not lead to autograd's kernel
    return any(t.requires_grad for t in tensors) and all(t.is_inference() for t in tensors)


def take_apart(facts: OpFacts, func: OpOverload, mode: Any, args: Any, kwargs: Any) -> Any:
    """Run what an operator is made up of under ``mode``, as torch does where there is no inference mode.

    Views know what they are views of (and require gradients as that does) only where torch's own layers above the modes
    see the operators inside; for the few operators that they have seen in one piece, that is done already.
    """
    # Not ``func.decompose``, which may take the compiler's kernel: its dropout copies in evaluation.
    kernel = DispatchKey.CompositeExplicitAutograd if facts.explicit else DispatchKey.CompositeImplicitAutograd
    if has_kernel(func, "ADInplaceOrView") and not facts.explicit:
        with mode:
            return func._op_dk(kernel, *args, **kwargs)
    devices = {t.device.type for t in tensors_given(args, kwargs)}
    before = _STATE.cast
    _STATE.cast = before or any(has_kernel(func, f"Autocast{d.upper()}") for _, d in _AUTOCAST if d in devices)
    try:
        with enable_reentrant_dispatch(), torch._C._DisableAutocast() if _STATE.cast else nullcontext(), mode:
            return func._op_dk(kernel, *args, **kwargs)
    finally:
        _STATE.cast = before


# ---- above everything ------------------------------------------------------------------------------------------------

_NAME: Final = "TESTING_ONLY_GenericMode"
_KEY: Final = torch._C._dispatch_key_parse(_NAME)
_BELOW: Final = torch._C._dispatch_keyset_full_after(_KEY)

_OTHERS: Final = torch.library.Library("_", "IMPL", _NAME)
_OTHERS.fallback(torch.library.fallthrough_kernel, _NAME)
_ATEN: Final = torch.library.Library("aten", "IMPL", _NAME)


@contextmanager
def as_plain() -> Iterator[None]:
    """Within this block, and in this thread, operators are made up as where no dispatch mode is active."""
    let_custom_operators_take_note()
    before = _is_included(_KEY)
    _include(_KEY, True)
    try:
        yield
    finally:
        _include(_KEY, before)


def _instead_of(func: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a kernel for an operator; where that returns ``NotImplemented``, torch's own runs."""

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(kernel)
        def wrapper(keyset: DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():
                made = kernel(*args, **kwargs)
            return func.redispatch(keyset & _BELOW, *args, **kwargs) if made is NotImplemented else made

        _ATEN.impl(func.name(), wrapper, _NAME, with_keyset=True)
        return kernel

    return register


@_instead_of(_aten.matmul.default)
def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """A batch of matrices times one that needs no gradient: plainly that one is repeated, else the batch is folded."""
    if not _is_repeated(a, b):
        return NotImplemented
    product = _aten.bmm.default(*_as_many(a, b))
    return _aten._unsafe_view.default(product, product.shape)


@_instead_of(_aten.matmul.out)
def _matmul_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    return _aten.bmm.out(*_as_many(a, b), out=out) if _is_repeated(a, b) else NotImplemented


def _is_repeated(a: Tensor, b: Tensor) -> bool:
    if a.dim() != 3 or b.dim() != 3 or (a.shape[0] == 1) == (b.shape[0] == 1):
        return False
    one = a if a.shape[0] == 1 else b
    return not one.requires_grad and _is_plain(one) and not _is_yet_to_be_cast(one)


def _as_many(a: Tensor, b: Tensor) -> list[Tensor]:
    n = max(a.shape[0], b.shape[0]) if a.shape[0] and b.shape[0] else 0
    return [_aten.reshape.default(_aten.expand.default(t, (n, *t.shape[1:])), (n, *t.shape[1:])) for t in (a, b)]


@_instead_of(_aten.linalg_svdvals.default)
def _svdvals(a: Tensor, *, driver: str | None = None) -> Tensor:
    """Without the vectors where no gradient asks for them."""
    if _asks_for_vectors(a):
        return NotImplemented
    return _aten._linalg_svd.default(a, False, False, driver=driver)[1]


@_instead_of(_aten.linalg_eigvalsh.default)
def _eigvalsh(a: Tensor, uplo: str = "L") -> Tensor:
    if _asks_for_vectors(a):
        return NotImplemented
    return _aten._linalg_eigh.default(a, uplo, False)[0]


@_instead_of(_aten.linalg_eigvals.default)
def _eigvals(a: Tensor) -> Tensor:
    if _asks_for_vectors(a):
        return NotImplemented
    return _aten._linalg_eigvals.default(a)


def _asks_for_vectors(matrix: Tensor) -> bool:
    needs_gradient = torch.is_grad_enabled() and matrix.requires_grad
    return needs_gradient or not _is_plain(matrix) or _is_yet_to_be_cast(matrix)


def _is_yet_to_be_cast(tensor: Tensor) -> bool:
    """Whether autocast's kernel is yet to come, which calls the operator once more with what it has cast."""
    return any(torch.is_autocast_enabled(device) for _, device in _AUTOCAST if device == tensor.device.type)


def _is_plain(tensor: Tensor) -> bool:
    """Whether torch takes the tensor for an ordinary one; a fake tensor stands for one."""
    if _others_look_on() or torch._C._functorch.is_functorch_wrapped_tensor(tensor) or _is_dual(tensor):
        return False
    is_subclass = torch._C._dispatch_keys(tensor).has(DispatchKey.Python) and not isinstance(tensor, FakeTensor)
    return not is_subclass and tensor.layout is torch.strided and tensor.device.type != "meta"


def _others_look_on() -> bool:
    """Whether a dispatch mode of somebody else's is active; then torch does the same without autoremat."""
    modes = _get_current_dispatch_mode_stack()
    return not all(isinstance(m, FakeTensorMode) or type(m).__module__.startswith("autoremat.") for m in modes)


def _is_dual(tensor: Tensor) -> bool:
    """Whether the tensor carries a tangent of forward-mode differentiation."""
    if forward_ad._current_level < 0:
        return False
    with torch._C._DisableTorchDispatch():
        return forward_ad.unpack_dual(tensor).tangent is not None


_NOTED: Final[set[str]] = set()
"""The operators that take note of autocast around them, by name."""
_LIBRARIES: Final[dict[str, torch.library.Library]] = {"aten": _ATEN}


def _take_note_of_autocast(func: OpOverload) -> None:
    """Inside the mode, where autocast is always off, nobody could say whether it was on around an operator."""

    def wrapper(keyset: DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        before, _STATE.autocast = _STATE.autocast, _autocast_now()
        try:
            return func.redispatch(keyset & _BELOW, *args, **kwargs)
        finally:
            _STATE.autocast = before

    if func.namespace not in _LIBRARIES:
        _LIBRARIES[func.namespace] = torch.library.Library(func.namespace, "IMPL", _NAME)
    _LIBRARIES[func.namespace].impl(func.name(), wrapper, _NAME, with_keyset=True)
    _NOTED.add(str(func))


def _take_note_of_treatment(func: OpOverload) -> None:
    """What such an operator is made of runs without autocast, as it has been treated as a whole."""
    devices = [d for d in AUTOCAST_DEVICES if has_kernel(func, f"Autocast{d.upper()}")]

    def wrapper(keyset: DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        before = _STATE.treated
        _STATE.treated = before.union(d for d in devices if torch.is_autocast_enabled(d))
        try:
            return func.redispatch(keyset & _BELOW, *args, **kwargs)
        finally:
            _STATE.treated = before

    _ATEN.impl(func.name(), wrapper, _NAME, with_keyset=True)


def _overload(name: str) -> OpOverload | None:
    """The operator of this name, such as ``aten::add.Tensor``; None if Python has none."""
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    except (AttributeError, RuntimeError):
        return None
    return found if isinstance(found, OpOverload) else None


_FREQUENT: Final = frozenset({"linear", "matmul", "conv1d", "conv2d", "conv3d", "layer_norm", "softmax", "log_softmax"})
"""Treated as a whole, and made up of what has no use for autocast: these need not take note, which takes time."""


def _all_take_note() -> None:
    """Let torch's own operators take note, as far as there is something to note."""
    for name in torch._C._dispatch_get_all_op_names():
        packet = name.partition("::")[2].partition(".")[0]
        if not name.startswith("aten::") or packet in _FREQUENT or name in _KNOWN:
            continue
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        whole = any(has(name, f"Autocast{d.upper()}") for d in AUTOCAST_DEVICES)
        if whole and has(name, "CompositeImplicitAutograd") and (func := _overload(name)) is not None:
            _take_note_of_treatment(func)


_KNOWN: Final = {f.name() for f in (_aten.linalg_svdvals.default, _aten.linalg_eigvalsh.default,
                                    _aten.linalg_eigvals.default, _aten.matmul.default)}  # fmt: skip
_all_take_note()


def let_custom_operators_take_note() -> None:
    """Let operators of others take note that have been defined since the last time."""
    names = torch.library._defs
    if len(names) != _Seen.n:
        _Seen.n = len(names)
        for name in names - _Seen.names:
            _note_custom(name)
        _Seen.names = set(names)


class _Seen:
    """Which operators that Python has defined have been looked at."""

    n = 0
    names: set[str] = set()  # noqa: RUF012 - replaced, never changed


def _note_custom(name: str) -> None:
    func = _overload(name.replace("/", "::"))
    if func is not None and str(func) not in _NOTED and func.namespace != "aten" and treated_inside(func):
        _take_note_of_autocast(func)


# ---- gradients computed in the forward -------------------------------------------------------------------------------

FORMULAS: Final = frozenset(
    {"CumprodBackward0", "LinalgDetBackward0", "LinalgEighBackward0", "MaskedFillBackward1", "MaxBackward1",
     "MedianBackward0", "MinBackward1", "NanmedianBackward0", "ProdBackward0", "ProdBackward1"}
)  # fmt: skip
"""Nodes of the graph that compute otherwise where a mode is active."""


def computes_otherwise() -> str:
    """The name of the autograd node that runs, if it is one of those."""
    node = torch._C._current_autograd_node()
    name = node.name() if node is not None else ""
    return name if name in FORMULAS and not _others_look_on() else ""
