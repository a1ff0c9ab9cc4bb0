"""Initialisers that draw from a generator of their own, so that every device and every rank gets the same tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def leading(
    matrix: Tensor, rank: int, iterations: int | None = None, draw: Draw | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, rank), S (rank,), V^T (rank, n) of the largest singular values; the largest entry of each u is positive.

    iterations: of a randomised range finder (Halko, Martinsson & Tropp 2011, algorithm 4.4) with 10 directions more;
    None decomposes the matrix as a whole.
    """
    if iterations is None:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        width = min(rank + 10, *matrix.shape)
        start = torch.empty(matrix.shape[1], width)
        (draw or Draw(0, "leading")).normal(start, 1.0)
        q = torch.linalg.qr(matrix @ start.to(matrix)).Q
        for _ in range(iterations):
            q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q).Q).Q
        u, s, vt = torch.linalg.svd(q.T @ matrix, full_matrices=False)
        u = q @ u
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()[0]
    sign = torch.where(sign == 0, 1, sign)
    return u * sign, s, vt * sign[:, None]


class Draw:
    """Fills parameters from a CPU generator seeded by (seed, name); the global generators are never touched."""

    def __init__(self, seed: int | str, name: str) -> None:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def _fill(self, tensor: Tensor, fill: Callable[[Tensor], object]) -> None:
        if tensor.is_meta:
            return  # `materialize` draws from a generator of the same seed, when there is memory
        drawn = torch.empty(tensor.shape, dtype=torch.float32)
        fill(drawn)
        with torch.no_grad():
            tensor.copy_(drawn)

    def zeros(self, tensor: Tensor) -> None:
        self._fill(tensor, nn.init.zeros_)

    def ones(self, tensor: Tensor) -> None:
        self._fill(tensor, nn.init.ones_)

    def constant(self, tensor: Tensor, value: float) -> None:
        self._fill(tensor, lambda t: t.fill_(value))

    def normal(self, tensor: Tensor, std: float, mean: float = 0.0) -> None:
        self._fill(tensor, lambda t: nn.init.normal_(t, mean, std, generator=self.generator))

    def truncated_normal(self, tensor: Tensor, std: float) -> None:
        """N(0, std^2) cut at two standard deviations."""
        self._fill(tensor, lambda t: nn.init.trunc_normal_(t, 0.0, std, -2 * std, 2 * std, generator=self.generator))

    def uniform(self, tensor: Tensor, bound: float) -> None:
        self._fill(tensor, lambda t: nn.init.uniform_(t, -bound, bound, generator=self.generator))

    def kaiming_uniform(self, tensor: Tensor) -> None:
        """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), fan_in = size of dimension 1: what `nn.Linear` draws for its weight."""
        self.uniform(tensor, 1 / math.sqrt(tensor.shape[1]))

    def orthonormal_rows(self, tensor: Tensor) -> None:
        """Rows (r, d), r <= d, with R R^T = I."""
        self._fill(tensor, lambda t: nn.init.orthogonal_(t, generator=self.generator))

    def integers(self, high: int, count: int) -> Tensor:
        """`count` distinct integers below `high`, sorted by nothing: a sample without replacement."""
        return torch.randperm(high, generator=self.generator)[:count]
