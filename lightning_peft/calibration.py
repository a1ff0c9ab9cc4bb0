"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers. Frantar et al., ICLR 2023.
https://arxiv.org/abs/2210.17323

    gptq(model, batches, mode="int4", blocksize=32); QALoRA().apply(model)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.codes import INTEGERS, Quantisation, packed_integers
from lightning_peft.core.quant import INTEGERS as BITS
from lightning_peft.core.quant import Integers, QuantisationError
from lightning_peft.core.quantised import oriented, quantise_module
from lightning_peft.core.sites import sites
from lightning_peft.precision import (
    Report,
    check_before,
    check_groups,
    check_untrained,
    check_weights,
    choose,
    compensating,
    quantisation,
)


@torch.no_grad()
def rounded(weight: Tensor, hessian: Tensor, bits: int, group: int, damping: float = 0.01) -> Integers:
    """Codes that keep W x: min over Q of tr (W - Q) H (W - Q)^T, one input after the other

    The error of an input, over the diagonal of U, is taken from the inputs after it along the row of U; U^T U = H^-1
    with `damping` times the mean of the diagonal added to H. Scale and zero are those of the group as it is when its
    turn comes. weight (d_out, d_in), hessian (d_in, d_in), the sum of x x^T; inputs keep their order, so that a group
    stays together. Source: algorithm 1.
    """
    rest, h = weight.float().clone(), hessian.double()
    h = h + torch.diag((h.diagonal() == 0).double() + damping * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    steps, width = 2**bits - 1, rest.shape[1]
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    scales, zeros = [], []
    for start in range(0, width, group):
        here = slice(start, start + group)
        low, high = rest[:, here].aminmax(dim=1)
        scale = ((high - low) / steps).masked_fill_(high == low, 1.0)
        errors = torch.empty_like(rest[:, here])
        for i in range(start, start + group):
            code = ((rest[:, i] - low) / scale).round().clamp(0, steps)
            codes[:, i] = code.to(torch.uint8)
            error = (rest[:, i] - code * scale - low) / upper[i, i]
            rest[:, i + 1 : start + group] -= error[:, None] * upper[i, i + 1 : start + group]
            errors[:, i - start] = error
        rest[:, start + group :] -= errors @ upper[here, start + group :]
        scales.append(scale)
        zeros.append(low)
    return Integers(codes, torch.stack(scales, 1), torch.stack(zeros, 1), bits, group)


def gptq(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mode: Literal["int4", "int3", "int2"] = "int4",
    blocksize: int = 32,
    damping: float = 0.01,
    targets: str | list[str] = "all-linear",
    skip: str | list[str] | None = None,
    act_order: bool = False,
    **options: Any,
) -> Report:
    """As `quantise` into groups of integers, with codes that fit the inputs that `batches` give; in place

    batches: what the forward takes, as a mapping of keyword arguments, a tuple or one tensor; a few dozen sequences are
    usual. Block after block, the inputs of one being those that the quantised blocks before it give; each block costs a
    forward of all batches. options: those of `quantisation`. Errors: QuantisationError.
    """
    q, held = quantisation(mode, blocksize, **options), list(batches)
    check_settings(mode, held, act_order)
    chosen, left = checked(model, q, targets, skip)
    before = sum(m.weight.nbytes for m in chosen.values())  # type: ignore[misc, union-attr]
    parameters, after = sum(m.weight.numel() for m in chosen.values()), 0  # type: ignore[misc, union-attr, operator]
    for number, names in enumerate(by_block(model, chosen)):
        reach = {} if number else chosen  # known before anything is changed
        for name, hessian in hessians(model, {name: chosen[name] for name in names}, held, reach).items():
            weight: Any = chosen[name].weight
            found = rounded(oriented(chosen[name], weight.detach()), hessian, BITS[mode], blocksize, damping)
            after += quantise_module(chosen[name], q, parts=packed_integers(found)).nbytes
    return Report(q, len(chosen), parameters, before, after, left)


def check_settings(mode: str, batches: list[Any], act_order: bool) -> None:
    """Raise on what this does not do."""
    if act_order:
        raise QuantisationError(
            "act_order=True puts the inputs in another order, and a group is then no run of inputs: QA-LoRA could not "
            "be merged into its zeros. Leave it out."
        )
    if mode not in INTEGERS or not batches:
        count = len(batches)
        raise QuantisationError(f"mode={mode!r}, {count} batches: expected int4, int3 or int2, and some batches.")


def checked(
    model: nn.Module, q: Quantisation, targets: str | list[str], skip: str | list[str] | None
) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """What will be quantised, and what will not and why; an error before anything is changed."""
    check_before(model)
    check_untrained(model)
    chosen, left = choose(model, targets, skip)
    check_weights(chosen, False)
    check_groups(chosen, q)
    if any(compensating(module) for module in chosen.values()):
        raise QuantisationError("An adapter on this model wants a say in what is quantised: use `quantise`.")
    return chosen, left


def by_block(model: nn.Module, chosen: Mapping[str, nn.Module]) -> list[list[str]]:
    """The names in groups, one for each block of the model, in their order."""
    blocks = {site.name: site.block for site in sites(model, [f"re:{re.escape(name)}" for name in chosen])}
    groups: dict[str, list[str]] = {}
    for name in chosen:
        groups.setdefault(blocks.get(name) or name, []).append(name)
    return list(groups.values())


@torch.no_grad()
def hessians(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: list[Any], reach: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """name -> sum of x x^T over all that goes into the module, (d_in, d_in) fp32; reach: more that must get some"""
    sums: dict[str, Tensor] = {}
    everything = {**reach, **modules}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            if name not in modules:
                sums[name] = torch.zeros(())
                return
            x = (args[0] if args else next(iter(named.values()))).detach().flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    handles = [m.register_forward_pre_hook(watch(name), with_kwargs=True) for name, m in everything.items()]
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
        for batch in batches:
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    if unseen := [name for name in everything if name not in sums]:
        raise QuantisationError(f"No batch reaches {unseen[:3]}. Give batches that do, or leave them out with skip=...")
    if wrong := [name for name in modules if not sums[name].isfinite().all()]:
        raise QuantisationError(f"What the batches give to {wrong[:3]} is not finite. Look for NaN in them.")
    return {name: sums[name] for name in modules}


def run(model: nn.Module, batch: Any) -> None:
    """The forward on one batch."""
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)
