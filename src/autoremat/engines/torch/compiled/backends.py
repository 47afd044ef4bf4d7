"""Backends of ``torch.compile`` whose graphs are split by a partitioner of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from functorch.compile import min_cut_rematerialization_partition
from torch import fx
from torch._dynamo import lookup_backend
from torch._dynamo.exc import InvalidBackend

from autoremat.engines.torch.compiled.partition import Halves, Partitioner
from autoremat.engines.torch.compiled.torch_names import (
    aot_backend_with,
    backend_with,
    inductor_splits_by,
    innermost,
    is_aot_backend,
)

Backend = Callable[..., Callable[..., Any]]
"""What the compiler calls with a graph and examples of its inputs; returns what runs in the graph's place."""
INDUCTOR: Final = "inductor"
AOT_EAGER: Final = "aot_eager"


def kind_of(backend: Any) -> str:
    """``inductor``, ``aot_eager``, ``aot`` for others made by ``aot_autograd``; "" for those that split no graph.

    Example:
        >>> from torch._dynamo import lookup_backend
        >>> kind_of(lookup_backend("aot_eager")), kind_of(lookup_backend("eager"))
        ('aot_eager', '')
    """
    found = innermost(backend)
    name = getattr(found, "compiler_name", None) or getattr(found, "__name__", "")
    if name in (INDUCTOR, AOT_EAGER):
        return str(name)
    return "aot" if is_aot_backend(getattr(found, "compiler_fn", found)) else ""


def named(name: str | Backend, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Backend:
    """The backend that ``torch.compile`` would take by this name (or callable), mode and options.

    Raises:
        ValueError: torch knows no such backend.
    """
    try:
        backend = lookup_backend(name)
    except InvalidBackend as error:
        raise ValueError(f"torch knows no backend {name!r}") from error
    settings = {k: v for k, v in (("mode", mode), ("options", options)) if v}
    return backend_with(name, backend, settings) if settings or name == INDUCTOR else backend


def compiled_by(
    backend: Any, partitioner: Partitioner, module: fx.GraphModule, inputs: Sequence[Any], token: str = ""
) -> Callable[..., Any]:
    """What a backend makes of a graph whose joint graph is split by this partitioner.

    ``token``: of the plan, in the key of torch's cache; without one, torch must not take the code of another plan.

    Raises:
        ValueError: the backend splits no graph.
    """
    kind = kind_of(backend)
    if kind == AOT_EAGER:
        return aot_backend_with(partitioner)(module, inputs)
    if kind == "aot":
        found = innermost(backend)
        return aot_backend_with(partitioner, getattr(found, "compiler_fn", found))(module, inputs)
    if kind == INDUCTOR:
        with inductor_splits_by(partitioner, token):
            return backend(module, inputs)
    raise ValueError(f"{backend} is not built on AOTAutograd")


def split_by_torch(kind: str, *args: Any, **given: Any) -> Halves:
    """What the partitioner makes of a joint graph that a backend of this kind has without us."""
    if kind == INDUCTOR:
        given["compiler"] = INDUCTOR
    return min_cut_rematerialization_partition(*args, **given)
