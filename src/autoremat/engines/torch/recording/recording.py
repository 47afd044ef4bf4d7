"""Holds what a recording has seen, as plain data.

From here on neither the recorder nor the user's code is needed. So it can be sent from the process that recorded
(``apart``), and everything that follows (measuring, assembling) is the same wherever that was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoremat.engines.torch.operators.facts import OpFacts
from autoremat.engines.torch.operators.signature import CallSignature


@dataclass(slots=True)
class RecordedOp:
    """One op as it was seen; values are numbered as in ``ValueMap``."""

    name: str
    reads: list[int]
    writes: tuple[int, ...]
    in_place: tuple[tuple[int, int], ...]
    backward: bool
    facts: OpFacts | None
    effects: tuple[int, ...] = ()
    opaque: bool = False
    covers_all: bool = False
    signature: CallSignature | None = None
    module: str = ""
    source: str = ""
    call: int = -1
    packed: int = -1
    """Which saved tensor the backward asks for here; -1 for other ops."""

    @property
    def is_ask(self) -> bool:
        """Whether the backward only asks for a saved tensor here."""
        return self.packed >= 0


@dataclass(slots=True)
class RecordedValue:
    """One value as seen: its size, and until when it was held."""

    nbytes: int
    device: torch.device
    label: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    module: str = ""
    died: int | None = None
    forever: bool = False
    available: int | None = None
    """The op after which a rerun of its call hands it out.

    None where calls are not recorded.
    """

    @staticmethod
    def of(tensor: Tensor, label: str, kind: str, module: str = "") -> RecordedValue:
        """Describe the value that a tensor stands for now."""
        nbytes, dtype = tensor.untyped_storage().nbytes(), str(tensor.dtype).removeprefix("torch.")
        return RecordedValue(nbytes, tensor.device, label, kind, dtype, tuple(tensor.shape), module)

    @property
    def text(self) -> str:
        """Type and shape, such as ``float32[8, 64]``."""
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(slots=True)
class Recording:
    """A finished recording.

    Attributes:
        ops: in the order they ran.
        values: by number; those from outside have negative numbers.
        made: how many values operators made.
        changed_unseen: values that were changed by something torch does not see.
        overwritten: values from outside that the step overwrites.
        calls_with_numbers: calls with gradients where a number stands in place of a tensor.
    """

    ops: list[RecordedOp]
    values: dict[int, RecordedValue]
    made: int
    changed_unseen: set[int]
    overwritten: set[int]
    calls_with_numbers: list[CallSignature]

    def take_sizes(self, made_bytes: Sequence[tuple[int, ...]]) -> None:
        """Replace sizes of fake memory by those of real runs.

        Where the numbers in a tensor decide how large a result is, a run on other numbers says nothing.

        Args:
            made_bytes: for every op the sizes of what it made when it really ran; () where it did not run.
        """
        real: dict[int, int] = {}
        for op, sizes in zip(self.ops, made_bytes, strict=True):
            if op.signature is not None and torch.Tag.dynamic_output_shape in op.signature.func.tags:
                continue
            overwriting = dict(op.in_place)
            fresh = [n for n in op.writes if n not in overwriting]
            if len(fresh) == len(sizes):
                real |= {n: b for n, b in zip(fresh, sizes, strict=True) if b != self.values[n].nbytes}
            real |= {new: real[old] for new, old in op.in_place if old in real}
        for number, nbytes in real.items():
            self.values[number].nbytes = nbytes
