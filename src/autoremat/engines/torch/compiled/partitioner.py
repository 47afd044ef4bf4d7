"""What the compiler calls with a joint graph: reads it, has it planned, and hands back its two halves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from autoremat.engines.torch.compiled.backends import INDUCTOR, split_by_torch
from autoremat.engines.torch.compiled.fusing import fused, is_fused
from autoremat.engines.torch.compiled.joint import NotPlannable, read_joint
from autoremat.engines.torch.compiled.naming import Names
from autoremat.engines.torch.compiled.partition import Halves
from autoremat.engines.torch.compiled.reading import never, read_program, with_optimizer
from autoremat.engines.torch.compiled.stored import Place
from autoremat.engines.torch.world.optimizer import optimizer_bytes

if TYPE_CHECKING:
    from autoremat.engines.torch.compiled.session import CompiledSession


class GraphPartitioner:
    """Splits one joint graph by a plan.

    Args:
        session: plans it.
        kind: of the backend.
        names: what the inputs are called.
        place: where the plan is kept.
    """

    def __init__(self, session: CompiledSession, kind: str, names: Names, place: Place) -> None:
        self._session, self._kind, self._names, self._place = session, kind, names, place
        self.was_called = self.was_refused = False
        """Whether torch has called it, as it does where something is differentiated; whether the graph has no plan."""

    def __call__(
        self, module: fx.GraphModule, joint_inputs: Sequence[object], *, num_fwd_outputs: int,
        compiler: str = "", **given: Any,
    ) -> Halves:  # fmt: skip
        """The halves of a joint graph: by its plan, or, where it can have none, as torch would split it."""
        session, self.was_called = self._session, True
        try:
            joint = read_joint(module, num_fwd_outputs)
            fuses = self._kind == INDUCTOR
            joint = fused(joint) if fuses else joint
            how = is_fused if fuses else never
            reading = read_program(joint, session.name, self._names, session.beside(), how)
            reading = with_optimizer(reading, optimizer_bytes(session.planner.optimizer)[1])
        except NotPlannable as error:
            self.was_refused = True
            session.without_plan(str(error))
            return split_by_torch(self._kind, module, joint_inputs, num_fwd_outputs=num_fwd_outputs, **given)
        given["num_fwd_outputs"] = num_fwd_outputs
        graph, halves = session.planned(reading, self._kind, self._place.known, joint_inputs, given)
        session.takes(graph)
        self._place.keep(graph)
        return halves
