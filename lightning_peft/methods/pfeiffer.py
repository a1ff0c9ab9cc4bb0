"""Pfeiffer adapter: AdapterFusion: Non-Destructive Task Composition for Transfer Learning. Pfeiffer et al., EACL 2021.
https://arxiv.org/abs/2005.00247
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.bottleneck import Activation, Bottleneck, Init, StreamBottleneck
from lightning_peft.core.fields import positive
from lightning_peft.core.sites import Site, Sites, TargetError
from lightning_peft.core.stream import closing_norm


class NormBottleneck(Bottleneck):
    """y = LN(s + D(LN(s))): s (..., d), the sum of which a post-norm block returns the norm."""

    def around(self, change: Callable[[Tensor], Tensor], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        s = args[0]
        return base(s + change(base(s)))


class Pfeiffer(PEFT, name="pfeiffer", family="additive", paper="2005.00247"):
    """LN(s + W_up phi(W_dn LN(s) + b_dn) + b_up), s = a + f(a), once a block

    s is the residual stream after the feed-forward layer. In post-norm blocks (BERT, BART, torch.nn) LN is the block's
    own last norm, applied twice, frozen. A pre-norm block (GPT-2, Llama, T5, ViT) returns s: there it is s + D(s), as
    in the `adapters` package. L (2md + m + d) parameters; init "zero" is the base at step 0, "bert" (the package's) is
    near it. Name norms as targets (such as "*.final_layer_norm") where a post-norm model is not recognised.
    Source: appendix A.2 and figure 5.
    """

    targets: str | list[str] | None = "block"
    bottleneck: int = 48
    activation: Activation = "relu"
    init: Init = "zero"

    def check(self) -> None:
        positive(self, "bottleneck")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        for site in sites:
            place, kind = stream_place(sites, site, "Pfeiffer")
            yield place, kind(place.out_features, self.bottleneck, self.activation, self.init)


def stream_place(sites: Sites, site: Site, method: str) -> tuple[Site, type[Bottleneck]]:
    """Where the residual stream after the feed-forward layer is seen, and the kind of bottleneck that acts there."""
    if site.role not in ("block", "norm"):
        raise TargetError(
            f"{method} acts at the end of blocks, and {site.name!r} ({type(site.module).__name__}) is none. "
            "Use targets='block', or name the norms that close the blocks."
        )
    norm = site if site.role == "norm" else closing_norm(sites, site)
    return (site, StreamBottleneck) if norm is None else (norm, NormBottleneck)
