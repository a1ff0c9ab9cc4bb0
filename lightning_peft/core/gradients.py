"""What gradients say of a model, which is left as it was: summed over batches, or over single examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_peft.core.calibration import CalibrationError, Run, distributed, reduced

Gradients = Iterator[list["Tensor | None"]]
Look = Callable[[Run, Any, int, "list[Tensor]"], Gradients]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode; after it every module is what it was, with what it counts, and so are flags and buffers."""
    before = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.eval()
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for m, own, held in before:  # buffers that it replaced or made, too
            vars(m).clear()
            vars(m).update(own)
            m._buffers.clear()
            m._buffers.update(held)
        with torch.no_grad():
            for b, value in buffers:
                if not torch.equal(b, value):
                    b.copy_(value)


def summed(run: Run, parts: Iterable[Any], sources: list[Tensor], look: Look) -> tuple[list[Tensor], int]:
    """Of each tensor the sum over parts of what `look` finds, in fp32, and how many parts; of all ranks together."""
    totals, count = [torch.zeros(s.shape, dtype=torch.float32, device=s.device) for s in sources], 0
    for count, part in enumerate(parts, 1):
        for found in look(run, part, count - 1, sources):
            for total, g in zip(totals, found, strict=True):
                if g is not None:
                    total.add_(g)
    whole = torch.tensor(float(count), device=totals[0].device)
    reduced([*totals, whole])
    return totals, int(whole)


# ------------------------------------------------------------------ ways to look at a batch or an example
def gradients(run: Run, part: Any, index: int, sources: list[Tensor]) -> Gradients:
    """dL/dt"""
    yield differentiated(loss_of(run, part, index), sources)


def loss_of(run: Run, part: Any, index: int) -> Tensor:
    """A loss that can be differentiated."""
    with torch.enable_grad():
        loss = run(part, index)
    if loss is None or not loss.requires_grad:
        raise CalibrationError("The step gave no loss with a gradient. Let it return the loss of the batch, a scalar.")
    return loss


def squared(run: Run, part: Any, index: int, sources: list[Tensor]) -> Gradients:
    """(dL/dt)^2"""
    for found in gradients(run, part, index, sources):
        yield [None if g is None else g.square() for g in found]


def expected(run: Run, part: Any, index: int, sources: list[Tensor]) -> Gradients:
    """p(y) (d log p(y) / dt)^2 for every label y"""
    with torch.enable_grad():
        logits = run(part, index)
        shape = () if logits is None or not logits.requires_grad else tuple(logits.shape)
        if logits is None or not shape or not 1 < shape[-1] == logits.numel():
            raise CalibrationError(
                "What is expected is a sum over the labels of one prediction an example, whose logits are (1, classes) "
                f"and have a gradient; these are {shape or 'none'}. Take the labels that are given (expect=False), as "
                "language models need."
            )
        log_p = logits.flatten().log_softmax(0, dtype=torch.promote_types(logits.dtype, torch.float32))
    for y, p in enumerate(log_p.detach().exp()):
        grads = differentiated(log_p[y], sources, keep=y + 1 < len(log_p))
        yield [None if g is None else p.float() * g.square() for g in grads]


def differentiated(y: Tensor, sources: list[Tensor], keep: bool = False) -> list[Tensor | None]:
    found = torch.autograd.grad(y, sources, retain_graph=keep, allow_unused=True)
    return [None if g is None else g.detach().float() for g in found]


# ------------------------------------------------------------------ single examples
def my_share(count: int) -> int:
    """Of this rank, so that all ranks together have `count`."""
    return len(range(dist.get_rank(), count, dist.get_world_size())) if distributed() else count


def examples(batch: Any) -> Iterator[Any]:
    """The rows of a batch, as batches of one."""
    sizes = {len(t) for t in tensors_of(batch) if t.dim()}
    if len(sizes) != 1:
        raise CalibrationError(
            f"Gradients of single examples need batches whose tensors have one first dimension, and these have "
            f"{sorted(sizes)}. Choose another score, or call `identify` with batches of one example."
        )
    for i in range(sizes.pop()):
        yield row(batch, i)


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


def row(value: Any, i: int) -> Any:
    if isinstance(value, Tensor):
        return value[i : i + 1] if value.dim() else value
    if isinstance(value, Mapping):
        items = {key: row(item, i) for key, item in value.items()}
        return type(value)(items) if type(value) is not dict else items  # type: ignore[call-arg]
    if isinstance(value, (list, tuple)):
        tensors = any(True for _ in tensors_of(value))
        items_ = [row(item, i) for item in value] if tensors else list(value[i : i + 1])
        return type(value)(items_) if type(value) in (list, tuple) else type(value)(*items_)
    return value
