"""The parts of a jaxpr by the names of ``jax.extend.core``; before JAX 0.10 some of them are in ``jax.core``."""

from __future__ import annotations

from typing import Any, Final

import jax
from jax.extend import core


def _part(name: str) -> Any:
    return getattr(core, name) if hasattr(core, name) else getattr(jax.core, name)


ClosedJaxpr: Final = core.ClosedJaxpr
DebugInfo: Final = _part("DebugInfo")
DropVar: Final = _part("DropVar")
Jaxpr: Final = core.Jaxpr
Literal: Final = core.Literal
jaxpr_as_fun: Final = core.jaxpr_as_fun
jaxprs_in_params: Final = _part("jaxprs_in_params")


def axis_type(aval: Any) -> dict[str, Any]:
    """How an array differs along the axes of a mesh, as its type says and ``ShapeDtypeStruct`` takes it."""
    name = next((name for name in ("manual_axis_type", "vma") if hasattr(aval, name)), None)
    return {} if name is None else {name: getattr(aval, name)}


def varying(aval: Any) -> frozenset[str]:
    """The axes of a mesh along which an array differs."""
    found = next(iter(axis_type(aval).values()), None) or ()
    return frozenset(getattr(found, "varying", found))
