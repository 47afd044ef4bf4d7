"""How long planning takes, recording included, and what it allocates.

Two programs: a GPT of 24 blocks, its operators measured; and the shape of a Llama of 7 billion parameters on the meta
device, its operators estimated. Run: ``python benchmarks/planning.py``.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoremat
from autoremat.demo.models import GPT, GPTConfig
from autoremat.program import Plan
from autoremat.show.text import format_bytes


class RMSNorm(nn.Module):
    """Root mean square normalisation with a learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.scale


class LlamaBlock(nn.Module):
    """Rotary attention and a gated MLP."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[B, T, D]`` to the same."""
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = (_rotate(z, cos, sin) for z in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x = x + self.out(y)
        z = self.norm2(x)
        return x + self.down(F.silu(self.gate(z)) * self.up(z))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Llama(nn.Module):
    """A decoder of the Llama shape."""

    def __init__(self, blocks: int = 32, width: int = 4096, heads: int = 32, hidden: int = 11008) -> None:
        super().__init__()
        self.embed = nn.Embedding(32000, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, hidden) for _ in range(blocks))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, 32000, bias=False)
        self.half = width // heads // 2

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        positions = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
        frequencies = 10000.0 ** (-torch.arange(self.half, device=tokens.device, dtype=torch.float32) / self.half)
        angles = positions[:, None] * frequencies
        cos, sin = angles.cos().to(self.embed.weight.dtype), angles.sin().to(self.embed.weight.dtype)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def _next_token(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())


def gpt24() -> Plan:
    """The measured plan of a GPT of 24 blocks at half of its plain peak."""
    model = GPT(GPTConfig(blocks=24, width=128, context=128))
    x, y = (torch.randint(0, 256, (8, 128)) for _ in range(2))
    return autoremat.plan(_next_token(model), x, y, budget=0.5, timing="measure")


def llama7b() -> Plan:
    """The plan of a Llama shape, 4 sequences of 2048 tokens in bfloat16, for 40 GB with SGD."""
    with torch.device("meta"):
        model = Llama().to(torch.bfloat16)
        x, y = (torch.empty(4, 2048, dtype=torch.int64) for _ in range(2))
    return autoremat.plan(_next_token(model), x, y, budget="40GB")


def main() -> None:
    """Print a line for each."""
    for make in (gpt24, llama7b):
        before, begin = _resident_bytes(), time.perf_counter()
        plan = make()
        seconds, grown = time.perf_counter() - begin, _resident_bytes() - before
        print(
            f"{make.__name__}: {len(plan.program.ops)} ops planned in {seconds:.1f} s; "
            f"plain peak {format_bytes(plan.plain_peak_bytes)}, planned {format_bytes(plan.peak_bytes)}, "
            f"floor {format_bytes(plan.floor_bytes)}, overhead {plan.overhead:.1%} (bound {plan.lower_bound:.1%}); "
            f"process grew by {format_bytes(max(grown, 0))}"
        )


def _resident_bytes() -> int:
    """The most that this process has had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
