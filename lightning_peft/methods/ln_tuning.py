"""Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models. Qi et al., 2022.
https://arxiv.org/abs/2211.08682
"""

from __future__ import annotations

from torch import nn

from lightning_peft.callback import PEFT


class LNTuning(PEFT, name="ln_tuning", family="selective", paper="2211.08682", mergeable=True):
    """train g and b in y = g * (x - mean) / std + b

    Gain and bias of every normalisation layer (LayerNorm, RMSNorm: gain only) train in place; a Gemma-style norm
    trains its raw parameter w of the gain 1 + w. Query and key norms inside attention are left out: add "norm.qk" to
    `targets`.
    """

    targets: str | list[str] | None = "norm"

    def select(self, name: str, parameter: nn.Parameter) -> bool:
        return True
