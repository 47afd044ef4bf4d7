"""Tells which operators copy all the memory behind a view.

The others copy just what the view shows of it.

``aten.copy`` of a slice makes a tensor as large as what was sliced, and so do the ``*_scatter`` operators (torch 2.13).
No schema says so, and neither do fake tensors. So each operator that is given a view is called once more, on a view
with one element beyond it.
"""

from __future__ import annotations

from typing import Any, Final

from autoremat.engines.torch.operators.signature import CallSignature, Items, TensorSpec, thaw
from autoremat.engines.torch.operators.timing import made_when_run

_FOUND: Final[dict[Any, bool]] = {}


def without_beyond(call: CallSignature) -> CallSignature:
    """Leave the memory beyond views out, unless the operator copies it.

    This may run the operator.
    """
    found: list[TensorSpec] = []
    thaw((call.args, call.kwargs), found.append)
    if not any(spec.beyond for spec in found):
        return call
    if call.func not in _FOUND:
        _FOUND[call.func] = _grows(call)
    return call if _FOUND[call.func] else _with_beyond(call, 0)


def _grows(call: CallSignature) -> bool:
    """Tell whether a call makes more with more behind its arguments."""
    try:
        return made_when_run(_with_beyond(call, 1)) != made_when_run(_with_beyond(call, 0))
    except Exception:  # noqa: BLE001 - random numbers do not suit every operator: nothing will be measured, then
        return False


def _with_beyond(tree: Any, beyond: int) -> Any:
    """Give every view as many elements beyond it."""
    if isinstance(tree, TensorSpec):
        return tree._replace(beyond=min(tree.beyond, beyond))
    if isinstance(tree, CallSignature | Items):
        return type(tree)(*(_with_beyond(part, beyond) for part in tree))
    return tuple(_with_beyond(part, beyond) for part in tree) if type(tree) is tuple else tree
