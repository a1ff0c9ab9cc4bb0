"""LoKr: Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation. Yeh et al., ICLR 2024.
https://arxiv.org/abs/2309.14859
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError, not_negative, positive
from lightning_peft.core.init import Draw
from lightning_peft.core.kronecker import Kronecker, channels, factorise
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import Shape, matrix_shape


class LowRankKronecker(Kronecker):
    """y = base(x) + s (w1 kron w2) x: w2, and on request w1, a product of rank r where that is smaller."""

    def __init__(
        self, shape: Shape, left: tuple[int, int], rank: int, scale: float, both: bool, inputs: int, zero: str
    ) -> None:
        super().__init__(shape, left, scale)
        self.zero = zero
        thin1 = both and rank < max(left) / 2
        thin2 = rank < max(self.o2, inputs) / 2  # by channels: the size of a kernel does not count
        self.w1, self.w1_a, self.w1_b = parts(self.o1, self.i1, rank if thin1 else None)
        self.w2, self.w2_a, self.w2_b = parts(self.o2, self.i2, rank if thin2 else None)

    def reset(self, draw: Draw) -> None:
        """One factor at zero, of a product the outer part of w1 or the inner one of w2; the rest Kaiming-uniform."""
        first = self.w1_a if self.w1 is None else self.w1
        second = self.w2_b if self.w2 is None else self.w2
        for tensor in (self.w1, self.w1_a, self.w1_b, self.w2, self.w2_a, self.w2_b):
            if tensor is not None:
                start = draw.zeros if tensor is (first if self.zero == "w1" else second) else draw.kaiming_uniform
                start(tensor)

    def factors(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        w1 = self.w1_a @ self.w1_b if self.w1 is None else self.w1  # type: ignore[operator]
        return w1, (self.w2_a, self.w2_b) if self.w2 is None else (self.w2,)  # type: ignore[return-value]


Part = nn.Parameter | None


def parts(rows: int, columns: int, rank: int | None) -> tuple[Part, Part, Part]:
    """The whole matrix, or its two parts; None for what there is not."""
    if rank is None:
        return nn.Parameter(torch.empty(rows, columns)), None, None
    return None, nn.Parameter(torch.empty(rows, rank)), nn.Parameter(torch.empty(rank, columns))


class LoKr(PEFT, name="lokr", family="reparametrisation", paper="2309.14859", mergeable=True):
    """y = W x + (alpha / rank) (w1 kron w2) x, w2 = w2_a w2_b

    w1 (o1, i1), w2 (o2, i2): the divisors of d_out and of d_in nearest to their square roots, the smaller ones for w1;
    of a convolution the channels are split and w2 has the kernel. w2 is one matrix where rank >= max(o2, i2) / 2, and
    w1 always, unless decompose_both. w1 starts at zero, the rest Kaiming-uniform: the base at step 0; with zero="w2" as
    in LyCORIS it is the other way round.

    factor: the largest o1 and i1 to take; -1 for no limit. alpha / rank holds where both factors are full, too, as in
    peft; LyCORIS has 1 there, which is alpha = rank.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 8
    alpha: float = 8.0
    factor: int = -1
    decompose_both: bool = False
    zero: Literal["w1", "w2"] = "w1"

    def check(self) -> None:
        positive(self, "rank")
        not_negative(self, "alpha")
        if self.factor == 0 or self.factor < -1:
            raise FieldError(f"LoKr(factor={self.factor!r}): expected a number above 0, or -1 for no limit.")

    def adapter(self, site: Site) -> Adapter:
        shape = matrix_shape(site, "LoKr")
        (i1, i2), (o1, _) = factorise(channels(site, shape, "LoKr"), self.factor), factorise(shape.d_out, self.factor)
        return LowRankKronecker(shape, (o1, i1), self.rank, self.alpha / self.rank, self.decompose_both, i2, self.zero)
