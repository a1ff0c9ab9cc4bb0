"""ReMoRA, in MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning. Jiang et al., 2024.
https://arxiv.org/abs/2405.12130
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning_peft.core import state
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.restart import Prune
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import projection_widths
from lightning_peft.methods.mora import Rounding, Square, square
from lightning_peft.methods.relora import Restarting


class ReMoRA(Restarting, name="remora", family="reparametrisation", paper="2405.12130", mergeable=True):
    """y = W x + decompress(M compress(x)); every T steps W takes the change over, M = 0, and the maps are the next ones

    M (n, n) starts at zero: the base at step 0, and at each restart what it was before. n^2 parameters a site, as many
    as MoRA. types: the maps (1 to 4 of MoRA) that are gone through, over and over; type 6 has an M of another size.
    The optimizer's state of M is dropped at a restart, as in the paper; the learning rate should rise again
    (`jagged_cosine`, 50 steps). The other fields are ReLoRA's. Source: section 4.3.
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
        return Square(d_in, d_out, square(d_in, d_out, self.rank, 1, self.rounding), self.kind, self.dropout)

    def renew(self, adapter: Adapter, draw: Draw) -> None:
        super().renew(adapter, draw)
        adapter.kind = self.kind  # type: ignore[assignment]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if (model := vars(self).get("_module", lambda: None)()) is not None:
            for placement in state.get_applied(model, self.name_on_model).placements:
                placement.adapter.kind = self.kind  # type: ignore[assignment]
