"""Scaled parallel adapter: Towards a Unified View of Parameter-Efficient Transfer Learning. He et al., ICLR 2022.
https://arxiv.org/abs/2110.04366
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.bottleneck import Activation, Bottleneck, Init
from lightning_peft.core.fields import positive
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site, Sites, TargetError


class Tap(Adapter):
    """Notes the input of the feed-forward layer; changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:
        self.seen = x
        return base(x)

    def take(self) -> Tensor:
        """What was noted, once."""
        u, self.seen = self.seen, None
        if u is None:
            raise RuntimeError("The feed-forward layer's down projection ran without its up projection before it.")
        return u


class Parallel(Bottleneck):
    """y = base(h) + s D(u): u (..., d) is what the tap saw on the way in."""

    def __init__(
        self, tap: Tap, site: Site, bottleneck: int, activation: Activation, init: Init, scale: float | None
    ) -> None:
        super().__init__(site.out_features, bottleneck, activation, init, 1.0 if scale is None else scale)
        self.tap: Any
        vars(self)["tap"] = tap  # it is registered where it listens
        self.gain = nn.Parameter(torch.empty(1)) if scale is None else None

    def reset(self, draw: Draw) -> None:
        super().reset(draw)
        if self.gain is not None:
            draw.ones(self.gain)

    def forward(self, base: Callable[..., Tensor], h: Tensor) -> Tensor:
        d = self.bottleneck(self.tap.take())
        return base(h) + (d if self.gain is None else self.gain.to(d.dtype) * d)


class ParallelAdapter(PEFT, name="parallel", family="additive", paper="2110.04366"):
    """f(u) + s (W_up phi(W_dn u + b_dn) + b_up), u the input of the feed-forward layer f

    u is what the layer itself reads: the attention block's output in post-norm models, its norm in pre-norm models.
    The sum is taken at the down projection, before dropout and residual. L (2md + m + d) parameters. scale None makes
    s a trained scalar that starts at 1. Source: section 4.4, table 4.
    """

    targets: str | list[str] | None = "down"
    bottleneck: int = 64
    activation: Activation = "relu"
    init: Init = "zero"
    scale: float | None = 4.0

    def check(self) -> None:
        positive(self, "bottleneck")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        for entry, site in feed_forward(sites, "ParallelAdapter"):
            tap = Tap()
            yield entry, tap
            yield site, Parallel(tap, site, self.bottleneck, self.activation, self.init, self.scale)


def feed_forward(sites: Sites, method: str) -> Iterator[tuple[Site, Site]]:
    """The first and the last projection of the feed-forward layers whose last ones these are."""
    for site in sites:
        entry, down = sites.sibling(site, "up"), sites.sibling(site, "down")
        if entry is None or down is None or down.module is not site.module or entry.in_features != down.out_features:
            raise TargetError(
                f"{method} needs the feed-forward layer around {site.name!r}: an `up` projection in the same block "
                f"that reads {site.out_features} features. Use targets='down' on a model whose roles are known."
            )
        yield entry, site
