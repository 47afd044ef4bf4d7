"""What operators make of a view: some copy all the memory behind it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from autoremat.engines.torch.compiled.sizes import spec_of_node
from autoremat.engines.torch.operators.signature import CallSignature, Items
from autoremat.engines.torch.operators.storages import without_beyond
from autoremat.engines.torch.operators.timing import measure_all

aten = torch.ops.aten
CALLS = [
    (aten.copy.default, ()),
    (aten.slice_scatter.default, (1, 0, 8)),
    (aten.add.Tensor, ()),
    (aten.mm.default, ()),
]


@pytest.mark.parametrize(("func", "more"), CALLS, ids=str)
def test_what_is_made_of_a_view_is_counted_as_it_is(func: Callable[..., torch.Tensor], more: tuple[int, ...]) -> None:
    view, other = torch.zeros(32, 64)[:, 8:16], torch.ones(32, 8)
    if func is aten.mm.default:
        other = torch.ones(8, 8)
    call = CallSignature(func, (spec_of_node(view), spec_of_node(other), *more), Items(dict, ()))  # type: ignore[arg-type]
    (cost,) = measure_all([without_beyond(call)])
    assert cost.made_bytes == (func(view, other, *more).untyped_storage().nbytes(),)
