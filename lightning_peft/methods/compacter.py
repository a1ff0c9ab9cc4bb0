"""Compacter: Efficient Low-Rank Hypercomplex Adapter Layers. Karimi Mahabadi et al., NeurIPS 2021.
https://arxiv.org/abs/2106.04647
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal

from torch import Tensor

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.bottleneck import ACTIVATIONS, Activation, Bottleneck
from lightning_peft.core.fields import positive
from lightning_peft.core.hypercomplex import PHM, Rules
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site, Sites
from lightning_peft.core.targets import check_divides, projection_widths
from lightning_peft.methods.ln_tuning import LNTuning


class Hypercomplex(Bottleneck):
    """y = h + U(phi(D(h))), D and U PHM layers."""

    down: PHM  # type: ignore[assignment]
    up: PHM  # type: ignore[assignment]

    def __init__(
        self,
        width: int,
        bottleneck: int,
        activation: Activation,
        init: str,
        rules: tuple[Rules, Rules],
        rank: int | None,
    ) -> None:
        super().__init__(width, bottleneck, activation, "zero" if init == "zero" else "normal")
        self.down, self.up = PHM(width, bottleneck, rules[0], rank), PHM(bottleneck, width, rules[1], rank)

    def make(self) -> None:
        """Needs the rules."""

    def reset(self, draw: Draw) -> None:
        self.down.reset(draw)
        self.up.reset(draw, zero=self.init == "zero")

    def bottleneck(self, u: Tensor) -> Tensor:  # (..., d) -> (..., d)
        return self.up(ACTIVATIONS[self.activation](self.down(u)))


class HypercomplexAdapters(PEFT):
    """A bottleneck of PHM layers at each site."""

    shared: ClassVar[bool] = True  # one set of A_i for all layers of all adapters

    targets: str | list[str] | None = "o,down"
    bottleneck: int = 24
    n: int = 4
    activation: Activation = "gelu_new"
    init: Literal["zero", "glorot"] = "zero"
    std: float = 0.01
    norms: bool = False

    def check(self) -> None:
        positive(self, "bottleneck", "n", "std")

    @property
    def low_rank(self) -> int | None:
        """Of the B_i; None where they are full."""
        return None

    def parts(self) -> tuple[PEFT, ...]:
        return (dataclasses.replace(self, norms=False), LNTuning()) if self.norms else ()

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        seed = self.seed if self.shared else None
        one = Rules(self.n, self.std, seed)
        for site in sites:
            width = projection_widths(site, type(self).__name__)[1]
            for value in (width, self.bottleneck):
                check_divides(site, "n", self.n, value)
            rules = (one, one) if self.shared else (Rules(self.n, self.std), Rules(self.n, self.std))
            yield site, Hypercomplex(width, self.bottleneck, self.activation, self.init, rules, self.low_rank)


class PHMAdapter(HypercomplexAdapters, name="phm", family="additive", paper="2106.04647"):
    """h + U(phi(D(h))) after attention and after the feed-forward layer, D and U of weight sum_i A_i kron B_i

    A_i (n, n) and B_i (d / n, m / n) of each layer its own. L * 2 (2 (dm / n + n^3) + m + d) parameters.

    A_i start Gaussian, B_i Glorot-uniform, biases at zero; init "zero" has U at zero: the base at step 0. The code's
    "glorot" starts near it. std: of A_i; 0.01 in the code for layers with their own. n: has to divide the widths; 12 in
    table 1. norms: gain and bias of every norm train as well, as in the paper; off by default, so that adapters share
    one base. Source: section 2.3.
    """

    shared = False


class Compacter(HypercomplexAdapters, name="compacter", family="additive", paper="2106.04647"):
    """h + U(phi(D(h))) after attention and after the feed-forward layer, D and U of weight sum_i A_i kron (l_i r_i)

    A_i (n, n) are one set for all layers of all adapters, l_i (d / n, r) and r_i (r, m / n) of each layer its own.
    L * 2 (2 r (d + m) + m + d) + n^3 parameters. H is never built where its factors cost less.

    h is the output of `o` and `down` in encoder and decoder, not after cross-attention, before dropout, residual and
    norm. A_i start Gaussian, l_i and r_i Glorot-uniform, biases at zero; init "zero" has the r_i of U at zero: the base
    at step 0. The code's "glorot" starts near it. std: of A_i; 1e-4 in the code. rank: of each l_i r_i. n: has to
    divide the widths; 4, 8 or 12 in the paper. norms: gain and bias of every norm train as well, as in the paper; off
    by default, so that adapters share one base. Source: sections 3 and 4.1.
    """

    rank: int = 1

    def check(self) -> None:
        super().check()
        positive(self, "rank")

    @property
    def low_rank(self) -> int | None:
        return self.rank


class CompacterPP(Compacter, name="compacter_pp", family="additive", paper="2106.04647"):
    """h + U(phi(D(h))) after the feed-forward layer only, D and U of weight sum_i A_i kron (l_i r_i)

    Compacter++: as `Compacter`, with one adapter a block. L (2 r (d + m) + m + d) + n^3 parameters. Source: section 3.
    """

    targets: str | list[str] | None = "down"
