"""Calls of operators, and a place to keep what they take."""

from __future__ import annotations

import torch

from autoremat.engines.torch.operators.signature import CallSignature, signature_of

PLACE = "a machine"


def call(*size: int, func: object = torch.ops.aten.mm.default) -> CallSignature:
    return signature_of(func, (torch.empty(size), torch.empty(size)), {})  # type: ignore[arg-type]
