"""Tells whether an operator that is not torch's may be rerun.

It may if it changes nothing unseen, and gives the same again.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from autoremat.engines.torch.eager.contents import content_of, contents_of
from autoremat.engines.torch.eager.entry import Entry
from autoremat.engines.torch.eager.state import Rerunning
from autoremat.engines.torch.operators.local import local_of


def gives_the_same(
    entry: Entry, given: Sequence[Tensor], numbers: Sequence[int | None], made: Sequence[Tensor],
    before: Sequence[int],
) -> bool:  # fmt: skip
    """Rerun a call that was just made; tell whether nothing differs.

    It must give the same results, and change none of its arguments. With fake tensors nobody knows: False.

    Args:
        entry: of the call.
        given: the tensors among its arguments.
        numbers: of the values that they look at.
        made: the tensors that it gave.
        before: checksums of what it was given, taken before it was made.
    """
    if (
        any(isinstance(local_of(t), FakeTensor) for t in (*given, *made))
        or entry.in_place
        or contents_of(given) != before
    ):
        return False
    memory = {n: local_of(t).detach() for n, t in zip(numbers, given, strict=True) if n is not None and n >= 0}
    try:
        with Rerunning() as rerunning:
            again = entry.run(memory, rerunning, [v for _, v in entry.results])
    except Exception:  # noqa: BLE001 - whatever somebody else's kernel does not like
        return False
    if contents_of(given) != before:
        return False
    return all(content_of(again[v]) == content_of(made[i]) for i, v in entry.results)
