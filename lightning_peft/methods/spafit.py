"""SPAFIT: Stratified Progressive Adaptation Fine-tuning for Pre-trained Large Language Models. Arora, Wang, 2024.
https://arxiv.org/abs/2405.00201
"""

from __future__ import annotations

from typing import Any

from lightning_peft.callback import PEFT
from lightning_peft.core.fields import FieldError, not_negative
from lightning_peft.methods.bitfit import BitFit
from lightning_peft.methods.lora import LoRA


class SPAFIT(PEFT, name="spafit", family="hybrid", paper="2405.00201", mergeable=True):
    """blocks 1..f as they are, f+1..b: train biases, b+1..L: biases and W x + (alpha / rank) B A x

    Three groups of blocks of each stack: the lowest `frozen` ones are left alone and no gradient goes there, the ones
    up to `biased` get BitFit, the others LoRA at `targets` and BitFit on everything. The base at step 0. The published
    boundaries and ranks could not be verified: the defaults are for 24 blocks. Source: section 3.
    """

    unused = ("layers",)

    targets: str | list[str] | None = "q,v"
    frozen: int = 4
    biased: int = 9
    rank: int = 8
    alpha: float = 16.0
    create: bool = True

    def check(self) -> None:
        not_negative(self, "frozen", "biased")
        if self.frozen > self.biased:
            raise FieldError(
                f"SPAFIT(frozen={self.frozen}, biased={self.biased}): biased counts the frozen blocks too."
            )
        self.parts()  # which know their ranges

    def parts(self) -> tuple[PEFT, ...]:
        common: dict[str, Any] = {
            "exclude": self.exclude,
            "roles": self.roles,
            "seed": self.seed,
            "dtype": self.dtype,
        }
        return (
            BitFit(layers=f"{self.frozen}-", create=self.create, **common),
            LoRA(layers=f"{self.biased}-", targets=self.targets, rank=self.rank, alpha=self.alpha, **common),
        )
