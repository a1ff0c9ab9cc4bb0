"""LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning. Guo et al., ICLR 2024.
https://arxiv.org/abs/2311.12023
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.lq import decompose
from lightning_peft.core.targets import Shape
from lightning_peft.methods.loftq import Compensating, LoftQ


class Decomposed(Compensating):
    """y = base(x) + s B A x; once the base is quantised around it, s B A starts at L1 L2 of W ~ Q + L1 L2."""

    fisher: Tensor | None = None  # weights of the entries (d_out, d_in), while the base is quantised

    @torch.no_grad()
    def compensate(self, weight: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        found = decompose(weight, len(self.a), rounded, vars(self).get("fisher"), self.iterations)
        self.begin(found.right / self.scale**0.5, found.left / self.scale**0.5)
        self.absorbed = True
        return found.given.to(weight.dtype)


class LQLoRA(LoftQ, name="lqlora", family="reparametrisation", paper="2311.12023", mergeable=True):
    """y = Q x + (alpha / rank) B A x, min over Q, B, A of |sqrt(F) * (W - Q - s B A)|

    Q the codes of the base, which must be quantised around it: by `NF4Precision`, by `quantise` after `apply`, or by
    `quantise_within(model, budget)`, which gives each weight its own codes so that a mean number of bits is met, and
    takes the Fisher information F. Starts with the rank-r part of W, then the codes of the rest, until the error grows,
    at most `iterations` times; the best is kept (the paper's code keeps the one after it). A, B are divided by sqrt(s).
    rank * (d_in + d_out) parameters a site; files as those of LoftQ.
    """

    init: Literal["lqlora"] = "lqlora"  # type: ignore[assignment]
    iterations: int = 100

    def product(self, shape: Shape, rank: int, scale: float) -> LowRank:
        adapter = Decomposed(shape, rank, scale, self.dropout, self.lora_bias)
        adapter.iterations = self.iterations
        return adapter
