"""The private names of torch that this engine needs, each with its reason; a test says for each whether it is there.

Everything else of the folder goes by documented interfaces: ``torch.fx``, ``functorch.compile``, ``torch.compile`` and
the compiler's configuration.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from types import CodeType, SimpleNamespace
from typing import Any, Final, NamedTuple

import torch
from torch import fx
from torch._dynamo.backends.common import AotAutograd, aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.descriptors import (
    AOTInput,
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
)
from torch._functorch.partitioners import get_default_op_list
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomPartitionerFn, CustomSchedulerPass
from torch.fx.node import Node
from torch.utils._ordered_set import OrderedSet


class Mark(Enum):
    """On which side of a joint graph torch has put a node."""

    NONE = ""
    FORWARD = "is_forward"
    BACKWARD = "is_backward"


_MARK: Final = "partitioner_tag"
"""Key of a node's ``meta`` under which AOTAutograd says where the node was traced. ``default_partition`` reads it."""
_FIXED: Final = {"must_be_in_forward": Mark.FORWARD, "must_be_in_backward": Mark.BACKWARD}
"""Marks of nodes that must stay where they are."""
_BY_HAND: Final = "recompute"
"""Key under which ``torch.utils.checkpoint`` says what is to be made again."""
_GENERATORS: Final = ("fwd_seed", "fwd_base_offset", "bwd_seed", "bwd_base_offset", "fwd_rng_state", "bwd_rng_state")
"""Parts of the names of inputs that are states of generators."""
_TANGENTS: Final = "tangents"
"""Part of the names of inputs that are gradients of outputs."""
_DESCRIPTION: Final = "desc"
"""Key under which AOTAutograd says what an input or an output of a graph is."""


def mark_of(node: Node) -> Mark:
    """On which side a node was traced."""
    mark = node.meta.get(_MARK) or ""
    return _FIXED.get(mark) or (Mark(mark) if mark in {m.value for m in Mark} else Mark.NONE)


def put_mark(node: Node, mark: Mark) -> None:
    """Say on which side a node runs, unless torch has said that it must not be anywhere else."""
    if node.meta.get(_MARK) not in _FIXED:
        node.meta[_MARK] = mark.value


def forget_how_to_recompute(node: Node) -> None:
    """Take from a node what a partitioner might read as a wish of the user's."""
    node.meta.pop(_BY_HAND, None)


def is_made_again_by_hand(node: Node) -> bool:
    """Whether the user has put a node into a region of ``torch.utils.checkpoint``."""
    return node.meta.get(_BY_HAND) is not None


def is_tangent(node: Node) -> bool:
    """Whether a node is the gradient of an output, which the backward is given; torch's partitioners go by the name."""
    return node.op == "placeholder" and _TANGENTS in str(node.target)


def is_seed_or_offset(node: Node) -> bool:
    """Whether a node is the seed of a generator: so do the names say of random numbers that are functions."""
    return node.op == "placeholder" and any(name in str(node.target) for name in _GENERATORS)


def input_of(node: Node) -> AOTInput | None:
    """What an input of the graph is to the user's callable."""
    found = node.meta.get(_DESCRIPTION)
    return found if node.op == "placeholder" and isinstance(found, AOTInput) else None


def mutated_input_of(description: Any) -> AOTInput | None:
    """The input into which an output is copied after the forward; None where it is an ordinary output."""
    return description.mutated_input if isinstance(description, InputMutationAOTOutput) else None


def size_hint(size: Any) -> int | float | bool | None:
    """What a symbol stands for in the call that is being compiled; None where that depends on data."""
    node = size.node
    return node.hint if node.has_hint() else None


def position_of(description: AOTInput | None) -> int | None:
    """Which input of the compiler's graph an input of the joint graph is."""
    return description.idx if isinstance(description, PlainAOTInput) else None


def gradient_of(description: Any) -> AOTInput | None:
    """The input whose gradient an output of the backward is."""
    return description.grad_of if isinstance(description, GradAOTOutput) else None


def innermost(backend: Any) -> Any:
    """The backend inside of what the compiler has wrapped it in for debugging."""
    while (inner := getattr(backend, "_torchdynamo_orig_backend", None)) is not None:
        backend = inner
    return backend


def is_aot_backend(backend: Any) -> bool:
    """Whether ``aot_autograd(...)`` has made a backend."""
    return isinstance(backend, AotAutograd)


