"""(IA)^3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning.
Liu et al., NeurIPS 2022. https://arxiv.org/abs/2205.05638
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site, Sites
from lightning_peft.core.targets import per_site, projection_widths


class ScaleOutput(Adapter):
    """y = l * base(x): l (d_out,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.empty(width))

    def reset(self, draw: Draw) -> None:
        draw.ones(self.l)

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = base(x)
        return y * self.l.to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gain = self.l.to(weight)
        return gain[:, None] * weight, None if bias is None else gain * bias


class ScaleInput(ScaleOutput):
    """y = base(l * x): l (d_in,)."""

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        return base(x * self.l.to(x.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.l.to(weight), bias


class ScaleNorm(ScaleOutput):
    """y = l * norm(x): l (d,), the width of the norm; folded into its gain, which may be stored as g or as g - 1."""

    folds_norms = True

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gain, less = self.l.to(weight), self.missing()
        return (weight + less) * gain - less, None if bias is None else gain * bias

    def missing(self) -> float:
        """What the norm adds to its weight: with a weight of zero it gives nothing, or what a gain of one does."""
        zeros = {name: torch.zeros_like(p) for name, p in self.place.named_parameters(recurse=False)}
        probe = torch.linspace(-1, 1, len(self.l), device=self.l.device, dtype=next(iter(zeros.values())).dtype)
        return float(functional_call(self.place, zeros, (probe[None],)).any())


class IA3(PEFT, name="ia3", family="additive", paper="2205.05638", mergeable=True, batched=True):
    """k = l_k * W_k x, v = l_v * W_v x, f = W_down (l_ff * g(x))

    Keys and values (self- and cross-attention) are scaled after their projection, bias included and before any
    rotation of positions; the feed-forward layer's inner activation is scaled before the down projection (after gate
    * up where there is a gate). All vectors start at one: the base at step 0. Merging is exact. inputs: targets that
    scale their input instead of their output. Source: section 3.3. The losses of T-Few are in
    `lightning_peft.tasks.MultipleChoice`.

    keys: where keys are scaled in models that norm them after the projection (Qwen3, OLMo 2). "projection": before the
    norm, which takes the size of each head out again, so that l_k turns keys but makes none larger. "norm": after it,
    as the equation has it, with one vector of the norm's width (of a head, mostly), which the norm's gain can take when
    merging. Elsewhere both are the same.
    """

    targets: str | list[str] | None = "k,v,cross.k?,cross.v?,down"
    inputs: str = "down?"
    keys: Literal["projection", "norm"] = "projection"

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        turned = per_site(sites, {self.inputs: True}, False)
        for site, before in zip(sites, turned, strict=True):
            d_in, d_out = projection_widths(site, "IA3")
            if self.keys == "norm" and (norm := key_norm(sites, site)) is not None:
                yield norm, ScaleNorm(norm.out_features)
            else:
                yield site, ScaleInput(d_in) if before else ScaleOutput(d_out)


def key_norm(sites: Sites, site: Site) -> Site | None:
    """The norm that the keys of a projection go through next, where there is one."""
    if site.role not in ("k", "cross.k"):
        return None
    parent = site.name.rpartition(".")[0]
    norms = (s for s in sites.known if s.role == "norm.qk" and s.name.rpartition(".")[0] == parent)
    return next((s for s in norms if s.name.rpartition(".")[2].startswith("k")), None)
