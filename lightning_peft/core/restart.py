"""A restart (2307.05695): the change is folded into the weights, and an optimizer forgets most of its moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.core import projection
from lightning_peft.core.init import Draw
from lightning_peft.core.state import Placement

Prune = Literal["magnitude", "random", "reset"]


class PruneError(TypeError):
    """A state that cannot be pruned."""


@torch.no_grad()
def fold_in(placement: Placement) -> None:
    """W <- W + the adapter's change, computed in fp32 or better and cast once."""
    weight, bias = projection.read(placement.place)
    projection.write(placement.place, *placement.adapter.fold(weight, bias))


@torch.no_grad()
def prune_state(optimizer: Optimizer, parameters: Iterable[Tensor], how: Prune, share: float, draw: Draw) -> None:
    """Zero a share of each moment of these parameters: the smallest, random ones, or with "reset" all of them.

    The count of steps stays, as in the authors' code: moments that begin anew are not corrected for bias, so the
    learning rate has to rise again (`jagged_cosine`).
    """
    for p in parameters:
        for name, moment in optimizer.state.get(p, {}).items():
            if isinstance(moment, Tensor) and name != "step" and moment.dim():
                if not moment.is_floating_point():
                    raise PruneError(
                        f"{type(optimizer).__name__} keeps its state in {moment.dtype} codes, which cannot be pruned. "
                        "Use an optimizer with floats: adamw, or paged_adamw."
                    )
                moment.mul_(kept(moment, how, share, draw).to(moment.device))


def kept(moment: Tensor, how: Prune, share: float, draw: Draw) -> Tensor:
    """A mask of what stays."""
    if how == "reset":
        return torch.zeros(moment.shape, dtype=torch.bool)
    if how == "random":
        return torch.rand(moment.shape, generator=draw.generator) >= share
    size = moment.detach().abs().flatten().float()
    threshold = size.kthvalue(int(share * (len(size) - 1)) + 1).values  # torch.quantile ends at 16 million elements
    return (size > threshold).view(moment.shape)


def optimizers_of(optimizers: Iterable[Any], parameters: Iterable[Tensor]) -> list[Optimizer]:
    """Those that hold any of the parameters."""
    wanted = {id(p) for p in parameters}
    return [o for o in optimizers if any(id(p) in wanted for group in o.param_groups for p in group["params"])]
