"""VeRA: Vector-based Random Matrix Adaptation. Kopiczko et al., ICLR 2024. https://arxiv.org/abs/2310.11454"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.basis import Basis, kaiming
from lightning_peft.core.fields import FieldError, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import BothSides, LowRank
from lightning_peft.core.sites import Site, Sites
from lightning_peft.core.targets import Shape, projection_widths


class Scaled(LowRank):
    """y = base(x) + (b B d) A drop(x): d (rank,), b (d_out,); A and B are the first columns and rows of a basis.

    Of x nothing is kept but A x: the factors have d beside B, and a pass that trains has d on A x and b on the output,
    which spares the gradient of a whole B.
    """

    def __init__(self, shape: Shape, rank: int, dropout: float, d_initial: float, basis: Basis) -> None:
        super().__init__(shape, rank, 1.0, dropout)
        self.d_initial, self.basis = d_initial, basis

    def make(self, shape: Shape, rank: int) -> None:
        self.d = nn.Parameter(torch.empty(rank))
        self.b = nn.Parameter(torch.empty(shape.d_out))

    def reset(self, draw: Draw) -> None:
        self.basis.fill()
        draw.constant(self.d, self.d_initial)
        draw.zeros(self.b)

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        if not torch.is_grad_enabled():
            return super().forward(base, x)
        y, x, (a, b) = base(x), self.dropped(x), self.random()
        z = F.linear(x, a.to(x.dtype)) * self.d.to(x.dtype)
        z = F.linear(z, b.to(x.dtype))
        return torch.addcmul(y, z, self.b.to(z.dtype))

    def random(self) -> tuple[Tensor, Tensor]:
        """A (rank, d_in) and B (d_out, rank)"""
        return self.basis.a[:, : self.shape.d_in], self.basis.b[: self.shape.d_out]  # type: ignore[index]

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = self.random()
        return a, BothSides.apply(self.b, b, self.d)


class VeRA(PEFT, name="vera", family="reparametrisation", paper="2310.11454", mergeable=True, batched=True):
    """y = W x + (b * B) (d * A) x, A and B frozen, random, and the same at all sites

    A (rank, d_in) and B (d_out, rank) are Kaiming-uniform with gain sqrt(2), drawn from the seed and kept in no file; a
    site takes the first columns and rows of those for the widest. d (rank,) starts at `d_initial`, b (d_out,) at zero:
    the base at step 0. rank + d_out parameters a site. Source: section 3.

    widest_in, widest_out: widths of the shared A and B, on which their numbers depend; None takes those of the widest
    site. Give them where adapters for more sites are to come.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 256
    dropout: float = 0.0
    d_initial: float = 0.1
    widest_in: int | None = None
    widest_out: int | None = None

    def check(self) -> None:
        positive(self, "rank", "d_initial")
        probability(self, "dropout")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        shapes = [Shape(*projection_widths(site, type(self).__name__)) for site in sites]
        basis = self.basis(shapes)
        for site, shape in zip(sites, shapes, strict=True):
            yield site, self.adapter_of(shape, basis)

    def adapter_of(self, shape: Shape, basis: Basis) -> Adapter:
        """The adapter at a site of this shape."""
        return Scaled(shape, self.rank, self.dropout, self.d_initial, basis)

    def basis(self, shapes: list[Shape]) -> Basis:
        """A and B for the widest of these."""
        wide = max(shape.d_in for shape in shapes), max(shape.d_out for shape in shapes)
        width, height = self.widest_in or wide[0], self.widest_out or wide[1]
        if width < wide[0] or height < wide[1]:
            raise FieldError(
                f"{type(self).__name__}(widest_in={self.widest_in}, widest_out={self.widest_out}) is less than the "
                f"widest site, {wide[0]} to {wide[1]}. Give at least that, or None."
            )
        gain = 2**0.5
        return Basis(
            self.seed,
            a=((self.rank, width), kaiming(width, gain)),
            b=((height, self.rank), kaiming(self.rank, gain)),
        )
