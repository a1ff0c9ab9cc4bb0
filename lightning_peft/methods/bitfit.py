"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models.
Ben Zaken, Ravfogel, Goldberg, ACL 2022. https://arxiv.org/abs/2106.10199
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter, NotMergeableError
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site, Sites
from lightning_peft.core.targets import projection_widths


class Shift(Adapter):
    """y = base(x) + b: a bias (d_out,) for a projection that has none."""

    additive = True

    def __init__(self, d_out: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.empty(d_out))

    def reset(self, draw: Draw) -> None:
        draw.zeros(self.b)

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = base(x)
        return y + self.b.to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if bias is None:
            raise NotMergeableError(
                "BitFit made biases for projections that have none, and such a projection has no place for one. "
                "Leave them "
                "attached, or train BitFit(create=False) on a model that has biases."
            )
        return weight, bias + self.b.to(bias)


class BitFit(PEFT, name="bitfit", family="selective", paper="2106.10199", mergeable=True):
    """train b in y = W x + b, nothing else

    Every bias of the base trains in place, those of the norms included; with `targets` only the biases of these modules
    (the paper's small variant: targets="q,up"; of a packed projection, the entries of that slice).
    create: projections of attention and feed-forward layers that have no bias (Llama, T5) get one, zero at step 0, as
    an adapter. Source: section 3.
    """

    targets: str | list[str] | None = None
    create: bool = True

    @property
    def places(self) -> str | list[str] | None:
        return (self.targets or "all-linear?") if self.create else None

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        for site in sites:
            if not has_bias(site):
                yield site, Shift(projection_widths(site, "BitFit")[1])

    def select(self, name: str, parameter: nn.Parameter) -> bool:
        return name.rpartition(".")[2].endswith("bias")


def has_bias(site: Site) -> bool:
    module: Any = site.module
    if site.part == "o":
        module = module.out_proj
    return getattr(module, "in_proj_bias" if site.part in ("q", "k", "v") else "bias", None) is not None
