"""Files are written as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as a whole or not at all.

    Where that fails on the way, what was there before stays, and nothing else is left.

    Raises:
        OSError: with the name of the file.
    """
    target = Path(path).resolve()
    whole = (target.is_file() or not target.exists()) and os.access(target.parent, os.W_OK)  # no pipe and no device
    part = target.with_name(f"{target.name[:200]}.part") if whole else target
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        if whole:
            if target.exists():
                shutil.copymode(target, part)
            part.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        if whole:
            part.unlink(missing_ok=True)
