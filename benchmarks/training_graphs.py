"""Training graphs at the level of layers, as in the literature on rematerialization: every node one output.

A network is a list of layers, each with the layers it reads, the bytes it makes and its FLOPs. ``training_graph`` adds
the loss and for every layer a node for the gradient of its output, which reads the gradients of the layers that read
it, and what those need to compute them: their inputs and outputs. Every node may run again. FLOPs of a backward node
are those of the layers it goes back through.

Run: ``python benchmarks/training_graphs.py``. Prints overhead, lower bound and seconds of planning at 0.9 and 0.8 of
the plain peak.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from autoremat import solve
from autoremat.program import END, Op, Program, Value


@dataclass
class Layers:
    """A network under construction; shapes are ``(channels, height, width)``, batch 1, 4 bytes per number."""

    names: list[str] = field(default_factory=list)
    reads: list[tuple[int, ...]] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    shapes: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, name: str, reads: Iterable[int], shape: tuple[int, int, int], flops: float) -> int:
        """Append a layer; returns its number."""
        channels, height, width = shape
        self.names.append(name)
        self.reads.append(tuple(reads))
        self.nbytes.append(4 * channels * height * width)
        self.flops.append(max(flops, 1.0 * channels * height * width))
        self.shapes.append(shape)
        return len(self.names) - 1

    def conv(self, x: int, channels: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> int:
        """A convolution."""
        c, h, w = self.shapes[x]
        shape = channels, -(-h // stride), -(-w // stride)
        return self.add("conv", (x,), shape, 2.0 * c * kernel * kernel * channels * shape[1] * shape[2] / groups)

    def same(self, name: str, *x: int, cost: float = 5.0) -> int:
        """An elementwise layer."""
        c, h, w = self.shapes[x[0]]
        return self.add(name, x, (c, h, w), cost * c * h * w)

    def resize(self, name: str, x: int, factor: float) -> int:
        """Pooling or upsampling."""
        c, h, w = self.shapes[x]
        shape = c, int(h * factor), int(w * factor)
        return self.add(name, (x,), shape, 4.0 * c * max(h * w, shape[1] * shape[2]))

    def concat(self, a: int, b: int) -> int:
        """Channels of both."""
        (c, h, w), (d, _, _) = self.shapes[a], self.shapes[b]
        return self.add("concat", (a, b), (c + d, h, w), 0.0)

    def conv_block(self, x: int, channels: int, **options: int) -> int:
        """Convolution, batch norm, ReLU."""
        return self.same("relu", self.same("norm", self.conv(x, channels, **options)), cost=1.0)


def training_graph(name: str, layers: Layers) -> Program:
    """Forward nodes, loss, backward nodes."""
    n, total = len(layers.names), sum(layers.flops)
    values = [Value("input", layers.nbytes[0], fixed=True)]
    values += [Value(f"{kind}{i}", layers.nbytes[i]) for i, kind in enumerate(layers.names)]
    values.append(Value("loss", 4))
    consumers: list[list[int]] = [[] for _ in range(n)]
    for j, reads in enumerate(layers.reads):
        for i in reads:
            consumers[i].append(j)
    ops = [
        Op(layers.names[i], tuple(1 + j for j in layers.reads[i]) or (0,), (1 + i,), layers.flops[i] / total)
        for i in range(n)
    ]
    ops.append(Op("loss", (n,), (n + 1,), 1 / total))
    for i in range(n - 1, -1, -1):
        values.append(Value(f"d_{layers.names[i]}{i}", layers.nbytes[i], held=END if i == 0 else None))
        users = consumers[i]
        reads = {n + 1} if not users else set[int]()
        for j in users:
            reads |= {_gradient(n, j), 1 + j, *(1 + k for k in layers.reads[j])}
        cost = sum(2 * layers.flops[j] / len(layers.reads[j]) for j in users) or layers.flops[i]
        ops.append(Op(f"d_{layers.names[i]}", tuple(sorted(reads)), (_gradient(n, i),), cost / total))
    return Program(name, tuple(values), tuple(ops))


def _gradient(n: int, i: int) -> int:
    return n + 2 + (n - 1 - i)


def vgg(plan: tuple[int, ...] = (2, 2, 4, 4, 4)) -> Layers:
    """VGG-19 by default, batch norm included."""
    g = Layers()
    x = g.add("input", (), (3, 224, 224), 0.0)
    for stage, count in enumerate(plan):
        for _ in range(count):
            x = g.conv_block(x, min(512, 64 << stage))
        x = g.resize("pool", x, 0.5)
    for width in (4096, 4096, 1000):
        c, h, w = g.shapes[x]
        x = g.add("linear", (x,), (width, 1, 1), 2.0 * c * h * w * width)
    return g


def mobilenet() -> Layers:
    """MobileNet v1."""
    g = Layers()
    x = g.conv_block(g.add("input", (), (3, 224, 224), 0.0), 32, stride=2)
    for channels, stride in (
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        *[(512, 1)] * 5,
        (1024, 2),
        (1024, 1),
    ):
        x = g.conv_block(x, g.shapes[x][0], stride=stride, groups=g.shapes[x][0])
        x = g.conv_block(x, channels, kernel=1)
    return g


def resnet50(blocks: tuple[int, ...] = (3, 4, 6, 3)) -> Layers:
    """ResNet-50 by default."""
    g = Layers()
    x = g.resize("pool", g.conv_block(g.add("input", (), (3, 224, 224), 0.0), 64, kernel=7, stride=2), 0.5)
    for stage, count in enumerate(blocks):
        for k in range(count):
            x = _bottleneck(g, x, 64 << stage, 2 if k == 0 and stage else 1)
    return g


def _bottleneck(g: Layers, x: int, width: int, stride: int) -> int:
    y = g.conv_block(x, width, kernel=1)
    y = g.conv_block(y, width, stride=stride)
    y = g.same("norm", g.conv(y, 4 * width, kernel=1))
    if g.shapes[x] != g.shapes[y]:
        x = g.same("norm", g.conv(x, 4 * width, kernel=1, stride=stride))
    return g.same("relu", g.same("add", x, y, cost=1.0), cost=1.0)


def unet(depth: int = 4, side: int = 416) -> Layers:
    """U-Net with long skips."""
    g = Layers()
    x, skips = g.add("input", (), (3, side, side), 0.0), []
    for level in range(depth):
        x = g.conv_block(g.conv_block(x, 64 << level), 64 << level)
        skips.append(x)
        x = g.resize("pool", x, 0.5)
    x = g.conv_block(g.conv_block(x, 64 << depth), 64 << depth)
    for level in reversed(range(depth)):
        x = g.concat(skips.pop(), g.conv(g.resize("up", x, 2), 64 << level, kernel=2))
        x = g.conv_block(g.conv_block(x, 64 << level), 64 << level)
    g.conv(x, 2, kernel=1)
    return g


def fcn8() -> Layers:
    """FCN-8 on the body of VGG-16."""
    g = Layers()
    x, kept = g.add("input", (), (3, 384, 384), 0.0), []
    for stage, count in enumerate((2, 2, 3, 3, 3)):
        for _ in range(count):
            x = g.same("relu", g.conv(x, min(512, 64 << stage)), cost=1.0)
        x = g.resize("pool", x, 0.5)
        kept.append(x)
    x = g.conv(g.same("relu", g.conv(g.same("relu", g.conv(x, 4096, kernel=7)), 4096, kernel=1)), 21, kernel=1)
    for skip in (kept[3], kept[2]):
        x = g.same("add", g.resize("up", x, 2), g.conv(skip, 21, kernel=1))
    g.resize("up", x, 8)
    return g


def segnet() -> Layers:
    """SegNet: VGG-16 down, the mirror image up."""
    g = Layers()
    x = g.add("input", (), (3, 416, 416), 0.0)
    plan = [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]
    for channels, count in plan:
        for _ in range(count):
            x = g.conv_block(x, channels)
        x = g.resize("pool", x, 0.5)
    for channels, count in reversed(plan):
        x = g.resize("up", x, 2)
        for _ in range(count):
            x = g.conv_block(x, channels)
    g.conv(x, 12)
    return g


def layered(n: int, seed: int, width: int = 4) -> Layers:
    """A random layered network: each node reads one to three of the last few layers, now and then one from far away."""
    dice, g = random.Random(seed), Layers()
    unread = {g.add("input", (), (8, 8, 8), 0.0)}
    while len(g.names) < n:
        near = range(max(0, len(g.names) - 2 * width), len(g.names))
        reads = set(dice.sample(near, min(len(near), dice.randint(1, 3))))
        if dice.random() < 0.1:
            reads.add(dice.randrange(len(g.names)))
        if len(unread) > width:
            reads.add(min(unread))
        unread = (unread - reads) | {len(g.names)}
        size = dice.choice((1, 2, 2, 4, 4, 8, 16))
        g.add("node", sorted(reads), (size, 8, 8), dice.uniform(1, 20) * size * 64)
    return _joined(g)


def _joined(g: Layers) -> Layers:
    """A last layer that reads whatever nothing else does."""
    used = {i for reads in g.reads for i in reads}
    g.add("join", [i for i in range(len(g.names)) if i not in used], (1, 1, 1), 1.0)
    return g


def random_layered(n: int, seed: int) -> Program:
    """Forward nodes only: a random layered graph whose memory has its peak somewhere in the middle."""
    g = layered(n, seed)
    values = tuple(Value(f"v{i}", g.nbytes[i], held=END if i == n else None) for i in range(len(g.names)))
    total = sum(g.flops)
    ops = tuple(Op("node", g.reads[i], (i,), g.flops[i] / total) for i in range(len(g.names)))
    return Program(f"layered {n}", values, ops)


NETWORKS: dict[str, Callable[[], Layers]] = {
    "VGG-19": vgg,
    "MobileNet": mobilenet,
    "ResNet-50": resnet50,
    "U-Net": unet,
    "FCN-8": fcn8,
    "SegNet": segnet,
    "layered 35": lambda: layered(35, 1),
    "layered 120": lambda: layered(120, 2),
    "layered 175": lambda: layered(175, 3),
    "layered 500": lambda: layered(500, 4),
}


BUDGETS = (0.9, 0.8)


def programs() -> list[Program]:
    """One training graph of each kind, 70 to 1,000 nodes."""
    return [training_graph(name, make()) for name, make in NETWORKS.items()]


def main() -> None:
    """Print the table."""
    print(f"{'graph':14s} {'nodes':>5s}" + "".join(f" | {b:.0%} of peak: overhead    bound  plan" for b in BUDGETS))
    for program in programs():
        cells = []
        for share in BUDGETS:
            begin = time.perf_counter()
            plan = solve(program, share)
            seconds = time.perf_counter() - begin
            cells.append(f"{plan.overhead:21.3%}  {plan.lower_bound:7.3%} {seconds:4.1f}s")
        print(f"{program.name:14s} {len(program.ops):5d} | " + " | ".join(cells))


if __name__ == "__main__":
    main()
