"""The measured peak beside the plan, after the first steps of a run."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_peft.core import state
from lightning_peft.planning import process
from lightning_peft.planning.planner import plan
from lightning_peft.planning.report import Plan
from lightning_peft.planning.shadow import hollow_batch, tensors
from lightning_peft.planning.sizes import PlanError, show

log = logging.getLogger("lightning_peft")
SECOND = 2


class MemoryLog(Callback):
    """Logs memory/peak and memory/plan, in GB, to the Trainer's loggers, and a line to the log, after `after` steps.

    plan: one that was made; None makes one for the largest batch up to then, which takes seconds and no memory.

    memory/peak is, on CUDA, the most that the allocator handed out (torch.cuda.max_memory_allocated). A CPU's allocator
    keeps no such number. There it is the most that the process had (resident set) during the steps after the first,
    less what it had beside weights, gradients and optimizer state when the first was done. So buffers of kernels and of
    data loaders are in it, and the holes that glibc's malloc leaves, which can be as much again; with
    MALLOC_MMAP_THRESHOLD_=65536 in the environment there are none, and the two agreed within 1 % at 1.6 GB.
    """

    def __init__(self, plan: Plan | None = None, after: int = SECOND) -> None:
        if isinstance(after, bool) or not isinstance(after, int) or after < SECOND:
            raise PlanError(f"after={after!r} is not a number of steps: give 2 or more; the first makes the state.")
        self.plan, self.after = plan, after
        self.peak: int | None = None
        self._largest: Any = None
        self._beside: int | None = None
        self._done = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.peak = self._largest = self._beside = None
        self._done = False
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        if not self._done and (self._largest is None or elements(batch) > elements(self._largest)):
            self._largest = hollow_batch(batch, "meta")

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._done or not trainer.global_step:
            return
        if trainer.global_step >= self.after:
            self.report(trainer, pl_module)
        elif self._beside is None and trainer.strategy.root_device.type != "cuda":
            now = process.settle()
            self._beside = None if now is None else now - resident(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._done and trainer.global_step:
            self.report(trainer, pl_module)

    def report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, plan, log; once in a run."""
        self._done, device = True, trainer.strategy.root_device
        if device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(device)
        elif self._beside is not None and trainer.global_step >= SECOND:
            self.peak = max((process.peak() or 0) - self._beside, 0)
        if not trainer.is_global_zero:
            return
        self.plan = self.plan or planned(trainer, pl_module, self._largest)
        found = {"memory/peak": self.peak, "memory/plan": None if self.plan is None else self.plan.total}
        for logger in trainer.loggers:
            known = {name: count / 10**9 for name, count in found.items() if count is not None}
            logger.log_metrics(known, step=trainer.global_step)
        what = "allocated on the GPU" if device.type == "cuda" else "in the process, for training"
        measured = "not measured" if self.peak is None else f"{show(self.peak)} {what}"
        line = "none" if self.plan is None else show(self.plan.total)
        log.info("memory: peak of the first %d steps %s; plan %s", trainer.global_step, measured, line)


def planned(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Plan | None:
    """The plan of a run that has begun; None, and a warning that says why, where there can be none."""
    device = "cuda" if trainer.strategy.root_device.type == "cuda" else "cpu"
    try:
        if len(trainer.optimizers) != 1:
            raise PlanError(f"It has {len(trainer.optimizers)} optimizers; a plan is of one.")
        how = {"precision": trainer.precision_plugin, "optimizer": trainer.optimizers[0]}
        how["accumulate"] = trainer.accumulate_grad_batches
        return plan(pl_module, batch=batch, device=device, **how)  # type: ignore[arg-type]
    except PlanError as error:
        log.warning("No plan of this run's memory: %s", error)
        return None


def elements(batch: Any) -> int:
    """Numbers in a batch."""
    return sum(tensor.numel() for tensor in tensors(batch))


def resident(trainer: pl.Trainer, module: pl.LightningModule) -> int:
    """Bytes of distinct storages between two steps: weights, gradients, optimizer state, copies that methods keep."""
    kept: list[Any] = [s.original for a in state.all_applied(module) for s in a.selected]
    kept += [*module.parameters(), *module.buffers(), *(p.grad for p in module.parameters())]
    kept += tree_leaves([list(optimizer.state.values()) for optimizer in trainer.optimizers])
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in kept if isinstance(t, Tensor)}
    return sum(storage.nbytes() for storage in storages.values())
