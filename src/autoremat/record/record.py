"""``record``: one training step, run once on fake tensors (or on real ones), as a ``Program``."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autoremat.program import Program
from autoremat.record.apart import CannotRunApart, RecordingDied, can_be_sent, can_run_apart, is_child, run_apart
from autoremat.record.as_plain import as_plain
from autoremat.record.assemble import assemble
from autoremat.record.casts import casts_in_use, forget_casts
from autoremat.record.compiled import CompiledCode, eagerly
from autoremat.record.living import Living, let_go_of_frames
from autoremat.record.local import Description, Jagged, is_distributed, is_jagged, local_of, prepare_jagged
from autoremat.record.parallel import (
    Gathering,
    NotSupported,
    Parallel,
    Unit,
    absent,
    check_supported,
    open_units,
    parallel_of,
    resident_bytes,
    whole_parameter,
)
from autoremat.record.recorder import Recorder
from autoremat.record.recording import Recording
from autoremat.record.timing import FREE, Cost, Progress, estimate_all, measure_all
from autoremat.record.values import fingerprint, storage_of
from autoremat.record.world import (
    gradients_kept,
    leaves_of,
    map_tensors,
    named_tensors,
    reachable_modules,
    scripted_in,
    swap_tensors,
    undisturbed,
    without_caches,
)


class UnusableInput(ValueError):
    """Something about the model or its inputs that no recording can deal with; the message says what to do."""


class NothingDifferentiable(UnusableInput):
    """The callable returned nothing that a backward pass could start from."""


class TrainsInside(UnusableInput):
    """The callable runs its own backward pass or optimizer."""


class Scripted(UnusableInput):
    """A ScriptModule would have to be recorded in this process, which would change it."""


class FakesLeft(UnusableInput):
    """Something of the user's holds fake tensors after a recording in this process."""


NOTHING: Final = (
    "the callable returned nothing that requires grad, so there is no backward pass to plan for; return the loss (or "
    "the model's output), and check that some parameter has requires_grad=True"
)
"""What is told of a step without a backward pass."""
_FINAL: Final = (NothingDifferentiable, CompiledCode, TrainsInside, Scripted, FakesLeft, RecordingDied)
"""Errors of a recording that the other way to record would not be spared."""


