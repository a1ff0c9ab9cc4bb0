"""What orthogonal methods share: Cayley's map of skew-symmetric blocks, and adapters that turn a matrix's input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_peft.core.adapter import Adapter


def skew(q: Tensor, size: int) -> Tensor:
    """Upper triangles, row by row -> Q = -Q^T: (..., b (b - 1) / 2) -> (..., b, b), in fp32 or better"""
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    rows, columns = torch.triu_indices(size, size, 1, device=q.device)
    out = q.new_zeros(*q.shape[:-1], size * size).index_copy(-1, rows * size + columns, q).unflatten(-1, (size, size))
    return out - out.mT


def cayley(q: Tensor) -> Tensor:
    """(I + Q) (I - Q)^-1 - I = 2 (I - Q)^-1 Q of skew-symmetric blocks; R - I keeps its digits where R is near I."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(eye - q, 2 * q)


def neumann(q: Tensor, terms: int) -> Tensor:
    """`cayley` cut off after `terms` of I + 2 Q + 2 Q^2 + ... , the last with half of its weight."""
    power = q
    out = torch.zeros_like(q)
    with torch.autocast(q.device.type, enabled=False):
        for _ in range(terms - 2):
            out, power = out + 2 * power, power @ q
    return out + power


def turned(x: Tensor, change: Tensor) -> Tensor:
    """x + x diag(C_1, ..., C_n): (..., n b) and (n or 1, b, b) -> (..., n b)"""
    blocks = x.unflatten(-1, (-1, change.shape[-1]))  # (..., n, b)
    if len(change) == 1:
        return x + (blocks @ change[0]).flatten(-2)
    return x + torch.einsum("...nb,nbc->...nc", blocks, change).flatten(-2)


class TurnInput(Adapter):
    """y = base(R x): a method says what R does to rows."""

    def turn(self, x: Tensor, transpose: bool = False) -> Tensor:
        """(R x^T)^T for each row of x (..., d_in), or with R^T in place of R; in the dtype of x."""
        raise NotImplementedError(f"{type(self).__name__} has no turn(x, transpose).")

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        return base(self.turn(x))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.turn(weight, transpose=True), bias  # W R = (R^T W^T)^T
