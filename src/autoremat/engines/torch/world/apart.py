"""Runs user code in a forked process, so that nothing changes here.

``run_apart`` forks. The child has everything that the parent has, as it is at that moment: objects, generators,
counters, modules, random generators, real tensors. It runs the work, sends the result through a pipe, and ends without
any clean-up. So nothing in the parent can have changed, wherever the user's code keeps its state.

Open files are shared with the parent. So the child opens files that are read once more, works on copies of files that
are written, and has neither pipes, sockets nor a terminal. A file that Python code opens by name for writing becomes a
copy in memory. What C code opens by name, or what the code asks other processes to do, does happen.

The child's memory is its own: it shares with the parent what it only reads, and takes memory for what it writes or
makes. A recording on real tensors makes one operator's results at a time, and copies of what the step overwrites.
"""

from __future__ import annotations

import builtins
import copyreg
import gc
import importlib
import io
import os
import pickle
import select
import signal
import stat
import struct
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensorMode

T = TypeVar("T")
Report = Callable[[str, float], None]

_COPIED_BYTES: Final = 64 << 20
"""Files open for reading and writing are copied up to this size.

A larger one is empty in the child.
"""
_STUCK_SECONDS: Final = 120.0
"""A child without progress for this long is given up.

It waits for something that only the parent could give it.
"""
_SAID_BYTES: Final = 2000
"""How much of a dead child's last words the error quotes."""


class CannotRunApart(Exception):
    """A separate process cannot be used here; nothing has been run."""


class RecordingDied(RuntimeError):
    """The process that recorded a step has died; the message says how."""


