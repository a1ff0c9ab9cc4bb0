"""LoRA whose start is taken from data: what EVA, CorDA and LoRA-GA share."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_peft.callback import LifeCycleError
from lightning_peft.core import state
from lightning_peft.core.calibration import Run, Watched, calibrate, plain_run
from lightning_peft.core.fields import positive
from lightning_peft.core.init import Draw
from lightning_peft.core.targets import Shape
from lightning_peft.methods.lora import StartedLoRA
from lightning_peft.resume import loader_generators, seed_generators


class CalibratedLoRA(StartedLoRA):
    """Plain LoRA until a few batches were seen: `batches` of the training data at the start of `fit`, or
    `calibrate`.
    """

    batches: int = 8

    def check(self) -> None:
        super().check()
        positive(self, "batches")

    def calibrate(self, model: nn.Module, batches: Iterable[Any], run: Run | None = None) -> int:
        """Take the start from these batches; before `fit`, or without a Trainer.

        run(batch, index) -> loss; by default a LightningModule's training_step, else the model's own call with the
        batch
        as keywords, positions or as it is. Tokens without a label, else padding, do not count. Everything is in eval
        mode. Memory: CorDA keeps d_in^2 numbers a site while it watches, LoRA-GA d_out d_in, EVA rank d_in. Errors:
        CalibrationError for sites that the batches do not reach.
        """
        placements = state.get_applied(model, self.label or self.info.name).placements
        if not isinstance(model, pl.LightningModule) or run is not None:
            return calibrate(model, adapters_of(placements), batches, run or plain_run(model))
        with quiet(model):
            return calibrate(model, adapters_of(placements), batches, step_of(model))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if all(adapter.settled for adapter in self.watched(pl_module)):
            return
        with training_batches(self, trainer, pl_module) as given:
            self.calibrate(pl_module, given)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for adapter in self.watched(vars(self).get("_module", lambda: None)()):
            adapter.settled = True  # what is resumed or loaded has its start

    def watched(self, model: nn.Module | None) -> list[Watched]:
        """The adapters of this method on a model."""
        applied = None if model is None else state.applied_to(model).get(self.name_on_model)
        return [] if applied is None else list(adapters_of(applied.placements).values())


@contextmanager
def training_batches(
    method: Any, trainer: pl.Trainer, pl_module: pl.LightningModule, instead: str = ""
) -> Iterator[Iterator[Any]]:
    """The first `method.batches` of an order of this epoch's own; what is drawn meanwhile is no part of the run.

    The order follows from the method's seed and the epoch alone, so that a resumed run sees the same. instead: a way
    out for a run that has no such batches, where the method has no `calibrate` or `identify` to call by hand.
    """
    by_hand = next((name for name in ("calibrate", "identify") if hasattr(method, name)), None)
    instead = f"Call {by_hand}(module, batches, run) before fit, run(batch, index) -> loss." if by_hand else instead
    if not pl_module.automatic_optimization:
        raise LifeCycleError(
            f"{type(method).__name__} looks at what training_step returns, and this one makes optimizer steps of its "
            f"own (automatic_optimization=False). {instead}"
        )
    loader: Any = trainer.train_dataloader
    if isinstance(loader, (dict, list, tuple)):
        raise LifeCycleError(
            f"{type(method).__name__} looks at the batches of one training dataloader, and this run has {len(loader)}. "
            f"{instead}"
        )
    own = [(generator, generator.get_state()) for generator in loader_generators(trainer)]
    with isolate_rng(), trainer.precision_plugin.train_step_context():
        seed = Draw(method.seed, f"batches/{trainer.current_epoch}/{trainer.global_rank}").generator.initial_seed()
        seed_generators(seed, [generator for generator, _ in own])
        _set_sampler_epoch(loader, trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        yield (as_in_training(trainer, pl_module, b) for b in itertools.islice(anew(loader), method.batches))
    for generator, before in own:
        generator.set_state(before)


def adapters_of(placements: list[state.Placement]) -> dict[str, Watched]:
    return {f"{x.site} ({x.role})": x.adapter for x in placements if isinstance(x.adapter, Watched)}


def anew(loader: Any) -> Any:
    """The same batches by an iterator of its own: workers that stay have one, which the run is about to use."""
    if getattr(loader, "persistent_workers", False):
        loader = copy.copy(loader)
        vars(loader).update(persistent_workers=False, _iterator=None)
    return loader


def as_in_training(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """What the loop does to a batch before `training_step`: dtype, the module's hooks, device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def linear_only(shape: Shape, method: str) -> Shape:
    """Raise for embeddings and convolutions, whose inputs are no rows."""
    if shape.kind != "linear":
        from lightning_peft.core.sites import TargetError

        raise TargetError(f"{method} watches the inputs of projections, and this is an {shape.kind}. Exclude it.")
    return shape


def step_of(module: pl.LightningModule) -> Run:
    def run(batch: Any, index: int) -> Tensor | None:
        out = module.training_step(batch, index)
        return out.get("loss") if isinstance(out, dict) else out  # type: ignore[return-value]

    return run


class quiet:  # noqa: N801
    """Without the module's logging, and with its metrics cleared: these batches are no steps of the run."""

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module

    def __enter__(self) -> None:
        vars(self.module).update(log=nothing, log_dict=nothing)

    def __exit__(self, *_: object) -> None:
        for name in ("log", "log_dict"):
            vars(self.module).pop(name, None)
        for module in self.module.modules():
            if isinstance(module, Metric):
                module.reset()


def nothing(*_: Any, **__: Any) -> None:
    """In place of `self.log`."""
