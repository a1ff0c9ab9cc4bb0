"""One training step without memory, and what lived in it: forward, loss, backward, optimizer, in Lightning's order."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_peft.core import state
from lightning_peft.core.quantised import Quantised
from lightning_peft.core.sites import roles
from lightning_peft.planning import optimizers
from lightning_peft.planning.precision import Arithmetic
from lightning_peft.planning.shadow import as_on, fewer_chunks, hollow, hollow_batch, stand_in
from lightning_peft.planning.sizes import PlanError
from lightning_peft.planning.tracker import (
    ACTIVATIONS,
    ADAPTERS,
    CONSTANTS,
    COPIES,
    GRADIENTS,
    OPTIMIZER,
    TEMPORARIES,
    WEIGHTS,
    Record,
    Tracker,
    by_label,
)

Loss = Callable[[Any, Any], Tensor]
FORWARD, BACKWARD, UPDATE = "in the forward pass", "in the backward pass", "in the optimizer's step"


@dataclass(frozen=True)
class Setting:
    """How a step is taken."""

    arithmetic: Arithmetic
    optimizer: Any
    device: str
    loss: Loss | None = None
    accumulates: bool = False


class Step:
    """What was seen in a step; marks are the times at which its phases begin and end."""

    def __init__(self, model: nn.Module, batch: Any, setting: Setting) -> None:
        self.setting, self.tracker, self.marks = setting, Tracker(stand_in), [0]
        with FakeTensorMode(allow_non_fake_inputs=True), quiet(), fewer_chunks():
            self.model = hollow(model, "cpu")
            self.batch = hollow_batch(batch, "cpu", setting.arithmetic.cast)
            self.label()
            with as_on(setting.device, self.model):
                self.take()
            self.found = by_label(self.tracker.alive())

    def label(self) -> None:
        """Record what is there before the first operator."""
        record, kinds = self.tracker.record, labels(self.model)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            record(tensor, kinds.get(id(tensor), WEIGHTS), frozen=not tensor.requires_grad)
        for tensor in torch.utils._pytree.tree_leaves(self.batch):
            if isinstance(tensor, Tensor):
                record(tensor, ACTIVATIONS)
        self.copies = [s.original for a in state.all_applied(self.model) for s in a.selected if s.original is not None]
        self.held = held(self.model)
        for tensor in (*self.held, *(self.copies if self.setting.device == "cpu" else ())):
            record(tensor, COPIES)

    def take(self) -> None:
        """Forward, backward, and two steps of the optimizer: the first makes its state."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.tracker.watch_gradients(trained)
        self.optimizer = optimizer = optimizers.make(self.setting.optimizer, trained, self.setting.device)
        with self.tracker:
            if self.setting.accumulates:
                self.forward().backward()
                self.marks = [self.tracker.tick()]
            loss = self.forward()
            self.mark()
            self.saved = self.tracker.alive()
            for record in self.saved:
                record.label = ACTIVATIONS if record.label == TEMPORARIES else record.label
            loss.backward()
            del loss
            self.mark()
            optimizer.step()
            for tensor in torch.utils._pytree.tree_leaves(list(optimizer.state.values())):
                if isinstance(tensor, Tensor):
                    self.tracker.relabel(tensor, OPTIMIZER)
            self.mark()
            optimizer.step()
            self.mark()

    def mark(self) -> None:
        self.marks.append(self.tracker.tick())

    def forward(self) -> Tensor:
        """The loss of a batch."""
        with self.setting.arithmetic.forward():
            return loss_of(self.model, self.batch, self.setting.loss)

    # -------------------------------------------------------------- what lived
    def size(self, label: str) -> int:
        """Bytes of what is kept for longer than a pass."""
        return self.found.get(label, 0)

    def activations(self) -> int:
        """Bytes between the forward and the backward pass."""
        return sum(record.bytes for record in self.saved if record.label == ACTIVATIONS)

    def peak(self, offload: str | None = None) -> tuple[str, dict[str, int]]:
        """The phase with the moment when most lived on the device, and what did, by label."""
        return fullest(self.phases(offload))

    def phases(self, offload: str | None = None) -> dict[str, dict[str, int]]:
        """The most that lived on the device in each phase, by label.

        In a forward pass the gradients and the state of the step before are still there; in a backward pass those
        of the batches before, where they accumulate.
        """
        found = {phase: self.moment(*times, offload) for phase, times in self.times().items()}
        if offload == "optimizer":  # gradients leave for the host one by one, which then takes the step
            sizes = [r.bytes for r in self.tracker.records if r.label == GRADIENTS]
            largest = 0 if self.setting.accumulates else max(sizes, default=0)  # else counted as what is added to it
            return {FORWARD: found[FORWARD], BACKWARD: added(found[BACKWARD], {GRADIENTS: largest})}
        found = with_kept(found, self.size(OPTIMIZER), 0 if self.setting.accumulates else self.size(GRADIENTS))
        if offload == "weights":
            found = {phase: added(lived, self.working_set()) for phase, lived in found.items()}
        return found

    def times(self) -> dict[str, tuple[int, int]]:
        """phase -> from when to when"""
        start, forward, backward, first, second = self.marks
        return {FORWARD: (start, forward), BACKWARD: (forward, backward), UPDATE: (first, second)}

    def moment(self, start: int, end: int, offload: str | None) -> dict[str, int]:
        """The most that lived from start to end, by label."""

        def counts(record: Record) -> bool:
            if offload == "weights":
                return not (record.frozen and record.label in (WEIGHTS, CONSTANTS))
            return offload is None or record.label not in (GRADIENTS, OPTIMIZER)

        return by_label(self.tracker.peak(start, end, counts))

    def working_set(self) -> dict[str, int]:
        """Frozen weights come to the device block by block, and what is outside of blocks module by module."""
        blocks = [site.module for site in roles(self.model).get("block", [])]
        inside = {id(m) for block in blocks for m in block.modules()}
        units: list[list[nn.Module]] = [list(block.modules()) for block in blocks]
        units += [[m] for m in state.base_modules(self.model) if id(m) not in inside]
        return max((self.frozen(unit) for unit in units), key=lambda found: sum(found.values()))

    def frozen(self, modules: Iterable[nn.Module]) -> dict[str, int]:
        """Bytes of frozen weights and constants that these modules hold, by label."""
        own = {id(t): t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
        records = {id(record): record for record in map(self.tracker.record, own.values())}
        return by_label(r for r in records.values() if r.frozen and r.label in (WEIGHTS, CONSTANTS))


# ------------------------------------------------------------------ pieces
def added(*parts: dict[str, int]) -> dict[str, int]:
    """Sums by label."""
    return {label: sum(part.get(label, 0) for part in parts) for part in parts for label in part}


def fullest(phases: dict[str, dict[str, int]]) -> tuple[str, dict[str, int]]:
    """The phase that takes most, and what it takes."""
    phase = max(phases, key=lambda phase: sum(phases[phase].values()))
    return phase, phases[phase]


def with_kept(found: dict[str, dict[str, int]], optimizer: int, gradients: int) -> dict[str, dict[str, int]]:
    """Phases, the first two with the state of the optimizer, the first with the gradients of the step before."""
    kept = {FORWARD: {OPTIMIZER: optimizer, GRADIENTS: gradients}, BACKWARD: {OPTIMIZER: optimizer}, UPDATE: {}}
    return {phase: added(lived, kept[phase]) for phase, lived in found.items()}


def labels(model: nn.Module) -> dict[int, str]:
    """id of a tensor -> what it is, where it is no weight of the base"""
    found = {id(t): CONSTANTS for m in model.modules() if isinstance(m, Quantised) for t in m.constants().values()}
    for applied in state.all_applied(model):
        for placement in applied.placements:
            found |= {id(t): ADAPTERS for t in (*placement.adapter.parameters(), *placement.adapter.buffers())}
    return found


def held(model: nn.Module) -> list[Tensor]:
    """Tensors like those that `state.hold` will make: masks, and the values that must not move."""
    pairs = list(state.masked(model))
    return [t for p, mask in pairs for t in (torch.empty_like(p), torch.empty_like(p, dtype=mask.dtype))]


def loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """`training_step` of a LightningModule, or the model's forward and `loss(output, batch)` or its own loss."""
    if isinstance(model, pl.LightningModule) and loss is None:
        out = model.training_step(batch, 0)
        out = out["loss"] if isinstance(out, dict) else out
    else:
        listed = batch if isinstance(batch, (list, tuple)) else [batch]
        out = model(**batch) if isinstance(batch, dict) else model(*listed)
        out = getattr(out, "loss", None) if loss is None else loss(out, batch)
    if not isinstance(out, Tensor) or out.dim() or not out.requires_grad:
        raise PlanError(
            f"A step of this {type(model).__name__} gives no loss to differentiate, but {type(out).__name__}. Plan a "
            "LightningModule, give loss=lambda output, batch: ..., or put labels into the batch."
        )
    return out


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no log: a step has its say when it is really taken, save what is said once in a process."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