class _InTheChild(Exception):
    """The child's traceback as text: the cause of the parent's error."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


class _Here:
    """What is known of this process."""

    is_child = False
    cannot = False
    """A child has found out that torch fails in a child."""
    is_warm = False


def can_run_apart() -> bool:
    """Tell whether a fork is safe here.

    It is if no accelerator is in use, no other thread runs, and there is no other process of ours to talk to.
    """
    if _Here.is_child or _Here.cannot or not sys.platform.startswith("linux") or not hasattr(os, "fork"):
        return False
    if threading.active_count() != 1 or threading.current_thread() is not threading.main_thread():
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    return not any(m.is_initialized() for m in (torch.cuda, torch.xpu))


def run_apart(work: Callable[[Report | None], T], progress: Report | None = None) -> T:
    """Run ``work(report)`` in a child process and return its result.

    What the work reports is passed on to ``progress``. Its warnings are issued here, once. Its errors are raised here,
    with their type where that can be sent.

    Raises:
        CannotRunApart: no child could be made, or torch does not work in one; ``work`` has not been run.
        RecordingDied: the child has died, or has waited in vain.
    """
    _warm_up()
    receiving, sending = os.pipe()
    said = os.memfd_create("autoremat")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads; there are none of Python's
        warnings.simplefilter("ignore", RuntimeWarning)  # of JAX's threads, where it is loaded; the child calls no JAX
        try:
            pid = os.fork()
        except OSError as error:
            for fd in (receiving, sending, said):
                os.close(fd)
            raise CannotRunApart(str(error)) from error
    if pid == 0:
        _be_child(work, progress is not None, sending, said)
    os.close(sending)
    try:
        return _Parent(pid, receiving, said, progress).outcome()
    finally:
        _end(pid)
        os.close(receiving)
        os.close(said)


def _end(pid: int) -> None:
    """Make sure that the child is gone.

    It has sent all that it had, or its result is no longer wanted.
    """
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _warm_up() -> None:
    """Import what torch needs for fake tensors, once for all children."""
    if _Here.is_warm:
        return
    _Here.is_warm = True
    with suppress(Exception), torch._C._DisableAutocast(), torch.no_grad(), FakeTensorMode() as mode:
        mode.from_tensor(torch.ones(1, 1)).mm(torch.ones(1, 1)).softmax(0).sum()


# ---- the parent ------------------------------------------------------------------------------------------------------


class _Parent:
    """Listens to a child until it has sent its result."""

    def __init__(self, pid: int, receiving: int, said: int, progress: Report | None) -> None:
        self._pid, self._receiving, self._said, self._progress = pid, receiving, said, progress
        self._worked, self._waited = -1, 0.0

    def outcome(self) -> Any:
        """Return what the work returned; raise what it raised."""
        while True:
            head = self._read(8)
            kind, content = pickle.loads(self._read(struct.unpack("q", head)[0]))
            if kind == "progress":
                if self._progress is not None:
                    self._progress(*content)
            elif kind == "warning":
                _warn_again(*content)
            elif kind == "cannot":
                _Here.cannot = True
                raise CannotRunApart(content)
            elif kind == "error":
                raise _error_of(*content)
            else:
                return _loads(content)

    def _read(self, n: int) -> bytes:
        parts = []
        while n:
            while not select.select([self._receiving], [], [], 5.0)[0]:
                self._look_after()
            part = os.read(self._receiving, min(n, 1 << 20))
            if not part:
                raise self._died()
            parts.append(part)
            n -= len(part)
        return b"".join(parts)

    def _look_after(self) -> None:
        """Give up a child that waits for ever.

        It may wait for a lock that a thread of the parent held.
        """
        worked = _cpu_ticks(self._pid)
        self._waited = self._waited + 5.0 if worked == self._worked else 0.0
        self._worked = worked
        if self._waited >= _STUCK_SECONDS:
            raise RecordingDied(
                f"the process in which the step was recorded has not done anything for {self._waited:.0f} seconds: the "
                "step waits for something that is not there (another process, input from a terminal)"
            )

    def _died(self) -> RecordingDied:
        try:
            end = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)  # the process id stays taken until _end
        except ChildProcessError:  # the program ignores SIGCHLD
            end = None
        if end is None:
            how = "has ended"
        elif end.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
            how = f"was ended by {signal.Signals(end.si_status).name}"
            how += " (the system ends processes in this way when memory runs out)" * (end.si_status == signal.SIGKILL)
        else:
            how = f"ended itself (with {end.si_status})"
        size = os.fstat(self._said).st_size
        words = os.pread(self._said, _SAID_BYTES, max(0, size - _SAID_BYTES)).decode(errors="replace").strip()
        return RecordingDied(
            f"the process in which the step was recorded {how}. It ran the step's own code, which may be why, so the "
            "same has not been tried in this process" + (f"; its last words were: {words}" if words else "")
        )


def _cpu_ticks(pid: int) -> int:
    """Return the processor time that a process has used."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return -1
    return int(fields[11]) + int(fields[12])


def _warn_again(message: bytes, text: str, category: bytes, filename: str, line: int) -> None:
    """Repeat a child's warning here, as if from the same line."""
    try:
        said, kind = _loads(message), _loads(category)
    except Exception:  # noqa: BLE001 - a class that cannot be sent
        said, kind = text, UserWarning
    module = next((m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == filename), None)
    registry = vars(module).setdefault("__warningregistry__", {}) if module is not None else {}
    warnings.warn_explicit(said, kind, filename, line, registry=registry)


def _error_of(pickled: bytes | None, name: str, text: str, trace: str, file: str) -> BaseException:
    """Rebuild the child's error, or one that says what it was."""
    error: BaseException | None = None
    if pickled is not None:
        with suppress(Exception):
            error = _loads(pickled)
    if not isinstance(error, BaseException):
        error = RuntimeError(f"{name}: {text}")
    error.__cause__ = _InTheChild(trace)
    with suppress(AttributeError):  # the frames stay in the child
        error.raised_in_child = file  # type: ignore[attr-defined]
    return error


# ---- the child -------------------------------------------------------------------------------------------------------


