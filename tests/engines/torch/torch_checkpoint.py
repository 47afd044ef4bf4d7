"""The three forms of ``torch.utils.checkpoint``, to be put beside autoremat."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KEPT = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.convolution.default)
"""What the selective form keeps: what takes long to compute again, as its documentation does it."""


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


FORMS: dict[str, Callable[..., Any]] = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "selective": partial(
        checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _policy)
    ),
}
"""Call as ``FORMS[form](function, *args, **kwargs)``."""


class Checkpointed(nn.Module):
    """A module, checkpointed whole."""

    def __init__(self, call: nn.Module, form: str) -> None:
        super().__init__()
        self.call, self.form = call, form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return FORMS[self.form](self.call, *args, **kwargs)
