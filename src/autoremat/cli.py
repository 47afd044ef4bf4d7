"""The ``autoremat`` command: ``plan``, ``explain``, ``frontier``, ``check``, ``solve``, ``bench``, ``demo``."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import click
from click.shell_completion import CompletionItem

from autoremat.loading import NoSuchStep, load_function, load_step
from autoremat.planner import SOLVERS, Wishes
from autoremat.program import InfeasibleBudget, Plan, Program
from autoremat.program.units import Budget, parse_budget

if TYPE_CHECKING:
    from autoremat.planner.frontiers import Frontier

# Threads of OpenMP wait for each other busily. Where something else runs on one of two cores, that makes a training
# step ten times slower (measured: 4.8 s instead of 0.5 s); a short wait costs 3 % on an idle machine. libgomp reads
# this when torch is loaded.
_SPIN_COUNT = "1000"

# Exit codes; click has 1 for other errors.
USAGE: Final = 2
INFEASIBLE: Final = 3
NOT_THE_SAME: Final = 4
REFUSED: Final = 5

_PAGE_POINTS: Final = 9
"""Number of budgets of the frontier on an HTML page."""

C = TypeVar("C", bound=Callable[..., Any])

# --- Errors -----------------------------------------------------------------------------------------------------------


class _WrongUse(click.ClickException):
    """The command line is wrong, or names something that is not there."""

    exit_code = USAGE


class _Infeasible(click.ClickException):
    """No known plan fits into the budget."""

    exit_code = INFEASIBLE


class _OneLineErrors(click.Group):
    """A group whose commands fail with one helpful line.

    The line says what to do next; ``--debug`` shows the traceback.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put what is wrong before the command's name into one line."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise _usage(error, ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and put any error of ours into one line."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise _usage(error, ctx) from None
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except (Exception, SystemExit) as error:
            if ctx.params.get("debug"):
                raise
            raise _failure_of(error) from None


def _usage(error: click.UsageError, ctx: click.Context) -> click.ClickException:
    if type(error).__name__ == "NoArgsIsHelpError":  # nothing was asked for: the help is the answer
        return error
    path = (error.ctx or ctx).command_path
    return _WrongUse(f"{' '.join(error.format_message().split())} See `{path} --help`.")


def _failure_of(error: Exception | SystemExit) -> click.ClickException:
    if isinstance(error, SystemExit):  # to take its code for ours would call a run that did nothing a success
        return click.ClickException(f"the code of the step ended the program (exit code {error.code}); take that out")
    kinds = {InfeasibleBudget: _Infeasible, NoSuchStep: _WrongUse}
    return kinds.get(type(error), click.ClickException)(_one_line(error))


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot use {str(error.filename)!r} ({error.strerror}); name another file"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) or (isinstance(error, ValueError) and _is_ours(error)):
        return text
    return f"{type(error).__name__}: {text} (autoremat --debug shows where)"