def aot_backend_with(partitioner: Any, backend: Any = None) -> Any:
    """A backend made by ``aot_autograd`` with another partitioner; ``aot_eager`` where none is given."""
    if backend is not None:
        return aot_autograd(**{**backend.kwargs, "partition_fn": partitioner})
    return aot_autograd(
        fw_compiler=boxed_nop, bw_compiler=boxed_nop, partition_fn=partitioner, keep_inference_input_mutations=True
    )


def graph_being_made() -> Any:
    """The graph that the compiler makes now: it has the backend that will be called with it (``compiler_fn``).

    None for an export, which keeps its graph, and where something else than ``torch.compile`` traces.
    """
    try:
        graph = InstructionTranslator.current_tx().output
    except AttributeError:
        return None
    return None if graph.export or graph.compiler_fn is None else graph


def begins_with(graph: Any, codes: Container[CodeType]) -> bool:
    """Whether the outermost function that the compiler traces now is one of these."""
    return graph.root_tx.f_code in codes


def must_be_whole(graph: Any) -> bool:
    """Whether the user has asked for one graph (``fullgraph=True``)."""
    return bool(graph.root_tx.one_graph or graph.root_tx.error_on_graph_break)


def reason_of_end(module: Any) -> Any:
    """Why a graph of the compiler's ends where it does: with ``reason``, ``user_stack`` and ``graph_break``."""
    return getattr(module, "compile_subgraph_reason", None)


def sources_of(module: Any) -> list[str]:
    """The compiler's paths to the inputs of its graph, in order; "" where there is none."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    return [str(getattr(getattr(node.meta.get("grapharg"), "source", None), "name", "") or "") for node in inputs]


def _choices() -> Any:
    """Inductor's choices, but for one: what runs again is fused with what reads it, and with nothing beside it.

    Two kernels that read the same are one kernel to Inductor, even where one of them is to run much later: then what
    both read, and what both make, is in memory from the first to the last. For what runs again that undoes the plan.

    Handed over twice: as the handler of the compilation, since Inductor looks at its configuration once in a thread
    only; and in the configuration, which is a part of the key of its cache.
    """
    from torch._inductor.choices import InductorChoices

    class Choices(InductorChoices):
        """As the plan wants."""

        @staticmethod
        def can_fuse_horizontal(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
            """Whether two kernels that read the same may become one."""
            if _runs_again(node1) or _runs_again(node2):
                return False
            return bool(InductorChoices.can_fuse_horizontal(scheduler, node1, node2, shared_data_score))

        def uuid(self) -> Any:
            """What the choices depend on."""
            return "autoremat", "apart what runs again"

    return Choices()


def _runs_again(kernel: Any) -> bool:
    return any(node.meta.get(AGAIN, False) for node in _computed(kernel))


AGAIN: Final = "autoremat_again"
"""Key of a node's ``meta`` under which stands that it is a further run."""


PLACE: Final = "autoremat_place"
"""Key of a node's ``meta`` under which stands at which run of the plan it was written."""


class _Orders(CustomSchedulerPass):
    """Orders kernels once they are fused (``_post_fusion_custom_pass``): the hook before Inductor's own ordering."""

    def __call__(self, kernels: Any) -> Any:
        return ordered(kernels) if kernels else kernels

    def uuid(self) -> Any:
        """What the order depends on, beside the graph."""
        return "autoremat", "the plan's order", 2  # count up where the order that a graph is given changes


class _Splits(CustomPartitionerFn):
    """A partitioner as Inductor takes one.

    Inductor copies its configuration deeply and pickles it for its cache: nothing of ours goes along.
    """

    def __init__(self, partitioner: Any, key: Any) -> None:
        self.partitioner, self.key = partitioner, key

    def __call__(self, gm: Any, joint_inputs: Any, **given: Any) -> Any:
        return self.partitioner(gm, joint_inputs, **given)

    def uuid(self) -> Any:
        """What the compiled graphs depend on, beside the graph itself."""
        return self.key

    def __deepcopy__(self, memo: Any) -> _Splits:
        return self

    def __reduce__(self) -> Any:
        return _Splits, (None, self.key)


