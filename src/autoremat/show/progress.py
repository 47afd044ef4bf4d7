"""A progress bar for what takes longer than a second; silent when nobody looks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(after_seconds: float = 1.0) -> Iterator[Callable[[str, float], None] | None]:
    """Yields ``report(label, fraction)``, which shows a bar on a terminal after a while; None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    begin = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("autoremat", total=1.0, visible=False)

        def report(label: str, fraction: float) -> None:
            visible = time.monotonic() - begin > after_seconds
            progress.update(task, description=f"autoremat: {label}", completed=fraction, visible=visible)

        yield report
