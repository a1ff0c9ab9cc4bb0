"""WaveFT: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets. Bilican et al., 2025.
https://arxiv.org/abs/2505.12532
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

from torch import Tensor

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.basis import Basis
from lightning_peft.core.fields import FieldError, positive
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site, Sites
from lightning_peft.core.spectrum import (
    WaveletChange,
    check_count,
    daubechies,
    entries,
    padded,
    quadrants,
    synthesis,
)
from lightning_peft.core.targets import per_site, projection_widths
from lightning_peft.methods.fourierft import Spectrum

Wavelet = Literal["db1", "db2", "db3", "db4", "db5", "db6", "db7", "db8", "db9", "db10", "none"]


class Coefficients(Spectrum):
    """y = base(x) + s S_out F S_in^T x: F has the entries c (n,) at the positions of the basis."""

    def __init__(
        self, basis: Basis, d_out: int, d_in: int, count: int, scale: float, zero: bool, taps: tuple[float, ...]
    ) -> None:
        super().__init__(basis, d_out, d_in, count, scale, zero)
        self.taps = taps

    def reset(self, draw: Draw) -> None:
        self.basis.fill()
        if self.zero:
            draw.zeros(self.c)
        else:
            draw.normal(self.c, std=0.01)

    def positions(self) -> Tensor:  # (2, n)
        return quadrants(super().positions(), self.d_out, self.d_in, len(self.taps))

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = base(x)
        rows = x.reshape(-1, self.d_in).to(y.dtype)
        z = WaveletChange.apply(rows, self.c.to(y.dtype), self.positions(), self.d_out, self.scale, self.taps)
        return y + z.reshape(y.shape)

    def delta(self, weight: Tensor) -> Tensor:  # (d_out, d_in)
        u, v = self.positions()
        size = padded(self.d_out, len(self.taps)), padded(self.d_in, len(self.taps))
        coefficients = weight.new_zeros(size).index_put((u, v), self.scale * self.c.to(weight))
        return synthesis(synthesis(coefficients, self.taps, self.d_out).T, self.taps, self.d_in).T


class WaveFT(PEFT, name="waveft", family="reparametrisation", paper="2505.12532", mergeable=True):
    """y = W x + s S_out F S_in^T x, F with n entries that are not zero

    S (d, padded d) is one level of a wavelet's synthesis (two-dimensional together): "db1", Haar, to "db10"; "none"
    puts the entries into the weight as they are. c (n,) starts at zero: the base at step 0; with init="normal" as
    N(0, 0.01^2). n parameters a site. Their places are the first n of a permutation of (d_out, d_in) drawn from
    `places_seed`, and the quarters lie as in peft. Applied as filters on x and on what F makes of it: no matrix of the
    size of W.

    counts: pattern or role -> n, for the sites it matches.
    """

    targets: str | list[str] | None = "q,v"
    count: int = 2592
    scale: float = 25.0
    wavelet: Wavelet = "db1"
    places_seed: int = 777
    init: Literal["zero", "normal"] = "zero"
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        positive(self, "count", "scale")
        if bad := {pattern: count for pattern, count in self.counts.items() if count <= 0}:
            raise FieldError(f"WaveFT(counts={bad!r}): expected numbers above 0; to leave sites out, exclude=...")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        shapes: dict[tuple[int, int, int], Basis] = {}
        taps = () if self.wavelet == "none" else daubechies(int(self.wavelet.removeprefix("db")))
        for site, count in zip(sites, per_site(sites, self.counts, self.count), strict=True):
            d_in, d_out = projection_widths(site, "WaveFT")
            check_count(site, "WaveFT", count, d_out, d_in)
            basis = entries(shapes, self.places_seed, d_out, d_in, count)
            yield site, Coefficients(basis, d_out, d_in, count, self.scale, self.init == "zero", taps)
