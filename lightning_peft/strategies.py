"""Strategies that know about adapters: checkpoints without the base, optimizer state by name, frozen parameters left
alone.

    Trainer(strategy="peft_ddp", callbacks=[LoRA(rank=8)])            # the method as a callback
    Trainer(strategy=PEFTDDPStrategy(method=LoRA(rank=8)))            # the strategy alone: the same method, once

The callback works with the plain strategies too; sharded ones (FSDP, ModelParallel, DeepSpeed) will need the mixin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft import callback
from lightning_peft.callback import PEFT, LifeCycleError


class PEFTStrategyMixin:
    """Put before a Lightning strategy in the bases. method: one callback, or several, that the strategy brings along.

    Subclasses for sharded training override `setup` (to shard adapters with their base) and what `load_checkpoint`
    asks for.
    """

    supports_peft = True
    lightning_module: pl.LightningModule

    def __init__(self, *args: Any, method: PEFT | list[PEFT] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.methods = [] if method is None else [method] if isinstance(method, PEFT) else list(method)
        for given in self.methods:
            if not isinstance(given, PEFT):
                raise LifeCycleError(f"method={given!r} is no PEFT method. Pass an instance, such as LoRA(rank=8).")

    def connect(self, model: pl.LightningModule) -> None:
        """The first thing a Trainer does with its strategy: early enough to add the methods as callbacks."""
        super().connect(model)  # type: ignore[misc]
        trainer = model.trainer
        known = trainer.callbacks  # type: ignore[attr-defined]
        known[:0] = [method for method in self.methods if method not in known]

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        return callback.module_state(self, super().lightning_module_state_dict)  # type: ignore[misc]

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        callback.load_module_state(self, super().load_model_state_dict, checkpoint, strict)  # type: ignore[misc]

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return callback.optimizer_state(self, super().optimizer_state, optimizer)  # type: ignore[misc]

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        callback.load_optimizer_state(self, super().load_optimizer_state_dict, checkpoint)  # type: ignore[misc]


class PEFTSingleDeviceStrategy(PEFTStrategyMixin, SingleDeviceStrategy):
    """`SingleDeviceStrategy` for adapters; registered as "peft_single_device"."""

    strategy_name = "peft_single_device"


class PEFTDDPStrategy(PEFTStrategyMixin, DDPStrategy):
    """`DDPStrategy` for adapters: frozen parameters are neither broadcast nor reduced; registered as "peft_ddp"."""

    strategy_name = "peft_ddp"


def register() -> None:
    """Make the names known to `Trainer(strategy=...)`; repeating it does no harm."""
    entries: tuple[tuple[Any, dict[str, Any]], ...] = (
        (PEFTSingleDeviceStrategy, {}),
        (PEFTDDPStrategy, {"start_method": "popen"}),
    )
    for cls, options in entries:
        if cls.strategy_name not in StrategyRegistry:
            StrategyRegistry.register(cls.strategy_name, cls, description=cls.__doc__ or "", **options)


register()
