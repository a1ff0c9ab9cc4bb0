"""FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform. Gao et al., ICML 2024.
https://arxiv.org/abs/2405.03003
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.basis import Basis
from lightning_peft.core.fields import FieldError, positive
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site, Sites
from lightning_peft.core.spectrum import FourierChange, check_count, entries
from lightning_peft.core.targets import per_site, projection_widths


class Spectrum(Adapter):
    """y = base(x) + s Re(ifft2(F)) x: F (d_out, d_in) has the entries c (n,) at the positions of the basis."""

    additive = True

    def __init__(self, basis: Basis, d_out: int, d_in: int, count: int, scale: float, zero: bool) -> None:
        super().__init__()
        self.basis, self.d_out, self.d_in, self.scale, self.zero = basis, d_out, d_in, scale, zero
        self.c = nn.Parameter(torch.empty(count))

    def reset(self, draw: Draw) -> None:
        self.basis.fill()
        if self.zero:
            draw.zeros(self.c)
        else:
            draw.normal(self.c, std=1.0)

    def positions(self) -> Tensor:  # (2, n)
        return self.basis.positions.long()  # type: ignore[operator, union-attr]

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = base(x)
        exact = torch.promote_types(x.dtype, torch.float32)  # there are no transforms of 16 bits
        rows = x.reshape(-1, self.d_in).to(exact)
        z = FourierChange.apply(rows, self.c.to(exact), self.positions(), self.d_out, self.scale)
        return y + z.view(y.shape).to(y.dtype)

    def delta(self, weight: Tensor) -> Tensor:  # (d_out, d_in)
        exact = torch.promote_types(weight.dtype, torch.float32)
        u, v = self.positions()
        spectrum = weight.new_zeros(self.d_out, self.d_in, dtype=exact).index_put((u, v), self.c.to(exact))
        return (self.scale * torch.fft.ifft2(spectrum).real).to(weight)


class FourierFT(PEFT, name="fourierft", family="reparametrisation", paper="2405.03003", mergeable=True, identity=False):
    """y = W x + s Re(ifft2(F)) x, F with n entries that are not zero

    The entries c (n,) start as N(0, 1), so that step 0 is not the base; init="zero" starts there. n parameters a site.
    Their places are the first n of a permutation of (d_out, d_in) drawn from `places_seed`, the same at all sites of
    one shape; files hold the first of them for comparison. Applied as F between a real Fourier transform of x and one
    back: no matrix of the size of W.

    counts: pattern or role -> n, for the sites it matches.
    """

    targets: str | list[str] | None = "q,v"
    count: int = 1000
    scale: float = 150.0
    places_seed: int = 777
    init: Literal["normal", "zero"] = "normal"
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        positive(self, "count", "scale")
        if bad := {pattern: count for pattern, count in self.counts.items() if count <= 0}:
            raise FieldError(
                f"FourierFT(counts={bad!r}): expected numbers above 0. To leave sites out, use exclude=..."
            )

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        shapes: dict[tuple[int, int, int], Basis] = {}
        for site, count in zip(sites, per_site(sites, self.counts, self.count), strict=True):
            d_in, d_out = projection_widths(site, "FourierFT")
            check_count(site, "FourierFT", count, d_out, d_in)
            basis = entries(shapes, self.places_seed, d_out, d_in, count)
            yield site, Spectrum(basis, d_out, d_in, count, self.scale, self.init == "zero")
