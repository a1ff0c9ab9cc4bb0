"""Invertible adapters: MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer. Pfeiffer et al.,
EMNLP 2020. https://arxiv.org/abs/2005.00052
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
from lightning_peft.core.sites import Site, Sites, TargetError, find
from lightning_peft.core.stream import edit_input


class Coupling(nn.Module):
    """o1 = e1 + F(e2), o2 = e2 + G(o1), and its inverse e2 = o2 - G(o1), e1 = o1 - F(e2): e1, e2 (..., d / 2)."""

    def __init__(self, width: int, bottleneck: int, activation: Activation, init: Init, draw: Callable[[], Draw]):
        super().__init__()
        self.draw = draw
        self.f = Bottleneck(width // 2, bottleneck, activation, init)
        self.g = Bottleneck(width // 2, bottleneck, activation, init)

    def reset(self) -> None:
        draw = self.draw()  # its own: it belongs to no single place
        self.f.reset(draw)
        self.g.reset(draw)

    def forward(self, e: Tensor) -> Tensor:  # (..., d) -> (..., d)
        e1, e2 = e.chunk(2, -1)
        o1 = e1 + self.f.bottleneck(e2)
        return torch.cat([o1, e2 + self.g.bottleneck(o1)], -1)

    def inverse(self, o: Tensor) -> Tensor:  # (..., d) -> (..., d)
        o1, o2 = o.chunk(2, -1)
        e2 = o2 - self.g.bottleneck(o1)
        return torch.cat([o1 - self.f.bottleneck(e2), e2], -1)


class Coupled(Adapter):
    """y = A(base(x)), A the coupling."""

    def __init__(self, coupling: Coupling) -> None:
        super().__init__()
        self.coupling = coupling

    def reset(self, draw: Draw) -> None:
        self.coupling.reset()

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.coupling(base(*args, **kwargs))


class Uncoupled(Coupled):
    """y = base(A^-1(x))."""

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = edit_input(self.coupling.inverse, args, kwargs)
        return base(*args, **kwargs)


class SeededDraw:
    """Makes the generator of one coupling anew."""

    def __init__(self, seed: int, name: str) -> None:
        self.seed, self.name = seed, name

    def __call__(self) -> Draw:
        return Draw(self.seed, self.name)


class Invertible(PEFT, name="invertible", family="additive", paper="2005.00052"):
    """A(e) on the embeddings and A^-1(z) before the tied head: o1 = F(e2) + e1, o2 = G(o1) + e2

    F and G are bottlenecks of half the width, m = d / (2 reduction); one A for all embeddings of one table (both of
    T5). Its inverse, with the same weights, acts on the input of each projection that is tied to the table
    (inverse="auto"), of those that `inverse` names, or (None) nowhere. 2 (d m + m + d / 2) parameters. init "zero" is
    the base at step 0. The sum with positions comes after A. Source: section 4.3, equations 3 to 5.
    """

    unused = ("layers",)

    targets: str | list[str] | None = "embed"
    reduction: int = 2
    activation: Activation = "relu"
    init: Init = "zero"
    inverse: str | list[str] | None = "auto"

    def check(self) -> None:
        positive(self, "reduction")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        couplings: dict[int, Coupling] = {}
        for site in sites:
            table = id(getattr(site.module, "weight", site.module))
            if table not in couplings:
                couplings[table] = self.coupling(site)
            yield site, Coupled(couplings[table])
        for name, module in self.heads_of(sites, couplings):
            coupling = couplings.get(id(module.weight)) or next(iter(couplings.values()))
            site = Site(name, module, "head")
            if site.in_features != 2 * coupling.f.width:
                raise TargetError(
                    f"Invertible(inverse={self.inverse!r}): {name!r} reads {site.in_features} features, the "
                    f"embeddings have {2 * coupling.f.width}. Name a projection of the same width, or inverse=None."
                )
            yield site, Uncoupled(coupling)

    def coupling(self, site: Site) -> Coupling:
        """A new one for the table at a site."""
        width = site.out_features
        middle = width // 2 // self.reduction
        if width % 2 or not middle:
            raise TargetError(
                f"Invertible(reduction={self.reduction}) at {site.name!r}: {width} features do not fall into two "
                "halves that can be reduced so far. Choose a smaller reduction, or exclude the site."
            )
        draw = SeededDraw(self.seed, f"{site.name}/coupling")
        return Coupling(width, middle, self.activation, self.init, draw)

    def heads_of(self, sites: Sites, couplings: dict[int, Coupling]) -> Iterator[tuple[str, Any]]:
        """The projections that get the inverse."""
        if self.inverse is None:
            return
        if self.inverse != "auto":
            yield from find(sites.model, self.inverse).items()
            return
        for name, module in sites.model.named_modules():
            if isinstance(module, nn.Linear) and id(module.weight) in couplings:
                yield name, module