def record(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    optimizer_state_bytes: int = 0,
    optimizer_scratch_bytes: int = 0,
    timing: str = "measure",
    device: torch.device | str | None = None,
    real: bool = False,
    compare: bool = False,
    progress: Progress | None = None,
    name: str = "",
    limit: Callable[[Program], int] | None = None,
    later: Callable[[Program], None] | None = None,
) -> Program:
    """Record forward and backward of ``fn(*args, **kwargs)``.

    Runs the callable once on fake tensors: nothing of the model's size is allocated. A callable that needs the
    numbers in its tensors (data-dependent control flow) is recorded on the real ones instead, without keeping what
    the backward would need.

    Where a process may be forked (``apart``), all this happens in a child, and nothing here can change. What runs there
    on real tensors takes memory of its own: an operator's results, and a copy of what the step overwrites. Elsewhere
    (CUDA is in use, other threads run, several processes train) it happens here, and afterwards all that can be put
    back is as it was: parameters, buffers, gradients, module attributes, random generators. If then somebody still
    holds a fake tensor, that is an error.

    Args:
        fn: a module or any callable; returns a tensor, or nested tensors, or an object with a ``loss``.
        args: its positional arguments.
        kwargs: its keyword arguments.
        optimizer_state_bytes: resident state of the optimizer, counted in the peak.
        optimizer_scratch_bytes: what the optimizer's step takes beside, counted after the backward.
        timing: ``"measure"`` runs each distinct operator alone on the device, ``"estimate"`` runs nothing.
        device: for a model on the ``meta`` device: the device it will train on (default: cuda if there, else cpu).
        real: record on the real tensors first: for a callable that looks whether its tensors are fake.
        compare: after a recording on fake tensors run the forward once more, on the real ones, and keep the recording
            only if both take the same path; otherwise record on the real ones.
        progress: called with a label and a fraction.
        name: name of the program.
        limit: given the program before anything is measured, how many bytes may be in memory while it is, what is
            fixed included; then caches are emptied between operators only as far as there is room.
        later: given a second program, if the step takes another path when it runs again and stays on that: it has
            cached a table at its first call, say. Looked for in a child only, on fake tensors.

    Returns:
        The program. Its backward starts from the ``loss`` if the result has one, from the only scalar that requires
        grad if there is just one, otherwise from everything returned that requires grad.

    Raises:
        NothingDifferentiable: nothing returned requires grad.
        CompiledCode: the callable runs code that ``torch.compile`` has compiled.
        TrainsInside: the callable runs its own backward pass or optimizer.
        FakesLeft: somebody holds fake tensors after a recording in this process.
        Scripted: a ScriptModule would have to be recorded in this process.
        UnusableInput: parameters and inputs are on several devices; ``device`` is not one of this machine's.
        RecordingDied: the child that recorded has died.
    """
    kwargs = dict(kwargs or {})
    if device is not None:
        _check_target(device)
    modules = reachable_modules(fn, args, kwargs)
    check_devices(modules, args, kwargs)
    prepare_jagged()
    parallel = parallel_of(modules)
    check_supported(parallel, modules)

    step = _Step(fn, modules, args, kwargs, parallel, device, progress, look_ahead=later is not None)

    def on_fake() -> Recording:
        _refuse_shared_memory(modules, args, kwargs)
        return _on_fake(step)

    def on_real(*, forward_only: bool = False) -> Recording:
        if parallel.units:
            raise NotSupported("a recording on real tensors would have to gather the shards of fully_shard")
        return _on_real(step, forward_only)

    ways = [("fake", on_fake), ("real", on_real)]
    (recorded, first), (other, second) = reversed(ways) if real else ways
    try:
        recording = first()
    except _FINAL:
        raise
    except Exception as error:
        if is_unreal(modules, args, kwargs):
            if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
                raise UnusableInput(
                    f"the step looks at the numbers in its tensors ({error.func}), and these are fake or on meta: give "
                    "it real ones"
                ) from error
            raise
        recorded, recording = other, _or_from(error, second, is_real=not real)
    alone = not parallel and not any(op.facts is not None and op.facts.communicates for op in recording.ops)
    if compare and recorded == "fake" and alone and not is_unreal(modules, args, kwargs):
        try:
            if not recording.has_path_of(on_real(forward_only=True)):
                recorded, recording = "real", on_real()
        except RecordingDied:
            raise
        except Exception:  # noqa: BLE001 - what fails on real tensors fails in the step, too, and is reported there
            pass
    whole = Whole(
        name or getattr(fn, "__name__", type(fn).__name__), recorded, optimizer_state_bytes, optimizer_scratch_bytes,
        resident_bytes(parallel), timing == "measure" and not is_unreal(modules, args, kwargs), limit, progress,
    )  # fmt: skip
    if later is not None and recording.later is not None:
        later(whole.program(recording.later))
    return whole.program(recording)


@dataclass(frozen=True)
class Whole:
    """What a program has beside its recording."""

    name: str
    recorded: str
    optimizer_state_bytes: int
    optimizer_scratch_bytes: int
    beside: Mapping[str, int]
    measures: bool
    limit: Callable[[Program], int] | None
    progress: Progress | None

    def program(self, recording: Recording) -> Program:
        """The program, with operators measured or estimated."""
        signatures = [op.signature for op in recording.ops]
        if not self.measures:
            written = [sum(recording.values[n].nbytes for n in op.writes) for op in recording.ops]
            return self._assembled(recording, estimate_all(signatures, written), "estimated")
        room = None
        if self.limit is not None:
            without_costs = self._assembled(recording, [FREE] * len(signatures), "estimated")
            room = self.limit(without_costs) - without_costs.fixed_bytes
        costs = measure_all(signatures, self.progress, room_bytes=room)
        if self.recorded == "fake":  # sizes that depend on the data were seen on the real tensors
            recording.take_sizes([cost.made_bytes for cost in costs])
        return self._assembled(recording, costs, "measured")

    def _assembled(self, recording: Recording, costs: Sequence[Cost], source: str) -> Program:
        return assemble(
            recording, self.name, costs, optimizer_state_bytes=self.optimizer_state_bytes,
            optimizer_scratch_bytes=self.optimizer_scratch_bytes, beside=self.beside, timing=source,
            recorded=self.recorded,
        )  # fmt: skip


