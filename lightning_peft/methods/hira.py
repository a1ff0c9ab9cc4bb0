"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models. Huang et al., ICLR 2025.
https://openreview.net/forum?id=TwJrTz9cRS
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import positive, probability
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.projection import base_weight, owner_of
from lightning_peft.core.quantised import dtype_around, is_quantised
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import matrix_shape


class Product(torch.autograd.Function):
    """y = x (W * B A)^T: W * B A (d_out, d_in) is made for this product, and again in backward."""

    @staticmethod
    def forward(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, (b @ a).mul_(weight.to(b.dtype)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, a, b, weight = ctx.saved_tensors
        weight, up = weight.to(b.dtype), grads[0].flatten(0, -2)
        to_x = (grads[0] @ ((b @ a) * weight)) if ctx.needs_input_grad[0] else None
        change = (up.T @ x.flatten(0, -2)) * weight
        return to_x, b.T @ change, change @ a.T, None


class Multiplied(LowRank):
    """y = base(x) + (W * B A) drop(x): A (rank, d_in), B (d_out, rank), W the base's weight."""

    additive = False
    reads_weight = True

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y, place = base(x), self.place
        if self.shape.kind == "embedding":  # one row of W a token: the base's output
            return y + y * F.linear(F.embedding(x, self.a.T, place.padding_idx), self.b).to(y.dtype)  # type: ignore[arg-type]
        x, dtype = self.dropped(x), dtype_around(x)[0]
        x, a, b = x.to(dtype), self.a.to(dtype), self.b.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            if self.shape.kind == "linear" and not is_quantised(owner_of(place)):
                rows = x.reshape(-1, x.shape[-1])
                return y + Product.apply(rows, a, b, base_weight(place)).view(y.shape)
            if torch.is_grad_enabled():  # from codes, or as a kernel: all of it again in backward
                return y + checkpoint(self.product, x, a, b, use_reentrant=False, preserve_rng_state=False)
            return y + self.product(x, a, b)

    def product(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """(W * B A) x, as a convolution where the place is one"""
        place: Any = self.place
        change = base_weight(place).to(b.dtype) * (b @ a)
        if self.shape.kind == "convolution":
            return place._conv_forward(x, change.view(place.weight.shape), None)
        return F.linear(x, change)

    def delta(self, weight: Tensor) -> Tensor:  # (d_out, d_in)
        return weight * (self.b.to(weight) @ self.a.to(weight))


class HiRA(PEFT, name="hira", family="reparametrisation", paper="", mergeable=True):
    """y = W x + (W * B A) x

    An update of high rank from factors of low rank: A (rank, d_in) Kaiming-uniform, B (d_out, rank) zero: the base at
    step 0. rank * (d_in + d_out) parameters a site. W * B A is not kept for the backward pass.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 32
    dropout: float = 0.0

    def check(self) -> None:
        positive(self, "rank")
        probability(self, "dropout")

    def adapter(self, site: Site) -> Adapter:
        return Multiplied(matrix_shape(site, "HiRA"), self.rank, 1.0, self.dropout)
