"""Bits for each weight by what they are worth: LQ-LoRA's integer program over the codes that layers can hold.

LQLoRA(targets="all-linear").apply(model)
quantise_within(model, 3.0, fisher=fisher(model, batches, loss))
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.core import projection, state
from lightning_peft.core.codes import INTEGERS, Quantisation, decode, encode
from lightning_peft.core.gradients import squared, summed, untouched
from lightning_peft.core.lq import allocate, weighted
from lightning_peft.core.quant import QuantisationError
from lightning_peft.core.quantised import compensated, oriented, quantise_module
from lightning_peft.methods.lqlora import Decomposed
from lightning_peft.precision import Undo, check_before, check_untrained, check_weights, choose

GRID = (
    *(Quantisation(mode, group) for mode in INTEGERS for group in (16, 32, 64, 128)),
    *(Quantisation("nf4", block) for block in (32, 64, 128)),
    Quantisation("int8"),
)
"""Codes from 2.5 to 8 bits."""


def fisher(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor], label: str | None = None
) -> dict[int, Tensor]:
    """id of a module -> mean over batches of the squared gradient of its weight, (d_out, d_in)

    Of one example each, they are the diagonal of the Fisher information. loss(model, batch): a scalar. The model is in
    eval mode, and stays as it was. Errors: QuantisationError, also for a weight that no batch gives a gradient.
    """
    modules, held = adapted(model, label), list(batches)
    if not held:
        raise QuantisationError("fisher got no batches, so there is nothing to weigh errors by. Give some.")
    check_before(model)
    weights = [cast(nn.Parameter, m._parameters["weight"]) for m in modules]
    with untouched(model):
        sources: list[Tensor] = [w.requires_grad_(True) for w in weights]
        sums, count = summed(lambda batch, index: loss(model, batch), held, sources, squared)
    names = {id(m): name for name, m in model.named_modules()}
    if idle := [names[id(m)] for m, total in zip(modules, sums, strict=True) if not total.any()]:
        raise QuantisationError(f"No batch gives {idle[:3]} a gradient. Give batches that do, or target others.")
    return {id(m): oriented(m, total / count) for m, total in zip(modules, sums, strict=True)}


def quantise_within(
    model: nn.Module,
    budget: float,
    *,
    configurations: Iterable[Quantisation] = GRID,
    fisher: Mapping[int, Tensor] | None = None,
    label: str | None = None,
) -> dict[str, Quantisation]:
    """Quantise what `LQLoRA` is on, each weight in codes of its own, at most `budget` bits a parameter; name -> codes

    Every weight is decomposed with every configuration, and `scipy.optimize.milp` chooses: least sum of squared errors.
    fisher: of the function of that name, for this very model. Errors: QuantisationError, ImportError without scipy.
    """
    grid, known = list(configurations), dict(fisher or {})
    modules = adapted(model, label)
    check_before(model)
    check_untrained(model)
    names = {id(m): name for name, m in model.named_modules()}
    if fisher is not None:
        check_fisher(fisher, modules, names)
    chosen, left = choose(model, [f"re:{re.escape(names[id(m)])}" for m in modules], None)
    if left:
        raise QuantisationError(f"Some of what LQLoRA is on cannot be quantised: {left}. Target others.")
    check_weights(chosen, False)
    undo = Undo(list(chosen.values()))
    try:
        tried = [[trial(m, q, known.get(id(m))) for q in grid] for m in chosen.values()]
        errors, bits = ([[pair[n] for pair in row] for row in tried] for n in (0, 1))
        picked = allocate(errors, bits, [cast(Tensor, m.weight).numel() for m in chosen.values()], budget)
        out = {name: grid[index] for name, index in zip(chosen, picked, strict=True)}
        for name, q in out.items():
            weigh(chosen[name], known.get(id(chosen[name])))
            quantise_module(chosen[name], q)
    except Exception:
        undo()
        raise
    finally:
        for module in chosen.values():
            weigh(module, None)
    return out


def check_fisher(fisher: Mapping[int, Tensor], modules: list[nn.Module], names: dict[int, str]) -> None:
    """Raise where it says nothing of a module."""
    if without := [names[id(m)] for m in modules if id(m) not in fisher]:
        raise QuantisationError(
            f"fisher says nothing of {without[:3]}. It knows the modules of one model by what they are, not by their "
            "names: take it on this very one, not on a copy."
        )


def adapted(model: nn.Module, label: str | None) -> list[nn.Module]:
    """The modules that LQLoRA is on."""
    placements = state.get_applied(model, label).placements
    if not placements or not all(isinstance(x.adapter, Decomposed) for x in placements):
        raise QuantisationError(
            "Bits within a budget are for LQLoRA: apply it first, LQLoRA(targets=...).apply(model)."
        )
    return list({id(m): m for m in (projection.owner_of(x.place) for x in placements)}.values())


def decomposed(module: nn.Module) -> list[Decomposed]:
    """The adapters on a module, those on slices of it too."""
    return [m for m in module.modules() if isinstance(m, Decomposed)]


def weigh(module: nn.Module, fisher: Tensor | None) -> None:
    """Lend the adapters on a module the weights of its entries, or take them back."""
    for adapter in decomposed(module):
        vars(adapter).pop("fisher", None)
        if fisher is not None:
            columns = vars(adapter.place).get("columns")
            vars(adapter)["fisher"] = fisher if columns is None else columns.take(fisher, 0)


@torch.no_grad()
def trial(module: nn.Module, q: Quantisation, fisher: Tensor | None) -> tuple[float, float]:
    """The squared error that these codes and the adapters leave, infinite where they do not fit; bits a parameter."""
    weight = oriented(module, cast(Tensor, module.weight).detach())
    if q.mode in INTEGERS and weight.shape[1] % q.blocksize:
        return math.inf, 0.0
    weigh(module, fisher)
    given = compensated(module, weight, q)
    parts = encode(given, q)
    back = decode(parts, (weight.shape[0], weight.shape[1]), q)
    bits = 8 * sum(part.nbytes for part in parts.values()) / weight.numel()
    return weighted(given.float() - back, fisher) ** 2, bits
