"""The ``recollect`` command: ``recollect demo``, ``recollect solve``, ``recollect frontier``."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

# Threads of OpenMP wait for each other busily. Where something else runs on one of two cores, that makes a training
# step ten times slower (measured: 4.8 s instead of 0.5 s); a short wait costs 3 % on an idle machine. libgomp reads
# this when torch is loaded.
_SPIN_COUNT = "1000"


class _OneLineErrors(click.Group):
    """A group whose commands fail with one line that says what to do next; ``--debug`` shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and put any error of ours into one line."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            raise click.ClickException(_one_line(error)) from None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ValueError | OSError):
        return text
    return f"{type(error).__name__}: {text} (recollect --debug shows where)"


def _version() -> str:
    try:
        return version("recollect")
    except PackageNotFoundError:
        return "unknown (not installed: pip install -e .)"


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="recollect")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Gradient checkpointing that plans itself: training steps inside a budget in bytes."""


@main.command()
@click.option("--steps", type=click.IntRange(min=4), default=36, show_default=True, help="Training steps per run.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("out"), show_default=True, help="Folder or .png file."
)
@click.option("--quick", is_flag=True, help="Tiny models: only to see that everything works.")
def demo(steps: int, out: Path, quick: bool) -> None:
    """Train two models plainly, checkpointed by hand and with recollect, side by side; print what each cost."""
    _require("demo", "matplotlib", "sklearn")
    os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    from recollect.demo.report import run_demo

    if not run_demo(steps, out, quick=quick):
        raise click.ClickException(
            "a run left its budget or differed from plain training; please report this table with `recollect --version`"
        )


def _require(extra: str, *modules: str) -> None:
    """Fail before the work starts if a module of an extra is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(f"this needs {' and '.join(missing)}; run: pip install 'recollect[{extra}]'")


_keep = click.option("--keep", multiple=True, metavar="PATTERN", help="Modules or ops never computed again.")
_recompute = click.option("--recompute", multiple=True, metavar="PATTERN", help="Modules or ops always computed again.")


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--budget", required=True, help='Bytes ("3000000", "10GiB"), or a share of the plain peak ("0.5", "50%").'
)
@click.option("--solver", default="auto", show_default=True, help="Name of a solver.")
@_keep
@_recompute
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the plan to this file.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Save memory over the step as a picture.")
def solve(
    file: Path,
    budget: str,
    solver: str,
    keep: tuple[str, ...],
    recompute: tuple[str, ...],
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Plan the program in FILE (recollect-program JSON) and print the plan."""
    if plot_path is not None:
        _require("plots", "matplotlib")
    from recollect.plan import solve as make_plan
    from recollect.program import Program

    plan = make_plan(Program.from_json(file), _budget(budget), solver=solver, keep=keep, recompute=recompute)
    click.echo(str(plan))
    if json_path is not None:
        plan.to_json(json_path)
        click.echo(f"Plan written to {json_path}")
    if plot_path is not None:
        from recollect.show.plots import memory_plot

        click.echo(f"Picture written to {memory_plot(plan, plot_path)}")


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--points", type=click.IntRange(min=2), default=16, show_default=True, help="How many budgets.")
@_keep
@_recompute
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Save the frontier as a picture.")
@click.option("--beside", multiple=True, metavar="SOLVER", help="Solvers to mark in the picture.")
def frontier(
    file: Path,
    points: int,
    keep: tuple[str, ...],
    recompute: tuple[str, ...],
    plot_path: Path | None,
    beside: tuple[str, ...],
) -> None:
    """Print overhead against peak for the program in FILE, from the floor to the plain peak."""
    if plot_path is not None:
        _require("plots", "matplotlib")
    from recollect.plan import frontier as make_frontier
    from recollect.program import Program
    from recollect.show.progress import progress_bar

    with progress_bar() as progress:
        found = make_frontier(Program.from_json(file), points=points, keep=keep, recompute=recompute, progress=progress)
    click.echo(str(found))
    if plot_path is not None:
        found.plot(plot_path, beside=beside)
        click.echo(f"Picture written to {plot_path}")


def _budget(text: str) -> int | float | str:
    """Numbers as numbers, everything else as it was typed."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    main()
