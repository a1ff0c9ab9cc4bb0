"""C3A: Parameter-Efficient Fine-Tuning via Circular Convolution. Chen et al., ACL Findings 2025.
https://arxiv.org/abs/2407.19342
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fft import irfft, rfft

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import positive
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import check_divides, projection_widths


class CircularProduct(torch.autograd.Function):
    """y_m[k] = sum_n sum_j w_mn[j - k] x_n[j], indices modulo b: x (tokens, n, b), w (m, n, b) -> (tokens, m, b)

    Only x and w are kept: their spectra are twice their size, and are made again for the gradients.
    """

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:  # type: ignore[override]
        return irfft(torch.einsum("tnf,mnf->tmf", rfft(x), rfft(w).conj()), n=x.shape[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        size, g = x.shape[-1], rfft(grads[0])
        to_x = irfft(torch.einsum("tmf,mnf->tnf", g, rfft(w)), n=size) if ctx.needs_input_grad[0] else None
        to_w = irfft(torch.einsum("tmf,tnf->mnf", g.conj(), rfft(x)), n=size) if ctx.needs_input_grad[1] else None
        return to_x, to_w


class CircularBlocks(Adapter):
    """y = base(x) + C x / d_in, C of circulant blocks: w (d_out / b, d_in / b, b), their first rows."""

    additive = True

    def __init__(self, d_in: int, d_out: int, size: int, init: str) -> None:
        super().__init__()
        self.init = init
        self.w = nn.Parameter(torch.empty(d_out // size, d_in // size, size))

    def reset(self, draw: Draw) -> None:
        rows, columns, size = self.w.shape
        d_in, d_out = columns * size, rows * size
        if self.init == "zeros":
            draw.zeros(self.w)
        elif self.init == "gaussian":
            draw.normal(self.w, 1.0)
        else:
            draw.uniform(self.w, math.sqrt(6 / (d_in + d_out) if self.init == "xavier" else 1 / d_in))

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y, (_, columns, size) = base(x), self.w.shape
        dtype = torch.promote_types(x.dtype, torch.float32)  # transforms of half precision are not to be had everywhere
        z = CircularProduct.apply(x.to(dtype).reshape(-1, columns, size), self.w.to(dtype) / (columns * size))
        return y + z.reshape(y.shape).to(y.dtype)

    def delta(self, weight: Tensor) -> Tensor:  # (d_out, d_in)
        k = torch.arange(self.w.shape[-1], device=weight.device)
        circulant = self.w.to(weight)[..., (k - k[:, None]) % len(k)]  # (m, n, b, b)
        return circulant.transpose(1, 2).reshape(weight.shape) / weight.shape[1]


class C3A(PEFT, name="c3a", family="reparametrisation", paper="2407.19342", mergeable=True):
    """y = W x + C x / d_in, C of circulant blocks: circular convolutions with trained kernels, by FFT

    One kernel of block_size numbers a block, zero at the start: the base at step 0. d_in d_out / block_size parameters
    a site, the change of full rank if need be. block_size divides d_in and d_out.

    init: "xavier" (the authors'), "kaiming" or "gaussian" kernels are small changes at step 0, through 1 / d_in.
    """

    targets: str | list[str] | None = "q,v"
    block_size: int = 256
    init: Literal["zeros", "xavier", "kaiming", "gaussian"] = "zeros"

    def check(self) -> None:
        positive(self, "block_size")

    def adapter(self, site: Site) -> Adapter:
        d_in, d_out = projection_widths(site, "C3A")
        for width in (d_in, d_out):
            check_divides(site, "C3A(block_size)", self.block_size, width)
        return CircularBlocks(d_in, d_out, self.block_size, self.init)
