"""Steps whose calls are never those of the step before: what they take under the online policy.

Layer drop, adaptive depth, recursion along random trees, graphs of random structure, and experts to which the data are
routed, each at several budgets. Every batch is trained on plainly and within the budget, in turns: processor time of a
step as a multiple of plain training's, once the kind has been recorded as often as it ever is; whether every step was
exact; with ``--peaks``, in place of time, how much of the budget the steps took.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from _side_by_side import keep_memory
from torch import Tensor, nn
from torch.nn import functional as F

import autoremat
from autoremat.engines.torch.world.memory_account import account, resident

WARM_UP = 24
"""Steps that are not timed: by then nothing is recorded any more."""


class Block(nn.Module):
    """A block of a transformer without attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The block, added to its input."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


class LayerDrop(nn.Module):
    """Every step leaves out other blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(10))
        self.width = width

    def batch(self, dice: random.Random) -> Any:
        """Rows, and which blocks there are."""
        return torch.randn(512, self.width), [dice.random() > 0.2 for _ in self.blocks]

    def forward(self, batch: Any) -> Tensor:
        """The loss."""
        x, kept = batch
        for block, keep in zip(self.blocks, kept, strict=True):
            x = block(x) if keep else x
        return x.square().mean()


class AdaptiveDepth(nn.Module):
    """A cell is applied as often as the data say."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell, self.read, self.width = nn.GRUCell(width, width), nn.Linear(width, 1), width

    def batch(self, dice: random.Random) -> Any:
        """Rows, and how often the cell is applied."""
        return torch.randn(128, self.width), dice.randint(10, 40)

    def forward(self, batch: Any) -> Tensor:
        """The loss."""
        x, n = batch
        h = torch.zeros_like(x)
        for _ in range(n):
            h = self.cell(x, h)
        return self.read(h).square().mean()


class Tree(nn.Module):
    """Two children become one, along a random tree: a Tree-LSTM."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both, self.width = nn.Linear(2 * width, 5 * width), width

    def batch(self, dice: random.Random) -> Any:
        """Leaves, and the tree, as nested pairs."""

        def tree(n: int) -> Any:
            return None if n == 1 else (tree(left := dice.randint(1, n - 1)), tree(n - left))

        n = dice.randint(10, 30)
        return torch.randn(n, 64, self.width), tree(n)

    def forward(self, batch: Any) -> Tensor:
        """The loss."""
        leaves, tree = batch
        rest = iter(leaves)

        def state(node: Any) -> tuple[Tensor, Tensor]:
            if node is None:
                x = next(rest)
                return x, torch.zeros_like(x)
            (h, c), (k, d) = state(node[0]), state(node[1])
            i, o, u, f, g = self.both(torch.cat([h, k], -1)).chunk(5, -1)
            cell = i.sigmoid() * u.tanh() + f.sigmoid() * c + g.sigmoid() * d
            return o.sigmoid() * cell.tanh(), cell

        return state(tree)[0].square().mean()


class Graph(nn.Module):
    """Messages along the edges of another graph at every step; so many rounds as its diameter would need."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.message, self.norm, self.width = Block(width), nn.LayerNorm(width), width

    def batch(self, dice: random.Random) -> Any:
        """Nodes, edges, rounds."""
        n = dice.randint(100, 300)
        return torch.randn(n, self.width), torch.randint(n, (2, 4 * n)), dice.randint(3, 7)

    def forward(self, batch: Any) -> Tensor:
        """The loss."""
        x, (begin, end), rounds = batch
        for _ in range(rounds):
            x = self.norm(x + torch.zeros_like(x).index_add(0, end, self.message(x[begin])))
        return x.square().mean()


