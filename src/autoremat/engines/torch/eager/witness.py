"""The witness of a first step: the shadow that records it, as long as fake tensors can do what the real ones do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from autoremat.engines.torch.eager.shadow import Shadow
from autoremat.program.once import Reason


class Witness:
    """Hands every event of a first step to its shadow; what fake tensors cannot do ends the recording, not the step.

    Args:
        shadow: that records; None where nobody does.
        unlike: called with the error that ended the recording.
    """

    def __init__(
        self, shadow: Shadow | None = None, unlike: Callable[[BaseException], None] = lambda error: None
    ) -> None:
        self.shadow, self._unlike = shadow, unlike

    def give_up(self, error: BaseException) -> None:
        """There will be no recording of this step; it goes on."""
        self.shadow = None
        self._unlike(error)

    def number(self, tensor: Tensor) -> int | None:
        """The number of the value that a tensor looks at, in the recording; None without one."""
        if self.shadow is None:
            return None
        try:
            return self.shadow.number(tensor)
        except Exception as error:  # noqa: BLE001 - whatever a fake tensor cannot do
            self.give_up(error)
            return None

    def number_anew(self, tensor: Tensor) -> int | None:
        """As ``number``, of a tensor that is not what it was."""
        if self.shadow is not None:
            self.shadow.forget(tensor)
        return self.number(tensor)

    def revive(self, tensor: Tensor, number: int) -> None:
        """A tensor of which the recording does not know looks at the memory of this value."""
        if self.shadow is not None:
            self.shadow.revive(tensor, number)

    def number_of_pack(self, pack: int) -> int | None:
        """The number of the value that was saved as this pack; None if it was not made in the step."""
        return None if self.shadow is None else self.shadow.saved.get(pack)

    def made(self, func: Any, args: Any, kwargs: Any, out: Any, packs: Sequence[int], call: int) -> None:
        """A call has been made: make it on fake tensors, too."""
        if self.shadow is None:
            return
        try:
            self.shadow.make(func, args, kwargs, out, packs, call)
            self.shadow.packed_here.clear()
        except Exception as error:  # noqa: BLE001 - whatever a fake tensor cannot do
            self.give_up(error)

    def saved(self, pack: int, tensor: Tensor, *, inside: bool) -> None:
        """Autograd saves a tensor, inside a call or, for a custom function, outside of all."""
        if self.shadow is None:
            return
        if inside:
            self.shadow.packed_here[pack] = tensor
            return
        try:
            self.shadow.loose(pack, tensor)
        except Exception as error:  # noqa: BLE001 - whatever a fake tensor cannot do
            self.give_up(error)

    def once(self, call: int, reason: Reason) -> None:
        """A call must not be made again."""
        if self.shadow is not None:
            self.shadow.once[call] = reason

    def changed_unseen(self, values: Iterable[int]) -> None:
        """Something else than torch may change the memory of these values."""
        if self.shadow is not None:
            self.shadow.recorder.changed_unseen.update(values)

    def names_of(self, call: int) -> list[tuple[str, str]]:
        """Module and name of the operators that a call is made of."""
        if self.shadow is None:
            return []
        ops = self.shadow.recorder.ops
        found = []
        for op in reversed(ops):
            if op.call != call:
                break
            found.append((op.module, op.name))
        return found
