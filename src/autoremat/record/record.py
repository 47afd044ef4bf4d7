"""``record``: one training step, run once on fake tensors (or on real ones), as a ``Program``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from autoremat.program import Program
from autoremat.record.as_plain import as_plain
from autoremat.record.assemble import assemble
from autoremat.record.casts import casts_in_use, forget_casts
from autoremat.record.compiled import CompiledCode, eagerly
from autoremat.record.local import Description, is_distributed, local_of
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
from autoremat.record.timing import FREE, Cost, Progress, estimate_all, measure_all
from autoremat.record.values import fingerprint, storage_of
from autoremat.record.world import (
    gradients_kept,
    leaves_of,
    map_tensors,
    named_tensors,
    reachable_modules,
    swap_tensors,
    undisturbed,
)


class UnusableInput(ValueError):
    """Something about the model or its inputs that no recording can deal with; the message says what to do."""


class NothingDifferentiable(UnusableInput):
    """The callable returned nothing that a backward pass could start from."""


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
) -> Program:
    """Record forward and backward of ``fn(*args, **kwargs)``.

    Runs the callable once on fake tensors: nothing of the model's size is allocated. A callable that needs the
    numbers in its tensors (data-dependent control flow) is recorded on the real ones instead, without keeping what
    the backward would need. Afterwards everything is as it was: parameters, buffers, gradients, module attributes,
    random generators.

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

    Returns:
        The program. Its backward starts from the ``loss`` if the result has one, from the only scalar that requires
        grad if there is just one, otherwise from everything returned that requires grad.

    Raises:
        NothingDifferentiable: nothing returned requires grad.
        CompiledCode: the callable runs code that ``torch.compile`` has compiled.
        UnusableInput: parameters and inputs are on several devices; ``device`` is not one of this machine's.
    """
    kwargs = dict(kwargs or {})
    if device is not None:
        _check_target(device)
    modules = reachable_modules(fn, args, kwargs)
    check_devices(modules, args, kwargs)
    parallel = parallel_of(modules)
    check_supported(parallel, modules)

    def on_fake() -> Recorder:
        _refuse_shared_memory(modules, args, kwargs)
        with undisturbed(modules, fn, args, kwargs), _fake_world(modules, args, kwargs, device, parallel) as world:
            return _record_in(world, fn, modules, parallel, progress)

    def on_real(*, forward_only: bool = False) -> Recorder:
        if parallel.units:
            raise NotSupported("a recording on real tensors would have to gather the shards of fully_shard")
        return _with_what_is_missed(
            lambda contents: _record_for_real(fn, modules, args, kwargs, parallel, progress, forward_only, contents)
        )

    ways = [("fake", on_fake), ("real", on_real)]
    (recorded, first), (other, second) = reversed(ways) if real else ways
    try:
        recorder = first()
    except (NothingDifferentiable, CompiledCode):
        raise
    except Exception as error:
        if is_unreal(modules, args, kwargs):
            if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
                raise UnusableInput(
                    f"the step looks at the numbers in its tensors ({error.func}), and these are fake or on meta: give "
                    "it real ones"
                ) from error
            raise
        recorded, recorder = other, _or_from(error, second, is_real=not real)
    alone = not parallel and not any(op.facts is not None and op.facts.communicates for op in recorder.ops)
    if compare and recorded == "fake" and alone and not is_unreal(modules, args, kwargs):
        with suppress(Exception):  # what fails on real tensors fails in the step itself, too, and is reported there
            if not _same_path(recorder, on_real(forward_only=True)):
                recorded, recorder = "real", on_real()
    signatures = [op.signature for op in recorder.ops]

    def assembled(costs: Sequence[Cost], source: str) -> Program:
        return assemble(
            recorder, name or getattr(fn, "__name__", type(fn).__name__), costs,
            optimizer_state_bytes=optimizer_state_bytes, optimizer_scratch_bytes=optimizer_scratch_bytes,
            beside=resident_bytes(parallel), timing=source, recorded=recorded,
        )  # fmt: skip

    if timing != "measure" or is_unreal(modules, args, kwargs):
        written = [sum(recorder.values[n].nbytes for n in op.writes) for op in recorder.ops]
        return assembled(estimate_all(signatures, written), "estimated")
    room = None
    if limit is not None:
        without_costs = assembled([FREE] * len(signatures), "estimated")
        room = limit(without_costs) - without_costs.fixed_bytes
    costs = measure_all(signatures, progress, room_bytes=room)
    if recorded == "fake":  # sizes that depend on the data were seen on the real tensors
        recorder.take_sizes([cost.made_bytes for cost in costs])
    return assembled(costs, "measured")


def _or_from(error: Exception, record_anew: Callable[[], Recorder], *, is_real: bool) -> Recorder:
    """The other way to record; if that fails, too, the error on the real tensors with the other one behind it.

    Where the other way is refused from the start, the first error tells more.
    """
    try:
        return record_anew()
    except (NothingDifferentiable, CompiledCode):
        raise
    except Exception as again:
        if is_real and not isinstance(again, NotSupported):
            raise again from error
        raise error from again


def _same_path(recorder: Recorder, forward: Recorder) -> bool:
    """Whether two recordings have the same forward; of the second one there need not be more."""
    one, other = [
        [(op.name, [n for n in op.reads if n >= 0], op.writes) for op in r.ops if not op.backward]
        for r in (recorder, forward)
    ]
    return one == other


_FAKE_TENSOR_LOG = logging.getLogger(FakeTensorMode.__module__)
"""Where torch writes a traceback when an operator fails on fake tensors."""
_MAX_ATTEMPTS = 8
"""How often a recording on real tensors begins anew to learn what a backward inside the forward needs."""


class _World:
    """Arguments and helpers of one recording: fake or real."""

    def __init__(
        self, args: Any, kwargs: Any, convert: Any, blank: Any, before_write: Any, contents: _Contents, fingerprint: Any
    ) -> None:
        self.args, self.kwargs = args, kwargs
        self.convert, self.blank, self.before_write, self.contents = convert, blank, before_write, contents
        self.fingerprint = fingerprint


@contextmanager
def _fake_world(
    modules: Sequence[nn.Module], args: Any, kwargs: Any, device: torch.device | str | None, parallel: Parallel
) -> Iterator[_World]:
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
            if is_distributed(tensor):
                converted[id(tensor)] = _around(tensor, convert(local_of(tensor).detach()))
                return converted[id(tensor)]
            with torch.utils._python_dispatch._disable_current_modes():
                fake = mode.from_tensor(tensor)
                converted[id(tensor)] = _placed(fake, mode, target) if tensor.device.type == "meta" else fake
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

    with warnings.catch_warnings(), _quiet(_FAKE_TENSOR_LOG):
        warnings.simplefilter("ignore")
        with mode:
            _make_whole(parallel)
        swap_tensors(modules, convert)
        fake_args, fake_kwargs = map_tensors((tuple(args), kwargs), convert_argument)
        running = True
        with mode:
            yield _World(fake_args, fake_kwargs, convert, blank, lambda t: None, _Contents(), None)


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


def _with_what_is_missed(record_with: Callable[[_RealContents], Recorder]) -> Recorder:
    """Record on the real tensors; anew while a backward inside the forward asks for numbers that were not kept."""
    contents = _RealContents()
    for k in reversed(range(_MAX_ATTEMPTS)):  # with other numbers it may ask for others
        try:
            recorder = record_with(contents)
        except Exception:
            if not contents.missed or k == 0:
                raise
        else:
            if not contents.missed or k == 0:
                break
        contents = _RealContents(contents.kept | contents.missed)
    return recorder


def _record_for_real(
    fn: Any,
    modules: Sequence[nn.Module],
    args: Any,
    kwargs: Any,
    parallel: Parallel,
    progress: Progress | None,
    forward_only: bool,
    contents: _RealContents,
) -> Recorder:
    """Record on the real tensors, and put back whatever the step overwrote."""
    before: dict[int, tuple[Tensor, Tensor]] = {}

    def before_write(tensor: Tensor) -> None:
        storage = storage_of(tensor)
        if storage is not None and storage._cdata not in before:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            before[storage._cdata] = (whole, whole.clone())

    def blank(n: int, dtype: torch.dtype, where: torch.device) -> Tensor:
        return torch.zeros(n, dtype=dtype, device=where)

    twin = _Twins()
    with undisturbed(modules, fn, args, kwargs):
        try:
            swap_tensors(modules, twin)
            args, kwargs = map_tensors((tuple(args), kwargs), twin)
            look = None if forward_only else fingerprint
            world = _World(args, kwargs, lambda t: t, blank, before_write, contents, look)
            return _record_in(world, fn, modules, parallel, progress, forward_only=forward_only)
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


def _record_in(
    world: _World,
    fn: Any,
    modules: Sequence[nn.Module],
    parallel: Parallel,
    progress: Progress | None,
    *,
    forward_only: bool = False,
) -> Recorder:
    """Run forward and backward under the recorder."""
    paths = ModulePaths(modules)
    recorder = Recorder(
        world.blank, world.convert, world.before_write, paths.current, world.contents.of, world.contents.missed.add,
        world.fingerprint,
    )  # fmt: skip
    if progress is not None:
        recorder.on_op = lambda n: progress("recording", 0.0) if n % 256 == 0 else None
    _know_the_world(recorder, world, modules)
    _know_units(recorder, parallel, fn, modules)
    with ExitStack() as stack:
        stack.enter_context(eagerly())
        stack.enter_context(absent(parallel))
        stack.callback(recorder.reset_generators)
        stack.callback(recorder.take_out_of_graph)
        stack.enter_context(torch.enable_grad())
        first_node = torch.ones(1, requires_grad=True).clone().grad_fn
        stack.enter_context(as_plain())
        stack.enter_context(recorder)
        with paths, recorder.hooks():
            result = fn(*world.args, **world.kwargs)
        forget_casts()
        if forward_only:
            return recorder
        recorder.forward_ends()
        outputs = differentiable_outputs(result)
        if not outputs:
            raise NothingDifferentiable(
                "the callable returned nothing that requires grad, so there is no backward pass to plan for; return "
                "the loss (or the model's output), and check that some parameter has requires_grad=True"
            )
        leaves = leaves_of(outputs, since=first_node)
        with gradients_kept(leaves), recorder.seeded(outputs) as start:
            recorder.backward = True
            start()
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
    recorder.gathering = Gathering(freed, open_units(parallel, modules, runs_inside))


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
