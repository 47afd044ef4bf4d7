"""The compiler meets a checkpointed callable, while it traces what the user has compiled.

What is traced is plain Python; so the callable is asked there how it wants to be traced, and answers at that moment.
Where its whole forward becomes part of the graph that is being made, that graph's backend is replaced by ours around
it, for this graph alone: nothing is set for other graphs, and the compiler's caches know one from the other. Where the
forward is broken into several graphs, it runs apart, compiled by itself with the same backend, so that all of them are
seen.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from types import CodeType
from typing import Any, Final

import torch

from autoremat.engines.torch.compiled.backends import kind_of
from autoremat.engines.torch.compiled.session import CompiledSession
from autoremat.engines.torch.compiled.torch_names import begins_with, graph_being_made, must_be_whole

INLINE: Final = "inline"
APART: Final = "apart"
PLAIN: Final = "plain"
"""How to go on: as a part of this graph, compiled by itself, or as it is."""


def meet(session: CompiledSession, ours: Container[CodeType]) -> str:
    """How the compiler is to go on with a checkpointed callable.

    Args:
        session: of the callable.
        ours: the code of the functions that stand in the place of callables.
    """
    graph = graph_being_made()
    if graph is None or not kind_of(graph.compiler_fn):
        return PLAIN
    session.met_by(graph.compiler_fn)
    if begins_with(graph, ours) and not must_be_whole(graph):
        return APART
    graph.compiler_fn = session.backend(graph.compiler_fn, is_whole=True)
    return INLINE


def apart(session: CompiledSession) -> Callable[..., Any]:
    """What makes a call of the callable, compiled by itself; the compiler that is at work does not look into it."""

    def run(args: Any, kwargs: Any) -> Any:
        return session.call(args, kwargs)

    return torch.compiler.disable(run)