class Experts(nn.Module):
    """Every row goes to the expert that scores highest; experts without rows are not called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(width, 8) for _ in range(3))
        self.experts = nn.ModuleList(nn.ModuleList(Block(width) for _ in range(8)) for _ in range(3))
        self.width = width

    def batch(self, dice: random.Random) -> Any:
        """Rows around a few centres."""
        centres = torch.randn(dice.randint(1, 4), self.width)
        return (centres[torch.randint(len(centres), (512,))] + 0.3 * torch.randn(512, self.width),)

    def forward(self, batch: Any) -> Tensor:
        """The loss."""
        (x,) = batch
        for gate, experts in zip(self.gates, self.experts, strict=True):
            score, chosen = gate(x).softmax(-1).max(-1)
            out = torch.zeros_like(x)
            for k, expert in enumerate(experts):
                rows = (chosen == k).nonzero().squeeze(-1)
                if len(rows):
                    out = out.index_add(0, rows, expert(x[rows]) * score[rows, None])
            x = x + out
        return x.square().mean()


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "layer drop": LayerDrop, "adaptive depth": AdaptiveDepth, "tree": Tree, "graph": Graph, "experts": Experts
}  # fmt: skip


class Given:
    """A batch in an object, as trainings have it: neither sizes nor structure are seen from outside."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch


@dataclass
class Outcome:
    """What the steps of one training came to."""

    ratios: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    exact: bool = True


def go(loss: Callable[[Any], Tensor], batch: Any) -> Tensor:
    """One step; its loss."""
    out = loss(batch)
    out.backward()
    return out.detach()


def tensors(batch: Any) -> list[Tensor]:
    """Those of a batch."""
    return [t for t in torch.utils._pytree.tree_leaves(batch) if isinstance(t, Tensor)]


def train(plain: nn.Module, batches: Iterable[Any], budget: int, *, peaks: bool) -> tuple[Outcome, Any]:
    """Train plainly and within the budget, in turns."""
    mine = copy.deepcopy(plain)
    step = autoremat.checkpoint(lambda given: mine(given.batch), budget=budget)
    outcome = Outcome()
    for k, batch in enumerate(batches):
        given = Given(batch)
        seconds, results = [], []
        for model, loss in ((plain, lambda g: plain(g.batch)), (mine, step)):
            model.zero_grad()
            begin = time.process_time()
            if peaks and model is mine:
                measured = account(lambda: results.append(go(loss, given)), resident(mine, *tensors(batch)))  # noqa: B023
                outcome.shares.append(measured.peak_bytes / budget)
            else:
                results.append(go(loss, given))
            seconds.append(time.process_time() - begin)
        outcome.exact &= torch.equal(*results)
        gradients = [[p.grad for p in m.parameters() if p.grad is not None] for m in (plain, mine)]
        outcome.exact &= all(map(torch.equal, *gradients)) and len(gradients[0]) == len(gradients[1])
        if k >= WARM_UP:
            outcome.ratios.append(seconds[1] / seconds[0])
    return outcome, autoremat.stats(step)


def main() -> None:
    """Print a line for each model and budget."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.9, 0.7, 0.5])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--peaks", action="store_true", help="measure peaks in place of time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    for name in args.models:
        torch.manual_seed(0)
        plain, dice = MODELS[name](args.width), random.Random(0)
        batches = [plain.batch(dice) for _ in range(args.steps)]
        peak = max(account(lambda: go(plain, b), resident(plain, *tensors(b))).peak_bytes for b in batches)  # noqa: B023
        for share in args.shares:
            try:
                outcome, stats = train(plain, batches, int(share * peak), peaks=args.peaks)
            except autoremat.InfeasibleBudget as error:
                print(f"{name:>15} {share:.0%}: floor {error.floor_bytes / peak:.0%}", flush=True)
                continue
            ratios = sorted(outcome.ratios)
            text = f"median {median(ratios):.2f}, 9 of 10 {ratios[len(ratios) * 9 // 10]:.2f}, "
            text += f"most {ratios[-1]:.2f} x plain"
            if args.peaks:
                late = outcome.shares[WARM_UP:]
                text = f"peaks: median {median(late):.3f}, most {max(late):.3f} of the budget"
            print(
                f"{name:>15} {share:.0%}: {text}; recorded {stats.planned}, off the path {stats.deviations}, "
                f"reruns {stats.reruns}, {'exact' if outcome.exact else 'DIFFERENT'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
