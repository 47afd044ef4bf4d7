"""The first step of a kind of input: real, and recorded.

It stays within the budget; a shadow records it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from autoremat.engines.torch.eager.arguments import tensors_in
from autoremat.engines.torch.eager.check import NoCheck
from autoremat.engines.torch.eager.path import Path
from autoremat.engines.torch.eager.recording import (
    finished,
    know_the_world,
    largest_op_bytes,
    path_of,
    program_of,
    record_backward,
)
from autoremat.engines.torch.eager.room import OfFirstStep
from autoremat.engines.torch.eager.shadow import Shadow
from autoremat.engines.torch.eager.tape import First, Reports, Tape
from autoremat.engines.torch.eager.units import Units
from autoremat.engines.torch.operators.history import is_leaf
from autoremat.engines.torch.operators.local import local_of, prepare_jagged
from autoremat.engines.torch.operators.timing import Progress
from autoremat.engines.torch.operators.values import storage_of
from autoremat.engines.torch.recording.recording import Recording
from autoremat.engines.torch.world.gradients import gradients_left, gradients_there
from autoremat.engines.torch.world.module_paths import ModulePaths
from autoremat.engines.torch.world.modules import named_tensors, reachable_modules
from autoremat.engines.torch.world.parallel import Parallel, resident_bytes
from autoremat.engines.torch.world.problems import NothingDifferentiable, TrainsInside, no_optimizer, refuse_training
from autoremat.program import InvalidProgram, Program


class NotRecorded(Exception):
    """The step could not be recorded; the message says why."""


class Cached:
    """What a forward may have cached.

    These are values that calls made and others read, except those it returned. A step that finds them makes fewer calls
    than this one.
    """

    def __init__(self, tape: Tape, result: Any) -> None:
        numbers, read = tape.numbers, {v for call in tape.path for _, v in call.reads}
        given = {s._cdata for t in tensors_in(result) if (s := storage_of(local_of(t))) is not None}
        found = [s for s in numbers.living() if numbers.known(s) in read and s._cdata not in given]
        self._storages, self._passes = list(map(weakref.ref, found)), weakref.ref(tape.passes)

    def outlive(self) -> bool:
        """Tell whether some of them outlive the backward."""
        passes = self._passes()
        if passes is not None and passes.needs.handles:
            return False
        return any(storage() is not None for storage in self._storages)


def _named(modules: Sequence[torch.nn.Module]) -> list[tuple[str, Tensor]]:
    """List existing parameters and buffers, by name."""
    return [(n, t) for n, _, t in named_tensors(modules) if not torch.nn.parameter.is_lazy(t)]


def what_is_there(
    modules: Sequence[torch.nn.Module], args: Sequence[Any], kwargs: dict[str, Any], parallel: Parallel
) -> tuple[list[torch.UntypedStorage], int]:  # fmt: skip
    """Return the memory that exists before a step, and its bytes.

    The bytes include those of torch.distributed.
    """
    tensors = [t for _, t in _named(modules)]
    tensors += [t.grad for t in tensors if is_leaf(t) and t.grad is not None]
    tensors += [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    found = list({s._cdata: s for s in map(storage_of, tensors) if s is not None}.values())
    return found, sum(s.nbytes() for s in found) + sum(resident_bytes(parallel).values())


def missing_gradient_bytes(modules: Sequence[torch.nn.Module]) -> int:
    """Return the bytes of gradients that parameters do not have yet."""
    own = {id(t): t for _, t in _named(modules) if is_leaf(t) and t.requires_grad and t.grad is None}
    return sum(local_of(t).nbytes for t in own.values())


class FirstStep:
    """One call of the callable, noted and recorded.

    Args:
        fn: the callable.
        args: its positional arguments.
        kwargs: its keyword arguments.
        parallel: what torch.distributed does around the modules.
        room: given the bytes that are always there, returns the function that tells what else may be taken, given what
            plain training would take.
        is_kept: whether the user wants what an operator of this module and name makes kept.
        reports: whom the tape tells what.
        check: of reruns.
    """

    def __init__(
        self, fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], parallel: Parallel,
        room: Callable[[int], Callable[[int], float]], is_kept: Callable[[str, str], bool], reports: Reports,
        check: NoCheck,
    ) -> None:  # fmt: skip
        self.fn, self.args, self.kwargs, self.parallel = fn, args, kwargs, parallel
        self.modules = reachable_modules(fn, args, kwargs)
        self._failures: list[BaseException] = []
        reports.unlike = self._failures.append  # not a method of self: that circle would keep gradients alive
        self._paths = ModulePaths(self.modules)
        self._shadow = Shadow(self._paths.current)
        self._gradients = [(t, t.grad) for t in self._own() if is_leaf(t) and t.requires_grad]
        self._versions = self._versions_of_gradients()
        self._units = Units(parallel, self.modules, self._shadow)
        storages, fixed_bytes = what_is_there(self.modules, args, kwargs, parallel)
        self.tape = Tape(First(OfFirstStep(room(fixed_bytes)), self._shadow, storages, is_kept), reports, check)
        self.tape.backward.watch = self._shadow.packs

    def _named(self) -> list[tuple[str, Tensor]]:
        return _named(self.modules)

    def _own(self) -> list[Tensor]:
        return [t for _, t in self._named()]

    def _moving(self) -> list[Tensor]:
        """List parameters whose complete gradients move into DistributedDataParallel's buckets."""
        found = (module._parameters[name] for module, name in self.parallel.moving)
        return [t for t in found if t is not None]

    def _versions_of_gradients(self) -> list[tuple[int, int] | None]:
        return [None if t.grad is None else (id(t.grad), t.grad._version) for t, _ in self._gradients]

    def close(self) -> None:
        """Let a graph that somebody holds keep nothing else alive.

        The recording is over, and there is no training.
        """
        self.tape.passes.needs.stop_counting()
        self.tape.ledger.close()
        self.let_go()
        self.args, self.kwargs, self._gradients = (), {}, []

    def forward(self, within: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()) -> Any:  # noqa: B008
        """Call the callable.

        Args:
            within: the block that it is called in.

        Raises:
            TrainsInside: it runs its own optimizer.
        """
        prepare_jagged()
        try:
            know_the_world(self._shadow, self.modules, self.args, self.kwargs, with_gradients=bool(self.parallel))
            self._units.know()
        except Exception as error:  # noqa: BLE001 - whatever a fake tensor cannot stand for
            self.tape.witness.give_up(error)
        around = self._gradients_put_back(), no_optimizer(), self._paths, self._units.watched(self.tape)
        with contextlib.ExitStack() as stack:
            for block in (*around, self.tape.forward(), within):
                stack.enter_context(block)
            return self.fn(*self.args, **self.kwargs)

    @contextlib.contextmanager
    def _gradients_put_back(self) -> Iterator[None]:
        """Restore gradients if the callable turns out to train inside."""
        try:
            yield
        except TrainsInside:
            for leaf, gradient in self._gradients:
                leaf.grad = gradient
            raise

    @property
    def compiled(self) -> str:
        """Where compiled code was met; "" if none was."""
        return self.tape.compiled or self._shadow.graph.compiled

    def cached(self, result: Any) -> Cached:
        """Return what calls of the forward made and others read."""
        return Cached(self.tape, result)

    def backward(self, result: Any) -> None:
        """Record the backward on fake tensors.

        Raises:
            NotRecorded: the forward, or the backward, cannot be made on fake tensors.
            NothingDifferentiable: nothing returned requires grad.
            TrainsInside: because the callable runs the backward itself.
        """
        has_trained = self._versions_of_gradients() != self._versions
        with self._gradients_put_back():
            try:
                if self._failures:
                    raise self._failures[0]
                whole = self._units.whole()
                moving = [*self._moving(), *(t for _, t in whole)]
                record_backward(
                    self._shadow, result, [*self._named(), *whole], moving, with_gradients=bool(self.parallel)
                )
                self._units.forbid()
            except NothingDifferentiable:
                refuse_training(has_trained)
                raise
            except Exception as error:
                if "backward through the graph a second time" in str(error):
                    refuse_training(has_trained, error)
                raise NotRecorded(f"{type(error).__name__}: {error}") from error

    def gradients(self, program: Program) -> dict[str, int]:
        """Return bytes of gradients found, by name, that the program lacks."""
        return {} if self.parallel else gradients_there(self.modules, gradients_left(program))

    def program(
        self, *, optimizer_state_bytes: int, optimizer_scratch_bytes: int, progress: Progress | None,
        limit: Callable[[Program], int] | None, timing: str = "measure",
    ) -> Program:  # fmt: skip
        """Make the program of the step.

        Where operators are measured, what the step holds by now takes room, too.

        Raises:
            NotRecorded: what has been recorded contradicts itself.
        """
        room = self.tape.backward.room
        assert room is not None
        room.make(largest_op_bytes(self._shadow))
        there = room.online.meter.nbytes + self._shadow.packs.real_bytes
        there += 0 if self.parallel else sum(gradients_there(self.modules).values())
        try:
            return program_of(
                self._shadow, self.tape.path, getattr(self.fn, "__name__", type(self.fn).__name__),
                optimizer_state_bytes=optimizer_state_bytes, optimizer_scratch_bytes=optimizer_scratch_bytes,
                parallel=self.parallel, progress=progress, timing=timing,
                limit=None if limit is None else lambda program: limit(program) - there,
            )  # fmt: skip
        except (InvalidProgram, LookupError, AssertionError) as error:  # what was recorded cannot be such a step
            raise NotRecorded(f"{type(error).__name__}: {error}") from error

    def module_at(self, line: str) -> str:
        """Return the module that ran a line; "" outside of all."""
        return next((op.module for op in self._shadow.recorder.ops if op.source == line), "")

    def living(self) -> list[Tensor]:
        """List the tensors of the step that somebody holds."""
        return self._shadow.twins.tensors()

    def on_op(self, report: Callable[[int], None]) -> None:
        """Report every recorded op, by the number of those so far."""
        self._shadow.recorder.log.on_op = report

    def recording(self) -> Recording:
        """Return what has been recorded, as plain data."""
        return finished(self._shadow, self.tape.path)

    def path(self) -> Path:
        """Return the path of its forward, and end the recording."""
        path = path_of(self._shadow, self.tape.path, self.tape.n_packs, self.tape.composites)
        self.tape.witness.shadow = None
        return path

    def let_go(self) -> None:
        """Hold nothing of the recording.

        What it has copied would take room until somebody looks for circles.
        """
        self._shadow.close()
