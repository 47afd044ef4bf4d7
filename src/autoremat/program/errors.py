"""What can go wrong with programs, schedules and budgets."""

from __future__ import annotations


class InvalidProgram(ValueError):
    """A program, or its JSON, breaks the rules of the format.

    The message names the op or the value.
    """


class InvalidSchedule(ValueError):
    """A schedule cannot be carried out.

    The message names the rule, the op and the value.
    """


class InfeasibleBudget(ValueError):
    """No known schedule stays within the budget.

    Attributes:
        budget_bytes: what was asked for.
        floor_bytes: the smallest budget that is accepted, whoever plans.
        peak_op: name of the op at which the peak of that smallest schedule stands.
        largest: ``(label, bytes)`` of the values that fill the peak, largest first.
        arrived: ``(what, bytes)`` of what is there during the whole step and was not there in the training's first
            planned step: gradients that stayed, larger inputs, buffers, optimizer state; most bytes first.
    """

    def __init__(
        self,
        message: str,
        *,
        budget_bytes: int,
        floor_bytes: int,
        peak_op: str = "",
        largest: tuple[tuple[str, int], ...] = (),
        arrived: tuple[tuple[str, int], ...] = (),
    ) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.floor_bytes = floor_bytes
        self.peak_op = peak_op
        self.largest = largest
        self.arrived = arrived

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with the keyword arguments, so that the error survives worker processes."""
        known = self.budget_bytes, self.floor_bytes, self.peak_op, self.largest, self.arrived
        return (_rebuild, (str(self), *known))


def _rebuild(
    message: str, budget_bytes: int, floor_bytes: int, peak_op: str, largest: tuple[tuple[str, int], ...],
    arrived: tuple[tuple[str, int], ...],
) -> InfeasibleBudget:  # fmt: skip
    return InfeasibleBudget(
        message, budget_bytes=budget_bytes, floor_bytes=floor_bytes, peak_op=peak_op, largest=largest, arrived=arrived
    )
