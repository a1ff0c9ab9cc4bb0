"""Folding adapters into weights: in fp32, cast once, and back from a snapshot, bit for bit."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from lightning_peft.core import projection
from lightning_peft.core.adapter import Adapter, Host, NotMergeableError, adapters_of, inside
from lightning_peft.core.codes import INTEGERS
from lightning_peft.core.quantised import Frozen, Quantised, is_quantised, quantise_module, refreeze, settings, thaw
from lightning_peft.core.state import Applied, Placement, all_applied

log = logging.getLogger("lightning_peft")
Into = Literal["float32", "bfloat16", "float16", "requantise"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTO = (*DTYPES, "requantise")


class MergeError(RuntimeError):
    """A merge or unmerge at the wrong time or place."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: how many places, into which dtypes, and the largest relative error that the final cast made.

    rounding = max over places of |(W_cast - W) x| / |W x| for one random x; 0 where the weight holds fp32 or better.
    """

    label: str
    places: int
    dtypes: tuple[str, ...]
    rounding: float


def merge(model: nn.Module, applied: Applied, into: Into | None = None) -> MergeReport:
    """Fold layer by layer; if one fails, those before it are as they were."""
    _check(model, applied)
    _check_into(applied, into)
    errors, dtypes = [0.0], set()
    try:
        for owner, stacks in _by_owner(applied):
            error, dtype = _merge_owner(applied, owner, stacks, into)
            errors.append(error)
            dtypes.add(dtype)
    except Exception:
        _put_back(applied)
        raise
    applied.cell.set(merged=True)
    applied.turn = 1 + max((a.turn for a in all_applied(model)), default=0)
    places = len({id(placement.place) for placement in foldable(applied)})
    report = MergeReport(applied.label, places, tuple(sorted(dtypes)), max(errors))
    if report.rounding:
        log.info(
            "merged %r into %s: output changed by at most %.2e (relative) by rounding",
            report.label, ", ".join(report.dtypes), report.rounding,
        )  # fmt: skip
    return report


def _merge_owner(
    applied: Applied, owner: nn.Module, stacks: list[list[Placement]], into: Into | None
) -> tuple[float, str]:
    """Fold what is at one module -> the relative change of its output by rounding, and the dtype that it now has."""
    quantised = is_quantised(owner)
    if into is None and isinstance(owner, Quantised):
        return shift(applied, owner, stacks)
    if quantised:
        applied.thawed.append(thaw(owner, torch.float32))
    error = 0.0
    if any(x.adapter.beyond for stack in stacks for x in stack):
        return _fold_parameters([x for stack in stacks for x in stack])
    for stack in stacks:
        weight, bias = _fold(stack)
        place = stack[0].place
        if quantised and bias is not None:
            applied.thawed[-1].bias_changed = True
        exact, old_bias = projection.snapshot(place)
        if not quantised:  # which comes back as a whole
            stack[0].original = exact, None if bias is None else old_bias  # a bias that stays is not ours to put back
        projection.write(place, weight, bias)
        error = max(error, _relative(projection.read(place)[0], weight) if exact.dtype != weight.dtype else 0.0)
    if quantised:
        return _store(applied.thawed[-1], str(into))
    return error, str(exact.dtype).removeprefix("torch.")


@torch.no_grad()
def shift(applied: Applied, owner: Quantised, stacks: list[list[Placement]]) -> tuple[float, str]:
    """Add what is one number for a group to the zeros of the groups; codes and scales stay, nothing is rounded."""
    before = cast(Tensor, owner._buffers["offset"])
    after = before.clone()
    for place, adapter in ((x.place, x.adapter) for stack in stacks for x in stack):
        change = cast(Tensor, adapter.grouped(owner.quantisation.blocksize)).to(after)
        columns = place.columns if isinstance(place, projection.Slice) else None
        after = after + change if columns is None else columns.put(after, columns.take(after, 0) + change, 0)
    if not torch.isfinite(after).all():
        raise MergeError(f"Folding {stacks[0][0].site!r} gives values that are not finite; nothing was merged.")
    applied.shifted.append((owner, before))
    owner._buffers["offset"] = after
    return 0.0, owner.quantisation.mode


def shifts(owner: nn.Module, stacks: list[list[Placement]]) -> bool:
    """Whether the zeros of the module can take the change of all adapters there."""
    if not isinstance(owner, Quantised) or owner.quantisation.mode not in INTEGERS:
        return False
    return all(x.adapter.grouped(owner.quantisation.blocksize) is not None for stack in stacks for x in stack)


@torch.no_grad()
def _fold_parameters(stack: list[Placement]) -> tuple[float, str]:
    """Of a module with parameters of other names: each by the change that its adapters say."""
    error, dtype = 0.0, ""
    for placement in stack:
        if not placement.adapter.beyond:
            raise NotMergeableError(
                f"{type(placement.adapter).__name__} at {placement.site!r} cannot be folded beside an adapter that "
                "changes more than weight and bias. Leave it attached."
            )
        for parameter, change in placement.adapter.fold_parameters():
            placement.before.append((parameter, parameter.detach().clone()))
            wide = torch.promote_types(parameter.dtype, torch.float32)
            exact = parameter.to(wide) + change.to(wide)
            if not torch.isfinite(exact).all():
                raise MergeError(f"Folding {placement.site!r} gives values that are not finite; nothing was merged.")
            parameter.copy_(exact)
            error = max(error, float((parameter.to(wide) - exact).norm() / exact.norm().clamp(min=1e-30)))
            dtype = str(parameter.dtype).removeprefix("torch.")
    return error, dtype


def _store(frozen: Frozen, into: str) -> tuple[float, str]:
    """The merged fp32 weight as it was asked for: cast, or into codes of the kind it had."""
    module = frozen.module
    weight = projection.read(module)[0]
    if into == "requantise":
        layer = quantise_module(module, settings(frozen), compensate=False)
        layer.source_dtype = frozen.source_dtype
        _cast_bias(frozen, frozen.bias.dtype if frozen.bias is not None else torch.float32)
        return _relative(layer.dequantised(torch.float32), weight), layer.quantisation.mode
    module._parameters["weight"] = nn.Parameter(weight_of(module).to(DTYPES[into]), requires_grad=False)
    _cast_bias(frozen, DTYPES[into])
    return _relative(projection.read(module)[0], weight), into


def weight_of(module: nn.Module) -> Tensor:
    return module._parameters["weight"]  # type: ignore[return-value]


def _cast_bias(frozen: Frozen, dtype: torch.dtype) -> None:
    bias = frozen.module._parameters.get("bias")
    if bias is not None:
        bias.data, frozen.merged_dtype = bias.data.to(dtype), dtype


def _check_into(applied: Applied, into: Into | None) -> None:
    quantised = [(owner, stacks) for owner, stacks in _by_owner(applied) if is_quantised(owner)]
    count = len(quantised)
    if into not in (None, *INTO):
        raise MergeError(f"into={into!r} is unknown. Known: {', '.join(INTO)}.")
    if into is None and not all(shifts(owner, stacks) for owner, stacks in quantised):
        raise MergeError(
            f"{applied.label!r} is on {count} quantised projections, which cannot take a change without being "
            "quantised anew. Choose: merge(model, into='bfloat16') or into='float32' makes them plain projections; "
            "into='requantise' keeps them small at the price of a second rounding, which is measured; or leave the "
            "adapter attached."
        )
    if into is not None and not count:
        raise MergeError(f"into={into!r} is for a quantised base, and this one is not. Leave it out.")


def _by_owner(applied: Applied) -> list[tuple[nn.Module, list[list[Placement]]]]:
    """The modules of the base, and at each the adapters of one place after the other."""
    owners: dict[int, nn.Module] = {}
    stacks: dict[int, dict[int, list[Placement]]] = {}
    for placement in (p for p in foldable(applied) if not p.adapter.mirrors):
        owner = projection.owner_of(placement.place)
        owners[id(owner)] = owner
        stacks.setdefault(id(owner), {}).setdefault(id(placement.place), []).append(placement)
    return [(owner, list(stacks[key].values())) for key, owner in owners.items()]


def foldable(applied: Applied) -> list[Placement]:
    """Those that change a weight."""
    return [placement for placement in applied.placements if not placement.adapter.training_only]


def _fold(stack: list[Placement]) -> tuple[Tensor, Tensor | None]:
    """The folded weight, and the folded bias where it changes."""
    weight, old_bias = projection.read(stack[0].place)
    bias = old_bias
    with torch.no_grad():
        for placement in stack:
            if not placement.adapter.folds_norms and projection.views(placement.place)[0].dim() == 1:
                raise NotMergeableError(
                    f"{type(placement.place).__name__} at {placement.site!r} has no floating-point weight "
                    f"(d_out, d_in) to fold {type(placement.adapter).__name__} into. Leave the adapter attached."
                )
            weight, bias = placement.adapter.fold(weight, bias)
    if not torch.isfinite(weight).all() or (bias is not None and not torch.isfinite(bias).all()):
        raise MergeError(f"Folding {stack[0].site!r} gives values that are not finite; nothing was merged.")
    return weight, None if bias is None or (old_bias is not None and torch.equal(bias, old_bias)) else bias


def _check(model: nn.Module, applied: Applied) -> None:
    if applied.cell.merged:
        raise MergeError(f"{applied.label!r} is merged already. Call unmerge first, or unload to make it permanent.")
    if not applied.cell.enabled:
        raise MergeError(f"{applied.label!r} is switched off, so merging would change the output. Enable it first.")
    if not applied.method.info.mergeable:
        raise NotMergeableError(
            f"{applied.method.info.name} changes more than weights, so it cannot be merged. Keep it attached "
            f"(enabled(False) "
            "switches it off, remove takes it away). `lightning-peft methods` lists what can be merged."
        )
    for placement in foldable(applied):
        placement.adapter.check_fold()
    check_tied(model, applied)
    check_inner(applied)


def check_inner(applied: Applied) -> None:
    """Folding goes from the inside out, unless both changes are plain additions."""
    for placement in foldable(applied):
        for inner in inside(placement.adapter):
            if inner.cell is not applied.cell and not (inner.additive and placement.adapter.additive):
                raise MergeError(
                    f"Another adapter at {placement.site!r} lies inside of {applied.label!r} and is not merged; "
                    f"the result "
                    "would not be the same. Merge the methods in the order in which they were applied."
                )
        for other in _sharers(placement.place):
            if other.reads_weight and other.cell.on and other.cell is not applied.cell:
                raise MergeError(
                    f"An adapter at {placement.site!r} ({type(other).__name__}) computes with the weight that merging "
                    f"{applied.label!r} would change. Unload {applied.label!r} before the other is applied, or apply "
                    "it after the other and merge that one first."
                )


def _sharers(place: nn.Module) -> list[Adapter]:
    """The adapters whose weight merging at `place` would change: at it, at the whole of it, at its parts."""
    owner = projection.owner_of(place)
    near = [place, *([owner] if owner is not place else [c for c in owner.children() if isinstance(c, Host)])]
    return [adapter for module in near for adapter in adapters_of(module)]


def check_tied(model: nn.Module, applied: Applied) -> None:
    """Raise where a weight to fold into is another module's too."""
    owners: dict[object, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(storage(parameter), set()).add(name)
    mirrors = {placement.site for placement in applied.placements if placement.adapter.mirrors}
    for placement in foldable(applied):
        for parameter in projection.parameters_of(placement.place):
            names = owners.get(storage(parameter), set()) - mirrors
            if len(names) > 1:
                raise MergeError(
                    f"The weight at {placement.site!r} is tied ({', '.join(sorted(names))}): merging would change "
                    f"them all. "
                    "Untie it first (a copy as its own nn.Parameter), or leave the adapter attached."
                )


def storage(tensor: Tensor) -> object:
    """What two tensors share when writing to one changes the other from its first element on."""
    return id(tensor) if tensor.is_meta or not tensor.numel() else (tensor.device, tensor.data_ptr())


def _relative(weight: Tensor, exact: Tensor) -> float:
    """|(W - W0) x| / |W0 x| for one random x; of one row (a norm) entry by entry"""
    x = torch.randn(exact.shape[1], generator=torch.Generator().manual_seed(0)).to(exact)
    y, change = (exact @ x, (weight - exact) @ x) if len(exact) > 1 else (exact * x, (weight - exact) * x)
    return float(change.norm() / y.norm().clamp_min(torch.finfo(y.dtype).tiny))


def unmerge(model: nn.Module, applied: Applied) -> None:
    if not applied.cell.merged:
        raise MergeError(f"{applied.label!r} is not merged, so there is nothing to undo.")
    if applied.sealed_by:
        raise MergeError(
            f"{applied.sealed_by!r} was unloaded into the weights that {applied.label!r} is merged into, for good. "
            f"Unload "
            f"{applied.label!r} too, or load the base again."
        )
    for other in all_applied(model):
        if other.cell.merged and other.turn > applied.turn and overlap(applied, other):
            raise MergeError(f"{other.label!r} was merged into the same weights later; unmerge {other.label!r} first.")
    _put_back(applied)
    applied.cell.set(merged=False)


@torch.no_grad()
def _put_back(applied: Applied) -> None:
    """The exact originals of everything that a merge has changed so far."""
    for placement in applied.placements:
        if placement.original is not None:
            projection.write(placement.place, *placement.original)
            placement.original = None
        for parameter, before in reversed(placement.before):
            parameter.copy_(before)
        placement.before = []
    for frozen in applied.thawed:
        refreeze(frozen)
    applied.thawed = []
    for module, zeros in applied.shifted:
        module._buffers["offset"] = zeros.to(cast(Tensor, module._buffers["offset"]).device)
    applied.shifted = []


def overlap(one: Applied, other: Applied) -> bool:
    """Whether the two change entries of a weight in common; slices of it side by side do not."""
    regions = [{projection.region(p.place) for p in foldable(applied)} for applied in (one, other)]
    for region, applied in zip(regions, (one, other), strict=True):  # blocks of a quantised weight are one thing
        region |= {(id(frozen.module), None) for frozen in applied.thawed}
        region |= {(id(module), None) for module, _ in applied.shifted}
    wholes = [{owner for owner, part in region if part is None} for region in regions]
    owners = [{owner for owner, _ in region} for region in regions]
    return bool(regions[0] & regions[1] or wholes[0] & owners[1] or owners[0] & wholes[1])


def seal(model: nn.Module, applied: Applied) -> None:
    """The merge of `applied` becomes permanent: what was merged below it cannot be undone any more."""
    for other in all_applied(model):
        if other is not applied and other.cell.merged and overlap(applied, other):
            other.sealed_by = applied.label
