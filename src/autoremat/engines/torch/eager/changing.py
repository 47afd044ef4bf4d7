"""Finds the argument that keeps making new kinds of input.

It is named in the user's words.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

import torch

from autoremat.engines.torch.eager.inputs import Form, Sizes, TensorForm, sizes_of


def what_changes(
    fn: Any, args: Sequence[Any], kwargs: dict[str, Any], kinds: Sequence[tuple[Form, Sizes]]
) -> tuple[str, str]:  # fmt: skip
    """Return the name of what most kinds differ in, and how.

    The last kind is that of the arguments.
    """
    names = _names(fn, len(args))
    columns = _by_name([_parts(form, names) for form, _ in kinds])
    if all(len(set(values)) < 2 for values in columns.values()):
        columns = _by_name([dict(_sizes(args, kwargs, sizes, names)) for _, sizes in kinds])
    name = max(columns, key=lambda n: len(set(columns[n])))
    values = columns[name]
    other = next((v for v in reversed(values) if v != values[-1]), values[-1])
    spot, before, now = _spot(other, values[-1])
    how = f"{spot.strip() or 'it'} was {_text(before)} and is {_text(now)}" if _text(before) != _text(now) else spot
    return name, ", ".join(filter(None, (f"{len(set(values))} different ones in {len(kinds)} kinds", how)))


def _names(fn: Any, n: int) -> list[str]:
    """Return the names of the first positional arguments."""
    try:
        found = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        found = []
    positional = [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [f"argument '{positional[i]}'" if i < len(positional) else f"argument {i}" for i in range(n)]


def _by_name(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of all kinds by name; None where missing."""
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(n for row in rows for n in row)}


def _parts(form: Form, names: Sequence[str]) -> dict[str, Any]:
    """Return the parts of a form that have names."""
    found = {names[i] if i < len(names) else f"argument {i}": value for i, value in enumerate(form.args)}
    found |= {f"argument '{name}'": value for name, value in form.kwargs}
    return found | {
        "train() and eval() of the modules": form.flags,
        "parameters and buffers of the model": form.own,
        "autocast": form.autocast,
        "what torch.distributed does around the modules": form.around,
    }


def _sizes(
    args: Sequence[Any], kwargs: dict[str, Any], sizes: Sizes, names: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """Yield the sizes of every argument, of an input of this form."""
    each, numbers = sizes.each, sizes.numbers
    for name, argument in (*zip(names, args, strict=True), *((f"argument '{k}'", x) for k, x in kwargs.items())):
        n_sizes, n_numbers = sizes_of(argument)
        yield name, Sizes(each[:n_sizes], numbers[:n_numbers])
        each, numbers = each[n_sizes:], numbers[n_numbers:]


def _spot(a: Any, b: Any) -> tuple[str, Any, Any]:
    """Find where two forms differ, and both forms there.

    It looks as far inside as they differ in one place alone.
    """
    if isinstance(a, TensorForm) and isinstance(b, TensorForm):
        fields = [f for f in TensorForm._fields if getattr(a, f) != getattr(b, f)]
        return (f" {fields[0]}", getattr(a, fields[0]), getattr(b, fields[0])) if len(fields) == 1 else ("", a, b)
    if _is_list(a) and _is_list(b) and a[0] == b[0] and len(a[1]) == len(b[1]):
        at = [i for i, (x, y) in enumerate(zip(a[1], b[1], strict=True)) if x != y]
        if len(at) == 1:
            spot, x, y = _spot(a[1][at[0]], b[1][at[0]])
            return f"[{at[0]}]{spot}", x, y
    return "", a, b


def _is_list(form: Any) -> bool:
    """Tell whether this is the form of a list, tuple or dict."""
    return type(form) is tuple and len(form) == 2 and isinstance(form[1], tuple)


def _text(form: Any) -> str:
    """Describe a form in words."""
    if isinstance(form, (bool, Enum, torch.dtype, torch.device, str)) or form is None:
        return str(form)
    if isinstance(form, Sizes):
        return "of size " + " x ".join(map(str, (*form.each, *form.numbers)))
    if isinstance(form, TensorForm):
        n = form.dimensions if isinstance(form.dimensions, int) else len(form.dimensions)
        return f"a tensor of {n} dimensions"
    if isinstance(form, type):
        return f"of type {form.__name__}"
    return f"{len(form[1])} items" if _is_list(form) else ""