@contextmanager
def inductor_splits_by(partitioner: Any, key: str) -> Iterator[None]:
    """Within this block Inductor splits joint graphs by this partitioner, and compiles both halves.

    Without being asked to, it would compile the backward in the first backward, outside of this block.

    Args:
        partitioner: takes the joint graph as Inductor will lower it.
        key: tells one plan's graphs from another's in AOTAutograd's cache; "": it is not to be used.
    """
    from torch._inductor.virtualized import V

    both = {
        "enable_autograd_cache": functorch_config.enable_autograd_cache and bool(key),
        "force_non_lazy_backward_lowering": True,
    }
    changes = {
        "custom_partitioner_fn": _Splits(partitioner, ("autoremat", key)), "inductor_choices_class": _choices,
        "_post_fusion_custom_pass": _Orders(), "reorder_for_peak_memory": False,
        "allow_buffer_reuse": False,  # what waits to be used again is in memory, also where an operator takes scratch
    }  # fmt: skip
    with inductor_config.patch(changes), functorch_config.patch(both), V.set_choices_handler(_choices()):
        yield


def backend_with(name: Any, backend: Any, settings: dict[str, Any]) -> Any:
    """A backend with the mode and the options that ``torch.compile`` was given for it."""
    if name == "inductor":
        return torch._TorchCompileInductorWrapper(settings.get("mode"), settings.get("options"), None)
    return functools.partial(backend, **settings)


def is_fusible(node: Node) -> bool:
    """Whether torch's own partitioner takes it for granted that a node is fused with its readers."""
    return bool(_op_types().is_fusible(node))


@functools.cache
def _op_types() -> Any:
    return get_default_op_list()


# ---- what Inductor makes of a graph, before it compiles it ------------------------------------------------------


Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Size and strides of a tensor."""


class Step(NamedTuple):
    """A kernel that Inductor makes.

    Attributes:
        nbytes: in memory while it runs.
        nodes: that it computes.
        layouts: of the tensors that an operator is given which is called as it is, in order; None for other kernels,
            and empty where the sizes are symbols.
    """

    nbytes: int
    nodes: list[Node]
    layouts: tuple[Layout, ...] | None


class Half(NamedTuple):
    """What Inductor makes of a half.

    Attributes:
        steps: its kernels, in order.
        strides: by name those of what the half returns.
        copied_bytes: of inputs that it returns as copies, laid out anew: weights of convolutions, channels last.
    """

    steps: list[Step]
    strides: dict[str, tuple[int, ...]]
    copied_bytes: int = 0


class _Scheduled(BaseException):
    """Ends a compilation once it is scheduled. No ``Exception``: nobody on the way takes it for an error."""

    def __init__(self, half: Half) -> None:
        super().__init__("scheduled")
        self.half = half


def scheduled(
    module: fx.GraphModule, static_inputs: Sequence[int], *, is_backward: bool, n_visible: int = 0,
    strides: Mapping[str, tuple[int, ...]] | None = None, handed_over: Sequence[int] = (),
) -> Half:  # fmt: skip
    """The kernels that Inductor makes of a graph, in order: bytes while each runs, and the nodes that it computes.

    Lowers, fuses, orders and writes a copy of the graph as the compilation that follows does, and ends before anything
    is compiled. The bytes are Inductor's own estimate (``_inductor.memory``) of what it allocates, and of the inputs
    that it frees: none of the step's own inputs, and no gradients that the backward is given. The text of the kernels
    says which results take the place of others. ``_post_fusion_custom_pass`` is the hook that sees the kernels, and
    ``generate`` of the wrapper what is called once they are written.

    Args:
        module: of one half.
        static_inputs: positions of the inputs that stay.
        is_backward: which half it is.
        n_visible: outputs that the user sees, so that their layout is that of eager; all of them in a backward.
        strides: by name those of inputs that the other half has laid out in its own way.
        handed_over: positions of the inputs that nobody else has, so that results may take their place.
    """
    from torch._inductor.compile_fx import compile_fx_inner

    copy = fx.GraphModule(module, _graph_copied(module.graph))
    copy.meta = dict(module.meta)
    inputs = [_laid_out(node, strides or {}) for node in copy.graph.find_nodes(op="placeholder")]
    _say_what_is_visible(copy, None if is_backward else n_visible)
    quiet = {
        "force_disable_caches": True, "custom_partitioner_fn": None, "_post_fusion_custom_pass": _order_and_end,
        "cpp.simdlen": inductor_config.cpp.simdlen,  # which is changed on the way, and so put back
    }  # fmt: skip
    try:
        with inductor_config.patch(quiet), _handed_over(handed_over):
            compile_fx_inner(
                copy, inputs, static_input_idxs=list(static_inputs), is_backward=is_backward, graph_id=None
            )
    except _Scheduled as found:
        return found.half
    return Half([], {})


@contextmanager
def _handed_over(positions: Sequence[int]) -> Iterator[None]:
    """Say to Inductor which inputs are its own, as AOTAutograd does once it has both halves (``donated_buffer``)."""
    context = torch._guards.TracingContext.try_get()
    if context is None or not functorch_config.donated_buffer:
        yield
        return
    before = context.fw_metadata
    context.fw_metadata = SimpleNamespace(bw_donated_idxs=list(positions), static_input_indices=[])  # type: ignore[assignment]
    try:
        yield
    finally:
        context.fw_metadata = before


def _laid_out(node: Node, strides: Mapping[str, tuple[int, ...]]) -> Any:
    """An example of an input, as the other half has laid it out."""
    value, known = node.meta["val"], strides.get(node.name)
    return value if known is None or len(known) != value.dim() else value.as_strided(value.shape, known)


def _say_what_is_visible(module: fx.GraphModule, n_visible: int | None) -> None:
    """Note at the output of a half which positions the user sees, as ``compile_fx`` does; None: all."""
    graph: fx.Graph = module.graph
    output = graph.output_node()
    about = torch.utils._pytree.tree_leaves(output.meta.get(_DESCRIPTION, ()))
    returned = output.args[0]
    assert isinstance(returned, Sequence)
    hidden = {k for k, what in enumerate(about) if mutated_input_of(what) is not None}
    visible = [k for k, node in enumerate(returned[:n_visible]) if isinstance(node, Node) and k not in hidden]
    output.meta["user_visible_output_idxs"] = visible


def _graph_copied(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes have the names and the meta of the originals."""
    new, copies = fx.Graph(), dict[Node, Node]()
    for node in graph.nodes:
        copies[node] = new.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
    return new


