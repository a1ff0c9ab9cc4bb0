"""KronA-B and KronA-B-res: KronA: Parameter Efficient Tuning with Kronecker Adapter. Edalati et al., ENLSP 2023.
https://arxiv.org/abs/2212.10650
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import not_negative
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site, Sites
from lightning_peft.core.targets import Shape
from lightning_peft.methods.krona import KroneckerPair, check_left, left_shape
from lightning_peft.methods.parallel import Tap, feed_forward


class ParallelKronecker(KroneckerPair):
    """y = base(h) + s (A kron B) u [+ s_res u]: u (..., d) is what the tap saw on the way in."""

    def __init__(self, tap: Tap, width: int, left: tuple[int, int], scale: float, residual: bool, zero: bool) -> None:
        super().__init__(Shape(width, width), left, scale)
        self.tap: Any
        vars(self)["tap"] = tap  # it is registered where it listens
        self.zero = zero
        self.gain = nn.Parameter(torch.empty(1)) if residual else None

    def reset(self, draw: Draw) -> None:
        draw.kaiming_uniform(self.a)
        if self.zero:
            draw.zeros(self.b)
        else:
            draw.kaiming_uniform(self.b)
        if self.gain is not None:
            (draw.zeros if self.zero else draw.ones)(self.gain)

    def forward(self, base: Callable[..., Tensor], h: Tensor) -> Tensor:
        u = self.tap.take()
        y = base(h)
        y = y + self.change(u)
        return y if self.gain is None else y + self.gain.to(u.dtype) * u

    def delta(self, weight: Tensor) -> Tensor:
        return Adapter.delta(self, weight)  # it goes past the feed-forward layer, so it is no change of a weight


class KronAB(PEFT, name="krona_b", family="additive", paper="2212.10650"):
    """f(u) + s (A kron B) u, u the input of the feed-forward layer f

    A (o1, i1) starts Kaiming-uniform, B (o2, i2) at zero: the base at step 0; o1 o2 = i1 i2 = d. init="random" draws
    both. o1 i1 + o2 i2 parameters a layer, 2 d with factors near the square root. It is parallel to a layer that is not
    linear, so it cannot be merged. The sum is taken at the down projection, before dropout and residual.

    left: (o1, i1), both divisors of d; without it, near the square root.
    """

    targets: str | list[str] | None = "down"
    scale: float = 16.0
    left: list[int] | None = None
    init: Literal["zero", "random"] = "zero"

    def check(self) -> None:
        not_negative(self, "scale")
        check_left(self, self.left)

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        residual = isinstance(self, KronABRes)
        for entry, site in feed_forward(sites, type(self).__name__):
            width, tap = site.out_features, Tap()
            left = left_shape(site.name, width, width, self.left)
            yield entry, tap
            yield site, ParallelKronecker(tap, width, left, self.scale, residual, self.init == "zero")


class KronABRes(KronAB, name="krona_b_res", family="additive", paper="2212.10650"):
    """f(u) + s (A kron B) u + s_res u, u the input of the feed-forward layer f

    As KronA-B, with s_res a trained number that starts at zero: the base at step 0. o1 i1 + o2 i2 + 1 parameters a
    layer. init="random" starts s_res at one. The paper gives no initial values.
    """
