"""Hugging Face's Trainer with a padding collator: random lengths, within the memory of its ``gradient_checkpointing``.

A byte-level GPT-2 of random weights is trained on source text of Python's standard library; every batch is padded to
its own longest row. Once with ``gradient_checkpointing=True``, once with ``AutorematCallback`` and the peak that the
former has on the longest batch as its budget. Every training is a process of its own; they take turns. Printed: their
processor time, everything from the first batch to the last in it, recordings and plans too, as a ratio; then, in
trainings of their own, the peak of every step by the allocator's account. Needs no network.

    pip install 'autoremat[transformers]'
    python benchmarks/trainer_lengths.py [--batches 400] [--rounds 2]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import (
    ByT5Tokenizer,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from autoremat.demo.data import stdlib_bytes
from autoremat.engines.torch.world.memory_account import _add_up, _events, resident
from autoremat.integrations.transformers import AutorematCallback

BATCH = 8
HAIR_BYTES = 4096
"""What the trainer itself takes beside model, optimizer and inputs: numbers that are logged and clipped with."""


@dataclass
class Trained:
    """What a training says of itself.

    Attributes:
        seconds: processor time from the first batch to the last.
        digest: of the parameters afterwards.
        counts: autoremat's statistics.
        peaks: of every step, where they were measured; in bytes.
        planned_in: the steps in which something was planned.
        warned: autoremat's warnings.
    """

    seconds: float
    digest: str
    counts: dict[str, Any] = field(default_factory=dict)
    peaks: list[int] = field(default_factory=list)
    planned_in: list[int] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)


class Watch(TrainerCallback):
    """Processor time of the training; where asked for, the peak of every step."""

    def __init__(self, ours: AutorematCallback | None, *, metered: bool) -> None:
        self.ours, self.metered = ours, metered
        self.collate = DataCollatorForSeq2Seq(ByT5Tokenizer())
        self.input_bytes: list[int] = []
        self.peaks: list[int] = []
        self.planned_in: list[int] = []
        self.planned, self.begin, self.end = 0, 0.0, 0.0
        self._profile: Any = None

    def collated(self, batch: list[Any]) -> Any:
        """A batch, padded to its longest row."""
        out = self.collate(batch)
        self.input_bytes.append(sum(t.nbytes for t in out.values()))
        return out

    def on_train_begin(self, *args: Any, **others: Any) -> None:
        """Begin to count."""
        self.begin = time.process_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **others: Any) -> None:
        """Begin the account of a step."""
        if self.metered:
            self._before = resident(model, _inner(optimizer)) + self.input_bytes[state.global_step]
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
            )
            self._profile.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """End it."""
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self.peaks.append(_add_up(_events(self._profile), self._before).peak_bytes)
        planned = 0 if self.ours is None else self.ours.stats().planned
        if planned != self.planned:
            self.planned_in.append(state.global_step - 1)
        self.planned = planned

    def on_train_end(self, *args: Any, **others: Any) -> None:
        """It is over."""
        self.end = time.process_time()


def _inner(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)


def rows(n: int, longest: int) -> list[dict[str, list[int]]]:
    """Stretches of source text, most of them short; one in every 64 is as long as can be."""
    dice, text, tokenizer = random.Random(1), stdlib_bytes().numpy().tobytes(), ByT5Tokenizer()
    found = []
    for k in range(n):
        length = longest - 1 if k % 64 == 0 else 8 + int((longest - 9) * dice.random() ** 2)
        at = dice.randrange(len(text) - length)
        ids = tokenizer(text[at : at + length].decode("ascii", "replace").replace("\ufffd", "?"))["input_ids"]
        found.append({"input_ids": ids, "labels": ids})
    return found


def train(args: argparse.Namespace) -> Trained:
    """Train once, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=384, n_positions=args.longest, n_embd=args.width, n_layer=args.blocks, n_head=4,
            bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    data = rows(BATCH * args.batches, args.longest)
    if args.only_longest:
        data = [data[0]] * (BATCH * args.batches)
    ours = AutorematCallback(budget=args.budget) if args.run == "autoremat" else None
    watch = Watch(ours, metered=args.metered)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        arguments = TrainingArguments(
            folder, max_steps=args.batches, per_device_train_batch_size=BATCH, learning_rate=1e-3, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True, seed=3, logging_steps=10**6,
            gradient_checkpointing=args.run == "checkpointed",
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=data, callbacks=[c for c in (ours, watch) if c is not None],
            data_collator=watch.collated,
        )  # fmt: skip
        trainer.train()
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()[:12]
    counts = {} if ours is None else ours.stats().as_dict()
    warned = [str(w.message) for w in caught if "autoremat" in str(w.message)]
    return Trained(watch.end - watch.begin, digest, counts, watch.peaks, watch.planned_in, warned)


def trained(run: str, args: argparse.Namespace, *options: str) -> Trained:
    """The same in a process of its own."""
    own = [f"--{name}={getattr(args, name)}" for name in ("width", "blocks", "longest")]
    command = [sys.executable, __file__, f"--run={run}", f"--batches={args.batches}", *own, *options]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return Trained(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print what the trainings took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=1, help="trainings of each kind, which take turns")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--run", choices=["plain", "checkpointed", "autoremat"], help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--metered", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only-longest", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(asdict(train(args))))
        return
    budget = max(trained("checkpointed", args, "--metered", "--only-longest", "--batches=3").peaks)
    plain = max(trained("plain", args, "--metered", "--only-longest", "--batches=3").peaks)
    print(f"longest batch: gradient_checkpointing peaks at {budget:,} bytes, plain training at {plain:,}", flush=True)
    ratios = []
    for n in range(args.rounds):
        kinds = ("checkpointed", "autoremat")
        done = {k: trained(k, args, f"--budget={budget}") for k in (kinds if n % 2 == 0 else kinds[::-1])}
        theirs, ours = done["checkpointed"], done["autoremat"]
        ratios.append(ours.seconds / theirs.seconds)
        print(
            f"round {n + 1}: gradient_checkpointing {theirs.seconds:.1f} s, autoremat {ours.seconds:.1f} s: "
            f"{ratios[-1]:.2f} x; planned in {len(ours.planned_in)} steps, plans made {ours.counts['planned']}, "
            f"off the path {ours.counts['deviations']}, parameters "
            f"{'bit-identical' if ours.digest == theirs.digest else 'DIFFERENT'}",
            flush=True,
        )
        print(*{w.split(";")[0] for w in ours.warned}, sep="\n", flush=True)
    print(f"median {statistics.median(ratios):.2f} x")
    ours = trained("autoremat", args, f"--budget={budget}", "--metered")
    over = [(k, p / budget) for k, p in enumerate(ours.peaks) if p > budget + HAIR_BYTES]
    print(
        f"peaks of {len(ours.peaks)} steps: the highest is {max(ours.peaks) / budget:.4f} of the budget, "
        f"{len(over)} are above it: {over[:8]}; planned in {ours.planned_in}"
    )


if __name__ == "__main__":
    main()
