"""What a person may call a budget, in bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Budget:
    """A budget as a person named it, read once.

    With neither bytes nor share it is as much as the device has (``"auto"``).

    Attributes:
        nbytes: of the peak.
        share: of the plain peak, above 0 and at most 1.
    """

    nbytes: int | None = None
    share: float | None = None

    @staticmethod
    def read(given: int | float | str) -> Budget:
        """Read the budget that a person means.

        KB, MB, GB, TB are decimal, KiB, MiB, GiB, TiB binary; upper and lower case do not matter. A float and a
        percentage are shares of the plain peak.

        Raises:
            ValueError: anything else, such as a float above 1 (a number of bytes must be an int).

        Example:
            >>> Budget.read("1.5 KiB"), Budget.read("25%")
            (Budget(nbytes=1536, share=None), Budget(nbytes=None, share=0.25))
        """
        if isinstance(given, bool):
            _refuse(given)
        if isinstance(given, int):
            return Budget(given) if given > 0 else _refuse(given)
        if isinstance(given, float):
            return _share(given, given)
        if isinstance(given, str):
            return _parse_text(given)
        return _refuse(given)

    @property
    def is_auto(self) -> bool:
        """Whether the device is to be asked what there is."""
        return self.nbytes is None and self.share is None

    def resolved(self, device_bytes: Callable[[], int]) -> Budget:
        """Ask the device for its bytes where the budget is ``"auto"``."""
        return Budget(device_bytes()) if self.is_auto else self

    def in_bytes(self, plain_peak_bytes: int) -> int:
        """Turn the budget into bytes, given plain training's peak.

        Fractions of a byte are cut off.

        Raises:
            ValueError: nobody has asked the device.
        """
        if self.nbytes is not None:
            return self.nbytes
        if self.share is not None:
            return int(self.share * plain_peak_bytes)
        raise ValueError('budget "auto" needs a device whose free memory can be asked: pass a number of bytes here')


def parse_budget(budget: int | float | str, plain_peak_bytes: int) -> int:
    """Read a budget as ``Budget.read`` does, in bytes.

    Raises:
        ValueError: as there; or ``"auto"``, which only makes sense where there is a device to ask.

    Example:
        >>> parse_budget("1.5 KiB", 0), parse_budget(0.5, 10), parse_budget("25%", 8), parse_budget(7, 0)
        (1536, 5, 2, 7)
    """
    return Budget.read(budget).in_bytes(plain_peak_bytes)


def _parse_text(text: str) -> Budget:
    if text.strip().lower() == "auto":
        return Budget()
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return _refuse(text)
    number, unit = match.groups()
    if unit == "%":
        return _share(text, float(number) / 100)
    factor = _UNITS.get(unit.lower())
    if factor is None:
        return _refuse(text)
    nbytes = int(number) * factor if number.isdigit() else int(float(number) * factor)
    return Budget(nbytes) if nbytes > 0 else _refuse(text)


def _share(given: float | str, share: float) -> Budget:
    if math.isnan(share) or not 0 < share <= 1:
        _refuse(given)
    return Budget(share=share)


def _refuse(budget: object) -> NoReturn:
    raise ValueError(f"cannot read {budget!r} as a budget; {_ACCEPTED}")


def format_bytes(nbytes: int) -> str:
    """Write a size for people, such as ``33.7 MB`` (decimal units)."""
    size = float(nbytes)
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 999.95:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
