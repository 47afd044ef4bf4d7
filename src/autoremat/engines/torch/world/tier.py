"""A slower tier for the CPU: a file and a copying thread.

The file has no name, so it is gone with the process, whatever ends that. A *store* is one step's part in it: every
value has a place of its own there until the step has ended, so no place is written while somebody still reads it. A
copy holds the memory that it reads or writes, so that cannot be used for anything else before the copy has ended.
"""

from __future__ import annotations

import errno
import os
import statistics
import tempfile
import threading
import time
import weakref
from queue import Empty, SimpleQueue
from typing import Any, Final

import torch

from autoremat.program import Link
from autoremat.program.units import format_bytes

_IDLE_SECONDS: Final = 1.0
"""After which the thread ends that has nothing to do."""
_LOOK_SECONDS: Final = 0.5
"""How often somebody who waits looks whether the thread is alive."""
_SAMPLE_BYTES, _SAMPLES = 16 << 20, 5
"""What a bandwidth is measured with."""


class OffloadFailed(RuntimeError):
    """A copy to or from the tier has failed."""


class File:
    """A file without a name, closed when nobody refers to it."""

    def __init__(self, folder: str) -> None:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    def fileno(self) -> int:
        """Return its descriptor."""
        return self._descriptor


class Copy:
    """One copy, out or in.

    Whoever waits for it learns of its failure.

    Args:
        file: that is written or read.
        offset: in the file.
        storage: the memory; held until the copy has ended.
        is_out: to the file.
    """

    __slots__ = ("_done", "error", "file", "is_cancelled", "is_out", "memory", "offset")

    def __init__(self, file: File, offset: int, storage: torch.UntypedStorage, *, is_out: bool) -> None:
        self.file, self.offset, self.is_out = file, offset, is_out
        self.memory: Any = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self.error: BaseException | None = None
        self.is_cancelled = False
        self._done = threading.Event()

    def carry_out(self) -> None:
        """Copy, or note why not; then let go of the memory."""
        memory, self.memory = self.memory, None
        try:
            if not self.is_cancelled:
                (_write if self.is_out else _read)(self.file.fileno(), memory, self.offset)
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            self.error = error.with_traceback(None)
        del memory
        self._done.set()

    def wait(self, worker: Worker) -> BaseException | None:
        """Wait for the end; return the reason of a failure."""
        while not self._done.wait(_LOOK_SECONDS):
            if not worker.is_alive() and not self._done.is_set():
                self.memory = None
                return OffloadFailed("the thread that copies has died")
        return self.error

    @property
    def is_over(self) -> bool:
        """Whether nobody has to wait."""
        return self._done.is_set()


def _write(file: int, memory: Any, offset: int) -> None:
    view = memoryview(memory)
    while view.nbytes:
        n = os.pwrite(file, view, offset)
        if n <= 0:
            raise OSError(errno.EIO, f"a short write: {view.nbytes} bytes were left")
        view, offset = view[n:], offset + n


def _read(file: int, memory: Any, offset: int) -> None:
    view = memoryview(memory)
    while view.nbytes:
        n = os.preadv(file, [view], offset)
        if n <= 0:
            raise OSError(errno.EIO, f"a short read: {view.nbytes} bytes were left")
        view, offset = view[n:], offset + n


class Worker:
    """A thread that makes one copy after the other, in order.

    It begins with the first copy, and ends where there has been none for a while.
    """

    def __init__(self) -> None:
        self._copies: SimpleQueue[Copy] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def hand_over(self, copy: Copy) -> None:
        """Have a copy made."""
        with self._lock:
            self._copies.put(copy)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="autoremat tier", daemon=True)
                self._thread.start()

    def is_alive(self) -> bool:
        """Tell whether the thread runs."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def _run(self) -> None:
        while True:
            try:
                self._copies.get(timeout=_IDLE_SECONDS).carry_out()
            except Empty:
                with self._lock:
                    if self._copies.empty():
                        self._thread = None
                        return


class Store:
    """What one step has in the tier.

    Args:
        tier: that it is a part of.
        file: of this step alone, as long as it goes on.
    """

    def __init__(self, tier: Disk, file: File) -> None:
        self.tier, self.used_bytes = tier, 0
        self._file, self._worker, self._pid = file, tier.worker, os.getpid()
        self._copies: list[Copy] = []

    def has_room(self, nbytes: int) -> bool:
        """Tell whether the tier's budget has room, beside other steps."""
        most = self.tier.most_bytes
        return most is None or self.tier.used_bytes + nbytes <= most

    def send(self, storage: torch.UntypedStorage) -> Copy:
        """Begin to copy memory to a place of its own."""
        offset = self.used_bytes
        self.used_bytes += storage.nbytes()
        return self._begun(Copy(self._file, offset, storage, is_out=True))

    def fetch(self, sent: Copy, storage: torch.UntypedStorage) -> Copy:
        """Begin to copy it back into other memory."""
        return self._begun(Copy(self._file, sent.offset, storage, is_out=False))

    def _begun(self, copy: Copy) -> Copy:
        self._copies.append(copy)
        self._worker.hand_over(copy)
        return copy

    def wait(self, copy: Copy) -> BaseException | None:
        """Wait for a copy; return the reason of a failure.

        In a copy of the process there is no thread, and the file is not its own.
        """
        if os.getpid() != self._pid:
            return OffloadFailed("the process was forked between forward and backward")
        return copy.wait(self._worker)

    def close(self) -> None:
        """End all copies.

        Later steps use the file again if nobody reads or writes it any more.
        """
        if os.getpid() != self._pid:
            return
        for copy in self._copies:
            copy.is_cancelled = True
        if all(copy.is_over and copy.error is None for copy in self._copies):
            self.tier.take_back(self._file)
        self._copies, self.used_bytes = [], 0


