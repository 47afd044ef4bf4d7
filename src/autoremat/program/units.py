"""What a person may call a budget, in bytes."""

from __future__ import annotations

import math
import re
from typing import Final, NoReturn

_UNITS: Final = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000 ** (k + 1) for k, prefix in enumerate("kmgt")},
    **{f"{prefix}ib": 1024 ** (k + 1) for k, prefix in enumerate("kmgt")},
}
_SIZE: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*|%)")
_ACCEPTED: Final = (
    'accepted are bytes as an int (10_000_000), a size as text ("10GiB", "512MB", "1.5 GB"), or a share of the plain '
    'peak, either a float above 0 and at most 1 (0.5) or text ("50%")'
)


def parse_budget(budget: int | float | str, plain_peak_bytes: int) -> int:
    """Bytes of a budget.

    KB, MB, GB, TB are decimal, KiB, MiB, GiB, TiB binary; upper and lower case do not matter. A float and a percentage
    are shares of ``plain_peak_bytes``; fractions of a byte are cut off.

    Raises:
        ValueError: anything else, such as a float above 1 (a number of bytes must be an int) or "auto", which only
            makes sense where there is a device to ask.

    Example:
        >>> parse_budget("1.5 KiB", 0), parse_budget(0.5, 10), parse_budget("25%", 8), parse_budget(7, 0)
        (1536, 5, 2, 7)
    """
    if isinstance(budget, bool):
        _refuse(budget)
    if isinstance(budget, int):
        return budget if budget > 0 else _refuse(budget)
    if isinstance(budget, float):
        return _share(budget, budget, plain_peak_bytes)
    if isinstance(budget, str):
        return _parse_text(budget, plain_peak_bytes)
    return _refuse(budget)


def _parse_text(text: str, plain_peak_bytes: int) -> int:
    if text.strip().lower() == "auto":
        raise ValueError('budget "auto" needs a device whose free memory can be asked: pass a number of bytes here')
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return _refuse(text)
    number, unit = match.groups()
    if unit == "%":
        return _share(text, float(number) / 100, plain_peak_bytes)
    factor = _UNITS.get(unit.lower())
    if factor is None:
        return _refuse(text)
    nbytes = int(number) * factor if number.isdigit() else int(float(number) * factor)
    return nbytes if nbytes > 0 else _refuse(text)


def _share(given: float | str, share: float, plain_peak_bytes: int) -> int:
    if math.isnan(share) or not 0 < share <= 1:
        _refuse(given)
    return int(share * plain_peak_bytes)


def _refuse(budget: object) -> NoReturn:
    raise ValueError(f"cannot read {budget!r} as a budget; {_ACCEPTED}")


def format_bytes(nbytes: int) -> str:
    """A size for people, such as ``33.7 MB`` (decimal units, as memory is sold)."""
    size = float(nbytes)
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 999.95:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