def _or_from(error: Exception, record_anew: Callable[[], Recording], *, is_real: bool) -> Recording:
    """The other way to record; if that fails, too, the error on the real tensors with the other one behind it.

    Where the other way is refused from the start, the first error tells more.
    """
    try:
        return record_anew()
    except _FINAL:
        raise
    except Exception as again:
        if is_real and not isinstance(again, NotSupported):
            raise again from error
        raise error from again


@dataclass(frozen=True)
class _Step:
    """What is to be recorded."""

    fn: Any
    modules: Sequence[nn.Module]
    args: Sequence[Any]
    kwargs: dict[str, Any]
    parallel: Parallel
    device: torch.device | str | None
    progress: Progress | None
    look_ahead: bool = False
    """Whether to find out, in a child, which path it takes when it runs again."""


def _on_fake(step: _Step) -> Recording:
    """Record on fake tensors, in a child or here."""
    living = Living()

    def work(progress: Progress | None) -> Recording:
        with _fake_world(step.modules, step.args, step.kwargs, step.device, step.parallel, living) as world:
            recording = _record_in(world, step, progress).recording()
            if step.look_ahead and is_child():
                with suppress(Exception):  # once was enough
                    recording.later = _settled(recording, world, step)
            return recording

    def here() -> Recording:
        try:
            with undisturbed(step.modules, step.fn, step.args, step.kwargs):
                recording = work(step.progress)
        except Exception as error:
            let_go_of_frames(error)
            _refuse_left(living)
            raise
        _refuse_left(living)
        return recording

    return _apart_or(here, work, step)


def _settled(first: Recording, world: _World, step: _Step) -> Recording | None:
    """The recording of a second run that takes another path than the first, if a third one takes the same."""
    second = _record_in(world, step, None).recording()
    if second.has_path_of(first):
        return None
    third = _record_in(world, step, None, forward_only=True).recording()
    return second if second.has_path_of(third) else None


def _apart_or(here: Callable[[], Any], work: Callable[[Progress | None], Any], step: _Step) -> Any:
    """Let a child do the work, or do it here."""
    with suppress(CannotRunApart):
        if can_run_apart():
            done = run_apart(lambda progress: _without_what_cannot_be_sent(work(progress)), step.progress)
            return _with_what_is_here(done)
    if scripted := scripted_in(step.modules):
        raise Scripted(
            f"{scripted} is a ScriptModule: a recording in this process would change it for good, and here none can be "
            "made in another one (CUDA is in use, other threads run, or several processes train); leave "
            "torch.jit.script out of what autoremat checkpoints, or checkpoint the parts around it"
        )
    return here()


def _without_what_cannot_be_sent(outcome: Any) -> Any:
    """The same without the arguments of operators that pickle does not know: those cannot be measured, then."""
    for recording in _recordings_in(outcome):
        if can_be_sent(recording):
            continue
        for op in recording.ops:
            if not can_be_sent(op.signature):
                op.signature = None
        recording.calls_with_numbers = [c for c in recording.calls_with_numbers if can_be_sent(c)]
    return outcome


def _recordings_in(outcome: Any) -> list[Recording]:
    recording = outcome if isinstance(outcome, Recording) else outcome[0]
    return [r for r in (recording, recording.later if recording else None) if r is not None]


def _with_what_is_here(outcome: Any) -> Any:
    """The same without calls of operators that the step has defined when it ran, which this process does not know."""
    for recording in _recordings_in(outcome):
        for op in recording.ops:
            if op.signature is not None and op.signature.func is None:
                op.signature = None
        recording.calls_with_numbers = [c for c in recording.calls_with_numbers if c.func is not None]
    return outcome


def _refuse_left(living: Living) -> None:
    """Raise if somebody else holds fake tensors that the recording has made: nothing could be trained with them."""
    if holders := living.holders():
        raise FakesLeft(
            f"after the step was recorded on fake tensors, one is still held by {'; one by '.join(holders)}. A step "
            "that used it would train nothing. Call the step once before autoremat does, so that what it caches is "
            "there, or keep the cache in an attribute of a module"
        )


_FAKE_TENSOR_LOG = logging.getLogger(FakeTensorMode.__module__)
"""Where torch writes a traceback when an operator fails on fake tensors."""
_MAX_ATTEMPTS = 8
"""How often a recording on real tensors begins anew to learn what a backward inside the forward needs."""


