"""``record``: one training step, run once on fake tensors (or on real ones), as a ``Program``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from autoremat.program import Program
from autoremat.record.apart import RecordingDied, is_child
from autoremat.record.as_plain import as_plain
from autoremat.record.casts import forget_casts
from autoremat.record.compiled import CompiledCode, eagerly
from autoremat.record.devices import check_devices, check_target, is_unreal, refuse_shared_memory
from autoremat.record.fakes import fake_world
from autoremat.record.living import Living, let_go_of_frames
from autoremat.record.local import prepare_jagged
from autoremat.record.module_paths import ModulePaths
from autoremat.record.outputs import differentiable_outputs
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
)
from autoremat.record.problems import (
    NOTHING,
    FakesLeft,
    NothingDifferentiable,
    Scripted,
    TrainsInside,
    UnusableInput,
    no_optimizer,
    refuse_training,
)
from autoremat.record.recorder import Recorder
from autoremat.record.recording import Recording
from autoremat.record.step import Step, apart_or, refuse_left
from autoremat.record.timing import Progress
from autoremat.record.twins import Twins
from autoremat.record.values import fingerprint, storage_of
from autoremat.record.whole import Whole
from autoremat.record.world import (
    gradients_kept,
    leaves_of,
    map_tensors,
    named_tensors,
    reachable_modules,
    swap_tensors,
    undisturbed,
    without_caches,
)

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
        check_target(device)
    modules = reachable_modules(fn, args, kwargs)
    check_devices(modules, args, kwargs)
    prepare_jagged()
    parallel = parallel_of(modules)
    check_supported(parallel, modules)

    step = Step(fn, modules, args, kwargs, parallel, device, progress, look_ahead=later is not None)

    def on_fake() -> Recording:
        refuse_shared_memory(modules, args, kwargs)
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


def _on_fake(step: Step) -> Recording:
    """Record on fake tensors, in a child or here."""
    living = Living()

    def work(progress: Progress | None) -> Recording:
        with fake_world(step.modules, step.args, step.kwargs, step.device, step.parallel, living) as fakes:
            world = _World(
                fakes.args, fakes.kwargs, fakes.convert, _blank, lambda t: None, _Contents(), None, living.note
            )  # fmt: skip
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
            refuse_left(living)
            raise
        refuse_left(living)
        return recording

    return apart_or(here, work, step)


def _blank(n: int, dtype: torch.dtype, where: torch.device) -> Tensor:
    return torch.empty(n, dtype=dtype, device=where)


def _settled(first: Recording, world: _World, step: Step) -> Recording | None:
    """The recording of a second run that takes another path than the first, if a third one takes the same."""
    second = _record_in(world, step, None).recording()
    if second.has_path_of(first):
        return None
    third = _record_in(world, step, None, forward_only=True).recording()
    return second if second.has_path_of(third) else None


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


def _on_real(step: Step, forward_only: bool) -> Recording:
    """Record on the real tensors; anew while a backward inside the forward asks for numbers that were not kept."""
    kept: Set[int] = frozenset()
    for k in reversed(range(_MAX_ATTEMPTS)):  # with other numbers it may ask for others
        recording, missed = _attempt(step, kept, forward_only, is_last=k == 0)
        if recording is not None:
            return recording
        kept = kept | missed
    raise AssertionError("unreachable")


def _attempt(step: Step, kept: Set[int], forward_only: bool, *, is_last: bool) -> tuple[Recording | None, Set[int]]:
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

    return apart_or(here, lambda progress: work(nullcontext(), progress), step)


def _record_for_real(step: Step, progress: Progress | None, forward_only: bool, contents: _RealContents) -> Recorder:
    """Record on the real tensors, and put back whatever the step overwrote (other processes may share it)."""
    before: dict[int, tuple[Tensor, Tensor]] = {}

    def before_write(tensor: Tensor) -> None:
        storage = storage_of(tensor)
        if storage is not None and storage._cdata not in before:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            before[storage._cdata] = (whole, whole.clone())

    def blank(n: int, dtype: torch.dtype, where: torch.device) -> Tensor:
        return torch.zeros(n, dtype=dtype, device=where)

    twin = Twins()
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


def _record_in(world: _World, step: Step, progress: Progress | None, *, forward_only: bool = False) -> Recorder:
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
