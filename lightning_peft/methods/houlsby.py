"""Parameter-Efficient Transfer Learning for NLP. Houlsby et al., ICML 2019. https://arxiv.org/abs/1902.00751"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import positive
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import projection_widths
from lightning_peft.methods.ln_tuning import LNTuning

Activation = Literal["gelu", "relu", "silu", "tanh", "identity"]
Init = Literal["zero", "normal", "bert"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


class Bottleneck(Adapter):
    """D(u) = W_up phi(W_dn u + b_dn) + b_up, y = h + s D(h): W_dn (m, d), W_up (d, m); 2md + m + d parameters."""

    def __init__(self, width: int, bottleneck: int, activation: Activation, init: Init, scale: float = 1.0) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(bottleneck, width))
        self.down_bias = nn.Parameter(torch.empty(bottleneck))
        self.up = nn.Parameter(torch.empty(width, bottleneck))
        self.up_bias = nn.Parameter(torch.empty(width))
        self.activation, self.init, self.scale = activation, init, scale

    def reset(self, draw: Draw) -> None:
        """zero: Kaiming down, zero up (He et al.); normal: N(0, 0.01^2) cut at two sigma (Houlsby).

        Bert: N(0, 0.02^2).
        """
        if self.init == "zero":
            draw.kaiming_uniform(self.down)
            draw.zeros(self.up)
        else:
            fill = draw.truncated_normal if self.init == "normal" else draw.normal
            for weight in (self.down, self.up):
                fill(weight, std=0.01 if self.init == "normal" else 0.02)
        draw.zeros(self.down_bias)
        draw.zeros(self.up_bias)

    def bottleneck(self, u: Tensor) -> Tensor:  # (..., d) -> (..., d)
        z = ACTIVATIONS[self.activation](F.linear(u, self.down.to(u.dtype), self.down_bias.to(u.dtype)))
        return self.scale * F.linear(z, self.up.to(u.dtype), self.up_bias.to(u.dtype))

    def forward(self, base: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        h = base(*args, **kwargs)
        return h + self.bottleneck(h)


class Houlsby(PEFT, name="houlsby", family="additive", paper="1902.00751"):
    """h + W_up phi(W_dn h + b_dn) + b_up after attention and after the feed-forward layer

    h is the output of the projections `o` and `down`, before dropout, residual and norm. L * 2 (2md + m + d)
    parameters.
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