def ordered(kernels: Any) -> Any:
    """The kernels in the order of the plan, or as Inductor would order them, whichever takes less.

    Inductor takes the best of some orders; in all of them what runs again may come long before anybody reads it.
    """
    from torch._inductor import memory
    from torch._inductor.virtualized import V

    scheduler = kernels[0].scheduler
    names = OrderedSet(V.graph.graph_inputs.keys()), OrderedSet(V.graph.get_output_names())
    theirs = memory.reorder_for_peak_memory(
        kernels, scheduler.name_to_buf, scheduler.name_to_fused_node, *names
    )  # fmt: skip
    places = _places_of(kernels)
    ours = scheduler.topological_sort_schedule(sorted(kernels, key=places.__getitem__))
    return min(theirs, ours, key=lambda order: max(_taken(order)))


def _places_of(kernels: Any) -> dict[Any, float]:
    """For every kernel where in the plan the last node stands that it computes.

    What computes none, such as taking one of several results apart, follows what it needs: the results are held
    together until each has been taken. What needs nothing comes when it is needed itself.
    """
    places, maker = dict[Any, float](), dict[str, Any]()
    for kernel in kernels:
        known = [node.meta[PLACE] for node in _computed(kernel) if PLACE in node.meta]
        needed = [places[maker[dep.name]] for dep in kernel.unmet_dependencies if dep.name in maker]
        places[kernel] = max(known or needed, default=math.inf)
        maker |= dict.fromkeys(kernel.get_buffer_names(), kernel)
    return places


def _taken(order: Any) -> list[int]:
    """The bytes in memory while each of these kernels runs in this order."""
    from torch._inductor import memory
    from torch._inductor.virtualized import V

    scheduler = order[0].scheduler
    inputs, outputs = OrderedSet(V.graph.graph_inputs.keys()), OrderedSet(V.graph.get_output_names())
    _, freed = memory.prepare_planning_info(
        order, scheduler.name_to_buf, scheduler.name_to_fused_node, inputs, outputs
    )  # fmt: skip
    replaced = _replaced(scheduler.name_to_buf, freed)
    _, _, changes, last = memory.estimate_peak_memory_allocfree(order, freed, outputs)
    for given in replaced:
        changes[last[given]].size_free -= given.mpi_buffer.size_free
    current, taken = 0, list[int]()
    for _, together in itertools.groupby(enumerate(order), key=_called_with):
        kernels = [changes[kernel] for _, kernel in together]
        current += sum(change.size_alloc for change in kernels)
        taken += [int(current)] * len(kernels)
        current -= sum(change.size_free for change in kernels)
    return taken


