"""Batches of many lengths: what recordings and plans cost a training in which every batch has a length of its own.

A GPT is trained on batches of random lengths, plainly and within a budget, twice over: rounds of 60 batches of 52
lengths, the same ones in the second round. Processor time, as a multiple of plain training's, which takes its turn
with every step; whether every step stayed within its budget; whether losses and gradients are those of plain training.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import autoremat
from autoremat.demo.models import GPT, GPTConfig
from autoremat.engines.torch.world.memory_account import account, resident


def batches(n_batches: int, lengths: list[int], batch: int) -> list[tuple[Tensor, Tensor]]:
    """Random text in the order of random lengths, every length at least once where there is room."""
    dice = torch.Generator().manual_seed(1)
    order = torch.randperm(len(lengths), generator=dice).tolist()
    order += torch.randint(len(lengths), (max(0, n_batches - len(lengths)),), generator=dice).tolist()
    text = torch.randint(0, 256, (batch, max(lengths) + 1), generator=dice)
    return [
        (text[:, :n].contiguous(), text[:, 1 : n + 1].contiguous()) for n in (lengths[k] for k in order[:n_batches])
    ]


def main() -> None:
    """Print a line for each round."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.6, help="of the plain peak of the longest batch")
    parser.add_argument("--peaks", action="store_true", help="measure every step's peak; times then say nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = GPT(GPTConfig(blocks=args.blocks, width=args.width, context=160))
    mine = copy.deepcopy(plain)
    all_batches = batches(60, list(range(48, 152, 2)), args.batch)

    def loss_of(model: GPT, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    longest = max(all_batches, key=lambda b: b[0].shape[1])
    peak = account(lambda: loss_of(plain, *longest).backward(), resident(plain, *longest)).peak_bytes
    plain.zero_grad()
    budget = int(args.share * peak)
    step = autoremat.checkpoint(lambda x, y: loss_of(mine, x, y), budget=budget)
    exact, over = True, list[float]()
    for number in (1, 2):
        seconds = [0.0, 0.0]
        for x, y in all_batches:
            results = []
            for k, (model, loss) in enumerate(((plain, lambda x, y: loss_of(plain, x, y)), (mine, step))):
                model.zero_grad()
                torch.manual_seed(0)
                begin = time.process_time()
                if args.peaks and k:
                    kept: list[Tensor] = []
                    measured = account(lambda: kept.append(go(loss, x, y)), resident(model, x, y))  # noqa: B023
                    over.append(measured.peak_bytes / budget)
                    results.append(kept[0])
                else:
                    results.append(go(loss, x, y))
                seconds[k] += time.process_time() - begin
            exact &= torch.equal(*results)
            exact &= all(
                torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), mine.parameters(), strict=True)
            )
        s = autoremat.stats(step)
        peaks = f", steps over the budget {sum(o > 1 for o in over)}, most {max(over):.3f} of it" if over else ""
        print(
            f"round {number}: plain {seconds[0]:.2f} s, autoremat {seconds[1] / seconds[0]:.2f} x plain; "
            f"plans made {s.planned}, kept {s.plans}, off the path {s.deviations}, "
            f"{'bit-identical' if exact else 'DIFFERENT'}{peaks}",
            flush=True,
        )


def go(loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    """One step; its loss."""
    out = loss(x, y)
    out.backward()
    return out.detach()


if __name__ == "__main__":
    main()
