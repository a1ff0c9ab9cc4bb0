"""P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks. Liu et al.,
ACL 2022. https://arxiv.org/abs/2110.07602
"""

from __future__ import annotations

import dataclasses

from lightning_peft.core.fields import positive
from lightning_peft.methods.prefix_tuning import PrefixTuning


class PTuningV2(PrefixTuning, name="p_tuning_v2", family="soft prompt", paper="2110.07602", identity=False):
    """Att(q, [P_K; K], [P_V; V]) in every layer, with a trained classification head

    Prefix tuning for understanding: the prefix is N(0, 1), or comes out of an MLP of width `bottleneck` with
    projection=True (the authors' prefix_projection), and the head on the class token or on each token trains, no
    verbaliser. L * 2 * length * d parameters and the head. The authors count the positions of the text from `length`
    on; here that is shift_positions=True, and off by default, since it needs a model with a table or rotation of
    positions. Source: section 3.2.
    """

    bottleneck: int = 512
    projection: bool = False

    def check(self) -> None:
        super().check()
        positive(self, "bottleneck")

    @property
    def middle(self) -> int:
        return self.bottleneck if self.projection else 0

    def portable(self) -> PTuningV2:
        return dataclasses.replace(self, projection=False, init="normal", text=None)
