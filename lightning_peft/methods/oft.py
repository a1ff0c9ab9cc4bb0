"""OFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning. Qiu et al., NeurIPS 2023.
https://arxiv.org/abs/2306.07280
OFTv2: Orthogonal Finetuning Made Scalable. Qiu et al., EMNLP 2025. https://arxiv.org/abs/2506.19847
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError, positive
from lightning_peft.core.init import Draw
from lightning_peft.core.orthogonal import TurnInput, cayley, neumann, skew, turned
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import check_divides, projection_widths


class BlockRotation(TurnInput):
    """y = base(x diag(R_1, ..., R_n)), R_i = (I + Q_i) (I - Q_i)^-1: q (n, b (b - 1) / 2), the upper triangles of Q."""

    def __init__(self, blocks: int, size: int, terms: int) -> None:
        super().__init__()
        self.size, self.terms = size, terms
        self.q = nn.Parameter(torch.empty(blocks, size * (size - 1) // 2))

    def reset(self, draw: Draw) -> None:
        draw.zeros(self.q)

    def turn(self, x: Tensor, transpose: bool = False) -> Tensor:
        q = skew(self.q, self.size)
        change = neumann(q, self.terms) if self.terms else cayley(q)
        return turned(x, (change.mT if transpose else change).to(x.dtype))


class OFT(PEFT, name="oft", family="reparametrisation", paper="2306.07280", mergeable=True):
    """y = W R x, R block-diagonal and orthogonal, each block (I + Q) (I - Q)^-1 with Q = -Q^T

    Q starts at zero: the base at step 0. d_in (block_size - 1) / 2 parameters a site; with `shared` one block for all,
    block_size (block_size - 1) / 2. The input is turned, so that no product with W is added: in
    rows, x R.

    neumann: in place of the exact inverse `terms` terms of its series, I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4 for 5
    (2506.19847): quicker, and orthogonal only while Q is small.
    """

    targets: str | list[str] | None = "q,v"
    block_size: int = 32
    neumann: bool = False
    terms: int = 5
    shared: bool = False

    def check(self) -> None:
        positive(self, "block_size")
        if self.block_size < 2:
            raise FieldError("OFT(block_size=1): a block of one feature has no rotation. Choose 2 or more.")
        if self.terms < 2:
            raise FieldError(f"OFT(terms={self.terms}): expected 2 or more, the first being the identity.")

    def adapter(self, site: Site) -> Adapter:
        d_in, _ = projection_widths(site, "OFT")
        check_divides(site, "OFT(block_size)", self.block_size, d_in)
        blocks = 1 if self.shared else d_in // self.block_size
        return BlockRotation(blocks, self.block_size, self.terms if self.neumann else 0)
