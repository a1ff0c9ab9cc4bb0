"""SHiRA: Rapid Switching and Multi-Adapter Fusion via Sparse High Rank Adapters. Bhardwaj et al., NeurIPS 2024.
https://arxiv.org/abs/2406.13175
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import positive
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site, TargetError
from lightning_peft.core.targets import projection_widths


@torch.library.custom_op("lightning_peft::sampled_products", mutates_args=())
def sampled_products(g: Tensor, x: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """(g^T x) at the places of a sparse matrix: g (tokens, d_out), x (tokens, d_in) -> (count,), and nothing larger."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        zeros = x.new_zeros(len(columns))
        mask = torch.sparse_csr_tensor(starts, columns, zeros, (g.shape[1], x.shape[1]), check_invariants=False)
        return torch.sparse.sampled_addmm(mask, g.T, x, beta=0.0).values().clone()


@sampled_products.register_fake
def _(g: Tensor, x: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    return x.new_empty(columns.shape)


class SparseProduct(torch.autograd.Function):
    """y = x S^T: x (tokens, d_in), the rows of S as bags of columns weighted by v; x and v are all that is kept."""

    @staticmethod
    def forward(x: Tensor, v: Tensor, columns: Tensor, starts: Tensor) -> Tensor:  # type: ignore[override]
        return bags(x, v, columns, starts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, v, columns, starts = ctx.saved_tensors
        g, to_x, to_v = grads[0], None, None
        if ctx.needs_input_grad[0]:  # S^T has the columns of S as its rows
            rows = torch.arange(g.shape[1], dtype=columns.dtype, device=g.device)
            rows = rows.repeat_interleave(starts.diff(), output_size=len(columns))
            ordered, order = columns.sort()
            first = torch.searchsorted(ordered, torch.arange(x.shape[1] + 1, device=g.device), out_int32=True)
            to_x = bags(g, v[order], rows[order], first)
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(x.dtype, torch.float32)
            to_v = sampled_products(g.to(wide), x.to(wide), starts, columns).to(v.dtype)
        return to_x, to_v, None, None


def bags(x: Tensor, v: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
    """(tokens, d) -> (tokens, bags), each the sum of v_k x[:, columns_k] between two starts"""
    features = x.T.contiguous()
    return F.embedding_bag(
        columns, features, starts, mode="sum", per_sample_weights=v, include_last_offset=True
    ).T.contiguous()


class SparseUpdate(Adapter):
    """y = base(x) + S x, S with the trained values v (count,) in row-major order: columns (count,), starts (d_out + 1,)

    Each output is a bag of inputs, weighted by v: neither y nor a gradient needs a matrix of W's size.
    """

    additive = True
    columns: Tensor
    starts: Tensor

    def __init__(self, d_in: int, d_out: int, count: int) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.v = nn.Parameter(torch.empty(count))
        self.register_buffer("columns", torch.zeros(count, dtype=torch.int32))
        self.register_buffer("starts", torch.zeros(d_out + 1, dtype=torch.int32))

    def reset(self, draw: Draw) -> None:
        draw.zeros(self.v)
        if not self.columns.is_meta:
            self.place_values(positions(draw, self.d_in * self.d_out, len(self.v)).sort().values)

    def place_values(self, flat: Tensor) -> None:
        """Set the positions (count,): row * d_in + column, ascending."""
        self.columns.copy_(flat % self.d_in)
        rows = torch.bincount(flat // self.d_in, minlength=self.d_out)
        self.starts.copy_(F.pad(rows.cumsum(0), (1, 0)))

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = base(x)
        dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
        z = SparseProduct.apply(x.reshape(-1, self.d_in).to(dtype), self.v.to(dtype), self.columns, self.starts)
        return y + z.view(y.shape).to(y.dtype)

    def delta(self, weight: Tensor) -> Tensor:  # (d_out, d_in)
        rows = torch.arange(self.d_out, device=weight.device).repeat_interleave(self.starts.diff())
        return torch.zeros_like(weight).index_put((rows, self.columns.long()), self.v.to(weight))


def positions(draw: Draw, high: int, count: int) -> Tensor:
    """A sample of `count` of the integers below `high`, without a permutation of them all where it is small."""
    if 4 * count > high:
        return draw.integers(high, count)
    found = torch.randint(high, (count + count // 2 + 16,), generator=draw.generator)
    unique, first = torch.unique(found, return_inverse=True)
    order = torch.full_like(unique, len(found)).scatter_reduce_(0, first, torch.arange(len(found)), "amin")
    return unique[order.argsort()[:count]]  # those that were drawn first


class SHiRA(PEFT, name="shira", family="reparametrisation", paper="2406.13175", mergeable=True):
    """y = (W + S) x, S sparse: trained values at random places

    The values start at zero: the base at step 0. rank * (d_in + d_out) parameters a site, as many as LoRA's, with a
    change of high rank. The places are drawn from the seed and go into the file. The paper's SHiRA-Rand.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 32

    def check(self) -> None:
        positive(self, "rank")

    def adapter(self, site: Site) -> Adapter:
        d_in, d_out = projection_widths(site, "SHiRA")
        if (count := self.rank * (d_in + d_out)) > d_in * d_out:
            raise TargetError(
                f"SHiRA(rank={self.rank}) has {count} values at {site.name!r}, whose weight has {d_in * d_out}. Choose "
                f"at most {d_in * d_out // (d_in + d_out)}."
            )
        return SparseUpdate(d_in, d_out, count)
