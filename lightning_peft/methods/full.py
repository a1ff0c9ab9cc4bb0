"""Full fine-tuning: the upper end that every comparison needs. No paper; the common practice."""

from __future__ import annotations

from torch import nn

from lightning_peft.callback import PEFT


class FullFineTuning(PEFT, name="full", family="baseline", mergeable=True, storage="model"):
    """train every parameter

    keep_base: a copy of the base stays on the CPU, so that `remove` restores it bit for bit; turn it off for large
    models.
    A checkpoint then holds the whole model, since all of it trains.
    """

    keep_base: bool = True

    @property
    def keeps_original(self) -> bool:
        return self.keep_base

    def select(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.is_floating_point()  # a quantised weight is shown as what it stands for
