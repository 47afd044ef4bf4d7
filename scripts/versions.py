"""The everyday tests with several versions of torch, each in a virtual environment of its own: ``make versions``.

By hand, not in continuous integration: every version takes gigabytes to install, and its own minutes of tests.
``python scripts/versions.py 2.13 2.15`` looks at these two only.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]
FOLDER: Final = ROOT / "build" / "versions"
VERSIONS: Final = "2.11", "2.13", "2.14.1", "2.15"
"""The oldest and the newest that ``autoremat.engines.torch.world.versions`` names, and two in between."""


class Result(NamedTuple):
    """What became of one version: in words, whether that is good, and where the details are."""

    words: str
    is_good: bool
    log: Path


def requirement(version: str) -> str:
    """The torch to install: the newest of two numbers' releases, or exactly that of three."""
    return f"torch=={version}" if version.count(".") == 2 else f"torch=={version}.*"


def run(command: list[str], log: Path, **env: str) -> int:
    """Run a command with its output at the end of the log."""
    with log.open("a") as file:
        return subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env=os.environ | env, check=False).returncode


def counts(log: Path) -> str:
    """Passed, failed, skipped: pytest's last line."""
    last = next((line for line in reversed(log.read_text().splitlines()) if " passed" in line or " failed" in line), "")
    found = {word: n for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    return ", ".join(f"{found.get(word, 0)} {word}" for word in ("passed", "failed", "skipped", "error"))


def examine(version: str) -> Result:
    """Install one version, and run the tests with it."""
    home, log = FOLDER / version, FOLDER / f"{version}.log"
    FOLDER.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    python = str(home / "bin" / "python")
    if not Path(python).exists() and run([sys.executable, "-m", "venv", str(home)], log):
        return Result("no virtual environment", False, log)
    if run([python, "-m", "pip", "install", "--quiet", "-e", ".[dev]", requirement(version)], log):
        return Result("could not be installed", False, log)
    begin = time.monotonic()
    tests = [python, "-m", "pytest", "-n", "auto", "--dist", "worksteal"]
    failed = run(tests, log, OMP_NUM_THREADS="1", GOMP_SPINCOUNT="1000")
    return Result(f"{counts(log)}, {(time.monotonic() - begin) / 60:.1f} minutes", not failed, log)


def main(versions: tuple[str, ...]) -> int:
    """One line per version; the exit status says whether all are good."""
    good = True
    for version in versions:
        result = examine(version)
        good &= result.is_good
        print(f"torch {version:7} {result.words}; {result.log.relative_to(ROOT)}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:]) or VERSIONS))