def _replaced(buffers: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[Any]:
    """Take from Inductor's account what has no memory of its own, where the text of the kernels is there to tell.

    Such are results that only the kernel reads which makes them, and results in the place of what they are made of.
    Returned are the inputs in whose places others come: these are not free when nobody reads them any more.
    """
    from torch._inductor.virtualized import V

    gone, found = V.graph.removed_buffers | V.graph.inplaced_to_remove, []
    for name in gone & buffers.keys():
        planned = buffers[name].mpi_buffer
        planned.size_alloc = planned.size_free = 0
    for new, old in getattr(V.graph.wrapper_code, "reuses", {}).items():
        if new not in buffers or not gone.isdisjoint((new, old)):
            continue
        memory = (buffers.get(old) or inputs[old]).mpi_buffer
        buffers[new].mpi_buffer.size_alloc, buffers[new].mpi_buffer.size_free = 0, memory.size_free
        if old in buffers:
            memory.size_free = 0
        else:
            found.append(inputs[old])
    return found


def _called_with(numbered: tuple[int, Any]) -> int:
    """What kernels have in common that one call runs: on CPU Inductor writes all that follow one another as one.

    All that they make is there before the call, and all that they read until its end.
    """
    number, kernel = numbered
    device = kernel.get_device()
    is_alone = kernel.is_extern() or device is None or device.type != "cpu"
    return number if is_alone else -1


def _order_and_end(kernels: Any) -> Any:
    """Order the kernels as the compilation that follows does, and let it end once their text is written."""
    from torch._inductor.virtualized import V

    def end(*given: Any) -> Any:
        raise _Scheduled(_half(V.graph))

    writer: Any = V.graph.wrapper_code
    writer.generate = end
    inductor_config.cpp.simdlen = 1  # kernels for the sake of their text: their vectors do not matter
    return ordered(kernels) if kernels else kernels


def _half(graph: Any) -> Half:
    """What Inductor makes of a half whose kernels are written."""
    order = graph.scheduler.nodes
    taken = _taken(order) if order else []
    steps = [Step(n, _computed(k), _given_to(k)) for k, n in zip(order, taken, strict=True)]
    strides, copied_bytes = dict[str, tuple[int, ...]](), 0
    returned = graph.module.graph.output_node().args[0]
    for node, made in zip(returned, graph.graph_outputs, strict=False):
        if isinstance(node, Node) and (known := _layout_of(made)) is not None:
            strides[node.name] = known[1]
            if node.op == "placeholder" and made.get_name() not in graph.graph_inputs:
                copied_bytes += math.prod(known[0]) * node.meta["val"].itemsize
    return Half(steps, strides, copied_bytes)


def _layout_of(buffer: Any) -> Layout | None:
    """Size and strides of what Inductor will have in memory; None where they are no numbers."""
    try:
        return tuple(map(int, buffer.get_size())), tuple(map(int, buffer.get_stride()))
    except (TypeError, AttributeError, NotImplementedError):
        return None


def _given_to(kernel: Any) -> tuple[Layout, ...] | None:
    """The layouts of what an operator is given that is called as it is; None for other kernels."""
    if not kernel.is_extern():
        return None
    called = [node.node for node in kernel.get_nodes() if getattr(node.node, "inputs", None)]
    known = [_layout_of(given) for given in called[0].inputs] if len(called) == 1 else [None]
    return tuple(k for k in known if k is not None) if None not in known else ()


def _computed(kernel: Any) -> list[Node]:
    """The nodes of the graph that a kernel computes; of an operator that is called as it is, that one."""
    inner = [node.node for node in kernel.get_nodes() if getattr(node, "node", None) is not None]
    origins = [
        origin for buffer in inner for origin in (buffer.get_origins() if hasattr(buffer, "get_origins") else ())
    ]
    if not kernel.is_extern():
        return origins
    called = [node for buffer in inner if (node := buffer.get_origin_node()) is not None]
    return [node for node in called or origins if node.target is not operator.getitem and not is_fusible(node)]


def has_nested_regions(module: fx.GraphModule) -> bool:
    """Whether a graph of the compiler's has regions that are split by themselves, by the same partitioner."""
    return bool(module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph))


def hold_sizes(module: fx.GraphModule) -> None:
    """Let the compiled code of a graph serve inputs up to the sizes of this call; for larger ones it is compiled anew.

    A comparison of symbols that the compiler is asked about while it compiles becomes a guard of the code.
    """
    for node in module.graph.find_nodes(op="placeholder"):
        example = node.meta.get("example_value")
        sizes = [example] if isinstance(example, torch.SymInt) else list(getattr(example, "shape", ()))
        for size in sizes:
            if isinstance(size, torch.SymInt) and (known := size_hint(size)) is not None:
                bool(size <= known)
