"""Everyday tests with several versions of torch or of JAX, each in a virtual environment of its own: ``make versions``.

By hand, not in continuous integration: every version takes gigabytes to install, and its own minutes of tests.
``python scripts/versions.py 2.13 2.15`` looks at these two of torch only; ``make versions-jax``, which is
``python scripts/versions.py jax``, runs the tests of the engine for JAX with the oldest and the newest of JAX.
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
VERSIONS: Final = {
    "torch": ("2.11", "2.13", "2.14.1", "2.15"),
    "jax": ("0.9", "0.10"),
}
"""Of torch the oldest and the newest that ``autoremat.engines.torch.world.versions`` names, and two in between; of JAX
the oldest that ``pyproject.toml`` allows, and the newest."""
TESTS: Final = {"torch": (), "jax": ("tests/engines/jax",)}


class Result(NamedTuple):
    """What became of one version: in words, whether that is good, and where the details are."""

    words: str
    is_good: bool
    log: Path


def requirement(version: str, name: str = "torch") -> str:
    """What to install: the newest of two numbers' releases, or exactly that of three."""
    return f"{name}=={version}" if version.count(".") == 2 else f"{name}=={version}.*"


def run(command: list[str], log: Path, **env: str) -> int:
    """Run a command with its output at the end of the log."""
    with log.open("a") as file:
        return subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env=os.environ | env, check=False).returncode


def counts(log: Path) -> str:
    """Passed, failed, skipped: pytest's last line."""
    last = next((line for line in reversed(log.read_text().splitlines()) if " passed" in line or " failed" in line), "")
    found = {word: n for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    return ", ".join(f"{found.get(word, 0)} {word}" for word in ("passed", "failed", "skipped", "error"))


def examine(version: str, name: str = "torch") -> Result:
    """Install one version, and run the tests with it."""
    known = version if name == "torch" else f"{name}-{version}"
    home, log = FOLDER / known, FOLDER / f"{known}.log"
    FOLDER.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    python = str(home / "bin" / "python")
    if not Path(python).exists() and run([sys.executable, "-m", "venv", str(home)], log):
        return Result("no virtual environment", False, log)
    if run([python, "-m", "pip", "install", "--quiet", "-e", ".[dev]", requirement(version, name)], log):
        return Result("could not be installed", False, log)
    begin = time.monotonic()
    tests = [python, "-m", "pytest", "-n", "auto", "--dist", "worksteal", *TESTS[name]]
    failed = run(tests, log, OMP_NUM_THREADS="1", GOMP_SPINCOUNT="1000")
    return Result(f"{counts(log)}, {(time.monotonic() - begin) / 60:.1f} minutes", not failed, log)


def main(arguments: tuple[str, ...]) -> int:
    """One line per version; the exit status says whether all are good."""
    name, versions = ("jax", arguments[1:]) if arguments[:1] == ("jax",) else ("torch", arguments)
    good = True
    for version in versions or VERSIONS[name]:
        result = examine(version, name)
        good &= result.is_good
        print(f"{name} {version:7} {result.words}; {result.log.relative_to(ROOT)}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:])))
