"""What XLA says of compiled code: its memory, its FLOPs, and whether fences hold there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax

Options = Mapping[str, Any]
"""As ``compiler_options`` of ``jax.jit``."""
KEEPS_BARRIERS: Final = {"xla_disable_hlo_passes": "cse_barrier_expander"}
"""Leaves out the pass by which XLA for CPU takes all barriers away before it merges equal operations."""
_SIDE: Final = 32


class BarriersRemoved(UserWarning):
    """XLA takes away the barriers that hold recomputation in place, so that no memory is saved."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a compiled step, by XLA's own account.

    Attributes:
        arguments_bytes: what goes in.
        outputs_bytes: what comes out.
        temporaries_bytes: what is there in between.
        aliased_bytes: outputs that take the memory of donated arguments.
    """

    arguments_bytes: int
    outputs_bytes: int
    temporaries_bytes: int
    aliased_bytes: int

    @property
    def total_bytes(self) -> int:
        """What the step takes in all: arguments, outputs and temporaries, without what is there twice."""
        return self.arguments_bytes + self.outputs_bytes + self.temporaries_bytes - self.aliased_bytes


def memory(compiled: Any) -> Memory:
    """The memory of a compiled function, as ``jax.jit(fn).lower(*args).compile()`` returns it.

    Only these four figures mean the same on every backend: what XLA for CPU calls the peak leaves out temporaries.

    Raises:
        ValueError: the backend does not say.

    Example:
        >>> import jax, autoremat.jax
        >>> compiled = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((256,), "float32")).compile()
        >>> autoremat.jax.memory(compiled).total_bytes
        2048
    """
    found = compiled.memory_analysis()
    if found is None:
        raise ValueError(f"the {jax.default_backend()} backend does not say how much memory compiled code takes")
    return Memory(
        found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes, found.alias_size_in_bytes
    )


def flops(compiled: Any) -> float:
    """Floating-point operations of a compiled function, by XLA's count: the body of a loop counts once."""
    found = compiled.cost_analysis()
    return float((found or {}).get("flops") or 0.0)


def keeps_barriers(options: Options | None = None) -> bool:
    """Whether code compiled with these options keeps what is computed again apart from what has been computed.

    Found out by compiling a function that computes one product twice, with a barrier in between, and counting.

    Example:
        >>> import autoremat.jax
        >>> autoremat.jax.keeps_barriers(autoremat.jax.compiler_options())
        True
    """
    return _keeps_barriers(jax.default_backend(), tuple(sorted((options or {}).items())))


@cache
def _keeps_barriers(backend: str, options: tuple[tuple[str, Any], ...]) -> bool:
    x = jax.ShapeDtypeStruct((_SIDE, _SIDE), jnp.float32)
    with jax.ensure_compile_time_eval():
        try:
            once, twice = (
                flops(jax.jit(fn).lower(x).compile(compiler_options=dict(options) or None))
                for fn in (_one_product, _two_products)
            )
        except Exception:  # noqa: BLE001 - a compiler that does not know the options does not keep barriers by them
            return False
    return twice > 1.5 * once


def _one_product(x: Any) -> Any:
    return x @ x


def _two_products(x: Any) -> Any:
    first = x @ x
    again, first = lax.optimization_barrier((x, first))
    return (again @ again) * first


def compiler_options(options: Options | None = None) -> dict[str, Any]:
    """Options to compile a checkpointed step with, so that it saves memory on the default backend.

    Nothing on TPU and GPU. XLA for CPU removes barriers before it merges equal operations, so that there neither
    ``jax.checkpoint`` nor a plan changes anything in unrolled code: there they say to leave out that pass.

    Args:
        options: further ones, which these are added to.

    Example:
        >>> import jax, autoremat.jax
        >>> step = jax.jit(lambda x: x + 1, compiler_options=autoremat.jax.compiler_options())
    """
    given = dict(options or {})
    if keeps_barriers(given):
        return given
    passes = ",".join(
        str(o["xla_disable_hlo_passes"]) for o in (given, KEEPS_BARRIERS) if "xla_disable_hlo_passes" in o
    )
    helped = given | {"xla_disable_hlo_passes": passes}
    return helped if keeps_barriers(helped) else given


_WARNED: set[str] = set()


def warn_of_removed_barriers() -> None:
    """Say once that the default options of this backend undo what is computed again."""
    backend = jax.default_backend()
    if backend in _WARNED or keeps_barriers():
        return
    _WARNED.add(backend)
    options = compiler_options()
    remedy = (
        f"compile with jax.jit(..., compiler_options={options!r}), which autoremat.jax.compiler_options() returns and "
        "autoremat.jax.fit uses by itself"
        if options
        else "no option is known that keeps them"
    )
    warnings.warn(
        f"XLA for {backend} takes away optimization barriers before it merges equal operations: what a plan (or "
        f"jax.checkpoint) computes again outside of loops is merged with what was computed before, and no memory is "
        f"saved; {remedy}. A step compiled so already is fine. (Said once.)",
        BarriersRemoved,
        stacklevel=2,
    )
