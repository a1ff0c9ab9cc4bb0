"""Optimizers of a plan: torch's are really run; those of bitsandbytes, which update in place, are arithmetic."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer

from lightning_peft.optim import state_bytes
from lightning_peft.planning.sizes import PlanError

RUN: dict[str, Callable[..., Optimizer]] = {
    "adamw": AdamW,
    "adam": Adam,
    "sgd": partial(SGD, momentum=0.9),
    "adafactor": Adafactor,
}
ARITHMETIC = {"paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit", "adamw_8bit": "AdamW8bit"}
"""Name in conf/optimizer -> class."""
MakeOptimizer = Callable[[Any], Optimizer]


class Arithmetic:
    """An optimizer of bitsandbytes: `state_bytes` for every parameter with a gradient, and no temporaries."""

    def __init__(self, name: str, parameters: Iterable[nn.Parameter]) -> None:
        self.name, self.parameters = name, list(parameters)
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}

    def step(self) -> None:
        """Take memory for the state of what has no state yet."""
        for p in self.parameters:
            if p.grad is not None and p not in self.state:
                size = state_bytes(self.name, p.shape, p.element_size())
                self.state[p] = {"state": torch.empty(size, dtype=torch.uint8, device=p.device)}


def named(optimizer: str | MakeOptimizer | Optimizer) -> str:
    """The name of an optimizer, as conf/optimizer has it where it is there."""
    inner: Any = optimizer
    while isinstance(inner, partial):
        inner = inner.func
    kind = type(inner) if isinstance(inner, Optimizer) else inner
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", type(kind).__name__)
    known = {cls: key for key, cls in ARITHMETIC.items()}
    return known.get(name, name if isinstance(kind, str) else name.lower())


def make(
    optimizer: str | MakeOptimizer | Optimizer, parameters: list[nn.Parameter], device: str
) -> Optimizer | Arithmetic:
    """The optimizer over these parameters; on CUDA torch's take all tensors at once, unless told otherwise.

    optimizer: a name, what makes one (`partial(AdamW, lr=...)`), or one that is in use.
    """
    name = named(optimizer)
    if name in ARITHMETIC:
        return Arithmetic(name, parameters)
    if isinstance(optimizer, str):
        if name not in RUN:
            raise PlanError(f"optimizer={name!r} is unknown. Known: {', '.join([*RUN, *ARITHMETIC])}, or a callable.")
        made = RUN[name](parameters)
    elif isinstance(optimizer, Optimizer):
        takes = inspect.signature(type(optimizer)).parameters
        made = type(optimizer)(parameters, **{k: v for k, v in optimizer.defaults.items() if k in takes})  # type: ignore[arg-type]
    else:
        made = optimizer(parameters)
    for group in made.param_groups if device == "cuda" else ():
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True  # torch's default there, which it does not take for tensors without memory
    return made
