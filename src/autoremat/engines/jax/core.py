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
