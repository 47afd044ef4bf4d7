"""The bytes of a step by module, equal layers folded."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from autoremat.program import Program
from autoremat.show.residents import Resident
from autoremat.show.savings import Savings
from autoremat.show.text import fold_indices


@dataclass(frozen=True, slots=True)
class Module:
    """A module, or several equal ones, with all that is below.

    All figures are sums over all of them.

    Attributes:
        name: relative to the module above: ``mlp``, ``layers.0-23`` for 24 equal ones; "" for the whole step.
        times: how many modules it stands for.
        peak_bytes: in memory at the peak.
        saved_bytes: what plain training saves from its forward for the backward.
        kept_bytes: what the schedule keeps of its forward.
        runs_again: reruns of its ops.
        seconds_again: of those.
        sources: what its reruns start from: values kept or there from the start, parameters apart.
        modules: those below, in the order in which they first occur.
    """

    name: str
    times: int
    peak_bytes: int
    saved_bytes: int
    kept_bytes: int
    runs_again: int
    seconds_again: float
    sources: tuple[int, ...]
    modules: tuple[Module, ...]

    @property
    def own_peak_bytes(self) -> int:
        """In memory at the peak, what is below not counted."""
        return self.peak_bytes - sum(m.peak_bytes for m in self.modules)


@dataclass(slots=True)
class _Node:
    """A module while its figures are being collected.

    They are peak, saved and kept bytes, and runs.
    """

    own: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    seconds: float = 0.0
    sources: set[int] = field(default_factory=set)
    below: dict[str, _Node] = field(default_factory=dict)


def module_tree(program: Program, residents: Iterable[Resident], saved: Savings, made: Savings) -> Module:
    """Build the tree of a step's modules with their figures.

    What is in memory at the peak, what is saved plainly, and what the schedule makes of it.
    """
    root = _Node()
    for op in program.ops:
        if op.phase == "forward":
            _find(root, op.module)
    for r in residents:
        _find(root, r.module).own[0] += r.nbytes
    for place, values in ((1, saved.kept), (2, made.kept)):
        for v in values:
            _find(root, program.module(v)).own[place] += program.values[v].nbytes
    for a in made.again:
        node = _find(root, program.ops[a.op].module)
        node.own[3] += a.runs
        node.seconds += a.seconds
        node.sources.update(a.sources)
    return _joined(_finished("", root))


def _find(root: _Node, path: str) -> _Node:
    node = root
    for part in filter(None, path.split(".")):
        node = node.below.setdefault(part, _Node())
    return node


def _finished(name: str, node: _Node) -> Module:
    modules = _folded([_finished(part, below) for part, below in node.below.items()])
    peak, saved, kept, runs = (
        own + sum(getattr(m, what) for m in modules)
        for own, what in zip(node.own, ("peak_bytes", "saved_bytes", "kept_bytes", "runs_again"), strict=True)
    )
    seconds = node.seconds + sum(m.seconds_again for m in modules)
    sources = node.sources.union(*(m.sources for m in modules))
    return Module(name, 1, peak, saved, kept, runs, seconds, tuple(sorted(sources)), modules)


def _folded(modules: Sequence[Module]) -> tuple[Module, ...]:
    """Join numbered modules that are equal, in the first one's place."""
    groups: dict[Hashable, list[Module]] = {}
    for m in modules:
        groups.setdefault(_likeness(m) if m.name.isdigit() else m.name, []).append(m)
    return tuple(
        group[0] if len(group) == 1 else _sum(fold_indices(int(m.name) for m in group), group)
        for group in groups.values()
    )


def _likeness(module: Module) -> Hashable:
    """Collect what equal modules share: all figures of all below."""
    m = module
    below = tuple((b.name, _likeness(b)) for b in m.modules)
    return m.times, m.peak_bytes, m.saved_bytes, m.kept_bytes, m.runs_again, m.seconds_again, below


def _sum(name: str, modules: Sequence[Module]) -> Module:
    return Module(
        name,
        sum(m.times for m in modules),
        sum(m.peak_bytes for m in modules),
        sum(m.saved_bytes for m in modules),
        sum(m.kept_bytes for m in modules),
        sum(m.runs_again for m in modules),
        sum(m.seconds_again for m in modules),
        tuple(sorted(set[int]().union(*(m.sources for m in modules)))),
        tuple(_sum(same[0].name, same) for same in zip(*(m.modules for m in modules), strict=True)),
    )


def _joined(module: Module) -> Module:
    """Join modules with the only module in them: ``model.layers.0-23``."""
    below = tuple(_joined(m) for m in module.modules)
    if module.name and len(below) == 1 and _figures(below[0]) == _figures(module):
        return replace(below[0], name=f"{module.name}.{below[0].name}")
    return replace(module, modules=below)


def _figures(m: Module) -> tuple[float, ...]:
    return m.peak_bytes, m.saved_bytes, m.kept_bytes, m.runs_again, m.seconds_again