class Disk:
    """A folder as a tier.

    Args:
        folder: that exists.
        most_bytes: of all steps together; None where nobody limits them.

    Raises:
        ValueError: there is no such folder, or nothing can be written there.
    """

    def __init__(self, folder: str, most_bytes: int | None = None) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self.worker = Worker()
        self._pid = os.getpid()
        self._files: list[File] = []
        self._stores: weakref.WeakSet[Store] = weakref.WeakSet()
        self._files.append(self._file())

    @property
    def used_bytes(self) -> int:
        """Bytes of all steps that are not over."""
        return sum(store.used_bytes for store in list(self._stores))

    def open(self, nbytes: int) -> Store:
        """Make room for a step that will have so many bytes there.

        Raises:
            OffloadFailed: the disk has less left.
        """
        if os.getpid() != self._pid:
            self._pid, self.worker, self._files, self._stores = os.getpid(), Worker(), [], weakref.WeakSet()
        file = self._files.pop() if self._files else self._file()
        seen = os.fstatvfs(file.fileno())  # also where the folder is gone by now
        left = seen.f_bavail * seen.f_frsize + os.fstat(file.fileno()).st_blocks * 512
        if left < nbytes:
            self.take_back(file)
            raise OffloadFailed(
                f"{format_bytes(nbytes)} are to go to {self.folder}, which has {format_bytes(left)} left: make room "
                'there, name another folder (offload="disk:/path"), or give a smaller offload_budget'
            )
        store = Store(self, file)
        self._stores.add(store)
        return store

    def take_back(self, file: File) -> None:
        """Keep a file for the next step; two at most."""
        if len(self._files) < 2:
            self._files.append(file)

    def _file(self) -> File:
        try:
            return File(self.folder)
        except OSError as error:
            raise ValueError(
                f"offload names folder {self.folder!r}, in which no file can be made ({error.strerror}); name one on a "
                "disk with room"
            ) from None

    def link(self) -> Link:
        """Return the bandwidth each way, measured once for each folder.

        It is the median of a few copies of 16 MiB.
        """
        if self.folder not in _MEASURED:
            _MEASURED[self.folder] = self._measured()
        out, back = _MEASURED[self.folder]
        return Link(out, back, 1e-4, takes_turns=True, tier_bytes=self.most_bytes, name=f"disk:{self.folder}")

    def _measured(self) -> tuple[float, float]:
        """Measure by writing over the same place, as steps do."""
        rates, memory = dict[str, list[float]](out=[], back=[]), torch.zeros(_SAMPLE_BYTES, dtype=torch.uint8)
        for _ in range(1 + _SAMPLES):
            store, storage = self.open(_SAMPLE_BYTES), memory.untyped_storage()
            begin = time.perf_counter()
            sent = store.send(storage)
            failure = store.wait(sent)
            middle = time.perf_counter()
            failure = failure or store.wait(store.fetch(sent, storage))
            end = time.perf_counter()
            if failure is not None:
                raise OffloadFailed(f"{self.folder} cannot be written and read: {failure}") from failure
            rates["out"].append(_SAMPLE_BYTES / (middle - begin))
            rates["back"].append(_SAMPLE_BYTES / (end - middle))
            store.close()
        return statistics.median(rates["out"][1:]), statistics.median(rates["back"][1:])


_MEASURED: Final[dict[str, tuple[float, float]]] = {}
"""Bytes a second by folder, out and back."""
