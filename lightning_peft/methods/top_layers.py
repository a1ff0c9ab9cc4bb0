"""The last layers only: How transferable are features in deep neural networks? Yosinski et al., NeurIPS 2014.
https://arxiv.org/abs/1411.1792
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_peft.callback import PEFT
from lightning_peft.core.fields import positive
from lightning_peft.core.method import outside_frozen_networks
from lightning_peft.core.sites import Site, TargetError, sites
from lightning_peft.core.stream import final_norm


class TopLayers(PEFT, name="top_layers", family="baseline", paper="1411.1792", mergeable=True):
    """train the last k blocks, the norm after them and the head

    All in place, so the base at step 0; no gradient goes below the last k blocks (of an encoder-decoder: of its
    decoder). The head is found by `heads`; for the head alone use linear_probe.
    """

    unused = ("targets", "layers")

    k: int = 2

    def check(self) -> None:
        positive(self, "k")

    def asked(self, model: nn.Module) -> Iterator[Site]:
        found = sites(model, "block", exclude=self.exclude, roles=self.roles)
        alive = outside_frozen_networks(model, found)
        blocks = [site for site in alive if site.stack.endswith("decoder")] or alive
        if small := [site for site in blocks if (site.layers or 0) < self.k]:
            raise TargetError(
                f"TopLayers(k={self.k}): there are {small[0].layers} blocks here. Use a smaller k, or full."
            )
        top = [site for site in blocks if (site.layer or 0) >= (site.layers or 0) - self.k]
        yield from top
        norms = [norm for norm in (final_norm(found, site) for site in top) if norm is not None]
        yield from {norm.name: norm for norm in norms}.values()

    def select(self, name: str, parameter: nn.Parameter) -> bool:
        return True
