"""The self-check of a plan's first step: what is made again must be what was made the first time."""

from __future__ import annotations

from typing import Any


class NoCheck:
    """Compares nothing."""

    def before(self, k: int, entry: Any, given: Any, call: Any) -> None:
        """Before a call that the plan has something to do with."""

    def after(self, k: int, entry: Any, made: Any) -> None:
        """After it."""

    def remade(self, k: int, entry: Any, made: Any) -> None:
        """After it has been made again."""

    def gives_the_same(self, ledger: Any, call: int, entry: Any, given: Any, numbers: Any, out: Any) -> bool:
        """Nothing is known of calls that are not torch's."""
        return False
