"""``record``: makes the program of a step that is not run.

The step's calls are made on fake tensors, so nothing of its size is allocated. The step goes as a first step does
(``first``), so that a plan made beforehand is that of the training. A callable that needs the numbers in its tensors is
run on the real ones instead, and drops all that can be recomputed.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autoremat.engines.torch.eager.arguments import mapped
from autoremat.engines.torch.eager.calls import in_sight
from autoremat.engines.torch.eager.check import NoCheck, SelfCheck
from autoremat.engines.torch.eager.first import FirstStep, NotRecorded
from autoremat.engines.torch.eager.state import without_function_modes
from autoremat.engines.torch.eager.tape import Reports
from autoremat.engines.torch.operators.collectives import run_alone
from autoremat.engines.torch.operators.compiled import CompiledCode, eagerly
from autoremat.engines.torch.operators.facts import facts_of, tensors_in
from autoremat.engines.torch.operators.history import is_leaf
from autoremat.engines.torch.operators.local import is_taken_apart, local_of, prepare_jagged
from autoremat.engines.torch.operators.timing import Progress
from autoremat.engines.torch.operators.values import storage_of
from autoremat.engines.torch.recording.doubles import Doubles
from autoremat.engines.torch.recording.fakes import fake_world
from autoremat.engines.torch.recording.living import Living, let_go_of_frames, let_go_of_lines
from autoremat.engines.torch.recording.recording import Recording
from autoremat.engines.torch.recording.step import Step, apart_or, refuse_left
from autoremat.engines.torch.recording.whole import Whole
from autoremat.engines.torch.world.apart import RecordingDied
from autoremat.engines.torch.world.devices import check_devices, check_target, is_unreal, refuse_shared_memory
from autoremat.engines.torch.world.gradients import gradients_left, gradients_there, with_gradients
from autoremat.engines.torch.world.modules import (
    map_tensors,
    reachable_modules,
    swap_tensors,
    undisturbed,
    without_caches,
)
from autoremat.engines.torch.world.parallel import (
    NotSupported,
    absent,
    check_supported,
    parallel_of,
    resident_bytes,
)
from autoremat.engines.torch.world.problems import (
    FakesLeft,
    NothingDifferentiable,
    Scripted,
    TrainsInside,
    UnusableInput,
)
from autoremat.program import Program

_FINAL: Final = (NothingDifferentiable, CompiledCode, TrainsInside, Scripted, FakesLeft, RecordingDied)
"""Errors that the other way to record would meet, too."""
_Work = Callable[[Progress | None], Recording]


def record(
    fn: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *,
    optimizer_state_bytes: int = 0, optimizer_scratch_bytes: int = 0, timing: str = "measure",
    device: torch.device | str | None = None, progress: Progress | None = None, name: str = "",
    accumulate: bool = False,
) -> Program:  # fmt: skip
    """Record forward and backward of ``fn(*args, **kwargs)``.

    Runs the callable once on fake tensors: nothing of the model's size is allocated. A callable that needs the numbers
    in its tensors (data-dependent control flow) is recorded on the real ones instead, without keeping what the backward
    would need.

    Where a process may be forked (``apart``), all this happens in a child, and nothing here can change. What runs there
    on real tensors takes memory of its own: what calls make, and a copy of what the step overwrites. Elsewhere (CUDA is
    in use, other threads run, several processes train) it happens here, and afterwards all that can be restored is as
    it was: parameters, buffers, gradients, module attributes, random generators. If then somebody still holds a fake
    tensor, that is an error.

    Args:
        fn: a module or any callable; returns a tensor, or nested tensors, or an object with a ``loss``.
        args: its positional arguments.
        kwargs: its keyword arguments.
        optimizer_state_bytes: resident state of the optimizer, counted in the peak.
        optimizer_scratch_bytes: temporaries of the optimizer's step, counted after the backward.
        timing: ``"measure"`` runs each distinct operator alone on the device, ``"auto"`` those for which it has room,
            ``"estimate"`` nothing.
        device: for a model on the ``meta`` device: the device it will train on (default: cuda if there, else cpu).
        progress: called with a label and a fraction.
        name: name of the program.
        accumulate: the step finds gradients of all parameters that its backward reaches, and adds to them.

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
        NotSupported: ``accumulate`` under DistributedDataParallel or ``fully_shard``.
    """
    kwargs = dict(kwargs or {})
    if device is not None:
        check_target(device)
    modules = reachable_modules(fn, args, kwargs)
    check_devices(modules, args, kwargs)
    prepare_jagged()
    parallel = parallel_of(modules)
    check_supported(parallel, modules)
    if accumulate and parallel:
        raise NotSupported(
            "accumulate= under DistributedDataParallel or fully_shard: where their buckets and shards keep gradients "
            "between steps is not known beforehand; autoremat.checkpoint plans for them when they are there"
        )
    has_numbers = not is_unreal(modules, args, kwargs)
    recorded, recording = _recorded(Step(fn, modules, args, kwargs, parallel, device, progress), has_numbers)
    whole = Whole(
        name or getattr(fn, "__name__", type(fn).__name__), recorded, optimizer_state_bytes, optimizer_scratch_bytes,
        resident_bytes(parallel), timing, has_numbers, None, progress,
    )  # fmt: skip
    program = whole.program(recording)
    if parallel:
        return program
    left = gradients_left(program)
    there = gradients_there(modules, left)
    return with_gradients(program, left | there if accumulate else there)


def _recorded(step: Step, has_numbers: bool) -> tuple[str, Recording]:
    """Record on fake tensors, or else on the real ones.

    If both fail, the second error is raised from the first. Where the other way is refused from the start, the first
    error is raised, because it tells more.
    """
    try:
        refuse_shared_memory(step.modules, step.args, step.kwargs)
        return "fake", _on_fake(step)
    except _FINAL:
        raise
    except Exception as error:
        if not has_numbers:
            _refuse_numbers(error)
            raise
        try:
            return "real", _on_real(step)
        except _FINAL:
            raise
        except NotSupported as refusal:
            raise error from refusal
        except Exception as again:
            raise again from error


def _refuse_numbers(error: Exception) -> None:
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        raise UnusableInput(
            f"the step looks at the numbers in its tensors ({error.func}), and these are fake or on meta: give it real "
            "ones"
        ) from error


def _on_fake(step: Step) -> Recording:
    """Record on fake tensors, in a child or here."""
    living = Living()

    def work(progress: Progress | None) -> Recording:
        with (
            fake_world(step.modules, step.args, step.kwargs, step.device, step.parallel, living) as world,
            _Beneath(living),
            in_sight(),
        ):
            first = _first(step, world.args, world.kwargs, math.inf, NoCheck())
            try:
                return _through(first, step, progress, _Converting(world.convert))
            finally:
                first.close()

    def here() -> Recording:
        try:
            with undisturbed(step.modules, step.fn, step.args, step.kwargs):
                recording = work(step.progress)
        except Exception as error:
            let_go_of_frames(error)
            if living.holders():
                let_go_of_lines(error)
            refuse_left(living)
            raise
        refuse_left(living)
        return recording

    return apart_or(here, work, step)


def _on_real(step: Step) -> Recording:
    """Record on the real tensors, in a child or here."""
    if step.parallel.units:
        raise NotSupported("a recording on real tensors would have to gather the shards of fully_shard")

    def work(progress: Progress | None) -> Recording:
        twin = Doubles()
        with without_caches(), _put_back() as before_writing:
            swap_tensors(step.modules, twin)
            args, kwargs = map_tensors((tuple(step.args), step.kwargs), twin)
            first = _first(step, args, kwargs, 0.0, SelfCheck(None, lambda call, why: None))
            first.tape.keeping.before_outside = before_writing
            try:
                return _through(first, step, progress, _ConvertingReal(twin))
            finally:
                first.close()

    def here() -> Recording:
        with undisturbed(step.modules, step.fn, step.args, step.kwargs):
            return work(step.progress)

    return apart_or(here, work, step)


def _first(step: Step, args: Any, kwargs: Any, room_bytes: float, check: NoCheck) -> FirstStep:
    """Make a first step of these arguments with limited room."""
    return FirstStep(
        step.fn, args, kwargs, step.parallel, lambda fixed: lambda plain: room_bytes, lambda module, name: False,
        Reports(), check,
    )  # fmt: skip


def _through(first: FirstStep, step: Step, progress: Progress | None, within: AbstractContextManager[Any]) -> Recording:
    """Run the forward in a block, and record it with its backward."""
    if progress is not None:
        first.on_op(lambda n: progress("recording", 0.0) if n % 256 == 0 else None)
    try:
        with eagerly(), absent(step.parallel), torch.enable_grad():
            result = first.forward(within)
            if first.compiled:
                module = first.module_at(first.compiled) or "the step"
                raise CompiledCode(
                    f"{module} ({first.compiled}) is compiled by torch.compile, and autoremat cannot see into compiled "
                    "code; leave torch.compile out there, or checkpoint only what is not compiled"
                )
            first.backward(result)
    except NotRecorded as error:
        raise error.__cause__ or error from None
    finally:
        torch.clear_autocast_cache()  # it has casts of tensors that no longer exist
    return first.recording()


@contextmanager
def _put_back() -> Iterator[Callable[[Tensor], None]]:
    """Yield a function that saves outside memory before it is overwritten.

    At the end of the block the memory is restored: other processes may share it.
    """
    before: dict[int, tuple[Tensor, Tensor]] = {}

    def note(tensor: Tensor) -> None:
        storage = storage_of(local_of(tensor))
        if storage is not None and storage._cdata not in before:
            whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            before[storage._cdata] = (whole, whole.clone())

    try:
        yield note
    finally:
        with torch.inference_mode():  # inference tensors can be written only in inference mode
            for whole, saved in before.values():
                whole.copy_(saved)


class _Converting(TorchFunctionMode):
    """Converts tensors from outside in calls; the tensors themselves do not change.

    Fake tensors are the step's own, and stay as they are.

    Args:
        convert: gives what stands for a tensor from outside.
    """

    def __init__(self, convert: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._convert = convert

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Make one call."""
        return func(*mapped(args, self._given), **mapped(kwargs or {}, self._given))

    def _given(self, tensor: Tensor) -> Tensor:
        with without_function_modes():
            is_kept = self._is_own(tensor) or nn.parameter.is_lazy(tensor)
            return tensor if is_kept else self._convert(tensor)

    def _is_own(self, tensor: Tensor) -> bool:
        return isinstance(tensor, FakeTensor)


class _ConvertingReal(_Converting):
    """Converts tensors from outside where the step's own are real.

    The step's own are those that its calls have made, or that have a history.
    """

    def __init__(self, convert: Callable[[Tensor], Tensor]) -> None:
        super().__init__(convert)
        self._made: dict[int, weakref.ref[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Make one call."""
        out = super().__torch_function__(func, types, args, kwargs)
        self._made.update((id(t), weakref.ref(t)) for t in tensors_in(out))
        return out

    def _is_own(self, tensor: Tensor) -> bool:
        made = self._made.get(id(tensor))
        return not is_leaf(tensor) or (made is not None and made() is tensor)


class _Beneath(TorchDispatchMode):
    """Runs below the calls on fake tensors.

    It sends nothing to other processes, and notes every tensor that is made.
    """

    def __init__(self, living: Living) -> None:
        super().__init__()
        self._living = living

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run one operator."""
        if types and is_taken_apart(types):
            return NotImplemented
        kwargs = kwargs or {}
        out = run_alone(func, args, kwargs) if facts_of(func).communicates else func(*args, **kwargs)
        self._living.note(tensors_in(out))
        return out
