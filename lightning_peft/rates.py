"""Learning rates of their own for methods that train together: BitFit, say, takes a higher one than LoRA.

    def configure_optimizers(self):
        optimizer = AdamW(parameter_groups(self), lr=1e-4)
        return with_rates(optimizer, self, {"bitfit": 1e-3, "heads": 5e-4})

On the command line: optimizer.lr=0.0001 rates={bitfit: 0.001, heads: 0.0005}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TypeVar

from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_peft.core import state
from lightning_peft.groups import Groups, MakeOptimizer, optimizer_of

HEADS = "heads"
Given = TypeVar("Given", bound=Optimizer)


def with_rates(optimizer: Given, module: nn.Module, rates: Mapping[str, float]) -> Given:
    """The optimizer, with groups of their own for what the methods in `rates` train.

    rates: label -> learning rate; "heads" -> that of the heads, whichever method trains them. The others keep the
    optimizer's own. What has a multiple of that one (B under LoRA+) has the same multiple of its method's rate. Errors:
    ValueError for a label that is not on the module, and for a parameter of two methods whose rates differ.
    """
    check_rates(rates)
    known = owners(module)
    labels = {label for own in known.values() for label in own}
    if unknown := sorted(set(rates) - labels):
        raise ValueError(
            f"rates={dict(rates)}: {unknown[0]!r} trains nothing in this {type(module).__name__}. Known: "
            f"{', '.join(sorted(labels)) or 'none'}."
        )
    own = optimizer.defaults["lr"]
    groups = []
    for group in optimizer.param_groups:
        split: dict[float | None, list[nn.Parameter]] = {}
        for p in group["params"]:
            split.setdefault(rate_of(known.get(id(p), set()), rates), []).append(p)
        for rate, params in split.items():
            lr = group["lr"] if rate is None else rate * (group["lr"] / own if own else 1.0)
            groups.append({**group, "params": params, "lr": lr})
    if isinstance(optimizer, LBFGS) and len(groups) > 1:
        raise ValueError(
            f"rates={dict(rates)}: LBFGS has one rate for all. Leave rates out, or take another optimizer."
        )
    optimizer.param_groups[:] = groups
    return optimizer


def owners(module: nn.Module) -> dict[int, set[str]]:
    """id of a parameter that trains -> the labels of the methods that train it, or "heads"."""
    found: dict[int, set[str]] = {}
    for applied in state.all_applied(module):
        heads = {id(s.parameter) for s in applied.selected if s.head}
        for p in applied.by_gradient() if applied.trainable else ():
            found.setdefault(id(p), set()).add(HEADS if id(p) in heads else applied.label)
    return found


def rate_of(labels: set[str], rates: Mapping[str, float]) -> float | None:
    """The rate of a parameter that these methods train; None for the optimizer's own."""
    wanted = {rates[label] for label in labels if label in rates}
    if len(wanted) > 1:
        raise ValueError(
            f"rates={dict(rates)}: {' and '.join(sorted(labels))} train a parameter together, and their rates differ. "
            "Give them the same, or keep their targets apart."
        )
    return next(iter(wanted), None)


def check_rates(rates: Mapping[str, float]) -> None:
    """Raise on rates that make no sense."""
    for label, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 <= rate < math.inf:
            raise ValueError(f"rates: {label}={rate!r} is no learning rate. Give a number of 0 or more, such as 0.001.")


@dataclass(frozen=True)
class Rates:
    """Any optimizer, that of LoRA+ too, over the groups of `with_rates`."""

    optimizer: MakeOptimizer | Groups
    rates: Mapping[str, float]

    def __post_init__(self) -> None:
        check_rates(self.rates)

    def over(self, module: nn.Module) -> Optimizer:
        """The optimizer of what trains in the module."""
        return with_rates(optimizer_of(module, self.optimizer), module, self.rates)
