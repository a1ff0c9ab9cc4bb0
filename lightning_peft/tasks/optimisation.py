"""What an optimizer is given, and learning rates over the steps of a run."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

MakeOptimizer = Callable[[Iterable[Any]], Optimizer]
"""parameter groups -> optimizer, such as `partial(AdamW, lr=1e-3)`"""

MakeScheduler = Callable[..., LRScheduler]
"""(optimizer, total_steps=...) -> scheduler, stepped after every optimizer step"""

DEFAULT_OPTIMIZER: MakeOptimizer = partial(AdamW, lr=1e-3, weight_decay=0.01)


def decays(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices: not for biases, scales and other vectors, nor in normalisation layers."""
    return parameter.ndim > 1 and not name.endswith("bias") and "norm" not in type(owner).__name__.lower()


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """The parameters that train, each once: first those that decay, then the others with weight_decay=0."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    seen: set[int] = set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                groups[decays(owner, name, parameter)].append(parameter)
    if not seen:
        raise ValueError(
            f"No parameter of {type(module).__name__} requires a gradient, so there is nothing to train. A PEFT"
            " callback switches on what it trains; without one, call module.requires_grad_(True) on the part to train."
        )
    full: list[dict[str, Any]] = [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}]
    return [group for group in full if group["params"]]


def warmup_steps(total_steps: float, warmup: float) -> float:
    """A share of the run (below 1) or a number of steps -> steps"""
    if not 0 <= warmup <= max(1, total_steps) or not math.isfinite(total_steps):
        raise ValueError(
            f"warmup={warmup} in a run of {total_steps} steps: give a share of the run (0 <= warmup < 1) or a number of"
            " steps that fits in it, and a run with an end (max_epochs or max_steps)."
        )
    return warmup * total_steps if warmup < 1 else warmup


def rise(step: int, warm: float) -> float:
    """min(1, (t + 1) / w)"""
    return min(1.0, (step + 1) / warm) if warm else 1.0


def linear_factor(step: int, total: float, warm: float) -> float:
    """What `linear_warmup` multiplies lr with."""
    return rise(step, warm) if step < warm else max(0.0, (total - step) / max(1, total - warm))


def cosine_factor(step: int, total: float, warm: float) -> float:
    """What `cosine_warmup` multiplies lr with."""
    done = min(1.0, max(0.0, (step - warm) / max(1, total - warm)))
    return rise(step, warm) if step < warm else (1 + math.cos(math.pi * done)) / 2


def linear_warmup(optimizer: Optimizer, total_steps: float, warmup: float = 0.06) -> LRScheduler:
    """lr(t) = lr min((t + 1) / w, (T - t) / (T - w)), w = warmup T: up, then down to zero at the end"""
    return LambdaLR(optimizer, partial(linear_factor, total=total_steps, warm=warmup_steps(total_steps, warmup)))


def cosine_warmup(optimizer: Optimizer, total_steps: float, warmup: float = 0.06) -> LRScheduler:
    """lr(t) = lr (t + 1) / w, then lr (1 + cos(pi (t - w) / (T - w))) / 2, w = warmup T"""
    return LambdaLR(optimizer, partial(cosine_factor, total=total_steps, warm=warmup_steps(total_steps, warmup)))


def constant(optimizer: Optimizer, total_steps: float | None = None, warmup: int = 0) -> LRScheduler:
    """lr(t) = lr min(1, (t + 1) / w), w = warmup, a number of steps; for a run without an end too"""
    if warmup < 0:
        raise ValueError(f"warmup={warmup} steps: it cannot be negative.")
    return LambdaLR(optimizer, partial(rise, warm=warmup))
