"""Learning rates over the steps of a run; what an optimizer is given is in `lightning_peft.groups`."""

import math
from collections.abc import Callable
from functools import partial

from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_peft.groups import MakeOptimizer
from lightning_peft.groups import parameter_groups as parameter_groups

MakeScheduler = Callable[..., LRScheduler]
"""(optimizer, total_steps=...) -> scheduler, stepped after every optimizer step"""

DEFAULT_OPTIMIZER: MakeOptimizer = partial(AdamW, lr=1e-3, weight_decay=0.01)


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


def jagged_factor(step: int, total: float, warm: float, cycle: int, again: int, floor: float) -> float:
    """What `jagged_cosine` multiplies lr with."""
    if step < warm:
        return rise(step, warm)
    start, since = step - step % cycle, step % cycle
    after = step >= cycle and since < again
    done = min(1.0, max(0.0, ((start + again if after else step) - warm) / max(1, total - warm)))
    level = floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
    return rise(since, again) * level if after else level


def jagged_cosine(
    optimizer: Optimizer,
    total_steps: float,
    cycle: int,
    warmup: float = 500,
    restart_warmup: int = 100,
    floor: float = 0.1,
) -> LRScheduler:
    """lr(t) = lr (floor + (1 - floor) (1 + cos(pi (t - w) / (T - w))) / 2), risen anew after each `cycle` steps

    For ReLoRA: at the start over `warmup` steps (or a share of the run), after each restart over `restart_warmup`
    steps, in a straight line to where the cosine is by then. https://arxiv.org/abs/2307.05695
    """
    if not 0 <= restart_warmup < cycle or not 0 <= floor <= 1 or warmup_steps(total_steps, warmup) > cycle:
        raise ValueError(
            f"cycle={cycle}, restart_warmup={restart_warmup}, warmup={warmup}, floor={floor}: give a floor from 0 to 1,"
            " and warm-ups that are shorter than a cycle."
        )
    if total_steps % cycle:
        raise ValueError(
            f"A run of {total_steps} steps is no whole number of cycles of {cycle}: it would end in mid-cycle. Set"
            f" max_steps to a multiple of cycle={cycle}."
        )
    warm = warmup_steps(total_steps, warmup)
    factor = partial(jagged_factor, total=total_steps, warm=warm, cycle=cycle, again=restart_warmup, floor=floor)
    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer, total_steps: float | None = None, warmup: int = 0) -> LRScheduler:
    """lr(t) = lr min(1, (t + 1) / w), w = warmup, a number of steps; for a run without an end too"""
    if warmup < 0:
        raise ValueError(f"warmup={warmup} steps: it cannot be negative.")
    return LambdaLR(optimizer, partial(rise, warm=warmup))
