"""Names what every engine can do, and finds engines by name.

The folder is the list of engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from autoremat.program import Abilities, Plan, Program

S = TypeVar("S", contravariant=True)
_HERE: Final = Path(__file__).parent


@dataclass(frozen=True)
class Step:
    """Names a callable that returns its loss or outputs, and its arguments."""

    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class Engine(Protocol[S]):
    """Records a step as a program, and carries out its plans.

    ``S`` is what the engine takes for a step: a callable and its arguments, or a list of calls.
    """

    @property
    def name(self) -> str:
        """Name the engine by its folder."""

    @property
    def abilities(self) -> Abilities:
        """Say what the engine can do with a plan.

        Its programs say the same.
        """

    def record(self, step: S) -> Program:
        """Record a step, forward and backward.

        Value ids are names that users know.
        """

    def carry_out(self, step: S, plan: Plan) -> Callable[..., Any]:
        """Make a callable that runs the step within the plan's budget.

        Its results are those of the step itself.
        A plan of another step is refused in words: with an error, or, where the step can go on without the plan, with
        a warning.
        """


NAMES: Final = tuple(
    sorted(".".join(file.parent.relative_to(_HERE).parts) for file in _HERE.rglob("engine.py") if file.parent != _HERE)
)
"""All engines, by name: the folders that have a file ``engine.py``."""


def engine_of(name: str) -> Engine[Any]:
    """Import the engine of a name, and no other.

    With it comes its framework.

    Raises:
        ValueError: there is no such engine.
        ModuleNotFoundError: its framework is not installed.

    Example:
        >>> engine_of("numpy").abilities.reruns
        'anywhere'
    """
    if name not in NAMES:
        raise ValueError(f"unknown engine {name!r}; choose one of {', '.join(NAMES)}")
    found: Engine[Any] = import_module(f"{__package__}.{name}.engine").ENGINE
    return found