class _World:
    """Arguments and helpers of one recording: fake or real."""

    def __init__(
        self, args: Any, kwargs: Any, convert: Any, blank: Any, before_write: Any, contents: _Contents,
        fingerprint: Any, made: Any = lambda tensors: None,
    ) -> None:  # fmt: skip
        self.args, self.kwargs = args, kwargs
        self.convert, self.blank, self.before_write, self.contents = convert, blank, before_write, contents
        self.fingerprint, self.made = fingerprint, made


@contextmanager
def _fake_world(
    modules: Sequence[nn.Module], args: Any, kwargs: Any, device: torch.device | str | None, parallel: Parallel,
    living: Living,
) -> Iterator[_World]:  # fmt: skip
    """Modules and arguments with fake tensors for as long as the block runs."""
    mode = _fake_mode_in(modules, args, kwargs) or FakeTensorMode(allow_non_fake_inputs=True)
    mode._allow_unsafe_data_ptr_access = False  # compiled code that is handed an address must not be handed 0
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    converted: dict[int, Tensor] = {}
    originals: list[Tensor] = []  # an id stays taken while its tensor lives
    running = False

    def convert(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in converted:
            if running and tensor.is_leaf and tensor.requires_grad and casts_in_use():
                raise RuntimeError("autocast's cache must not get to know a fake cast of a real weight")
            originals.append(tensor)
            if is_jagged(tensor):
                inside = Jagged.of(tensor).converted(convert)
                values = convert(local_of(tensor).detach())
                converted[id(tensor)] = inside.around(values).requires_grad_(tensor.requires_grad)
                return converted[id(tensor)]
            if is_distributed(tensor):
                converted[id(tensor)] = _around(tensor, convert(local_of(tensor).detach()))
                return converted[id(tensor)]
            with torch.utils._python_dispatch._disable_current_modes():
                fake = mode.from_tensor(tensor)
                converted[id(tensor)] = _placed(fake, mode, target) if tensor.device.type == "meta" else fake
                living.note([fake, converted[id(tensor)]])
        return converted[id(tensor)]

    def convert_argument(tensor: Tensor) -> Tensor:
        """One with a history becomes a leaf: the graph that it comes from is no part of the callable."""
        if tensor.is_leaf or isinstance(tensor, FakeTensor) or id(tensor) in converted:
            return convert(tensor)
        originals.append(tensor)
        converted[id(tensor)] = convert(tensor.detach()).requires_grad_(tensor.requires_grad)
        return converted[id(tensor)]

    def blank(n: int, dtype: torch.dtype, where: torch.device) -> Tensor:
        return torch.empty(n, dtype=dtype, device=where)

    with warnings.catch_warnings(), _quiet(_FAKE_TENSOR_LOG), without_caches():
        warnings.simplefilter("ignore")
        with mode:
            _make_whole(parallel)
        swap_tensors(modules, convert)
        fake_args, fake_kwargs = map_tensors((tuple(args), kwargs), convert_argument)
        running = True
        with mode:
            yield _World(fake_args, fake_kwargs, convert, blank, lambda t: None, _Contents(), None, living.note)


@contextmanager
def _quiet(log: logging.Logger) -> Iterator[None]:
    """Without a word of this logger: what fails on fake tensors is recorded on real ones."""
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _around(tensor: Tensor, local: Tensor) -> Tensor:
    """A DTensor like this one, around another local tensor; its gradient, if there is one, stays out."""
    made = Description.of(tensor).around(local)
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)


def _make_whole(parallel: Parallel) -> None:
    """Give modules fake parameters of full size in place of their shards."""
    made: dict[int, Tensor] = {}
    for unit in parallel.units:
        for module, name, parameter in unit.parameters():
            if id(parameter) not in made:
                made[id(parameter)] = whole_parameter(unit, parameter)
            module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]


def _placed(fake: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    """A fake tensor of the meta device as one of another device."""
    with mode, torch.no_grad():
        moved = torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype, device=device)
    if isinstance(fake, nn.Parameter):
        moved = nn.Parameter(moved, requires_grad=fake.requires_grad)
    moved.requires_grad_(fake.requires_grad)
    if fake.is_leaf and fake.grad is not None:
        moved.grad = _placed(fake.grad, mode, device)
    return moved


