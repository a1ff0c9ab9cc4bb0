"""RoAd: 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability.
Liao, Monz, NeurIPS 2024. https://arxiv.org/abs/2409.00119
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError, positive
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import check_divides, projection_widths


class PairRotation(Adapter):
    """y = R base(x), R turning and stretching pairs of outputs: theta, alpha (groups, 1 or 2, 1 or 2, half a group).

    The second dimension tells the cosines' from the sines', the third the first half of a group from the second.
    """

    def __init__(self, d_out: int, group: int, variant: int) -> None:
        super().__init__()
        shape = (d_out // group, 1 + (variant == 4), 1 + (variant > 1), group // 2)
        self.theta = nn.Parameter(torch.empty(shape))
        self.alpha = nn.Parameter(torch.empty(shape))

    def reset(self, draw: Draw) -> None:
        draw.zeros(self.theta)
        draw.ones(self.alpha)

    def turn(self, y: Tensor) -> Tensor:  # (..., d_out)
        cosine = self.alpha[:, 0] * self.theta[:, 0].cos()  # (groups, 1 or 2, half)
        sine = self.alpha[:, -1] * self.theta[:, -1].sin()
        sine = torch.stack([-sine[:, 0], sine[:, -1]], 1)
        kept, crossed = (t.expand_as(sine).flatten().to(y.dtype) for t in (cosine, sine))
        first, second = y.unflatten(-1, (len(sine), 2, -1)).unbind(-2)
        return torch.addcmul(y * kept, torch.stack([second, first], -2).flatten(-3), crossed)

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        return self.turn(base(x))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.turn(weight.T).T, None if bias is None else self.turn(bias)


class RoAd(PEFT, name="road", family="reparametrisation", paper="2409.00119", mergeable=True):
    """(y_i, y_j) = alpha (cos t u_i - sin t u_j, sin t u_i + cos t u_j) of pairs (i, j) of u = W x + b

    i lies in the first half of a group of `group_size` outputs and j at the same place of the second. Angles start at
    zero, lengths at one: the base at step 0. Products of numbers only.

    variant: 1 shares alpha and t in a pair (d_out parameters a site), 2 has one of each an output (2 d_out), 4 one of
    each an entry of the 2 x 2 matrix (4 d_out).
    """

    targets: str | list[str] | None = "q,v"
    variant: Literal[1, 2, 4] = 1
    group_size: int = 64

    def check(self) -> None:
        positive(self, "group_size")
        if self.group_size % 2:
            raise FieldError(f"RoAd(group_size={self.group_size}): a group has two halves. Choose an even size.")

    def adapter(self, site: Site) -> Adapter:
        _, d_out = projection_widths(site, "RoAd")
        check_divides(site, "RoAd(group_size)", self.group_size, d_out)
        return PairRotation(d_out, self.group_size, self.variant)
