"""The C allocator, told to keep what it has got, so that timed steps do not pay for one another's page faults.

glibc hands memory back to the system whenever much is free at the end of its heap, and gets it again a page at a time:
hundreds of milliseconds that fall on whichever step happens to come next, and more often on one that uses more memory.
"""

from __future__ import annotations

import ctypes
import ctypes.util

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def keep_memory() -> None:
    """Never hand memory back, never map a tensor by itself; without effect where the C library is another one."""
    mallopt = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20)):
            mallopt(option, value)
