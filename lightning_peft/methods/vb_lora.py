"""VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks. Li et al., NeurIPS 2024.
https://arxiv.org/abs/2405.15179
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError, not_negative, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.sites import Site, Sites, TargetError
from lightning_peft.core.targets import Shape, projection_widths


class Bank(nn.Module):
    """Vectors (number, length) that all adapters mix."""

    def __init__(self, number: int, length: int, bound: float, seed: int) -> None:
        super().__init__()
        self.bound, self.seed = bound, seed
        self.vectors = nn.Parameter(torch.empty(number, length))

    def fill(self) -> None:
        """U(-bound, bound), the same numbers whichever adapter asks."""
        Draw(self.seed, "vb_lora/vectors").uniform(self.vectors, self.bound)

    def mixed(self, logits: Tensor, top: int) -> Tensor:
        """sum over the `top` largest logits of softmax * vector: (..., number) -> (..., length)"""
        chosen, indices = logits.topk(top, dim=-1)
        return (chosen.softmax(-1)[..., None] * self.vectors[indices]).sum(-2)


class Mixed(LowRank):
    """y = base(x) + B A drop(x): the rows of A and the columns of B are pieces of `length`, each a mix of the bank's.

    a (rank, d_in / length, number) and b (d_out / length, rank, number) are logits.
    """

    def __init__(self, shape: Shape, rank: int, dropout: float, bank: Bank, top: int, std: float) -> None:
        super().__init__(shape, rank, 1.0, dropout)
        number, length = bank.vectors.shape
        self.bank, self.top, self.std = bank, top, std
        self.a = nn.Parameter(torch.empty(rank, shape.d_in // length, number))
        self.b = nn.Parameter(torch.empty(shape.d_out // length, rank, number))

    def make(self, shape: Shape, rank: int) -> None:
        """Needs the bank."""

    def reset(self, draw: Draw) -> None:
        self.bank.fill()
        draw.normal(self.a, self.std)
        draw.normal(self.b, self.std)

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = self.bank.mixed(self.a, self.top), self.bank.mixed(self.b, self.top)
        return a.flatten(1), b.transpose(1, 2).flatten(0, 1)


class VBLoRA(PEFT, name="vb_lora", family="reparametrisation", paper="2405.15179", mergeable=True, identity=False):
    """y = W x + B A x, pieces of A and B mixed from a bank: sum over the top k of softmax(logits) * vector

    The bank (vectors, length) trains and is one for all sites; it starts uniform within `bank_bound`, the logits
    Gaussian, so that step 0 is near the base and not equal to it. `length` has to divide the widths. vectors * length
    parameters in all, and vectors rank (d_in + d_out) / length a site.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 4
    vectors: int = 256
    length: int = 256
    top: int = 2
    dropout: float = 0.0
    bank_bound: float = 0.02
    logits_std: float = 0.1

    def check(self) -> None:
        positive(self, "rank", "vectors", "length", "top", "bank_bound")
        not_negative(self, "logits_std")
        probability(self, "dropout")
        if self.top > self.vectors:
            raise FieldError(f"VBLoRA(top={self.top}, vectors={self.vectors}): the bank has fewer vectors than that.")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        bank = Bank(self.vectors, self.length, self.bank_bound, self.seed)
        for site in sites:
            shape = Shape(*projection_widths(site, "VB-LoRA"))
            if shape.d_in % self.length or shape.d_out % self.length:
                raise TargetError(
                    f"{site.name!r} is {shape.d_in} to {shape.d_out} wide, which pieces of length={self.length} do not "
                    "fill. Give a length that divides both, or exclude it."
                )
            yield site, Mixed(shape, self.rank, self.dropout, bank, self.top, self.logits_std)
