"""Random scripts for hypothesis to draw and to shrink."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import strategies as st

from tests.engines.torch.eager.fuzz.model import RETURNS
from tests.engines.torch.eager.fuzz.operations import GROUP_OF, GROUPS, REGIONS, SURPRISING
from tests.engines.torch.eager.fuzz.scripts import Do, If, In, Instruction, Script, Step, Way
from tests.engines.torch.eager.fuzz.uses import USES

SLOTS = 5
"""The pool: slots 0 and 1 begin as the inputs, 2 as a linear layer of slot 0, 3 and 4 as views of that one."""


# ---- random scripts ----------------------------------------------------------------------------------------------

WEIGHTS = {"pointwise": 6, "shapes": 2, "layers": 4, "views": 4, "in place": 3, "random": 2, "others": 2}

SIGNS = ((1, -1), (1, 1, -1), (-1, 1))

slot = st.integers(0, SLOTS - 1)
names = st.sampled_from([g for g, n in WEIGHTS.items() for _ in range(n)]).flatmap(
    lambda g: st.sampled_from(list(GROUPS[g]))
)
dos = st.builds(Do, names, slot, slot, slot, st.integers(0, 7))


def bodies(depth: int, size: int) -> st.SearchStrategy[tuple[Instruction, ...]]:
    one: st.SearchStrategy[Instruction] = dos
    if depth:
        inner = bodies(depth - 1, 4)
        branch = st.builds(If, slot, inner, inner)
        region = st.builds(In, st.sampled_from(list(REGIONS)), inner)
        one = st.integers(0, 19).flatmap(lambda n: branch if n == 19 else region if n >= 17 else dos)
    return st.lists(one, min_size=1, max_size=size).map(tuple)


uses = st.one_of(st.just("once"), st.sampled_from(list(USES)))
steps = st.builds(
    Step, uses, st.sampled_from([4, 4, 4, 6]), st.sampled_from([1, 1, -1]), st.sampled_from([True, True, False]),
    st.booleans(), st.integers(0, 7),
)  # fmt: skip
histories = st.one_of(  # mostly several of one kind: a new kind takes a recording
    st.builds(lambda step, signs: tuple(replace(step, sign=s) for s in signs), steps, st.sampled_from(SIGNS)),
    st.lists(steps, min_size=2, max_size=3).map(tuple),
)
shares = st.sampled_from([0.0, 0.0, 0.1, 0.3, 0.5, 0.8])
ways = st.builds(
    Way, st.sampled_from(["nothing", "nothing", "random", "random", "budget", "online", "online"]),
    st.integers(0, 99), shares,
)  # fmt: skip
scripts = st.builds(
    Script,
    st.builds(lambda first, then: first + then, bodies(2, 12), bodies(2, 12)),
    st.sampled_from(list(RETURNS)),
    st.lists(slot, min_size=1, max_size=3).map(tuple),
    histories,
    ways,
)


predictable = st.sampled_from([n for g in WEIGHTS if g not in ("random", "others") for n in GROUPS[g]]).filter(
    lambda name: name not in SURPRISING
)
measured_scripts = st.builds(
    Script,
    st.lists(st.builds(Do, predictable, slot, slot, slot, st.integers(0, 7)), min_size=3, max_size=20).map(tuple),
    st.just("loss"),
    st.lists(slot, min_size=1, max_size=3).map(tuple),
    st.builds(lambda training: (Step(rows=64, training=training),), st.booleans()),
    st.builds(Way, st.just("measured"), st.integers(0, 99), shares),
)
"""Whole steps in which nothing is random: the states of generators take more than these tensors."""


moved_scripts = scripts.map(
    lambda script: replace(script, steps=(script.steps[0], *script.steps), way=replace(script.way, mode="moved"))
)
"""The same scripts under plans that move values to a tier and back; with a step more, since the first moves nothing."""


def features(script: Script) -> Counter[str]:
    """What a script has, each counted once."""
    found = Counter({f"way: {script.way.mode}", f"returns: {script.returns}", *(f"use: {s.use}" for s in script.steps)})

    def look(body: tuple[Instruction, ...]) -> None:
        for i in body:
            if isinstance(i, Do):
                found[f"op: {GROUP_OF[i.op]}"] = 1
            elif isinstance(i, If):
                found["branch on data"] = 1
                look(i.then + i.otherwise)
            else:
                found[f"region: {i.region}"] = 1
                look(i.body)

    look(script.body)
    return found
