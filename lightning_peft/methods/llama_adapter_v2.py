"""LLaMA-Adapter V2: Parameter-Efficient Visual Instruction Model. Gao et al., 2023.
https://arxiv.org/abs/2304.15010
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import not_negative, positive
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site, Sites
from lightning_peft.core.sites import sites as find_sites
from lightning_peft.core.targets import projection_widths
from lightning_peft.methods.llama_adapter import zero_init
from lightning_peft.methods.ln_tuning import LNTuning


class BiasScale(Adapter):
    """y = s * (base(x) + b): both (d_out,)."""

    def __init__(self, d_out: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(d_out))
        self.bias = nn.Parameter(torch.empty(d_out))

    def reset(self, draw: Draw) -> None:
        draw.ones(self.scale)
        draw.zeros(self.bias)

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = base(x)
        return self.scale.to(y.dtype) * (y + self.bias.to(y.dtype))


class LlamaAdapterV2(PEFT, name="llama_adapter_v2", family="additive", paper="2304.15010", overhead="tokens"):
    """y = s * (W x + b) at every projection, Att(q, K, V) + tanh(g) Att(q, W_k P, W_v P), norms trained

    Taken from the paper: a bias and a scale at each linear layer of the blocks (b = 0, s = 1 at the start), the norms
    trained in place, prompts with zero-init attention in the layers `prompts` (None: those of `layers`; the paper: the
    last 30 of 32), and prompts in the first `early` layers, with zero-init attention too, where the paper feeds its
    visual tokens: here they are trained tokens, since there is no image. The paper's joint training on two data sets
    and its expert systems are no part of this. The base at step 0. sum 2 d_out + norms + (prompted layers) (length d +
    heads) parameters. The authors' code scales the input of a layer, W (s * x) + b; this is the paper's equation.
    Source: the sections on bias tuning and on early fusion.
    """

    targets: str | list[str] | None = "all-linear"
    length: int = 10
    prompts: str | int | list[int] | None = None
    early: int = 0
    norms: bool = True

    def check(self) -> None:
        positive(self, "length")
        not_negative(self, "early")

    def parts(self) -> tuple[PEFT, ...]:
        norms = LNTuning(layers=self.layers, exclude=self.exclude, roles=self.roles)
        return (dataclasses.replace(self, norms=False), norms) if self.norms else ()

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        for site in sites:
            yield site, BiasScale(projection_widths(site, "LlamaAdapterV2")[1])
        for site in self._prompted(sites):
            yield site, zero_init(sites, site, self.length, "head", True)

    def _prompted(self, sites: Sites) -> list[Site]:
        late = self.layers if self.prompts is None else self.prompts
        where = [late, f"first:{self.early}"] if self.early else [late]
        networks = {site.name.partition(".")[0] for site in sites}  # a frozen teacher is not among them
        found = [
            site
            for layers in where
            for site in find_sites(sites.model, "attend", layers=layers, exclude=self.exclude, roles=self.roles)
        ]
        return list({site.name: site for site in found if site.name.partition(".")[0] in networks}.values())
