"""ReMoRA, in MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning. Jiang et al., 2024.
https://arxiv.org/abs/2405.12130
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.restart import Prune
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import projection_widths
from lightning_peft.methods.mora import Rounding, Square, square
from lightning_peft.methods.relora import Restarting


class Cycled(Square):
    """Whose state says which type it is of, since M means nothing without it."""

    of_type: Tensor

    def __init__(self, d_in: int, d_out: int, size: int, kind: int, dropout: float) -> None:
        super().__init__(d_in, d_out, size, kind, dropout)
        self.register_buffer("of_type", torch.tensor(kind))

    def reset(self, draw: Draw) -> None:
        super().reset(draw)
        self.become(self.kind)

    def become(self, kind: int) -> None:
        """Of this type from here on."""
        self.kind = kind
        self.of_type.fill_(kind)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self.kind = self.kind if self.of_type.is_meta else int(self.of_type)


class ReMoRA(
    Restarting, name="remora", family="reparametrisation", paper="2405.12130", mergeable=True, storage="weights"
):
    """y = W x + decompress(M compress(x)); every T steps W takes the change over, M = 0, and the maps are the next ones

    M (n, n) starts at zero: the base at step 0, and at each restart what it was before. n^2 parameters a site, as many
    as MoRA. types: the maps (1 to 4 of MoRA) that are gone through, over and over; type 6 has an M of another size.
    The optimizer's state of M is dropped at a restart, as in the paper; the learning rate should rise again
    (`jagged_cosine`, 50 steps). The other fields are ReLoRA's.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 8
    types: list[int] = dataclasses.field(default_factory=lambda: [1, 2])
    dropout: float = 0.0
    rounding: Rounding = "nearest"
    prune: Prune = "reset"

    def check(self) -> None:
        super().check()
        positive(self, "rank")
        probability(self, "dropout")
        if not self.types or not set(self.types) <= {1, 2, 3, 4}:
            raise FieldError(f"ReMoRA(types={self.types}): only types 1, 2, 3, 4 share their M; name one at least.")

    @property
    def kind(self) -> int:
        """The type between the restarts of now."""
        return self.types[self.restarts % len(self.types)]

    def adapter(self, site: Site) -> Adapter:
        d_in, d_out = projection_widths(site, "ReMoRA")
        return Cycled(d_in, d_out, square(d_in, d_out, self.rank, 1, self.rounding), self.kind, self.dropout)

    def renew(self, adapter: Adapter, draw: Draw) -> None:
        super().renew(adapter, draw)
        cast(Cycled, adapter).become(self.kind)
