"""``torch.compile(model, backend="autoremat", options={"budget": ...})``: a backend around another one.

Installed packages tell torch of their backends (the entry points ``torch_dynamo_backends``): so torch knows this one by
its name, whether autoremat has been imported or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from autoremat.engines.torch.compiled.backends import kind_of, named
from autoremat.engines.torch.compiled.session import CompiledSession, PlannedBackend
from autoremat.engines.torch.eager.options import Options

NAME: Final = "autoremat"
_OURS: Final = ("budget", "optimizer", "keep", "recompute", "time_limit_seconds", "effort")
_OF_THE_BACKEND: Final = ("backend", "options")


def autoremat(
    module: Any, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Run in the place of a compiler's graph, within a budget.

    Args:
        module: the graph, as the compiler hands it to every backend.
        inputs: examples of its inputs.
        options: what ``torch.compile`` was given as ``options``: ``budget``, ``optimizer``, ``keep``, ``recompute``,
            ``time_limit_seconds`` and ``effort`` as for ``autoremat.checkpoint``; ``backend``, the name of the backend
            that compiles what is planned (``"inductor"``), and ``options``, which are its own.
        mode: what ``torch.compile`` was given as ``mode``, for Inductor.

    Raises:
        ValueError: no budget, an option that is not known, or a backend that is not built on AOTAutograd.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
        >>> budget = {"budget": 0.9, "backend": "aot_eager"}
        >>> compiled = torch.compile(model, backend=autoremat, options=budget)
        >>> compiled(torch.randn(512, 64)).sum().backward()
        >>> sum(p.grad is not None for p in model.parameters())
        16
    """
    return backend_of(options, mode)(module, inputs)


def backend_of(options: Mapping[str, Any] | None, mode: str | None = None) -> PlannedBackend:
    """Return the backend of these options.

    It is the same one whenever the same ``torch.compile`` asks.

    Raises:
        ValueError: as ``autoremat``.
    """
    if not options or "budget" not in options:
        raise ValueError('the backend "autoremat" needs a budget: torch.compile(..., options={"budget": "10GiB"})')
    known = _KNOWN.get(id(options))
    if known is None or known[0] is not options:
        known = _KNOWN[id(options)] = options, _made(options, mode)
    return known[1]


def session_of_options(options: Any) -> CompiledSession | None:
    """Look up what has been compiled for these options, if anything."""
    known = _KNOWN.get(id(options))
    return known[1].session if known is not None and known[0] is options else None


_KNOWN: Final[dict[int, tuple[Mapping[str, Any], PlannedBackend]]] = {}
"""By the identity of what ``torch.compile`` was given; it is kept, so that no other one takes its place."""


def _made(options: Mapping[str, Any], mode: str | None) -> PlannedBackend:
    if unknown := sorted(set(options) - {*_OURS, *_OF_THE_BACKEND}):
        raise ValueError(
            f'the backend "autoremat" has no option {unknown[0]!r}; it knows '
            f'{", ".join((*_OURS, *_OF_THE_BACKEND))}, and hands on what stands in "options"'
        )
    inner = named(options.get("backend", "inductor"), mode, options.get("options"))
    if not kind_of(inner):
        raise ValueError(f"{options['backend']!r} is not built on AOTAutograd, so no plan can be carried out under it")
    wishes = Options(
        options["budget"], options.get("optimizer"), options.get("keep", ()), options.get("recompute", ()),
        options.get("time_limit_seconds", 10.0), effort=options.get("effort"),
    )  # fmt: skip
    return CompiledSession(None, wishes).backend(inner, is_whole=False)
