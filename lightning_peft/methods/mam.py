"""MAM adapter (mix and match): Towards a Unified View of Parameter-Efficient Transfer Learning. He et al., ICLR 2022.
https://arxiv.org/abs/2110.04366
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning_peft.callback import PEFT
from lightning_peft.methods.parallel import ParallelAdapter
from lightning_peft.methods.prefix_tuning import PrefixTuning


class MAM(PEFT, name="mam", family="hybrid", paper="2110.04366", identity=False, overhead="tokens"):
    """prefix tuning on attention + scaled parallel adapter on the feed-forward layer

    The same as applying the two methods one after the other. prefix_bottleneck > 0 trains the prefix through an MLP
    of this width (the paper: 800 for summarisation). Source: section 4.6.
    """

    unused = ("targets",)

    length: int = 30
    prefix_bottleneck: int = 0
    bottleneck: int = 512
    scale: float | None = 4.0

    def parts(self) -> tuple[PEFT, ...]:
        common: dict[str, Any] = {
            "layers": self.layers,
            "exclude": self.exclude,
            "roles": self.roles,
            "seed": self.seed,
            "dtype": self.dtype,
        }
        return (
            PrefixTuning(length=self.length, bottleneck=self.prefix_bottleneck, **common),
            ParallelAdapter(bottleneck=self.bottleneck, scale=self.scale, **common),
        )

    def portable(self) -> MAM:
        return dataclasses.replace(self, prefix_bottleneck=0)