def _be_child(work: Callable[[Report | None], Any], reports: bool, sending: int, said: int) -> None:
    """Do the work, send the result, and end; never returns."""
    code = 1
    try:
        pipe = _Pipe(sending)
        _settle_in(sending, said, pipe)
        obstacle = _obstacle()
        if obstacle:
            pipe.send("cannot", obstacle)
        else:
            report = (lambda label, share: pipe.send("progress", (label, share))) if reports else None
            try:
                done = _dumps(work(report))
            except BaseException as error:  # noqa: BLE001 - whatever it is, the parent is to know
                pipe.send("error", _sendable(error))
            else:
                pipe.send("done", done)
        code = 0
    except BaseException:  # noqa: BLE001 - nothing of the child may go on in the parent's code
        with suppress(BaseException):
            os.write(said, traceback.format_exc().encode())
    finally:
        os._exit(code)


class _Pipe:
    """Carries messages from a child to its parent."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def send(self, kind: str, content: Any) -> None:
        """Send one message."""
        message = pickle.dumps((kind, content))
        left = memoryview(struct.pack("q", len(message)) + message)
        while left:
            left = left[os.write(self._fd, left) :]

    def warn(self, message: Any, category: type, filename: str, line: int, *_: Any) -> None:
        """Stand in for ``warnings.showwarning``."""
        kinds = []
        for thing in (message, category):
            try:
                kinds.append(_dumps(thing))
            except Exception:  # noqa: BLE001 - a class that cannot be sent
                kinds.append(b"")
        self.send("warning", (kinds[0], str(message), kinds[1], filename, line))


def _settle_in(sending: int, said: int, pipe: _Pipe) -> None:
    """Detach the child from what it shares with the parent."""
    _Here.is_child = True
    gc.freeze()  # the child must not collect objects of the parent
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    _unshare_files({sending, said})
    for fd in (1, 2):
        os.dup2(said, fd)
    _Copies().take_over()
    torch.set_num_threads(1)  # the parent's threads are not in the fork, and OpenMP would wait for them
    warnings.showwarning = pipe.warn  # type: ignore[assignment]


def _obstacle() -> str:
    """Return why torch cannot work in this child; "" if it can."""
    try:
        with torch._C._DisableAutocast(), torch.inference_mode(False), torch.enable_grad():
            torch.ones(1, requires_grad=True).exp().backward()
            if torch.cuda.is_available():
                with FakeTensorMode():
                    torch.ones(1, device="cuda").exp()
    except Exception as error:  # noqa: BLE001 - autograd's threads, CUDA's driver
        return f"{type(error).__name__}: {error}"
    return ""


def _unshare_files(own: set[int]) -> None:
    """Give the child its own position and content of every open file."""
    import fcntl

    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd in own or fd == null:
            continue
        try:
            kind, flags = os.fstat(fd), fcntl.fcntl(fd, fcntl.F_GETFL)
            if stat.S_ISREG(kind.st_mode):
                other = _copy_of(fd, kind.st_size, flags)
                os.dup2(other, fd)
                os.close(other)
            elif stat.S_ISFIFO(kind.st_mode) or stat.S_ISSOCK(kind.st_mode) or os.isatty(fd):
                os.dup2(null, fd)
        except OSError:  # the descriptor of this listing, closed by now; or a file that cannot be opened again
            continue
    os.close(null)


def _copy_of(fd: int, size: int, flags: int) -> int:
    """Open a file that reads like this one, at the same position."""
    at = os.lseek(fd, 0, os.SEEK_CUR)
    mode = flags & os.O_ACCMODE
    if mode == os.O_RDONLY:
        other = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    else:
        other = os.memfd_create("autoremat")
        if mode == os.O_RDWR and size <= _COPIED_BYTES:
            os.write(other, os.pread(fd, size, 0))
        os.ftruncate(other, size)
    os.lseek(other, size if flags & os.O_APPEND else at, os.SEEK_SET)
    return other


class _Copies:
    """Replaces files opened by name for writing with copies in memory.

    The child reads these copies from then on.
    """

    def __init__(self) -> None:
        self._open, self._fd_of = io.open, dict[str, int]()

    def take_over(self) -> None:
        """Stand in for ``open``."""
        builtins.open = io.open = self.open

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """Open a file, or its copy."""
        if isinstance(file, int):
            return self._open(file, mode, *args, **kwargs)
        path = os.path.abspath(os.fsdecode(file))
        if any(c in mode for c in "wax+") and path not in self._fd_of and self._is_file(path):
            if "x" in mode and os.path.exists(path):
                raise FileExistsError(path)
            self._fd_of[path] = self._copied(path)
        if path not in self._fd_of:
            return self._open(file, mode, *args, **kwargs)
        return self._open(f"/proc/self/fd/{self._fd_of[path]}", mode.replace("x", "w"), *args, **kwargs)

    def _is_file(self, path: str) -> bool:
        return os.path.isfile(path) if os.path.exists(path) else os.path.isdir(os.path.dirname(path))

    def _copied(self, path: str) -> int:
        fd = os.memfd_create("autoremat")
        if os.path.exists(path) and os.path.getsize(path) <= _COPIED_BYTES:
            with self._open(path, "rb") as file:
                os.write(fd, file.read())
        return fd


# ---- what is sent ----------------------------------------------------------------------------------------------------


def _operator(namespace: str, name: str, overload: str | None) -> Any:
    """Return an operator by name, or the packet of its overloads.

    None for an operator that only the child has defined.
    """
    try:
        packet = getattr(getattr(torch.ops, namespace), name)
        return packet if overload is None else getattr(packet, overload)
    except (AttributeError, RuntimeError):
        return None


def _named(op: OpOverload) -> tuple[Any, ...]:
    namespace, _, name = op.name().partition("::")
    return _operator, (namespace, name.partition(".")[0], op._overloadname)


def _packet_named(packet: OpOverloadPacket) -> tuple[Any, ...]:
    return _operator, (*packet._qualified_op_name.split("::"), None)


class _Pickler(pickle.Pickler):
    """Sends operators by name."""

    dispatch_table = copyreg.dispatch_table | {
        OpOverload: _named,
        OpOverloadPacket: _packet_named,
        **dict.fromkeys(OpOverload.__subclasses__(), _named),
    }


class _ErrorPickler(_Pickler):
    """Sends local error classes by identity: the parent has them, too.

    A class that was made inside a function cannot be found by its name, but a fork keeps its address.
    """

    def persistent_id(self, obj: Any) -> Any:
        """Name an error class that pickle cannot find by its name."""
        if isinstance(obj, type) and issubclass(obj, BaseException) and not _is_importable(obj):
            return obj.__qualname__, id(obj)
        return None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        """Find the error class again among those of this process."""
        pending: list[type] = [BaseException]
        while pending:
            found = pending.pop()
            if (found.__qualname__, id(found)) == pid:
                return found
            pending += type.__subclasses__(found)
        raise pickle.UnpicklingError(f"no class {pid[0]} here")


def _is_importable(cls: type) -> bool:
    try:
        found: Any = sys.modules.get(cls.__module__) or importlib.import_module(cls.__module__)
        for name in cls.__qualname__.split("."):
            found = getattr(found, name)
    except Exception:  # noqa: BLE001 - then it cannot
        return False
    return found is cls


def _dumps(thing: Any, pickler: type[pickle.Pickler] = _Pickler) -> bytes:
    buffer = io.BytesIO()
    pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(thing)
    return buffer.getvalue()


def _loads(data: bytes) -> Any:
    return _Unpickler(io.BytesIO(data)).load()


def can_be_sent(thing: Any) -> bool:
    """Tell whether an object can be sent to the parent."""
    try:
        _dumps(thing)
    except Exception:  # noqa: BLE001 - whatever pickle does not know
        return False
    return True


def _sendable(error: BaseException) -> tuple[bytes | None, str, str, str, str]:
    """Describe an error for sending: pickle, name, words, traceback, file.

    The pickle is None if the error cannot be sent, or would come out as something else.
    """
    trace = "".join(traceback.format_exception(error))
    file = traceback.extract_tb(error.__traceback__)[-1].filename
    try:
        pickled: bytes | None = _dumps(error, _ErrorPickler)
        again = _loads(pickled or b"")
        if type(again) is not type(error) or str(again) != str(error):
            pickled = None
    except Exception:  # noqa: BLE001 - then its name and words must do
        pickled = None
    return pickled, type(error).__name__, str(error), trace, file
