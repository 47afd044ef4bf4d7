"""The log of a recording: ops and values as they are seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from autoremat.engines.torch.operators.local import local_of
from autoremat.engines.torch.operators.signature import CallSignature
from autoremat.engines.torch.operators.values import ValueMap, storage_of
from autoremat.engines.torch.recording.recording import RecordedOp, RecordedValue, Recording
from autoremat.engines.torch.world.gradients import ACCUMULATE, label_of


class Log:
    """What has been seen so far.

    Attributes:
        map: numbers the values.
        ops: in the order they ran.
        values: by number; those from outside have negative numbers.
        on_op: called after each op with their count.
        changed_unseen: values that were changed by something torch does not see.
        calls_with_numbers: calls with gradients where a number stands in place of a tensor.
    """

    def __init__(self) -> None:
        self.map = ValueMap()
        self.ops: list[RecordedOp] = []
        self.values: dict[int, RecordedValue] = {}
        self.on_op: Callable[[int], None] = lambda n: None
        self.changed_unseen: set[int] = set()
        self.calls_with_numbers: list[CallSignature] = []
        self._overwritten: set[int] = set()

    def append(self, op: RecordedOp) -> None:
        """Add an op."""
        self.ops.append(op)
        self.on_op(len(self.ops))

    def overwrite(self, outside: Iterable[int]) -> None:
        """Note that an op overwrites values from outside."""
        self._overwritten.update(outside)

    def know(self, tensor: Tensor, label: str, kind: str, module: str = "") -> None:
        """Register a tensor that exists before the step."""
        tensor = local_of(tensor)
        storage = storage_of(tensor)
        if storage is not None:
            number = self.map.number(storage)
            self.values.setdefault(number, RecordedValue.of(tensor, label, kind, module))

    def know_outside(self, tensors: Sequence[Tensor]) -> None:
        """Register tensors from outside that are met on the way."""
        for tensor in tensors:
            storage = storage_of(tensor)
            if storage is not None:
                number = self.map.number(storage)
                if number < 0 and number not in self.values:
                    self.values[number] = RecordedValue.of(tensor, "constant", "input")

    def accumulates(self, gradient: Tensor) -> None:
        """Note that the backward hands a leaf its gradient now."""
        storage = storage_of(local_of(gradient))
        number = None if storage is None else self.map.number(storage)
        if number in self.values:
            self.append(RecordedOp(ACCUMULATE, [number], (), (), True, None))

    def call_gradient(self, tensor: Tensor, name: str, module: str) -> None:
        """Mark a tensor as a leaf's gradient; parameters give a name."""
        storage = storage_of(local_of(tensor))
        if storage is None:
            return
        value = self.values.get(self.map.number(storage))
        if value is None:  # the gradient existed before, or was made unseen
            return
        value.kind = "gradient"
        if name:
            value.label, value.module = label_of(name, value.text), module

    def leave_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Note that these gradients leave their memory once complete."""
        for storage in filter(None, map(storage_of, gradients)):
            value = self.values.get(self.map.number(storage))
            if value is not None:
                value.forever, value.died = False, None

    def recording(self) -> Recording:
        """Return what has been seen, as plain data."""
        return Recording(
            self.ops, self.values, self.map.made, self.changed_unseen, self._overwritten, self.calls_with_numbers
        )
