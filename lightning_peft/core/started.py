"""LoRA that starts at factors of its own, taken from the weight or from data, while the base stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.projection import base_weight
from lightning_peft.core.sites import TargetError
from lightning_peft.core.targets import Shape


class Started(LowRank):
    """y = base(x) + s (B A - B0 A0) x: B, A start at B0, A0, which stay in buffers; the base at step 0, bit for bit.

    The papers take s B0 A0 out of the weight. Here the weight is left alone: B A - B0 A0 = (B - B0) A + B0 (A - A0), a
    product of rank 2r in which nothing cancels. Where the base is quantised around it, the codes are made of
    W - s B0 A0 and y = base(x) + s B A x (`absorbed`).
    """

    a0: Tensor
    b0: Tensor

    def make(self, shape: Shape, rank: int) -> None:
        super().make(shape, rank)
        self.register_buffer("a0", torch.zeros(rank, shape.d_in))
        self.register_buffer("b0", torch.zeros(shape.d_out, rank))

    def start(self, weight: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """A0 (r, d_in) and B0 (d_out, r) for a weight (d_out, d_in) in fp32 or better"""
        raise NotImplementedError

    @torch.no_grad()
    def reset(self, draw: Draw) -> None:
        weight = base_weight(self.place)
        if weight.is_meta:
            return
        if len(self.a) > min(weight.shape):
            raise TargetError(
                f"rank={len(self.a)} is more than a weight of {tuple(weight.shape)} has. Choose at most "
                f"{min(weight.shape)}, for this site through ranks={{...}}, or exclude it."
            )
        self.begin(*self.start(weight.to(torch.promote_types(weight.dtype, torch.float32)), draw))
        if self.c is not None:
            draw.zeros(self.c)

    @torch.no_grad()
    def begin(self, a: Tensor, b: Tensor) -> None:
        """Take these as the start."""
        for parameter, buffer, value in ((self.a, self.a0, a), (self.b, self.b0, b)):
            parameter.copy_(value)
            buffer.copy_(parameter)

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.absorbed:
            return self.a, self.b
        return torch.cat([self.a, self.a - self.a0]), torch.cat([self.b - self.b0, self.b0], 1)

    @torch.no_grad()
    def compensate(self, weight: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        self.absorbed = True
        return weight - self.scale * (self.b0.to(weight) @ self.a0.to(weight))

    def collapsed(self) -> dict[str, Tensor]:
        """The change as a plain LoRA of twice the rank: A' = [A; A0], B' = [B, -B0]"""
        out = {"a": torch.cat([self.a, self.a0]).detach(), "b": torch.cat([self.b, -self.b0], 1).detach()}
        return out if self.c is None else {**out, "c": self.c.detach()}
