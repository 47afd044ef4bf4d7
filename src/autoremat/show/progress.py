"""A progress bar for what takes longer than a second.

It is silent when nobody looks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_REDRAWN_SECONDS = 0.1


@contextmanager
def progress_bar(after_seconds: float = 1.0) -> Iterator[Callable[[str, float], None] | None]:
    """Yield ``report(label, fraction)``, which shows a bar after a while.

    It does so on a terminal; elsewhere None is yielded.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    begin = time.monotonic()
    drawn = begin
    # Drawn when there is something to report, and by no thread: with one, nothing could be recorded in a process apart.
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task = progress.add_task("autoremat", total=1.0, visible=False)

        def report(label: str, fraction: float) -> None:
            nonlocal drawn
            now = time.monotonic()
            visible = now - begin > after_seconds
            progress.update(task, description=f"autoremat: {label}", completed=fraction, visible=visible)
            if visible and now - drawn > _REDRAWN_SECONDS:
                drawn = now
                progress.refresh()

        yield report
