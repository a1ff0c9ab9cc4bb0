"""Parameter-Efficient Transfer Learning for NLP. Houlsby et al., ICML 2019. https://arxiv.org/abs/1902.00751"""

from __future__ import annotations

import dataclasses

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.bottleneck import Activation, Bottleneck, Init
from lightning_peft.core.fields import positive
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import projection_widths
from lightning_peft.methods.ln_tuning import LNTuning


class Houlsby(PEFT, name="houlsby", family="additive", paper="1902.00751"):
    """h + W_up phi(W_dn h + b_dn) + b_up after attention and after the feed-forward layer

    h is the output of the projections `o` and `down`, before dropout, residual and norm. L * 2 (2md + m + d)
    parameters. targets="o" or "down" gives the variants after attention or after the feed-forward layer alone,
    "o,cross.o,down" an adapter after cross-attention as well.
    init "zero" starts at the base exactly; the paper's "normal" starts near it. norms: gain and bias of every norm
    train as well, as in the paper; off by default, so that adapters share one base. Source: section 2.1, figure 2.
    """

    targets: str | list[str] | None = "o,down"
    bottleneck: int = 64
    activation: Activation = "gelu"
    init: Init = "zero"
    norms: bool = False

    def check(self) -> None:
        positive(self, "bottleneck")

    def parts(self) -> tuple[PEFT, ...]:
        return (dataclasses.replace(self, norms=False), LNTuning()) if self.norms else ()

    def adapter(self, site: Site) -> Adapter:
        return Bottleneck(projection_widths(site, "Houlsby")[1], self.bottleneck, self.activation, self.init)
