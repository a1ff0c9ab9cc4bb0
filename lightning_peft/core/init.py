"""Initialisers that draw from a generator of their own, so that every device and every rank gets the same tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Draw:
    """Fills parameters from a CPU generator seeded by (seed, name); the global generators are never touched."""

    def __init__(self, seed: int, name: str) -> None:
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
