"""The private names of torch that the compiled engine needs: each is there, and does what we think."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoremat.engines.torch.compiled import torch_names as names
from autoremat.engines.torch.operators import compiled


@pytest.fixture
def joint() -> torch.fx.Graph:
    """The joint graph of a small step, with a buffer that it overwrites."""
    found = []

    def look(module: torch.fx.GraphModule, *args: object, **given: object) -> object:
        found.append(module.graph)
        return torch._functorch.partitioners.default_partition(module, *args, **given)

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    torch.compile(model, backend=names.aot_backend_with(look))(torch.randn(8, 4)).sum().backward()
    return found[0]


def test_marks_and_descriptions(joint: torch.fx.Graph) -> None:
    nodes = list(joint.nodes)
    assert {names.mark_of(n) for n in nodes} >= {names.Mark.FORWARD, names.Mark.BACKWARD}
    inputs = joint.find_nodes(op="placeholder")
    assert sum(map(names.is_tangent, inputs)) == 1
    assert not any(map(names.is_seed_or_offset, inputs))
    assert not any(map(names.is_made_again_by_hand, nodes))
    positions = [names.position_of(names.input_of(n)) for n in inputs if not names.is_tangent(n)]
    assert positions == list(range(len(positions)))
    described = nodes[-1].meta["desc"]
    assert sum(names.gradient_of(d) is not None for d in described) == 4
    assert all(names.mutated_input_of(d) is None for d in described)
    names.put_mark(nodes[-2], names.Mark.FORWARD)
    fixed = [n for n in nodes if n.meta.get("partitioner_tag") == "must_be_in_forward"]
    assert fixed
    names.put_mark(fixed[0], names.Mark.BACKWARD)
    assert names.mark_of(fixed[0]) is names.Mark.FORWARD


def test_fusible_operators(joint: torch.fx.Graph) -> None:
    by_name = {str(n.target): names.is_fusible(n) for n in joint.nodes if n.op == "call_function"}
    assert by_name["aten.add.Tensor"]
    assert not by_name["aten.addmm.default"]


def test_the_graph_that_is_being_made() -> None:
    assert names.graph_being_made() is None
    found = []

    def look() -> int:
        graph = names.graph_being_made()
        found.append(
            (callable(graph.compiler_fn), names.begins_with(graph, {run.__code__}), names.must_be_whole(graph))
        )
        return 1

    look._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def run(x: torch.Tensor) -> torch.Tensor:
        return x * look()

    torch.compile(run, backend="eager", fullgraph=True)(torch.ones(2))
    assert found == [(True, True, True)]


def test_why_a_graph_ends_and_what_its_inputs_are() -> None:
    ends, sources = [], []

    def backend(module: torch.fx.GraphModule, inputs: object) -> object:
        ends.append(names.reason_of_end(module))
        sources.append(names.sources_of(module))
        assert not names.has_nested_regions(module)
        return module.forward

    def run(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()

    torch.compile(run, backend=backend)(torch.ones(2))
    assert [end.graph_break for end in ends] == [True, False]
    assert ends[0].user_stack[-1].name == "run"
    assert "graph_break" in ends[0].reason
    assert sources[0] == ["L['x']"]


def test_sizes_become_guards() -> None:
    made = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> object:
        names.hold_sizes(module)
        made.append(module)
        return module.forward

    call = torch.compile(lambda x: x.sin(), backend=backend, dynamic=True)
    for n in (8, 6, 4, 9, 7):
        call(torch.ones(n))
    assert len(made) == 2


def test_backends_by_name() -> None:
    from torch._dynamo import lookup_backend

    aot = names.aot_backend_with(None)
    assert names.is_aot_backend(aot)
    assert not names.is_aot_backend(lookup_backend("aot_eager"))
    assert names.is_aot_backend(names.aot_backend_with(print, aot))
    assert names.innermost(lookup_backend("inductor")).__name__ == "inductor"
    assert names.backend_with("inductor", None, {"options": {"fallback_random": True}}).config == {
        "fallback_random": True
    }


def test_where_the_compiler_keeps_what_it_was_given() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    options = {"a": 1}

    def backend(module: torch.fx.GraphModule, inputs: object, *, options: object) -> object:
        return module.forward

    call = torch.compile(run, backend=backend, options=options)
    assert compiled.is_compiled_callable(call)
    assert not compiled.is_compiled_callable(run)
    assert compiled.options_of(call) is options
    assert compiled.options_of(torch.compile(nn.Linear(2, 2), backend=backend, options=options)) is options
    other = compiled.compiled_alike(call, lambda inner: lambda x: inner(x) + 1)
    assert float(other(torch.zeros(()))) == 1
    assert compiled.options_of(other) is options
    module = nn.Linear(2, 2)
    assert compiled.inside_compiled(torch.compile(module)) is module
    assert compiled.inside_compiled(module) is module


@pytest.mark.slow
def test_inductor_says_what_it_would_run() -> None:
    """Its schedule of a half, in bytes, with the nodes that each kernel computes; and nothing is generated."""
    found = []

    def look(module: torch.fx.GraphModule, inputs: object, *, compiler: str, **given: object) -> object:
        halves = torch._functorch.partitioners.default_partition(module, inputs, **given)
        for k, half in enumerate(halves):
            found.append(names.scheduled(half, (), is_backward=bool(k), n_visible=1))
        return halves

    torch._inductor.metrics.reset()
    with names.inductor_splits_by(look, ""):
        torch.compile(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)))(torch.randn(4, 8)).sum().backward()
    forward, backward = found
    assert max(step.nbytes for step in forward.steps) >= 3 * 4 * 8 * 4
    assert max(step.nbytes for step in backward.steps) >= 2 * 8 * 8 * 4
    called = {str(node.target) for step in forward.steps if step.layouts is not None for node in step.nodes}
    assert called == {"aten.addmm.default"}
    assert ((4, 8), (8, 1)) in next(step.layouts for step in forward.steps if step.layouts)
    assert set(forward.strides.values()) >= {(8, 1)}
    assert forward.copied_bytes == backward.copied_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("is_handed_over", [True, False])
def test_results_in_the_place_of_what_they_are_made_of(is_handed_over: bool) -> None:
    """Counted once: in the place of what the half has made, and of inputs that nobody else has."""
    found = []

    def look(module: torch.fx.GraphModule, inputs: object, *, compiler: str, **given: object) -> object:
        forward, backward = torch._functorch.partitioners.default_partition(module, inputs, **given)
        saved = [k for k, n in enumerate(backward.graph.find_nodes(op="placeholder")) if n.name == "exp"]
        assert saved
        theirs = saved if is_handed_over else []
        found.append(names.scheduled(forward, (), is_backward=False, n_visible=1))
        found.append(names.scheduled(backward, (), is_backward=True, handed_over=theirs))
        return forward, backward

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (x @ w).exp().tanh()

    vectors = torch._inductor.config.cpp.simdlen
    with names.inductor_splits_by(look, ""):
        torch.compile(run)(torch.randn(64, 64, requires_grad=True), torch.randn(64, 64))
    one = 64 * 64 * 4
    made, gradients = ([step.nbytes / one for step in half.steps] for half in found)
    assert made == [1, 2]  # the product; its exponential in its place, and what is returned
    assert gradients == [2 if is_handed_over else 3, 2]
    assert torch._inductor.config.cpp.simdlen == vectors


@pytest.mark.slow
def test_inductor_compiles_the_backward_as_it_was_asked_to() -> None:
    """Not in the first backward, when what it was asked is forgotten; and in the order of the plan."""
    orders = []

    class Watching(names._Orders):
        def __call__(self, kernels: object) -> object:
            orders.append(kernels)
            return super().__call__(kernels)

    def look(module: torch.fx.GraphModule, inputs: object, *, compiler: str, **given: object) -> object:
        return torch._functorch.partitioners.default_partition(module, inputs, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names, "_Orders", Watching)
        with names.inductor_splits_by(look, ""):
            call = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.GELU()))
            loss = call(torch.randn(4, 8)).sum()
    assert len(orders) == 2
    loss.backward()
    assert len(orders) == 2
