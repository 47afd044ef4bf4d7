"""First contact: how long a training waits for autoremat when it calls it for the first time.

From the first call to the end of the second step, as a multiple of a plain step, and where the time goes: the first
forward with its recording, the backward on fake tensors, measuring operators, planning. Each network in a process of
its own, because what is known of an operator is known for the whole process; plain steps come first, so that torch
itself is warm. Seconds of the processor, of one thread: what else the machine does plays next to no part.

Run: ``python benchmarks/first_contact.py [NAME ...]``; ``--results FILE`` writes the figures as JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.nn.functional as F
from _gpu_networks import ResNet
from torch import Tensor, nn

import autoremat
from autoremat.demo.models import GPT, GPTConfig
from autoremat.engines.torch.eager.first import FirstStep
from autoremat.engines.torch.eager.planning import Planning
from autoremat.engines.torch.world.memory_account import account, resident

PLAIN_STEPS = 3
PARTS = (
    ("forward", FirstStep, "forward"),
    ("backward on fakes", FirstStep, "backward"),
    ("measuring", FirstStep, "program"),
    ("planning", Planning, "solve"),
)
"""What a first call is made of: its name, and the method that does it."""


@dataclass(frozen=True)
class Training:
    """A network with its batches.

    Attributes:
        model: the network.
        loss: of a batch.
        batches: the first two, and more for plain steps; the second one may be larger than the first.
        share: of the plain peak of the larger one, as a budget.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    batches: list[Any]
    share: float


@dataclass(frozen=True)
class Row:
    """What was found; seconds of the processor.

    Attributes:
        name: of the network.
        plain_step: of the same batches, the mean of both.
        first_step: forward, recording, plan and backward.
        second_step: all of it.
        multiple: both, as a multiple of a plain step.
        parts: of both steps together.
        planned: how often a plan was made.
    """

    name: str
    plain_step: float
    first_step: float
    second_step: float
    multiple: float
    parts: dict[str, float]
    planned: int


def gpt2_small() -> Training:
    """12 blocks of width 768, the vocabulary of GPT-2; with fewer texts weights and gradients would be the peak."""
    model = GPT(GPTConfig(vocabulary=50257, blocks=12, width=768, heads=12, context=128))
    text = torch.randint(0, 50257, (16, 129))
    pairs = [(text[i : i + 8, :-1], text[i : i + 8, 1:]) for i in (0, 8)]
    return Training(model, lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten()), pairs, 0.85)


def resnet50() -> Training:
    """ResNet-50 on images of 96 x 96."""
    pairs = [(torch.randn(4, 3, 96, 96), torch.randint(0, 1000, (4,))) for _ in range(2)]
    return Training(ResNet(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), pairs, 0.9)


class Tagger(nn.Module):
    """Embedding, two layers of ``nn.LSTM``, a class for every word."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5000, 256), nn.Linear(256, 50)
        self.lstm = nn.LSTM(256, 256, 2, batch_first=True)

    def forward(self, words: Tensor) -> Tensor:
        """``[B, T]`` to scores ``[B, T, classes]``."""
        return self.head(self.lstm(self.embed(words))[0])


def lstm() -> Training:
    """A tagger of 64 words."""
    pairs = [(torch.randint(0, 5000, (32, 64)), torch.randint(0, 50, (32, 64))) for _ in range(2)]
    return Training(Tagger(), lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten()), pairs, 0.9)


def bert() -> Training:
    """Fine-tuning of a DistilBERT shape, every batch padded to its longest text: the second one is longer."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    model, dice = DistilBertForSequenceClassification(DistilBertConfig(num_labels=2)), random.Random(0)

    def batch(longest: int) -> dict[str, Tensor]:
        lengths = [longest, *(dice.randrange(8, longest) for _ in range(15))]
        ids = nn.utils.rnn.pad_sequence([torch.randint(1, 30522, (n,)) for n in lengths], batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.randint(0, 2, (16,))}

    return Training(model, lambda m, b: m(**b).loss, [batch(48), batch(80)], 0.9)


NETWORKS = {
    "GPT-2 small": gpt2_small,
    "ResNet-50": resnet50,
    "LSTM": lstm,
    "DistilBERT, dynamic padding": bert,
}


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Adds up what each part takes."""

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.process_time() - begin

        return call

    with ExitStack() as stack:
        for name, owner, method in PARTS:
            stack.enter_context(patch.object(owner, method, watched(name, getattr(owner, method))))
        yield


def measured(name: str) -> Row:
    """First contact with one network, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    training = NETWORKS[name]()
    mine = copy.deepcopy(training.model)

    def step(loss: Callable[[Any], Tensor], model: nn.Module, batch: Any) -> float:
        model.zero_grad()
        begin = time.process_time()
        loss(batch).backward()
        return time.process_time() - begin

    def plain(batch: Any) -> Tensor:
        return training.loss(training.model, batch)

    def peak(batch: Any) -> int:
        training.model.zero_grad()
        tensors = torch.utils._pytree.tree_leaves(batch)
        return account(lambda: plain(batch).backward(), resident(training.model, *tensors)).peak_bytes

    seconds = [median(step(plain, training.model, b) for _ in range(PLAIN_STEPS)) for b in training.batches]
    plain_step = sum(seconds) / len(seconds)
    budget = int(training.share * max(map(peak, training.batches)))
    loss = training.loss  # not the training: a callable is asked for all modules that it can reach
    call = autoremat.checkpoint(lambda batch: loss(mine, batch), budget=budget)
    parts: dict[str, float] = {}
    with timed(parts):
        first, second = (step(call, mine, b) for b in training.batches)
    planned = autoremat.stats(call).planned
    return Row(name, plain_step, first, second, (first + second) / plain_step, parts, planned)


def apart(name: str) -> Row | None:
    """The same in a process of its own; None where a library is missing."""
    with tempfile.NamedTemporaryFile() as out:
        command = [sys.executable, __file__, "--one", name, "--results", out.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "ModuleNotFoundError" in done.stderr:
            return None
        if done.returncode:
            raise RuntimeError(done.stderr)
        return Row(**json.loads(Path(out.name).read_text()))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NETWORKS)}; all if none is given")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.results.write_text(json.dumps(asdict(measured(args.one))))
        return
    rows = []
    names = [name for name, *_ in PARTS]
    print(f"| network | plain step | to the end of the second step | multiple | {' | '.join(names)} |")
    print("| --- " * (4 + len(names)) + "|")
    for name in args.names or NETWORKS:
        row = apart(name)
        if row is None:
            print(f"{name}: a library is missing", file=sys.stderr)
            continue
        rows.append(asdict(row))
        parts = " | ".join(f"{row.parts.get(n, 0.0):.2f} s" for n in names)
        both = row.first_step + row.second_step
        print(f"| {name} | {row.plain_step:.2f} s | {both:.2f} s | {row.multiple:.1f} | {parts} |", flush=True)
    if args.results:
        args.results.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
