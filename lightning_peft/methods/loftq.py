"""LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models. Li et al., ICLR 2024.
https://arxiv.org/abs/2310.08659
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_peft.callback import LifeCycleError
from lightning_peft.core import state
from lightning_peft.core.fields import positive
from lightning_peft.core.init import Draw, leading
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.started import Started
from lightning_peft.core.targets import Shape
from lightning_peft.methods.lora import StartedLoRA


class Compensating(Started):
    """y = base(x) + s B A x; once the base is quantised around it, s B A starts as what the codes lack."""

    iterations = 5

    def reset(self, draw: Draw) -> None:
        self.reset_plain(draw)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b

    @torch.no_grad()
    def compensate(self, weight: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        exact = weight.float()
        product = torch.zeros_like(exact)
        least, best = math.inf, product
        for _ in range(self.iterations):
            given = exact - product
            rest = exact - rounded(given)
            u, s, vt = leading(rest, len(self.a))
            product = (u * s) @ vt
            error = float((rest - product).norm())
            if error < least:
                least, best = error, given
                half = (s / self.scale).sqrt()
                self.begin(half[:, None] * vt, u * half)
        self.absorbed = True
        return best.to(weight.dtype)


class LoftQ(StartedLoRA, name="loftq", family="reparametrisation", paper="2310.08659", mergeable=True):
    """y = Q x + (alpha / rank) B A x, min over Q, B, A of |W - Q - s B A|_F

    Q the codes of the base, which must be quantised around it: by `NF4Precision`, or by `quantise` after `apply`. From
    B A = 0 on, Q <- codes of W - s B A and s B A <- the largest singular values of W - Q, `iterations` times; the best
    is kept, and A, B are divided by sqrt(s), so that any alpha will do. rank * (d_in + d_out) parameters a site; files
    hold plain LoRA of rank 2r, whose first half is what was trained and whose second half is the start. Source:
    algorithm 1.
    """

    init: Literal["loftq"] = "loftq"  # type: ignore[assignment]
    iterations: int = 5

    def check(self) -> None:
        super().check()
        positive(self, "iterations")

    def product(self, shape: Shape, rank: int, scale: float) -> LowRank:
        adapter = Compensating(shape, rank, scale, self.dropout, self.lora_bias)
        adapter.iterations = self.iterations
        return adapter

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        placements = state.get_applied(pl_module, self.name_on_model).placements
        if plain := sorted({x.site for x in placements if not x.adapter.absorbed}):
            raise LifeCycleError(
                f"{type(self).__name__} makes up for what quantising takes away, and {len(plain)} of {len(placements)} "
                f"weights were not quantised around it ({plain[:3]}). Add NF4Precision (precision=nf4), target only "
                "what it quantises, or use LoRA or PiSSA."
            )
        super().on_fit_start(trainer, pl_module)
