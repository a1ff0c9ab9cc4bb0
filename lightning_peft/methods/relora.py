"""ReLoRA: High-Rank Training Through Low-Rank Updates. Lialin et al., ICLR 2024. https://arxiv.org/abs/2307.05695"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_peft.callback import PEFT
from lightning_peft.core import merge, projection, state
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError, not_negative, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.restart import Prune, fold_in, optimizers_of, prune_state
from lightning_peft.core.sites import Site
from lightning_peft.core.targets import matrix_shape

log = logging.getLogger("lightning_peft")


class Restarting(PEFT):
    """A method whose adapters are folded into the weights every so many optimizer steps, and begin anew.

    The weights at its sites are part of what it trains: they are in checkpoints and adapter files, and the originals
    are kept on the CPU for `remove` and `enabled`. Weights that it adapts are not quantised.
    """

    by_hand = True

    every: int = 1000
    prune: Prune = "magnitude"
    share: float = 0.9
    keep_base: bool = True
    restarts: int = 0

    def check(self) -> None:
        positive(self, "every")
        not_negative(self, "restarts")
        if not 0 <= self.share <= 1:
            raise FieldError(f"{type(self).__name__}(share={self.share}): expected a share, 0 <= share <= 1.")

    @property
    def keeps_original(self) -> bool:
        return self.keep_base

    def select(self, name: str, parameter: nn.Parameter) -> bool:
        return name.endswith("weight") and parameter.dim() > 1

    # -------------------------------------------------------------- in a run
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        applied = state.get_applied(pl_module, self.name_on_model)
        merge.check_tied(pl_module, applied)
        merge.check_inner(applied)
        if rounded := [x.site for x in applied.placements if projection.views(x.place)[0].itemsize < 4]:
            log.warning(
                "%s folds into %d weights of 16 bits (%s, ...), where each restart rounds and small changes are lost. "
                "Keep the weights in fp32 and compute in 16 bits: precision='bf16-mixed'.",
                type(self).__name__, len(rounded), rounded[0],
            )  # fmt: skip

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            vars(self)["_steps"] = 0
        vars(self)["_before"] = self.steps

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if optimizers_of([optimizer], self.parameters(pl_module)):
            vars(self)["_steps"] = self.steps + 1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *rest)
        if self.steps // self.every > vars(self)["_before"] // self.every:  # a batch may have several steps
            self.restart(pl_module, trainer.optimizers)
        vars(self)["_before"] = self.steps

    @property
    def steps(self) -> int:
        """Optimizer steps of this run so far."""
        return vars(self).get("_steps", 0)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        vars(self)["_steps"] = state_dict["steps"]

    def go_on(self, config: Mapping[str, Any]) -> None:
        self.restarts = config.get("restarts", self.restarts)

    # -------------------------------------------------------------- a restart
    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Of the adapters."""
        placements = state.get_applied(model, self.name_on_model).placements
        return [p for x in placements for p in x.adapter.parameters()]

    def restart(self, model: nn.Module, optimizers: list[Optimizer] | tuple[Optimizer, ...] = ()) -> None:
        """Fold the adapters in, draw them anew and prune the optimizers' state; the model computes what it did."""
        self.restarts += 1
        for placement in state.get_applied(model, self.name_on_model).placements:
            fold_in(placement)
            where = f"{placement.site}/{placement.role}/{self.info.name}/{self.restarts}"
            self.renew(placement.adapter, Draw(self.seed, where))
            own = list(placement.adapter.parameters())
            for optimizer in optimizers_of(optimizers, own):
                prune_state(optimizer, own, self.prune, self.share, Draw(self.seed, f"{where}/moments"))

    def renew(self, adapter: Adapter, draw: Draw) -> None:
        """Begin anew, at a change of zero."""
        with torch.no_grad():
            adapter.reset(draw)


class ReLoRA(
    Restarting, name="relora", family="reparametrisation", paper="2307.05695", mergeable=True, storage="weights"
):
    """y = W x + (alpha / rank) B A x; every T steps W <- W + (alpha / rank) B A, A drawn anew, B = 0

    A (rank, d_in) is Kaiming-uniform, B (d_out, rank) zero: the base at step 0, and at each restart what it was before.
    The change after N restarts has a rank of up to (N + 1) rank. rank * (d_in + d_out) parameters a site.

    every: optimizer steps between restarts; give the scheduler `jagged_cosine` the same. prune: which `share` of the
    optimizer's moments is zeroed at a restart: the smallest ("magnitude"), "random" ones, or all ("reset").
    keep_base: the originals stay on the CPU, so that `remove` and `enabled` work; turn it off for large models.
    restarts: how many there have been; files and checkpoints say it. The paper trains embeddings, norms and the head
    as they are: add FullFineTuning(targets="embed,norm"), and heads=. It begins with some thousand steps of full
    training, which is a run of its own.
    """

    targets: str | list[str] | None = "all-linear"
    rank: int = 128
    alpha: float = 32.0
    dropout: float = 0.1

    def check(self) -> None:
        super().check()
        positive(self, "rank", "alpha")
        probability(self, "dropout")

    def adapter(self, site: Site) -> Adapter:
        return LowRank(matrix_shape(site, "ReLoRA"), self.rank, self.alpha / self.rank, self.dropout)
