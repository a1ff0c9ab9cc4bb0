"""AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning. Wang et al., EMNLP 2022.
https://arxiv.org/abs/2205.12410
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.bottleneck import Activation, Bottleneck, Init
from lightning_peft.core.fields import not_negative, positive
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import projection_widths
from lightning_peft.extra_loss import Predictions
from lightning_peft.methods.houlsby import Houlsby


class Mixture(Bottleneck):
    """h + W_up^j phi(W_dn^i h + b_dn^i) + b_up^j: i and j uniform, drawn once a forward; their averages in eval mode.

    All experts lie in one tensor, so that each of them has a gradient on every rank: zero for those not drawn. The draw
    is from torch's generator of the device, whose state a checkpointed block restores when it is computed again.
    """

    def __init__(self, width: int, bottleneck: int, activation: Activation, init: Init, down: int, up: int) -> None:
        self.experts = down, up
        super().__init__(width, bottleneck, activation, init)

    def make(self) -> None:
        down, up = self.experts
        self.down = nn.Parameter(torch.empty(down, self.middle, self.width))
        self.down_bias = nn.Parameter(torch.empty(down, self.middle))
        self.up = nn.Parameter(torch.empty(up, self.width, self.middle))
        self.up_bias = nn.Parameter(torch.empty(up, self.width))

    def reset(self, draw: Draw) -> None:
        """Each expert on its own, as one bottleneck."""
        for i in range(max(self.experts)):
            one = Bottleneck(self.width, self.middle, self.activation, self.init)
            one.to(self.down.device).reset(draw)
            for name, tensor in one.named_parameters():
                if i < len(mine := getattr(self, name)) and not mine.is_meta:
                    mine.data[i].copy_(tensor.data)

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not self.training:
            return self.down.mean(0), self.down_bias.mean(0), self.up.mean(0), self.up_bias.mean(0)
        i, j = (torch.randint(count, (1,), device=self.down.device) for count in self.experts)
        down, down_bias = self.down.index_select(0, i)[0], self.down_bias.index_select(0, i)[0]
        return down, down_bias, self.up.index_select(0, j)[0], self.up_bias.index_select(0, j)[0]

    def collapsed(self) -> dict[str, Tensor]:
        """The averages, as one bottleneck."""
        return {name: tensor.detach().mean(0) for name, tensor in self.named_parameters()}


def consistency(one: Tensor, two: Tensor) -> Tensor:
    """(KL(p || q) + KL(q || p)) / 2 of logits (rows, classes), a mean over rows; the first of each pair held fixed."""
    p, q = one.float().log_softmax(-1), two.float().log_softmax(-1)
    there = F.kl_div(q, p.detach(), reduction="batchmean", log_target=True)
    back = F.kl_div(p, q.detach(), reduction="batchmean", log_target=True)
    return (there + back) / 2


class AdaMix(PEFT, name="adamix", family="additive", paper="2205.12410"):
    """h + W_up^j phi(W_dn^i h + b_dn^i) + b_up^j after the feed-forward layer, i and j drawn for each batch

    experts: how many there are of W_dn and of W_up. share: the side that has one only. L (M (md + m) + md + d)
    parameters with one W_up. init "zero" starts at the base exactly; the experts are drawn independently. In eval mode,
    and in adapter files, they are averaged into one bottleneck adapter; checkpoints keep them all. Source: section 3.

    consistency: the weight of (KL(p || q) + KL(q || p)) / 2 in the loss of training, between the logits of the pass
    that the loss is of and those of a second one with other experts (and other dropout). This takes a second forward,
    and a LightningModule with `predictions(batch)`, as those of `lightning_peft.tasks` (see
    `lightning_peft.extra_loss`). The paper's code has 1, and 100 for generation; 0 leaves the second pass out.

    Checkpointed blocks have to restore the state of the generators, as they do unless told otherwise, to meet the same
    experts again.
    """

    targets: str | list[str] | None = "down"
    experts: int = 4
    share: Literal["up", "down", "none"] = "up"
    bottleneck: int = 16
    activation: Activation = "gelu"
    init: Init = "zero"
    consistency: float = 1.0

    def check(self) -> None:
        positive(self, "experts", "bottleneck")
        not_negative(self, "consistency")

    def adapter(self, site: Site) -> Adapter:
        width = projection_widths(site, "AdaMix")[1]
        down, up = (1 if self.share == side else self.experts for side in ("down", "up"))
        return Mixture(width, self.bottleneck, self.activation, self.init, down, up)

    @property
    def adds_loss(self) -> bool:
        return self.consistency > 0

    def extra_loss(self, outputs: Predictions, batch: Any) -> Tensor:
        return self.consistency * consistency(outputs.logits, outputs.again().logits)

    def portable(self) -> Houlsby:
        """One bottleneck adapter at the same places."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(Houlsby) if f.name != "norms"}
        return Houlsby(**own)
