"""Looks for a plan in its own process, beside a training.

Not in a thread: planning is Python, and a training that runs many short operators waits for the interpreter's lock
after each of them, so it would lose more than the search takes. Not a copy of this process either: the other one has
nothing but this package, no model, no device and no main module of the user's. It gives way to everything else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol

from autoremat.planner.wishes import NO_WISHES, Wishes
from autoremat.program import InfeasibleBudget, Plan, Program
from autoremat.program.json_format import program_to_data

_BEGIN: Final = (
    "import json, sys; wanted = json.load(sys.stdin); sys.path[:] = wanted.pop('path'); "
    "from autoremat.planner.beside import answer; answer(wanted)"
)
_ONE_THREAD: Final = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_GIVES_WAY: Final = 10
"""How nice the other process is."""


class SearchFailed(RuntimeError):
    """A search ended in an error; the message says in which."""


@dataclass(frozen=True)
class Wanted:
    """A plan that is looked for.

    Attributes:
        program: of the step.
        budget_bytes: that its peak is to stay within.
        seconds: when to stop looking.
        wishes: as for ``solve``.
        effort: as for ``solve``.
    """

    program: Program
    budget_bytes: int
    seconds: float
    wishes: Wishes = NO_WISHES
    effort: float | None = None

    def found(self) -> Plan:
        """Look for it.

        Raises:
            InfeasibleBudget: there is none that is known.
        """
        from autoremat.planner.solving import solve

        return solve(
            self.program, self.budget_bytes, wishes=self.wishes, time_limit_seconds=self.seconds, effort=self.effort
        )


class Search(Protocol):
    """A search that has begun.

    Attributes:
        wanted: what is looked for.
    """

    wanted: Wanted

    def is_over(self) -> bool:
        """Tell whether ``plan`` does not have to wait."""

    def plan(self) -> Plan | None:
        """Return what was found; None where no plan is known.

        It is a plan of the very program that was asked about.

        Raises:
            SearchFailed: it ended in an error.
        """


class Here:
    """A search in this process, where there is no other.

    It takes its time when it is asked.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted

    def is_over(self) -> bool:
        """Say yes: nobody else is going to do it."""
        return True

    def plan(self) -> Plan | None:
        """Look for it now."""
        try:
            return self.wanted.found()
        except InfeasibleBudget:
            return None
        except Exception as error:
            raise SearchFailed(f"{type(error).__name__}: {error}") from error


class Beside:
    """A search in another process.

    It ends when nobody refers to this any more, and with this process.

    Raises:
        OSError: there can be no other process, or no file to hand over what is wanted.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted, self._pid = wanted, os.getpid()
        question = vars(wanted) | {
            "path": list(map(str, sys.path)),
            "program": program_to_data(wanted.program),
            "wishes": vars(wanted.wishes),
        }
        # Files, because somebody would have to read from pipes; open until the answer is read.
        self._answer, self._errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
        weakref.finalize(self, _close, self._answer, self._errors)
        with tempfile.TemporaryFile() as asked:
            asked.write(json.dumps(question).encode())
            asked.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BEGIN], stdin=asked, stdout=self._answer, stderr=self._errors,
                env=os.environ | _ONE_THREAD,
            )  # fmt: skip
        weakref.finalize(self, _end, self._process, self._pid)

    def is_over(self) -> bool:
        """Tell whether the other process has ended.

        In a copy of this one it is none of ours.
        """
        return os.getpid() != self._pid or self._process.poll() is not None

    def plan(self) -> Plan | None:
        """Return what it has found, once it has ended."""
        if os.getpid() != self._pid:
            return None
        code = self._process.wait()
        said = _read(self._answer)
        if code or not said:
            last = _read(self._errors).strip().splitlines()[-1:] or [f"it ended with code {code}"]
            raise SearchFailed(last[0])
        data = json.loads(said)
        if data is None:
            return None
        found = Plan.from_json(data)
        return Plan(**{**vars(found), "program": self.wanted.program})


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _close(*files: IO[bytes]) -> None:
    for file in files:
        file.close()


def _end(process: subprocess.Popen[bytes], pid: int) -> None:
    """End a search that nobody waits for any more."""
    if os.getpid() == pid and process.poll() is None:
        process.kill()
        process.wait()


_LAST: list[weakref.ref[Beside]] = []
"""The search that has begun last."""


def begun(wanted: Wanted) -> Search | None:
    """Begin a search, in a process beside this one if possible.

    Where there can be none, it is in this one; None while another one runs.
    """
    last = _LAST[0]() if _LAST else None
    if last is not None and not last.is_over():
        return None
    if not _has_interpreter():
        return Here(wanted)
    try:
        search = Beside(wanted)
    except OSError:
        return Here(wanted)
    _LAST[:] = [weakref.ref(search)]
    return search


def _has_interpreter() -> bool:
    """Tell whether it is known how to run Python.

    It is not in a program that has it built in.
    """
    return bool(sys.executable) and not getattr(sys, "frozen", False) and Path(sys.executable).stem.startswith("py")


def answer(question: Mapping[str, Any]) -> None:
    """Look for the plan, in the other process, and write it.

    It is JSON, or null where none is known.
    """
    if hasattr(os, "nice"):
        os.nice(_GIVES_WAY)
    program, wishes = Program.from_json(question["program"]), Wishes(**question["wishes"])
    wanted = Wanted(program, question["budget_bytes"], question["seconds"], wishes, question["effort"])
    try:
        sys.stdout.write(wanted.found().to_json())
    except InfeasibleBudget:
        sys.stdout.write("null")
