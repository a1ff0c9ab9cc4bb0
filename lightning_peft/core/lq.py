"""LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning. Guo, Greengard, Xing,
Kim. ICLR 2024. https://arxiv.org/abs/2311.12023
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.core import quant
from lightning_peft.core.init import leading
from lightning_peft.core.quant import QuantisationError

WHOLE = 256  # up to this size a decomposition is exact; above, a range finder with 10 directions more
SCALE_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}


@dataclass(frozen=True)
class Scheme:
    """The paper's codes: NF-`bits` in blocks of `block`, scales as `scale_bits` integers in blocks of `second`.

    Unlike QLoRA's, scales have the least of them taken off, not their mean, and are unsigned; weights are divided by
    the scale as it comes back.
    """

    bits: int = 4
    scale_bits: int = 8
    scale_dtype: str = "float32"
    block: int = 64
    second: int = 256

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8) or self.scale_bits not in (2, 3, 4, 8) or self.scale_dtype not in SCALE_BITS:
            raise QuantisationError(f"{self}: expected 2, 3, 4 or 8 bits, and scales in {', '.join(SCALE_BITS)}.")

    @property
    def per_parameter(self) -> float:
        """b + b0 / B0 + b1 / (B0 B1): 4.127 for QLoRA's"""
        more = SCALE_BITS[self.scale_dtype] / (self.block * self.second)
        return self.bits + self.scale_bits / self.block + more

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight as it comes back, in fp32"""
        if weight.numel() % (self.block * self.second):
            raise QuantisationError(
                f"A weight of {tuple(weight.shape)} is no multiple of block * second = {self.block} * {self.second}."
            )
        blocks = weight.float().view(-1, self.block)
        scales = blocks.abs().amax(1)
        least, steps = scales.min(), 2**self.scale_bits - 1
        spread = (scales - least).view(-1, self.second)
        largest = spread.amax(1, keepdim=True).to(getattr(torch, self.scale_dtype)).float()
        codes = (spread / largest.clamp_min(quant.SMALLEST) * steps).round().clamp(0, steps)
        scales = (codes / steps * largest).view(-1, 1) + least
        scaled = (blocks / scales.clamp_min(quant.SMALLEST)).clamp(-1, 1)
        kind = f"nf{self.bits}"
        values = quant.codebook(kind, weight.device)[quant._nearest(scaled.flatten(), kind).long()]
        return (values.view_as(blocks) * scales).view(weight.shape)


@dataclass(frozen=True, eq=False)
class Decomposition:
    """W ~ Q + L1 L2: `given` is what Q are the codes of, error is |sqrt(F) * (W - Q - L1 L2)|."""

    given: Tensor
    quantised: Tensor
    left: Tensor  # (d_out, rank)
    right: Tensor  # (rank, d_in)
    error: float


def weighted(residual: Tensor, fisher: Tensor | None) -> float:
    """|sqrt(F) * R|, or |R|"""
    return float((residual if fisher is None else fisher.sqrt() * residual).norm())


@torch.no_grad()
def decompose(
    weight: Tensor, rank: int, rounded: Callable[[Tensor], Tensor], fisher: Tensor | None = None, iterations: int = 100
) -> Decomposition:
    """From Q = 0: L1 L2 <- rank-r part of W - Q, Q <- codes of W - L1 L2, until the error grows; the best is kept

    fisher: (d_out, d_in), weights the error. The part is then that of D_row (W - Q) D_col, D the roots of the mean of F
    over rows and columns, divided by D again; the error counts F itself.
    """
    exact = weight.float()
    rows, columns = roots(fisher, 1), roots(fisher, 0)
    q, best = torch.zeros_like(exact), None
    for _ in range(iterations):
        left, right = factors((exact - q) * rows * columns, rank)
        left, right = left / rows, right / columns
        given = exact - left @ right
        q = rounded(given)
        found = Decomposition(given, q, left, right, weighted(given - q, fisher))
        if best is not None and not found.error < best.error:
            break
        best = found
    return best  # type: ignore[return-value]


def roots(fisher: Tensor | None, dim: int) -> Tensor | float:
    """sqrt of the mean of F along `dim`, never 0: an input or output without a gradient counts next to nothing"""
    if fisher is None:
        return 1.0
    mean = fisher.float().mean(dim, keepdim=True).sqrt()
    return mean.clamp_min(max(1e-4 * float(mean.max()), 1e-12))


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U sqrt(S) (m, rank) and sqrt(S) V^T (rank, n) of the largest singular values"""
    u, s, vt = leading(matrix, rank, None if min(matrix.shape) <= WHOLE else 4)
    return u * s.sqrt(), s.sqrt()[:, None] * vt


def allocate(
    errors: Sequence[Sequence[float]], bits: Sequence[Sequence[float]], sizes: Sequence[int], budget: float
) -> list[int]:
    """One configuration for each matrix: min sum of errors[matrix][c], with a mean of bits[matrix][c] within the budget

    budget: bits a parameter, over all matrices by their sizes. An infinite error is a configuration that the matrix
    cannot have. Exact, by `scipy.optimize.milp`. Errors: ImportError without scipy; QuantisationError where nothing
    fits.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise ImportError(
            "The bits of LQ-LoRA are given out by scipy, which is missing. Run: pip install scipy"
        ) from error
    cost = torch.tensor(errors, dtype=torch.float64)
    count, size = torch.tensor(bits, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    possible = cost.isfinite()
    cost = cost.masked_fill(~possible, 0)
    cost = 1000 * cost / cost.norm().clamp_min(1e-30)
    one = torch.block_diag(*[torch.ones(1, cost.shape[1])] * len(sizes))
    storage = (size[:, None] * count / size.sum()).flatten()
    rules = [LinearConstraint(one.numpy(), 1, 1), LinearConstraint(storage[None].numpy(), -math.inf, budget)]
    limits = Bounds(0, possible.double().flatten().numpy())
    found = milp(cost.flatten().numpy(), constraints=rules, bounds=limits, integrality=torch.ones(cost.numel()).numpy())
    if found.x is None:
        raise QuantisationError(
            f"budget={budget} bits a parameter cannot be met: the configurations have at least "
            f"{float(count.masked_fill(~possible, math.inf).amin(1) @ size / size.sum()):.3f}. Raise it, or add "
            "smaller ones."
        )
    return torch.from_numpy(found.x).view_as(cost).argmax(1).tolist()