def _on_real(step: _Step, forward_only: bool) -> Recording:
    """Record on the real tensors; anew while a backward inside the forward asks for numbers that were not kept."""
    kept: Set[int] = frozenset()
    for k in reversed(range(_MAX_ATTEMPTS)):  # with other numbers it may ask for others
        recording, missed = _attempt(step, kept, forward_only, is_last=k == 0)
        if recording is not None:
            return recording
        kept = kept | missed
    raise AssertionError("unreachable")


def _attempt(step: _Step, kept: Set[int], forward_only: bool, *, is_last: bool) -> tuple[Recording | None, Set[int]]:
    """One recording on the real tensors, in a child or here; None if it has missed numbers that it needs."""

    def work(around: AbstractContextManager[None], progress: Progress | None) -> tuple[Recording | None, Set[int]]:
        contents = _RealContents(kept)
        recording = None
        try:
            with around:
                recording = _record_for_real(step, progress, forward_only, contents).recording()
        except Exception:
            if is_last or not contents.missed:
                raise
        return (None if contents.missed and not is_last else recording), contents.missed

    def here() -> tuple[Recording | None, Set[int]]:
        return work(undisturbed(step.modules, step.fn, step.args, step.kwargs), step.progress)

    return _apart_or(here, lambda progress: work(nullcontext(), progress), step)


def _record_for_real(step: _Step, progress: Progress | None, forward_only: bool, contents: _RealContents) -> Recorder:
    """Record on the real tensors, and put back whatever the step overwrote (other processes may share it)."""
    before: dict[int, tuple[Tensor, Tensor]] = {}

    def before_write(tensor: Tensor) -> None:
        storage = storage_of(tensor)
        if storage is not None and storage._cdata not in before:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            before[storage._cdata] = (whole, whole.clone())

    def blank(n: int, dtype: torch.dtype, where: torch.device) -> Tensor:
        return torch.zeros(n, dtype=dtype, device=where)

    twin = _Twins()
    try:
        with without_caches():
            swap_tensors(step.modules, twin)
            args, kwargs = map_tensors((tuple(step.args), step.kwargs), twin)
            look = None if forward_only else fingerprint
            world = _World(args, kwargs, lambda t: t, blank, before_write, contents, look)
            return _record_in(world, step, progress, forward_only=forward_only)
    finally:
        with torch.inference_mode():  # some of them may have been made in it, and can be written nowhere else
            for whole, saved in before.values():
                whole.copy_(saved)
        before.clear()  # the recorder, which lives on while operators are measured, would hold the copies


class _Twins:
    """Real tensors under another identity, on the same memory.

    So that the backward of a recording meets no hooks of the user's on parameters (which may step an optimizer), does
    not run into the graph that an input comes from, and that an input or a buffer that is overwritten with something
    differentiable does not become part of the recording's graph.
    """

    def __init__(self) -> None:
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            return tensor
        if id(tensor) not in self._twins:
            twin = tensor.detach()
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
            else:
                twin.requires_grad_(tensor.requires_grad)
            vars(twin).update(vars(tensor))
            if tensor.is_leaf:
                twin.grad = tensor.grad
            self._twins[id(tensor)] = tensor, twin
        return self._twins[id(tensor)][1]


class _Contents:
    """What a recording keeps of the numbers in saved tensors: none, and what of them the forward itself asked for."""

    def __init__(self, kept: Set[int] = frozenset()) -> None:
        self.kept, self.missed = kept, set[int]()

    def of(self, n: int, tensor: Tensor) -> Tensor | None:
        """What to keep of the n-th tensor that is saved."""
        return None


