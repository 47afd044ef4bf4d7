"""Programs for the tests of the planners: chains, GPT-like steps, random small graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from autoremat.program import Once, Op, Program, Value


@dataclass
class Builder:
    """Writes down a training step of the recorded shape: forward ops, then per op unpacks and backward ops."""

    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    nodes: list[tuple[int, tuple[int, ...], float, str, int]] = field(default_factory=list)

    def fixed(self, name: str, nbytes: int) -> int:
        self.values.append(Value(name, nbytes, fixed=True, kind="parameter"))
        return len(self.values) - 1

    def forward(
        self,
        name: str,
        reads: tuple[int, ...],
        nbytes: int,
        seconds: float,
        *,
        saves: tuple[int, ...] = (),
        saves_output: bool = False,
        back: float = 2.0,
        module: str = "",
        once: Once | None = None,
        grad_bytes: int | None = None,
        in_place: int | None = None,
    ) -> int:
        """An op and the node of its backward, which saves some of its inputs or its output."""
        self.values.append(Value(f"{module}/{name}:{len(self.ops)}", nbytes, kind="activation"))
        out = len(self.values) - 1
        pairs = () if in_place is None else ((out, in_place),)
        self.ops.append(Op(name, reads, (out,), seconds, module=module, once=once, in_place=pairs))
        saved = saves + ((out,) if saves_output else ())
        source = next((v for v in reads if not self.values[v].fixed), -1)
        grad = grad_bytes if grad_bytes is not None else (self.values[source].nbytes if source >= 0 else 0)
        self.nodes.append((out, saved, seconds * back, module, grad))
        return out

    def backward(self, name: str) -> Program:
        """The backward as a chain of gradients, in reverse order."""
        self.values.append(Value("grad:seed", 4))
        grad = len(self.values) - 1
        self.ops.append(Op("ones_like", (), (grad,), 0.0, phase="backward", once=Once.BACKWARD))
        for k, (_, saved, seconds, module, nbytes) in enumerate(reversed(self.nodes)):
            self.ops += [
                Op("unpack", (v,), (), phase="backward", once=Once.BACKWARD, module=module, kind="ask") for v in saved
            ]
            self.values.append(Value(f"grad:{k}", nbytes, kind="gradient"))
            new = len(self.values) - 1
            reads = (*dict.fromkeys((grad, *saved)),)
            self.ops.append(Op("back", reads, (new,), seconds, phase="backward", once=Once.BACKWARD, module=module))
            grad = new
        return Program(name, tuple(self.values), tuple(self.ops))


def chain(n: int, nbytes: int = 100, seconds: float = 1.0) -> Program:
    """A uniform chain: n equal ops, each of whose backward needs its input and output."""
    b = Builder()
    x = b.fixed("x", 0)
    for k in range(n):
        x = b.forward(f"f{k}", (x,), nbytes, seconds, saves=() if k == 0 else (x,), saves_output=True)
    return b.backward(f"chain{n}")


def steps(
    sizes: Sequence[int], seconds: Sequence[float], *, grad_bytes: int = 100, taped: bool = False
) -> Program:  # fmt: skip
    """A chain of the literature: step i makes state i + 1 of state i, backward i reads state i and gradient i + 1.

    ``sizes`` are those of states 0 to n - 1; state 0 is an input. The last step is part of its backward, since nothing
    reads state n. With ``taped`` every step also writes 10,000 bytes that its backward reads in place of the state.
    """
    n, values, ops = len(sizes), [Value("x0", sizes[0], fixed=True)], list[Op]()
    states, tapes = [0], list[int]()
    for i in range(n if taped else n - 1):
        values.append(Value(f"x{i + 1}", [*sizes, grad_bytes][i + 1]))
        states.append(len(values) - 1)
        if taped:
            values.append(Value(f"tape{i}", 10_000))
            tapes.append(len(values) - 1)
        ops.append(Op(f"f{i}", (states[i],), tuple(v for v in (states[-1], *tapes[-1:])), seconds[i]))
    values.append(Value("seed", grad_bytes))
    ops.append(Op("seed", (), (len(values) - 1,), 0.0, phase="backward"))
    for i in reversed(range(n)):
        values.append(Value(f"g{i}", grad_bytes))
        reads = (tapes[i] if taped else states[i], len(values) - 2)
        ops.append(Op(f"b{i}", reads, (len(values) - 1,), 2 * seconds[i], phase="backward"))
    return Program(f"steps{n}", tuple(values), tuple(ops))


def uniform_steps(n: int, *, taped: bool = False) -> Program:
    """n equal steps with states and gradients of 100 bytes."""
    return steps([100] * n, [1.0] * n, taped=taped)


def bytes_of_slots(slots: int) -> int:
    """The budget of ``uniform_steps`` in which so many states have a slot, the initial one included.

    Besides, there are a state that is being used, what is made of it, and the gradient before.
    """
    return 100 * (slots + 3)


def gpt(
    n_blocks: int, *, batch: int = 8, tokens: int = 1024, width: int = 768, heads: int = 12, vocabulary: int = 8192,
    flash: bool = True,
) -> Program:  # fmt: skip
    """A GPT step, op by op, half precision activations; seconds from FLOPs at 100 Tflop/s and bytes at 1 TB/s."""
    b, c = Builder(), batch * tokens * width * 2
    rows = batch * tokens

    def matmul(inner: int, outer: int) -> float:
        return 2 * rows * inner * outer / 1e14

    def light(nbytes: float) -> float:
        return nbytes / 1e12

    x = b.forward("embedding", (b.fixed("idx", rows * 8), b.fixed("wte", vocabulary * width * 2)), c, light(2 * c))
    for k in range(n_blocks):
        m = f"blocks.{k}"
        weights = b.fixed(f"{m}.w", 12 * width * width * 2)
        h = b.forward("layer_norm", (x,), c, light(2 * c), saves=(x,), module=f"{m}.ln1")
        qkv = b.forward("qkv", (h, weights), 3 * c, matmul(width, 3 * width), saves=(h,), module=f"{m}.attn")
        if flash:
            cost = 4 * batch * tokens * tokens * width / 1e14
            y = b.forward("sdpa", (qkv,), c, cost, saves=(qkv,), saves_output=True, module=f"{m}.attn")
        else:
            scores = 2 * batch * heads * tokens * tokens
            half = 2 * batch * tokens * tokens * width / 1e14
            s = b.forward("qk", (qkv,), scores, half, saves=(qkv,), module=f"{m}.attn")
            p = b.forward("softmax", (s,), scores, light(2 * scores), saves_output=True, module=f"{m}.attn")
            y = b.forward("pv", (p, qkv), c, half, saves=(p, qkv), module=f"{m}.attn", grad_bytes=scores)
        o = b.forward("proj", (y, weights), c, matmul(width, width), saves=(y,), module=f"{m}.attn")
        x = b.forward("add", (x, o), c, light(3 * c), module=m)
        h = b.forward("layer_norm", (x,), c, light(2 * c), saves=(x,), module=f"{m}.ln2")
        u = b.forward("fc1", (h, weights), 4 * c, matmul(width, 4 * width), saves=(h,), module=f"{m}.mlp")
        g = b.forward("gelu", (u,), 4 * c, light(8 * c), saves=(u,), module=f"{m}.mlp")
        d = b.forward("fc2", (g, weights), c, matmul(4 * width, width), saves=(g,), module=f"{m}.mlp")
        x = b.forward("add", (x, d), c, light(3 * c), module=m)
    h = b.forward("layer_norm", (x,), c, light(2 * c), saves=(x,), module="ln_f")
    logits = rows * vocabulary * 2
    z = b.forward("head", (h,), logits, matmul(width, vocabulary), saves=(h,), module="head")
    q = b.forward("log_softmax", (z,), logits, light(2 * logits), saves_output=True, module="")
    b.forward("nll", (q,), 4, 0.0, module="", grad_bytes=logits)
    return b.backward(f"gpt{n_blocks}")
