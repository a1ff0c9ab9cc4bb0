"""Time and memory of a run, without a line in what it logs."""

from __future__ import annotations

import statistics
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_peft.planning import process


class Meter(Callback):
    """step_ms: the median over training batches, but the first two; peak_bytes: of the fit.

    On CUDA the peak is what the allocator handed out. Elsewhere it is what the process had at most, less what it had
    when the fit began: a figure that holds buffers of loaders and kernels, and that later runs of one process make too
    small, since they find memory that earlier ones left.
    """

    WARM = 2

    def __init__(self) -> None:
        self.times: list[float] = []
        self.peak_bytes: int | None = None
        self._start = 0.0
        self._before: int | None = None

    @property
    def step_ms(self) -> float | None:
        """None before the first batch."""
        kept = self.times[self.WARM :] or self.times
        return 1000 * statistics.median(kept) if kept else None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
        else:
            self._before = process.settle()

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._start = self.now(trainer)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.times.append(self.now(trainer) - self._start)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.strategy.root_device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(trainer.strategy.root_device)
        elif self._before is not None:
            self.peak_bytes = max((process.peak() or 0) - self._before, 0)

    def now(self, trainer: pl.Trainer) -> float:
        """Seconds, when the device is done."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        return time.perf_counter()