class _RealContents(_Contents):
    """Masks and indices, which no backward can do without, and those that are known to be asked for in the forward."""

    def of(self, n: int, tensor: Tensor) -> Tensor | None:
        """A copy of the memory, or nothing."""
        if n not in self.kept and (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
            return None
        storage = tensor.untyped_storage()
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return flat.set_(storage, 0, (storage.nbytes() // tensor.itemsize,)).clone()  # type: ignore[call-overload]


def _record_in(world: _World, step: _Step, progress: Progress | None, *, forward_only: bool = False) -> Recorder:
    """Run forward and backward under the recorder."""
    modules, parallel = step.modules, step.parallel
    paths = ModulePaths(modules)
    recorder = Recorder(
        world.blank, world.convert, world.before_write, paths.current, world.contents.of, world.contents.missed.add,
        world.fingerprint, world.made,
    )  # fmt: skip
    if progress is not None:
        recorder.on_op = lambda n: progress("recording", 0.0) if n % 256 == 0 else None
    _know_the_world(recorder, world, modules)
    _know_units(recorder, parallel, step.fn, modules)
    with ExitStack() as stack:
        stack.enter_context(eagerly())
        stack.enter_context(absent(parallel))
        stack.callback(recorder.reset_generators)
        stack.callback(recorder.take_out_of_graph)
        stack.enter_context(torch.enable_grad())
        first_node = torch.ones(1, requires_grad=True).clone().grad_fn
        stack.enter_context(as_plain())
        stack.enter_context(recorder)
        before = _gradients(modules)
        with paths, recorder.hooks(), no_optimizer():
            result = step.fn(*world.args, **world.kwargs)
        forget_casts()
        if forward_only:
            return recorder
        recorder.forward_ends()
        outputs = differentiable_outputs(result)
        has_trained = _gradients(modules) - before
        if not outputs:
            refuse_training(has_trained)
            raise NothingDifferentiable(NOTHING)
        leaves = leaves_of(outputs, since=first_node)
        with gradients_kept(leaves), recorder.seeded(outputs) as start:
            recorder.backward = True
            try:
                start()
            except RuntimeError as error:
                if "backward through the graph a second time" in str(error):
                    refuse_training(has_trained, error)
                raise
            _name_gradients(recorder, leaves, modules)
            recorder.finish()
            recorder.leave_gradients(_moved_gradients(leaves, parallel))
        del result, outputs
    if recorder.compiled is not None:
        raise CompiledCode(
            f"{recorder.compiled} is compiled by torch.compile, and autoremat cannot see into compiled code; "
            "leave torch.compile out there, or checkpoint only what is not compiled"
        )
    return recorder


def _gradients(modules: Sequence[nn.Module]) -> frozenset[tuple[int, int]]:
    """Which gradients the parameters have now, and in which version."""
    tensors = (t for _, kind, t in named_tensors(modules) if kind == "parameter" and t.is_leaf)
    return frozenset((id(t.grad), t.grad._version) for t in tensors if t.grad is not None)


def refuse_training(has_trained: object, error: Exception | None = None) -> None:
    """Raise if gradients came up within the callable."""
    if has_trained:
        raise TrainsInside(
            "the callable runs the backward pass inside, and autoremat plans the one that follows: return the loss "
            "from the callable, and call backward() and the optimizer outside, after it"
        ) from error


@contextmanager
def no_optimizer() -> Iterator[None]:
    """Within this block and in this thread, no optimizer takes a step: it would be one on fake gradients."""
    thread = threading.get_ident()

    def refuse(optimizer: Any, *_: Any) -> None:
        if threading.get_ident() == thread:
            raise TrainsInside(
                f"the callable runs the optimizer ({type(optimizer).__name__}) inside, and with it the backward pass: "
                "return the loss from the callable, and call backward() and the optimizer's step() outside, after it"
            )

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _know_the_world(recorder: Recorder, world: _World, modules: Sequence[nn.Module]) -> None:
    for name, kind, tensor in named_tensors(modules):
        recorder.know(tensor, name, kind, _module_of(name))
        if tensor.is_leaf and tensor.grad is not None:
            recorder.know(tensor.grad, f"{name}.grad", "gradient", _module_of(name))
    leaves = [t for t in torch.utils._pytree.tree_leaves((world.args, world.kwargs)) if isinstance(t, Tensor)]
    for i, tensor in enumerate(leaves):
        recorder.know(tensor, f"input {i}", "input")


def _know_units(recorder: Recorder, parallel: Parallel, fn: Any, modules: Sequence[nn.Module]) -> None:
    """Tell the recorder which parameters are gathered when; their memory is in the account as a whole."""
    freed: dict[int, Unit] = {}
    for unit in parallel.units:
        for module, name, _ in unit.parameters():
            tensor = module._parameters[name]
            storage = None if tensor is None else storage_of(tensor)
            number = None if storage is None else recorder.map.number(storage)
            if number in recorder.values:
                recorder.values[number].nbytes = 0
                if unit.frees:
                    freed[number] = unit
    runs_inside = len(modules) == 1 and modules[0] in (fn, getattr(fn, "module", None))
    recorder.gathering = Gathering(freed, open_units(parallel, modules, runs_inside)) if freed else None


def _moved_gradients(leaves: Sequence[Tensor], parallel: Parallel) -> list[Tensor]:
    """Gradients that do not stay where the backward makes them: they move into shards or buckets."""
    moving = {id(module._parameters[name]) for module, name in parallel.moving}
    return [leaf.grad for leaf in leaves if leaf.grad is not None and id(leaf) in moving]


def _module_of(name: str) -> str:
    """The path of the module that has the parameter of this name."""
    return name.rpartition(".")[0]


def _name_gradients(recorder: Recorder, leaves: Sequence[Tensor], modules: Sequence[nn.Module]) -> None:
    names = {id(tensor): name for name, _, tensor in named_tensors(modules)}
    for leaf in leaves:
        if leaf.grad is not None:
            name = names.get(id(leaf), "")
            recorder.call_gradient(leaf.grad, name and f"{name}.grad", _module_of(name))


def differentiable_outputs(result: Any) -> list[Tensor]:
    """What a backward pass would start from."""
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
        return [loss]
    tensors = [t for t in _tensors_of(result) if t.requires_grad]
    scalars = [t for t in tensors if t.numel() == 1]
    return scalars if len(scalars) == 1 else tensors


def _tensors_of(tree: Any) -> list[Tensor]:
    if is_dataclass(tree) and not isinstance(tree, type):
        tree = [getattr(tree, f.name) for f in fields(tree)]
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _check_target(device: torch.device | str) -> None:
    """Refuse a device that is not there: autograd would end the process."""
    try:
        kind = torch.device(device).type
        there = kind == "cpu" or torch.get_device_module(kind).is_available()
    except RuntimeError:
        there = False
    if not there:
        raise UnusableInput(
            f"device {str(device)!r} is not available to torch {torch.__version__} here; leave it out, name one that "
            "is, or record on the machine that will train"
        )


def check_devices(modules: Sequence[nn.Module], args: Any, kwargs: Any) -> None:
    """Refuse models and inputs that are spread over several devices (scalars on the CPU are fine)."""
    tensors = [t for _, _, t in named_tensors(modules)]
    tensors += [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
    devices = {str(t.device) for t in tensors}
    if len(devices) > 1:
        raise UnusableInput(
            f"parameters and inputs are on several devices ({', '.join(sorted(devices))}); a budget is for one device: "
            "move the model and its inputs to the same one before the call"
        )


def is_unreal(modules: Sequence[nn.Module], args: Any, kwargs: Any) -> bool:
    """Whether there are meta or fake tensors, so that no operator can be run."""
    tensors = [t for _, _, t in named_tensors(modules)]
    tensors += [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    return any(isinstance(t, FakeTensor) or t.device.type == "meta" for t in tensors)


def _refuse_shared_memory(modules: Sequence[nn.Module], args: Any, kwargs: Any) -> None:
    """Raise if two storages lie on the same memory (of one NumPy array, say), which fake tensors would not know."""
    if is_unreal(modules, args, kwargs):
        return
    tensors = [t for _, _, t in named_tensors(modules) if not nn.parameter.is_lazy(t)]
    tensors += [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    storages = {s._cdata: s for s in map(storage_of, tensors) if s is not None and s.nbytes()}
    spans = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages.values())
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise RuntimeError("two tensors share memory without torch's knowledge")


def _fake_mode_in(modules: Sequence[nn.Module], args: Any, kwargs: Any) -> FakeTensorMode | None:
    tensors = [t for _, _, t in named_tensors(modules)]
    tensors += torch.utils._pytree.tree_leaves((args, kwargs))
    return next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None)


class ModulePaths:
    """Tells which module runs, while it is entered (by torch's global module hooks)."""

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self._names = {id(m): name for root in roots for name, m in root.named_modules()}
        self._stack: list[str] = []
        self._exits = ExitStack()

    def current(self) -> str:
        """Path of the innermost module that runs now; "" outside all."""
        return self._stack[-1] if self._stack else ""

    def __enter__(self) -> ModulePaths:
        hooks = nn.modules.module
        enter = hooks.register_module_forward_pre_hook(self._entered)
        leave = hooks.register_module_forward_hook(self._left, always_call=True)
        self._exits.callback(enter.remove)
        self._exits.callback(leave.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._exits.close()

    def _entered(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self._names.get(id(module), type(module).__name__))

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack:
            self._stack.pop()
