"""The product that many methods share: s B A x beside W x, at a projection, an embedding or a convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter, NotMergeableError
from lightning_peft.core.init import Draw
from lightning_peft.core.quantised import takes_low_rank
from lightning_peft.core.targets import Shape


class LowRank(Adapter):
    """y = base(x) + s (B A drop(x) + c): A (rank, d_in), B (d_out, rank), c (d_out,) or absent.

    A method that makes A and B of something else overrides `factors`. Indices into an embedding are not dropped.
    """

    additive = True

    def __init__(
        self, shape: Shape, rank: int, scale: float, dropout: float = 0.0, bias: bool = False, init: str = "kaiming"
    ) -> None:
        super().__init__()
        self.shape, self.scale, self.dropout, self.init = shape, scale, dropout, init
        self.c = None
        self.make(shape, rank)
        if bias:
            self.c = nn.Parameter(torch.empty(shape.d_out))

    def make(self, shape: Shape, rank: int) -> None:
        """The parameters that `factors` uses."""
        self.a = nn.Parameter(torch.empty(rank, shape.d_in))
        self.b = nn.Parameter(torch.empty(shape.d_out, rank))

    def reset(self, draw: Draw) -> None:
        if self.shape.kind == "embedding":  # each column of A is one token's: it starts at zero, as in the paper's code
            draw.normal(self.b, std=1.0)
            draw.zeros(self.a)
        elif self.init == "orthogonal":
            orthogonal_(self.a, self.b, draw)
        else:
            draw.kaiming_uniform(self.a) if self.init == "kaiming" else draw.normal(self.a, std=1 / len(self.a))
            draw.zeros(self.b)
        if self.c is not None:
            draw.zeros(self.c)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, d_in) and B (d_out, r)"""
        return self.a, self.b

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        a, b = self.factors()
        if self.c is None and not self.dropping and takes_low_rank(base, x):
            return base(x, low_rank=(a, b, self.scale))
        y = base(x)
        return y + self.term(self.dropped(x), a, b, y.dtype)

    @property
    def dropping(self) -> bool:
        return self.dropout > 0 and self.training

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropping and self.shape.kind != "embedding" else x

    def term(self, x: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, rank_dropout: float = 0.0) -> Tensor:
        """s (B A x + c) in the dtype of the base's output; rank_dropout: of A x, (..., rank)."""
        bias = None if self.c is None else self.scale * self.c
        if self.shape.kind == "embedding":
            return embedded(self.place, x, a, b, bias, self.scale, dtype)
        if self.shape.kind == "convolution":
            return convolved(self.place, x, a.to(x.dtype), b.to(x.dtype), bias, self.scale, rank_dropout)
        # on (..., rank): torch.add(alpha=) is lost in a compiled graph
        z = self.scale * F.linear(x, a.to(x.dtype))
        if rank_dropout:
            z = F.dropout(z, rank_dropout)
        return F.linear(z, b.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def delta(self, weight: Tensor) -> Tensor:  # (d_out, d_in)
        a, b = self.factors()
        return self.scale * (b.to(weight) @ a.to(weight))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.c is not None:
            if bias is None:
                raise NotMergeableError(
                    "A bias of its own (lora_bias=True) at a module without a bias cannot be merged; leave it attached."
                )
            bias = bias + self.scale * self.c.to(bias)
        return weight + self.delta(weight), bias


@torch.no_grad()
def orthogonal_(a: Tensor, b: Tensor, draw: Draw) -> None:
    """B A = 0 with both random: A^T = G Q1 / 10, B = H Q2 / 10; G, H of N(0, 1), Q1, Q2 alternate rows of a rotation"""
    rank = len(a)
    rotation, g, h = torch.empty(rank, rank), torch.empty(a.shape[1], rank // 2), torch.empty(len(b), rank // 2)
    draw.orthonormal_rows(rotation)
    draw.normal(g, 1.0)
    draw.normal(h, 1.0)
    a.copy_((g @ rotation[0::2]).T / 10)
    b.copy_(h @ rotation[1::2] / 10)


class BothSides(torch.autograd.Function):
    """l[..., r] M[r, d] g[..., d] -> (..., r, d), of which only the three are kept."""

    @staticmethod
    def forward(l: Tensor, m: Tensor, g: Tensor) -> Tensor:  # type: ignore[override]
        return l[..., None] * m * g[..., None, :]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        l, m, g = ctx.saved_tensors
        up = grads[0] * m
        to_m = (grads[0] * l[..., None] * g[..., None, :]).sum_to_size(m.shape) if ctx.needs_input_grad[1] else None
        return torch.einsum("...rd,...d->...r", up, g), to_m, torch.einsum("...rd,...r->...d", up, l)


def embedded(
    place: Any, index: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, dtype: torch.dtype
) -> Tensor:
    """s (A^T)[index] B^T, with the factor that some models put on their embeddings; padding gets no gradient"""
    z = scale * F.embedding(index, a.T, place.padding_idx)
    y = F.linear(z.to(dtype), b.to(dtype), None if bias is None else bias.to(dtype))
    gain = getattr(place, "embed_scale", None)  # Gemma, BART, ...: a number or a tensor
    return y if gain is None else y * (gain.to(dtype) if isinstance(gain, Tensor) else gain)


def convolved(
    place: Any, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, rank_dropout: float = 0.0
) -> Tensor:
    """s B (A * x): A as a kernel of the place's own size, B as one of size 1; each group of channels with the same A"""
    batch, z, convolve = patches(place, x, a.view(len(a), *place.weight.shape[1:]), place.groups)
    z = (scale * z).unflatten(0, (batch, place.groups)).flatten(1, 2)  # (batch, groups rank, ...)
    if rank_dropout:
        z = F.dropout(z, rank_dropout)
    ones = [1] * (place.weight.dim() - 2)
    y = convolve(z, b.view(*b.shape, *ones), None if bias is None else bias.to(x.dtype), groups=place.groups)
    return y if x.dim() == y.dim() else y[0]


def patches(place: Any, x: Tensor, kernel: Tensor, groups: int) -> tuple[int, Tensor, Callable[..., Tensor]]:
    """A kernel over each of `groups` groups of the channels of x, padded and strided as the place does it.

    The size of the batch (1 where x has none), the result (batch groups, channels, ...), and the function for more.
    """
    space = place.weight.dim() - 2
    convolve = (F.conv1d, F.conv2d, F.conv3d)[space - 1]
    if place.padding_mode != "zeros":
        x = F.pad(x, place._reversed_padding_repeated_twice, mode=place.padding_mode)
    padding = place.padding if place.padding_mode == "zeros" else 0
    x = x[None] if x.dim() == space + 1 else x
    grouped = x.unflatten(1, (groups, -1)).flatten(0, 1)
    return len(x), convolve(grouped, kernel, None, place.stride, padding, place.dilation), convolve