def _is_ours(error: Exception) -> bool:
    """Tell whether our own code raised an error.

    Then its text says what to do.
    """
    if (file := getattr(error, "raised_in_child", None)) is not None:
        return Path(file).is_relative_to(Path(__file__).parent)
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is None or Path(frame.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


def _version() -> str:
    try:
        return version("autoremat")
    except PackageNotFoundError:
        return "unknown (not installed: pip install -e .)"


# --- What options take ------------------------------------------------------------------------------------------------


class _Budget(click.ParamType):
    """A budget as a person types it.

    It is read here, so that a malformed one is noticed before any work.
    """

    name = "budget"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float | str:
        """Return numbers as numbers, everything else as it was typed."""
        budget = _number(value)
        if budget != "auto":
            try:
                parse_budget(budget, 1 << 62)
            except ValueError as error:
                self.fail(f"{error}.", param, ctx)
        return budget


class _Size(click.ParamType):
    """A number of bytes as a person types it."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes; a share would be a share of nothing."""
        size = _number(value)
        try:
            if isinstance(size, float) or str(size).strip().endswith("%"):
                raise ValueError("a share")
            return parse_budget(size, 0)
        except ValueError:
            self.fail(f"{value!r} is no number of bytes; accepted are 3000000, 512MB, 1.5GiB.", param, ctx)


class _Seconds(click.FloatRange):
    """A number of seconds in a range, and not NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Refuse NaN, which is within every range by click's comparison."""
        seconds = float(super().convert(value, param, ctx))
        if isnan(seconds):
            self.fail(f"{value!r} is no number of seconds.", param, ctx)
        return seconds


class _Target(click.ParamType):
    """A file to write, or ``-`` for stdout where allowed.

    One that cannot be written is noticed before any work.
    """

    name = "file"

    def __init__(self, *, dash: bool = False) -> None:
        self._dash = dash

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        """Return the dash, or a path whose folders can be made."""
        if value == "-":
            if self._dash:
                return "-"
            self.fail("only --json can go to the terminal with -. Name a file.", param, ctx)
        path = Path(value)
        folder = next(p for p in path.absolute().parents if p.exists())
        obstacle = (
            "that is a folder" if path.is_dir()
            else f"{folder} is a file, not a folder" if not folder.is_dir()
            else f"{path if path.exists() else folder} may not be written" if not _can_be_written(path, folder)
            else ""
        )  # fmt: skip
        if obstacle:
            self.fail(f"cannot write {value!r}: {obstacle}. Name another file.", param, ctx)
        return path

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete files."""
        return [CompletionItem(incomplete, type="file")]


def _can_be_written(path: Path, folder: Path) -> bool:
    """Tell whether a file can be written there.

    Where only the last part of its path is missing, it is tried.
    """
    there = path.exists()
    if not os.access(path if there else folder, os.W_OK):
        return False
    if there or path.absolute().parent != folder:
        return True
    try:
        path.touch(exist_ok=False)
        path.unlink()
    except OSError:
        return False
    return True


def _number(text: Any) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return str(text)


def _together(*options: Callable[[C], C]) -> Callable[[C], C]:
    """Join several options into one decorator, in the help's order."""

    def decorate(command: C) -> C:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_BUDGET_HELP = 'Bytes ("3000000", "10GiB"), a share of the plain peak ("0.5", "50%"), or "auto".'


class _Model(click.ParamType):
    """``package.module:function`` or a file; the shell completes files."""

    name = "model"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete files."""
        return [CompletionItem(incomplete, type="file")]


_model = click.argument("model", type=_Model())
_file = click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
_budget = click.option("--budget", required=True, type=_Budget(), help=_BUDGET_HELP)
_solver = click.option(
    "--solver", type=click.Choice(SOLVERS), default="auto", show_default=True, help="What makes the plan."
)
_wishes = _together(
    click.option("--keep", multiple=True, metavar="PATTERN", help="Modules or ops never computed again."),
    click.option("--recompute", multiple=True, metavar="PATTERN", help="Modules or ops always computed again."),
)
_recording = _together(
    click.option("--device", help="Where the model will train, if its tensors are on the meta device."),
    click.option("--optimizer", type=_Size(), help="Bytes of the optimizer's state, counted in the peak."),
    click.option(
        "--timing", type=click.Choice(["auto", "measure", "estimate"]),
        help="Where seconds and kernel scratch come from: what was measured before and, of the rest, each operator "
        "alone, if there is room (auto, the default) or in any case (measure); FLOPs and bytes alone (estimate).",
    ),
    click.option(
        "--accumulate", is_flag=True, help="A step of gradient accumulation: it finds gradients, and adds to them."
    ),
)  # fmt: skip
_offload = _together(
    click.option(
        "--offload", metavar="TIER", help='Where values may be moved to: "disk:/path", "host" or "auto"; for models.'
    ),
    click.option("--offload-budget", type=_Size(), help="The most bytes in that tier."),
)
_json = click.option(
    "--json", "json_path", type=_Target(dash=True), metavar="FILE",
    help="Write it as JSON to this file, folders on the way are made; - prints JSON instead of text.",
)  # fmt: skip
_html = click.option(
    "--html", "html_path", type=_Target(), metavar="FILE",
    help="Write it as one HTML page, with the frontier, which takes as long again as --time-limit.",
)  # fmt: skip
_plot = click.option(
    "--plot", "plot_path", type=_Target(), metavar="FILE", help="Save a picture of it: .png, .svg or .pdf."
)


def _time_limit(seconds: float) -> Callable[[C], C]:
    text = "The longest that planning may take, in seconds."
    return click.option(
        "--time-limit", type=_Seconds(min=0, min_open=True), default=seconds, show_default=True, help=text
    )


_effort = click.option(
    "--effort", type=_Seconds(min=0, min_open=True),
    help="How much work to do, on any machine; 1 is what goes with 10 seconds.  [default: a tenth of --time-limit]",
)  # fmt: skip
_planning = _together(_solver, _wishes, _time_limit(10.0), _effort, _json, _plot, _html)


# --- What commands work on --------------------------------------------------------------------------------------------


def _recorded(
    target: str, device: str | None, optimizer: int | None, timing: str | None, accumulate: bool
) -> Program:  # fmt: skip
    """Record the program of the step that the command line names."""
    if target.endswith(".json"):
        raise NoSuchStep(f"{target} is a file, not a model; to plan the program in it: autoremat solve {target}")
    _require("torch", "torch", "platformdirs")
    step = load_step(target)
    from autoremat.api import record_step
    from autoremat.show.progress import progress_bar

    with progress_bar() as progress:
        name = Path(target).stem if target.endswith(".py") else target.rpartition(":")[2]
        return record_step(
            step.fn, step.args, step.kwargs, optimizer, timing or "auto", progress, device, name,
            accumulate=accumulate,
        )  # fmt: skip


def _linked(program: Program, offload: str | None, offload_budget: int | None) -> Program:
    """Add the link to the tier that the command line names."""
    if offload is None and offload_budget is None:
        return program
    _require("torch", "torch", "platformdirs")
    from autoremat.engines.torch.world.tiers import TierOf

    return replace(program, link=TierOf(offload, offload_budget).link())


def _read_or_recorded(
    target: str, device: str | None, optimizer: int | None, timing: str | None, accumulate: bool
) -> Program | Plan:  # fmt: skip
    """Read a program or plan from a file, or record a step."""
    if not target.endswith(".json"):
        return _recorded(target, device, optimizer, timing, accumulate)
    if device or optimizer or timing or accumulate:
        raise click.UsageError(
            "--device, --optimizer, --timing and --accumulate are for models; a file has its bytes and seconds."
        )
    if not Path(target).is_file():
        raise NoSuchStep(f"there is no file {target}")
    from autoremat.program.json_format import PLAN_FORMAT, PROGRAM_FORMAT, read_json

    data = read_json(Path(target))
    if data.get("format") not in (PLAN_FORMAT, PROGRAM_FORMAT):
        raise NoSuchStep(f"{target} is neither a program nor a plan: its format is {data.get('format')!r}")
    return Plan.from_json(data) if data["format"] == PLAN_FORMAT else Program.from_json(data)


class _Printable(Protocol):
    """What can be shown as text and as JSON."""

    def to_json(self, path: str | Path | None = None) -> str: ...


def _show(found: _Printable, json_path: Path | str | None) -> None:
    if json_path == "-":
        click.echo(found.to_json(), nl=False)
        return
    if json_path is not None:
        Path(json_path).parent.mkdir(parents=True, exist_ok=True)
        found.to_json(json_path)
    click.echo(str(found))
    if json_path is not None:
        click.echo(f"{type(found).__name__} written to {json_path}")


def _solve_and_show(
    program: Program, budget: int | float | str, solver: str, wishes: Wishes,
    time_limit: float, effort: float | None,
    json_path: Path | str | None, plot_path: Path | None, html_path: Path | None,
) -> None:  # fmt: skip
    """Plan, print, write."""
    plan = _solved(program, budget, solver, wishes, time_limit, effort)
    _show(plan, json_path)
    if plot_path is not None:
        plan.plot(plot_path)
        click.echo(f"Picture written to {plot_path}", err=json_path == "-")
    if html_path is not None:
        _write_page(plan, html_path, wishes, time_limit)
        click.echo(f"Page written to {html_path}", err=json_path == "-")


def _solved(
    program: Program, budget: int | float | str, solver: str, wishes: Wishes,
    time_limit: float, effort: float | None = None,
) -> Plan:  # fmt: skip
    """Plan, with a progress bar."""
    from autoremat.planner import solve as make_plan
    from autoremat.show.progress import progress_bar

    with progress_bar() as progress:
        return make_plan(
            program, budget, solver=solver, wishes=wishes, time_limit_seconds=time_limit, effort=effort,
            progress=progress,
        )  # fmt: skip


def _asked_of_device(budget: int | float | str, program: Program) -> int | float | str:
    """Turn a budget of ``auto`` into bytes of this machine's device."""
    if not Budget.read(budget).is_auto:
        return budget
    _require("torch", "torch", "platformdirs")
    from autoremat.api import in_bytes

    return in_bytes(budget, program)


def _write_page(plan: Plan, path: Path, wishes: Wishes, time_limit: float) -> None:
    """Write a plan's page, with the frontier and the classic schedules."""
    from autoremat.planner import classics_of
    from autoremat.planner import frontier as make_frontier
    from autoremat.show.progress import progress_bar

    with progress_bar() as progress:
        front = make_frontier(
            plan.program, points=_PAGE_POINTS, wishes=wishes, time_limit_seconds=time_limit, progress=progress
        )
    classics = classics_of(plan.program, plan.budget_bytes, time_limit_seconds=time_limit)
    plan.save_html(path, frontier=front, beside=classics)


def _refuse_one_file_twice(*paths: Path | str | None) -> None:
    """Refuse to write two results to one file.

    Only the last one would be left.
    """
    named = [Path(path).absolute() for path in paths if path not in (None, "-")]
    if len(set(named)) < len(named):
        raise click.UsageError("--json, --plot and --html name one file twice; give each its own.")


def _require(extra: str, *modules: str) -> None:
    """Fail before the work starts if an extra's module is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(f"this needs {' and '.join(missing)}; run: pip install 'autoremat[{extra}]'")


def _require_picture(path: Path) -> None:
    """Fail before the work starts if no such picture can be drawn."""
    _require("plots", "matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise _WrongUse(f"'{path}' has no ending of a picture; name a file that ends in .png, .svg or .pdf")


def _require_for(json_path: Path | str | None, plot_path: Path | None, html_path: Path | None) -> None:
    """Fail before the work starts if an output could not be written."""
    _refuse_one_file_twice(json_path, plot_path, html_path)
    if plot_path is not None:
        _require_picture(plot_path)
    if html_path is not None:
        _require("html", "jinja2")


def _examples(*lines: str) -> str:
    """Write the end of a command's help, without rewrapping.

    That is what the backspace tells click.
    """
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


# --- Commands ---------------------------------------------------------------------------------------------------------


@click.group(
    cls=_OneLineErrors,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 an error, 2 a wrong command line, 3 no plan fits into the budget, "
    "4 a check found a difference, 5 a schedule was refused by the judge of the benchmark.",
)
@click.version_option(_version(), prog_name="autoremat")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Gradient checkpointing that plans itself: training steps inside a budget in bytes."""


@main.command(
    epilog=_examples(
        "autoremat plan examples/models.py:gpt --budget 50%",
        "autoremat plan my_package.train:step --budget 10GiB --optimizer 2.4GB",
        "autoremat plan examples/models.py:gpt --budget 3GB --keep 'head*' --json plan.json",
        "autoremat plan examples/models.py:gpt --budget 50% --html out.html",
        "autoremat plan examples/models.py:gpt --budget 50% --accumulate",
        "autoremat plan examples/models.py:gpt --budget 50% --offload disk:/tmp --offload-budget 8GiB",
    )
)
@_model
@_budget
@_recording
@_offload
@_planning
def plan(
    model: str, budget: int | float | str, device: str | None, optimizer: int | None, timing: str | None,
    accumulate: bool, offload: str | None, offload_budget: int | None, solver: str, keep: tuple[str, ...],
    recompute: tuple[str, ...], time_limit: float, effort: float | None, json_path: Path | str | None,
    plot_path: Path | None, html_path: Path | None,
) -> None:  # fmt: skip
    """Plan a training step of MODEL within a budget.

    Nothing of its size is allocated.

    MODEL is package.module:function or path/to/file.py:function; a file alone stands for its function `step`. The
    function takes nothing and returns (fn, args) or (fn, args, kwargs); fn(*args, **kwargs) is recorded. Tensors on the
    meta device cost no memory.
    """
    _require_for(json_path, plot_path, html_path)
    program = _linked(_recorded(model, device, optimizer, timing, accumulate), offload, offload_budget)
    budget = _asked_of_device(budget, program)
    _solve_and_show(
        program, budget, solver, Wishes(keep, recompute), time_limit, effort, json_path, plot_path, html_path
    )


@main.command(
    epilog=_examples(
        "autoremat explain examples/models.py:gpt",
        "autoremat explain examples/models.py:gpt --budget 50%",
        "autoremat explain plan.json --json -",
    )
)
@_model
@click.option("--budget", type=_Budget(), help=f"Explain the plan for it, not plain training. {_BUDGET_HELP}")
@_recording
@_wishes
@_time_limit(10.0)
@_json
def explain(
    model: str, budget: int | float | str | None, device: str | None, optimizer: int | None, timing: str | None,
    accumulate: bool, keep: tuple[str, ...], recompute: tuple[str, ...], time_limit: float,
    json_path: Path | str | None,
) -> None:  # fmt: skip
    """Print where a step's peak stands, what fills it, and why.

    MODEL is as for `autoremat plan`, or a file: a program or a plan as JSON.
    """
    if budget is None and (keep or recompute):
        raise click.UsageError("--keep and --recompute are wishes for a plan: give a --budget with them.")
    step = _read_or_recorded(model, device, optimizer, timing, accumulate)
    if budget is not None and isinstance(step, Plan):
        raise click.UsageError(f"{model} is a plan, which has its budget; leave --budget out.")
    from autoremat.show.explanation import explanation_of

    if isinstance(step, Plan):
        _show(explanation_of(step.program, step), json_path)
    elif budget is None:
        _show(explanation_of(step), json_path)
    else:
        plan = _solved(step, _asked_of_device(budget, step), "auto", Wishes(keep, recompute), time_limit)
        _show(explanation_of(step, plan), json_path)


@main.command(
    epilog=_examples(
        "autoremat frontier examples/models.py:gpt --points 8",
        "autoremat frontier step.json --plot frontier.png --beside every-block --beside segments",
    )
)
@_model
@click.option("--points", type=click.IntRange(min=2), default=16, show_default=True, help="How many budgets.")
@_recording
@_offload
@_wishes
@_time_limit(60.0)
@_json
@_plot
@click.option(
    "--beside", type=click.Choice(SOLVERS), multiple=True, metavar="SOLVER", help="Solvers to mark in the picture."
)
def frontier(
    model: str, points: int, device: str | None, optimizer: int | None, timing: str | None, accumulate: bool,
    offload: str | None, offload_budget: int | None, keep: tuple[str, ...], recompute: tuple[str, ...],
    time_limit: float, json_path: Path | str | None,
    plot_path: Path | None, beside: tuple[str, ...],
) -> None:  # fmt: skip
    """Print overhead against peak, from the floor to the plain peak.

    MODEL is as for `autoremat plan`, or a file: a program as JSON.
    """
    _require_for(json_path, plot_path, None)
    step = _read_or_recorded(model, device, optimizer, timing, accumulate)
    program = _linked(step.program if isinstance(step, Plan) else step, offload, offload_budget)
    from autoremat.planner import frontier as make_frontier
    from autoremat.show.progress import progress_bar

    with progress_bar() as progress:
        found: Frontier = make_frontier(
            program, points=points,
            wishes=Wishes(keep, recompute), time_limit_seconds=time_limit, progress=progress,
        )  # fmt: skip
    _show(found, json_path)
    if plot_path is not None:
        found.plot(plot_path, beside=beside)
        click.echo(f"Picture written to {plot_path}", err=json_path == "-")


@main.command(
    epilog=_examples(
        "autoremat check examples/models.py:small_gpt --budget 50%",
        "autoremat check my_package.train:step --budget 10GiB && python train.py",
    )
)
@_model
@_budget
@_wishes
@_time_limit(10.0)
@click.pass_context
def check(
    context: click.Context, model: str, budget: int | float | str, keep: tuple[str, ...], recompute: tuple[str, ...],
    time_limit: float,
) -> None:  # fmt: skip
    """Compare a plain step of MODEL with one within a budget.

    Both are run, and gradients, buffers, generators and peaks compared.

    MODEL is as for `autoremat plan`, with real tensors: both steps are run.
    """
    _require("torch", "torch", "platformdirs")
    step = load_step(model)
    from autoremat.checking import check as run_check

    with warnings.catch_warnings(record=True) as warned:  # where the step fails, the error says it all
        warnings.simplefilter("always")
        found = run_check(
            step.fn, *step.args, budget=budget, keep=keep, recompute=recompute, time_limit_seconds=time_limit,
            **step.kwargs,
        )  # fmt: skip
    for text in dict.fromkeys(" ".join(str(w.message).split()) for w in warned):
        click.echo(f"Warning: {text}", err=True)
    click.echo(str(found))
    context.exit(0 if found.is_exact and found.is_within_budget else NOT_THE_SAME)


@main.command(
    epilog=_examples(
        "autoremat solve step.json --budget 50%",
        "autoremat solve step.json --budget 3GB --solver exact --time-limit 60 --json plan.json",
    )
)
@_file
@click.option("--budget", required=True, type=_Budget(), help=_BUDGET_HELP.replace(', or "auto"', ""))
@_planning
def solve(
    file: Path, budget: int | float | str, solver: str, keep: tuple[str, ...], recompute: tuple[str, ...],
    time_limit: float, effort: float | None,
    json_path: Path | str | None, plot_path: Path | None, html_path: Path | None,
) -> None:  # fmt: skip
    """Plan the program in FILE (autoremat-program JSON) and print the plan.

    PyTorch is not needed.
    """
    _require_for(json_path, plot_path, html_path)
    _solve_and_show(
        Program.from_json(file), budget, solver, Wishes(keep, recompute), time_limit, effort,
        json_path, plot_path, html_path,
    )  # fmt: skip


@main.command(
    epilog=_examples(
        "autoremat bench auto --only layered",
        "autoremat bench my_package.planning:schedule --by 'A. Author 2027' --update",
    )
)
@click.argument("solver")
@click.option(
    "--programs",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/programs"),
    show_default=True,
    help="The folder of the benchmark.",
)
@click.option("--only", default="", metavar="TEXT", help="Programs with this in their names.")
@_time_limit(10.0)
@_effort
@click.option("--update", is_flag=True, help="Write what is better than known into the folder's table.")
@click.option("--by", default="", metavar="NAME", help="Who found it, for the table.")
@click.pass_context
def bench(
    context: click.Context, solver: str, programs: Path, only: str, time_limit: float, effort: float | None,
    update: bool, by: str,
) -> None:  # fmt: skip
    """Run SOLVER on the benchmark's programs, and print what the judge says.

    What it finds stands beside the best that is known.

    SOLVER is a solver of `autoremat solve`, or package.module:function: a function (program, budget_bytes, *, deadline)
    that returns a Schedule.
    """
    from autoremat.bench.catalog import Catalog
    from autoremat.bench.contest import Effort, rows_of
    from autoremat.bench.lines import HEAD, line_of, summary_of
    from autoremat.show.progress import progress_bar

    if update and not by:
        raise click.UsageError("--update needs --by: who found it.")
    asked = solver if solver in SOLVERS else load_function(solver)
    rows, catalog = [], Catalog.at(programs)
    click.echo(HEAD)
    with progress_bar() as progress:
        for row in rows_of(catalog, asked, Effort(time_limit, effort), only=only, progress=progress):
            rows.append(row)
            click.echo(line_of(row))
            if update and row.plan and not row.faults:
                catalog = catalog.with_plan(row.task.name, row.number, row.plan, by)
    click.echo(summary_of(rows))
    context.exit(REFUSED if any(row.faults for row in rows) else 0)


@main.command(epilog=_examples("autoremat demo", "autoremat demo --quick --out pictures"))
@click.option("--steps", type=click.IntRange(min=4), default=36, show_default=True, help="Training steps per run.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("out"), show_default=True, help="Folder or .png file."
)
@click.option("--quick", is_flag=True, help="Tiny models: only to see that everything works.")
def demo(steps: int, out: Path, quick: bool) -> None:
    """Train two models plainly, by hand and with autoremat.

    By hand is PyTorch's own checkpointing around every block. They take turns, and what each cost is printed.
    """
    _require("demo", "torch", "matplotlib", "sklearn")
    folder = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not folder.is_dir() and folder != out:
        raise _WrongUse(f"cannot write into '{out}': {folder} is a file, not a folder. Name another folder.")
    os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    from autoremat.demo.report import run_demo

    if not run_demo(steps, out, quick=quick):
        raise click.ClickException(
            "a run left its budget or differed from plain training; please report this table with `autoremat --version`"
        )


if __name__ == "__main__":
    main()
