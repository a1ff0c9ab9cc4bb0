"""Simple, Scalable Adaptation for Neural Machine Translation. Bapna, Firat, EMNLP 2019.
https://arxiv.org/abs/1909.08478
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.bottleneck import Activation, Init, StreamBottleneck
from lightning_peft.core.fields import positive
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site, TargetError

EPS = 1e-5


class NormedBottleneck(StreamBottleneck):
    """y + D(g * (y - mean) / std + c): g, c (d,)."""

    def make(self) -> None:
        super().make()
        self.gain = nn.Parameter(torch.empty(self.width))
        self.shift = nn.Parameter(torch.empty(self.width))

    def reset(self, draw: Draw) -> None:
        super().reset(draw)
        draw.ones(self.gain)
        draw.zeros(self.shift)

    def bottleneck(self, u: Tensor) -> Tensor:
        gain, shift = self.gain.to(u.dtype), self.shift.to(u.dtype)
        return super().bottleneck(F.layer_norm(u, (self.width,), gain, shift, EPS))


class Bapna(PEFT, name="bapna", family="additive", paper="1909.08478"):
    """y + W_up relu(W_dn LN(y) + b_dn) + b_up on what a block returns, LN new and trained

    L (2md + m + d + 2d) parameters, as AdapterL (Lin et al., 2020) has in the tables of the LoRA paper. init "zero"
    starts at the base exactly. Source: section 2.2, figure 2.
    """

    targets: str | list[str] | None = "block"
    bottleneck: int = 64
    activation: Activation = "relu"
    init: Init = "zero"

    def check(self) -> None:
        positive(self, "bottleneck")

    def adapter(self, site: Site) -> Adapter:
        if site.role != "block":
            raise TargetError(
                f"Bapna acts on what blocks return, and {site.name!r} ({type(site.module).__name__}) is none. Use "
                "targets='block', with layers=... for some of them."
            )
        return NormedBottleneck(site.out_features, self.bottleneck, self.activation, self.init)
