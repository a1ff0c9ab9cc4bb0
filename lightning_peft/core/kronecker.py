"""Kronecker products that are applied, never built: (A kron B) x = vec_row(A X B^T), X = x as rows of i1 by i2."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.low_rank import patches
from lightning_peft.core.sites import Site, TargetError
from lightning_peft.core.targets import Shape


def factorise(width: int, near: int = -1) -> tuple[int, int]:
    """(m, n), m n = width, m <= n: the divisor nearest to the square root from below, or the largest up to `near`.

    A `near` that divides the width is m itself, whatever its size.
    """
    if near > 0 and width % near == 0:
        return near, width // near
    top = math.isqrt(width) if near < 0 else min(near, math.isqrt(width))
    m = next(m for m in range(max(top, 1), 0, -1) if width % m == 0)
    return m, width // m


def channels(site: Site, shape: Shape, method: str) -> int:
    """The width that i1 has to divide: features, or the channels of a convolution; an error where there is none."""
    if shape.kind == "embedding":
        raise TargetError(
            f"{method} acts on projections and convolutions, and {site.name!r} is an Embedding. Exclude it."
        )
    if shape.kind == "linear":
        return shape.d_in
    module: Any = site.module
    if module.groups > 1:
        raise TargetError(
            f"{site.name!r} is a convolution in {module.groups} groups, which a Kronecker product does not follow. "
            "Exclude it."
        )
    return int(module.in_channels)


def left_first(o1: int, i1: int, o2: int, i2: int) -> bool:
    """Whether A (X B^T) takes more products than (A X) B^T."""
    return o1 * i2 * (i1 + o2) < i1 * o2 * (i2 + o1)


class Kronecker(Adapter):
    """y = base(x) + s (A kron B) x: A (o1, i1), B (o2, i2) or a product of two, of a projection or a convolution.

    `factors` gives A and the parts of B, the one next to x last. A goes where the tensor between them is smallest.
    """

    additive = True

    def __init__(self, shape: Shape, left: tuple[int, int], scale: float) -> None:
        super().__init__()
        (self.o1, self.i1), self.scale, self.kind = left, scale, shape.kind
        self.o2, self.i2 = shape.d_out // self.o1, shape.d_in // self.i1

    def factors(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A (o1, i1); (B,), or (B_out (o2, r), B_in (r, i2))"""
        raise NotImplementedError(f"{type(self).__name__} has no factors(); give A and the parts of B.")

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        return base(x) + self.change(x)

    def change(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        a, parts = self.factors()
        a, cast = (self.scale * a).to(x.dtype), [part.to(x.dtype) for part in parts]
        if self.kind == "convolution":
            return self.convolved(x, a, cast)
        z = x.unflatten(-1, (self.i1, self.i2))
        if len(cast) == 1 and left_first(self.o1, self.i1, self.o2, self.i2):
            return F.linear(torch.matmul(a, z), cast[0]).flatten(-2)
        z = torch.matmul(a, F.linear(z, cast[-1]))
        return (z if len(cast) == 1 else F.linear(z, cast[0])).flatten(-2)

    def convolved(self, x: Tensor, a: Tensor, parts: list[Tensor]) -> Tensor:
        """B as a kernel of the place's size for each of the i1 groups of channels, then A across the groups."""
        place: Any = self.place
        batch, z, convolve = patches(place, x, parts[-1].unflatten(1, (-1, *place.kernel_size)), self.i1)
        size = z.shape[2:]
        z = torch.matmul(a, z.reshape(batch, self.i1, -1)).reshape(batch * self.o1, -1, *size)
        z = z if len(parts) == 1 else convolve(z, parts[0].view(*parts[0].shape, *[1] * len(size)))
        z = z.reshape(batch, self.o1 * self.o2, *size)
        return z if x.dim() == z.dim() else z[0]

    def delta(self, weight: Tensor) -> Tensor:  # (d_out, d_in)
        a, parts = self.factors()
        b = parts[0].to(weight) if len(parts) == 1 else parts[0].to(weight) @ parts[1].to(weight)
        return torch.kron(self.scale * a.to(weight), b)
