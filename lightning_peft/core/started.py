"""LoRA that starts at factors of its own, taken from the weight or from data, while the base stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.projection import base_weight
from lightning_peft.core.sites import TargetError
from lightning_peft.core.targets import Shape


class MovedProduct(torch.autograd.Function):
    """s ((B - B0) z + B0 (z - z0)), z = A x, z0 = A0 x: keeps x and z, as s B A x alone would.

    The second of what it returns is z, for its own backward.
    """

    @staticmethod
    def forward(x: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, scale: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        z, start = F.linear(x, a), F.linear(x, a0)
        both = scale * torch.cat([z, z - start], -1)
        return F.linear(both, torch.cat([b - b0, b0], 1)), z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        (x, a, b, a0, b0, ctx.scale), needs = inputs, ctx.needs_input_grad
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if needs[1] else None, a, b, a0, b0, output[1] if needs[2] else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (x, a, b, a0, b0, z), needs = ctx.saved_tensors, ctx.needs_input_grad
        to_x = to_a = to_b = to_z = up = None
        if grads[0] is not None:
            up = ctx.scale * grads[0]
            to_z = up @ b
        if grads[1] is not None:  # only in a second derivative
            to_z = grads[1] if to_z is None else to_z + grads[1]
        if to_z is None:
            return (None,) * 6
        if needs[0]:
            to_x = to_z @ a if up is None else torch.cat([to_z, up @ b0], -1) @ torch.cat([a, -a0])
        if needs[1]:
            to_a = outer(to_z, x)
        if needs[2] and up is not None:
            to_b = outer(up, z)
        return to_x, to_a, to_b, None, None, None


def outer(left: Tensor, right: Tensor) -> Tensor:
    """(..., m), (..., n) -> (m, n), summed over the leading sizes"""
    return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])


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
        if len(self.a) > min(weight.shape):
            raise TargetError(
                f"rank={len(self.a)} is more than a weight of {tuple(weight.shape)} has. Choose at most "
                f"{min(weight.shape)}, for this site through ranks={{...}}, or exclude it."
            )
        if weight.is_meta:
            return
        self.begin(*self.start(weight.to(torch.promote_types(weight.dtype, torch.float32)), draw))
        if self.c is not None:
            draw.zeros(self.c)

    def reset_plain(self, draw: Draw) -> None:
        """As plain LoRA, for a start that comes later: with data, or when the base is quantised."""
        super().reset(draw)
        self.a0.zero_()
        self.b0.zero_()

    @torch.no_grad()
    def begin(self, a: Tensor, b: Tensor) -> None:
        """Take these as the start."""
        for parameter, buffer, value in ((self.a, self.a0, a), (self.b, self.b0, b)):
            parameter.copy_(value)
            buffer.copy_(parameter)

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        linear = self.shape.kind == "linear" and not (self.absorbed or torch.compiler.is_compiling())
        if not linear or not torch.is_grad_enabled():
            return super().forward(base, x)
        y = base(x)
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else x
        factors = (t.to(y.dtype) for t in (self.a, self.b, self.a0, self.b0))
        y = y + MovedProduct.apply(dropped.to(y.dtype), *factors, self.scale)[0]
        return y if self.c is None else y + self.scale * self.c.to(y.dtype)

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
