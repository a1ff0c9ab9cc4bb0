"""Starts that are taken from data: a few batches go through the model while its adapters watch what they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter

Run = Callable[[Any, int], "Tensor | None"]  # a batch and its number -> the loss


class CalibrationError(RuntimeError):
    """Batches that say nothing about a site."""


# ------------------------------------------------------------------ what is watched
class Watch:
    """What one adapter gathers; `mask` (...,) says which rows of the batch count."""

    of_gradient = False
    mask: Tensor | None = None

    def see(self, x: Tensor, y: Tensor) -> None:
        """x (..., d_in) went in, y (..., d_out) came out."""
        self.take(self.rows(x.detach()).float())

    def take(self, x: Tensor) -> None:
        """x (n, d_in)"""

    def reduce(self) -> None:
        """Make it the same on all ranks."""

    def rows(self, x: Tensor) -> Tensor:
        """(..., d) -> (n, d), those that count"""
        mask = self.mask
        return x.flatten(0, -2) if mask is None or mask.shape != x.shape[:-1] else x[mask.to(x.device).bool()]


class Covariance(Watch):
    """E[x x^T] (d_in, d_in)"""

    def __init__(self) -> None:
        self.total: Any = 0.0
        self.count = 0

    def take(self, x: Tensor) -> None:
        self.total, self.count = self.total + x.T @ x, self.count + len(x)

    def reduce(self) -> None:
        if distributed():
            count = torch.tensor(float(self.count), device=self.total.device)
            reduced((self.total, count))
            self.count = int(count)

    def result(self) -> Tensor:
        """The mean over all rows."""
        return self.total / self.count


class Components(Watch):
    """The principal directions of x, kept up to date batch by batch (Ross et al. 2008, section 3).

    vt (k, d_in) orthonormal, s (k,): singular values of all rows less their mean (with center) seen so far.
    """

    def __init__(self, count: int, center: bool) -> None:
        self.keep, self.center, self.n = count, center, 0
        self.scaled: Tensor | None = None  # S V^T
        self.mean: Any = 0.0

    def take(self, x: Tensor) -> None:
        if len(x):
            mean = x.mean(0) if self.center else torch.zeros_like(x[0])
            self.merge(x - mean, mean, len(x))

    def merge(self, rows: Tensor, mean: Tensor, n: int) -> None:
        """Add n vectors whose scatter about their mean is rows^T rows."""
        blocks = [rows]
        if self.scaled is not None:
            shift = (self.n * n / (self.n + n)) ** 0.5 * (self.mean - mean)
            blocks = [self.scaled, rows, shift[None]]
        _, s, vt = torch.linalg.svd(torch.cat(blocks), full_matrices=False)
        self.scaled = s[: self.keep, None] * vt[: self.keep]
        self.mean = (self.n * self.mean + n * mean) / (self.n + n)
        self.n += n

    def reduce(self) -> None:
        if not distributed():
            return
        mine = (self.scaled, self.mean, self.n)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, tuple(t.cpu() if isinstance(t, Tensor) else t for t in mine))
        self.scaled, self.mean, self.n = None, 0.0, 0
        for scaled, mean, n in everyone:
            if n:
                self.merge(scaled, mean, n)

    def result(self) -> tuple[Tensor, Tensor]:
        """S (k,), V^T (k, d_in); the largest entry of each v is positive"""
        _, s, vt = torch.linalg.svd(self.scaled, full_matrices=False)  # type: ignore[arg-type]
        sign = vt.gather(1, vt.abs().argmax(1, keepdim=True)).sign()
        return s, vt * sign


class Gradient(Watch):
    """The mean over batches of dL/dW = (dL/dy)^T x (d_out, d_in)"""

    of_gradient = True

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.total: Any = 0.0
        self.count = 0

    def see(self, x: Tensor, y: Tensor) -> None:
        if y.requires_grad:
            self.calls.append((x.detach(), y))

    def differentiate(self, inputs: Iterable[Tensor], grads: Iterable[Tensor | None]) -> None:
        """Take the gradients of a batch at the outputs, and forget what was seen."""
        for x, g in zip(inputs, grads, strict=True):
            if g is not None:
                self.total = self.total + g.flatten(0, -2).float().T @ x.flatten(0, -2).float()
        self.count += bool(self.calls)
        self.calls = []

    def reduce(self) -> None:
        if distributed():
            dist.all_reduce(self.total)
            self.count *= dist.get_world_size()

    def result(self) -> Tensor:
        """The mean over batches, of all ranks."""
        return self.total / self.count


class Watched(Adapter):
    """An adapter that can be watched while batches go through it; `settle` takes its start from what was seen."""

    watch: Watch | None = None
    settled = False

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = super().forward(base, x)
        if self.watch is not None:
            self.watch.see(x, y)
        return y

    def watcher(self) -> Watch:
        """What to gather."""
        raise NotImplementedError

    def settle(self, watch: Any) -> None:
        """Set the own tensors."""
        raise NotImplementedError


# ------------------------------------------------------------------ running
def calibrate(model: nn.Module, adapters: dict[str, Watched], batches: Iterable[Any], run: Run) -> int:
    """Send the batches through, in eval mode, then settle each adapter (name -> adapter); how many batches there were.

    Gradients of parameters stay as they are, and nothing is drawn from the global generators by us.
    """
    modes = {module: module.training for module in model.modules()}
    watches = {name: adapter.watcher() for name, adapter in adapters.items()}
    count = 0
    try:
        for name, adapter in adapters.items():
            adapter.watch = watches[name]
        model.eval()
        for count, batch in enumerate(batches, 1):
            one(list(watches.values()), batch, count - 1, run)
    finally:
        for adapter in adapters.values():
            adapter.watch = None
        for module, mode in modes.items():
            module.training = mode
    silent = [name for name, watch in watches.items() if not (getattr(watch, "count", 0) or getattr(watch, "n", 0))]
    if silent := on_any_rank(silent):
        raise CalibrationError(
            f"{count} batches told nothing about {len(silent)} of {len(watches)} sites ({silent[:3]}): no rows that "
            "count, or no gradient, reached them. Give batches that use the whole model, or exclude these sites."
        )
    with torch.no_grad():
        for name, adapter in adapters.items():
            watches[name].reduce()
            adapter.settle(watches.pop(name))
            adapter.settled = True
            if distributed():  # decompositions may differ in their last bits, and nothing would make them equal later
                for tensor in (*adapter.parameters(), *adapter.buffers()):
                    dist.broadcast(tensor, 0)
    return count


def one(watches: list[Watch], batch: Any, index: int, run: Run) -> None:
    mask = counted(batch)
    for watch in watches:
        watch.mask = mask
    gradient = any(watch.of_gradient for watch in watches)
    with torch.set_grad_enabled(gradient):
        loss = run(batch, index)
    # copies: a checkpointed block is computed again in backward, and seen again
    seen = [(watch, list(watch.calls)) for watch in watches if isinstance(watch, Gradient)]
    outputs = [y for _, calls in seen for _, y in calls]
    if not outputs:
        return
    if loss is None or not loss.requires_grad:
        raise CalibrationError("The step gave no loss with a gradient. Let it return the loss of the batch, a scalar.")
    grads = iter(torch.autograd.grad(loss, outputs, allow_unused=True))  # past the hooks on parameters
    for watch, calls in seen:
        watch.differentiate([x for x, _ in calls], [next(grads) for _ in calls])


def counted(batch: Any) -> Tensor | None:
    """Which tokens of a batch count: those with a label, else those that are no padding."""
    if not isinstance(batch, Mapping):
        return None
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and isinstance(mask, Tensor) and labels.shape == mask.shape:
        return labels != -100
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def call(model: nn.Module, batch: Any) -> Any:
    """Of a model, with keywords, positions, or the batch itself."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def plain_run(model: nn.Module) -> Run:
    """The loss of a model's own call with a batch, where it has one."""

    def run(batch: Any, index: int) -> Tensor | None:
        out = call(model, batch)
        return out if isinstance(out, Tensor) and out.dim() == 0 else getattr(out, "loss", None)

    return run


def on_any_rank(names: list[str]) -> list[str]:
    """Together, so that no rank waits for one that has raised."""
    if not distributed():
        return names
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, names)
    return list(dict.fromkeys(name for theirs in everyone for name in theirs))


def distributed() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def reduced(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The sum over ranks, in place."""
    if distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)
    return tensors
