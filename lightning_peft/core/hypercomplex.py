"""Hypercomplex (PHM) layers: a matrix as a sum of Kronecker products, built only where applying them costs more."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft.core.init import Draw


class Rules(nn.Module):
    """A_1 ... A_n (n, n, n): how the n parts of an input go to those of an output; of one layer, or of all."""

    def __init__(self, n: int, std: float, shared_seed: int | str | None = None) -> None:
        super().__init__()
        self.n, self.std, self.shared_seed = n, std, shared_seed
        self.a = nn.Parameter(torch.empty(n, n, n))

    def reset(self, draw: Draw) -> None:
        """N(0, std^2); what is shared is drawn from a generator of its own, whichever layer asks."""
        draw = draw if self.shared_seed is None else Draw(self.shared_seed, "hypercomplex/rules")
        draw.normal(self.a, self.std)


class PHM(nn.Module):
    """y = x H + b, H = sum_i A_i kron B_i (d_in, d_out): A_i (n, n), B_i (d_in / n, d_out / n), or l_i r_i of a rank.

    n divides both widths. The products with x cost n r (d_in + n^2 + d_out) a token, with full B_i d_out (d_in + n^2);
    H costs d_in d_out a token, and n d_in d_out once, so that full B_i are applied as they are to a few tokens only.
    """

    def __init__(self, d_in: int, d_out: int, rules: Rules, rank: int | None) -> None:
        super().__init__()
        self.d_in, self.d_out, self.rules, n = d_in, d_out, rules, rules.n
        if rank is None:
            self.weight = nn.Parameter(torch.empty(n, d_in // n, d_out // n))
        else:
            self.left = nn.Parameter(torch.empty(n, d_in // n, rank))
            self.right = nn.Parameter(torch.empty(n, rank, d_out // n))
        self.bias = nn.Parameter(torch.empty(d_out))
        self.full, self.rank = rank is None, rank or 0

    def reset(self, draw: Draw, zero: bool = False) -> None:
        """Glorot-uniform with a gain of sqrt 2, no bias. zero: H = 0, by the last factor."""
        self.rules.reset(draw)
        draw.zeros(self.bias)
        for tensor in [self.weight] if self.full else [self.left, self.right]:
            draw.uniform(tensor, (12 / (tensor.shape[1] + tensor.shape[2])) ** 0.5)
        if zero:
            draw.zeros(self.weight if self.full else self.right)

    def matrix(self) -> Tensor:
        """H (d_in, d_out)"""
        b = self.weight if self.full else self.left @ self.right
        both = torch.tensordot(self.rules.a, b, dims=([0], [0]))  # (n, n, d_in / n, d_out / n)
        return both.transpose(1, 2).reshape(self.d_in, self.d_out)

    def forward(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = self.products(x) if self.cheap(x) else x @ self.matrix().to(x.dtype)
        return y + self.bias.to(x.dtype)

    def cheap(self, x: Tensor) -> bool:
        """Whether the products of the factors cost less than H."""
        n, r, size = self.rules.n, self.rank, self.d_in * self.d_out
        tokens = x.numel() // self.d_in
        each = size + n * n * self.d_out if self.full else n * r * (self.d_in + n * n + self.d_out)
        return tokens * each < tokens * size + n * size + (0 if self.full else r * size // n)

    def products(self, x: Tensor) -> Tensor:
        """x H, factor by factor: within each part of x, across the parts, within each part of y."""
        n, left = self.rules.n, (self.weight if self.full else self.left).to(x.dtype)
        z = x.unflatten(-1, (n, -1)) @ left.transpose(0, 1).flatten(1)  # (..., part of x, i r)
        z = z.unflatten(-1, (n, -1)).movedim(-2, -3)  # (..., i, part of x, r)
        z = self.rules.a.to(x.dtype).mT @ z  # (..., i, part of y, r)
        if self.full:
            return z.sum(-3).flatten(-2)
        return (z.movedim(-3, -2).flatten(-2) @ self.right.to(x.dtype).flatten(0, 1)).flatten(-2)
