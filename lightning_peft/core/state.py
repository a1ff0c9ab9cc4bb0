"""What is active, what is trainable, what is saved: three sets, kept apart, all derived from objects and never
from names.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter, Cell, LabelError

if TYPE_CHECKING:
    from lightning_peft.core.method import Method

FUSED: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
ATTRIBUTE = "_lightning_peft"  # where a model keeps its registry


@dataclass(eq=False)
class Placement:
    """One adapter at one place. `original` holds weight and bias of the place while the adapter is merged into them."""

    place: nn.Module
    key: str
    adapter: Adapter
    part: Method  # the method, or the part of it, that made the adapter
    site: str
    role: str | None = None
    original: tuple[Tensor, Tensor | None] | None = None


@dataclass(eq=False)
class Selected:
    """A parameter of the base that is trained in place: all of it, or the entries where `mask` is True."""

    module: nn.Module
    attribute: str
    mask: Tensor | None
    original: Tensor | None  # on the CPU; None where the method was told not to keep it
    head: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)


@dataclass(eq=False)
class Applied:
    """A method on a model, under a label."""

    method: Method
    label: str
    cell: Cell
    placements: list[Placement]
    selected: list[Selected]
    trainable: bool
    fingerprint: str
    turn: int = 0  # when it was merged, among the merges of this model

    def parameters(self) -> Iterator[nn.Parameter]:
        for placement in self.placements:
            yield from placement.adapter.parameters()
        for selected in self.selected:
            yield selected.parameter


@dataclass(eq=False)
class Registry:
    """Everything that was applied to a model, and how the model was before."""

    applied: dict[str, Applied] = field(default_factory=dict)
    flags: list[tuple[nn.Module, str, bool]] = field(default_factory=list)  # requires_grad before the first method
    buffers: list[tuple[nn.Module, str, bytes]] = field(default_factory=list)  # digests, to see which ones changed
    switches: list[tuple[nn.Module, str, Any]] = field(default_factory=list)  # attributes that kept a fused path on

    def record(self, model: nn.Module) -> None:
        seen = {(id(module), name) for module, name, _ in self.flags}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and (id(module), name) not in seen:
                    self.flags.append((module, name, parameter.requires_grad))
        self.buffers = self.buffers or [(m, n, digest(b)) for m, n, b in persistent_buffers(model)]

    def leave_fused_paths(self, model: nn.Module) -> None:
        """torch.nn's encoder layers skip their children in eval mode; those that hold adapters must not."""
        switched = {id(module) for module, _, _ in self.switches}
        for module in model.modules():
            name = FUSED.get(next((kind for kind in FUSED if isinstance(module, kind)), nn.Module))
            if name and id(module) not in switched and any(isinstance(child, Adapter) for child in module.modules()):
                self.switches.append((module, name, getattr(module, name)))
                setattr(module, name, False)

    def restore(self) -> None:
        for module, name, value in self.switches:
            setattr(module, name, value)
        for module, name, flag in self.flags:
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(flag)


def persistent_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if (
                buffer is not None
                and name not in module._non_persistent_buffers_set
                and not isinstance(module, Adapter)
            ):
                yield module, name, buffer


def digest(tensor: Tensor) -> bytes:
    if tensor.is_meta:
        return b"meta"
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).digest()


# ------------------------------------------------------------------ finding registries
def registry_of(model: nn.Module) -> Registry | None:
    """The registry kept by this model or by a module inside it."""
    for module in model.modules():
        if ATTRIBUTE in vars(module):
            return vars(module)[ATTRIBUTE]
    return None


def open_registry(model: nn.Module) -> Registry:
    found = registry_of(model)
    if found is None:
        found = vars(model)[ATTRIBUTE] = Registry()
    return found


def close_registry(model: nn.Module) -> None:
    for module in model.modules():
        vars(module).pop(ATTRIBUTE, None)


def applied_to(model: nn.Module) -> dict[str, Applied]:
    """label -> what was applied, in the order of application."""
    registry = registry_of(model)
    return {} if registry is None else registry.applied


def get_applied(model: nn.Module, label: str | None = None) -> Applied:
    """The method applied under `label`; without a label, the only one there is."""
    applied = applied_to(model)
    if label is None and len(applied) == 1:
        return next(iter(applied.values()))
    if label is None or label not in applied:
        raise LabelError(f"label={label!r} names no method on this {type(model).__name__}; known: {list(applied)}.")
    return applied[label]


# ------------------------------------------------------------------ the three sets
def active(model: nn.Module) -> list[str]:
    """Labels whose adapters run in the forward pass."""
    return [label for label, applied in applied_to(model).items() if applied.cell.on]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """name -> parameter for everything that the methods on this model train; shared parameters once."""
    wanted = {id(p) for applied in applied_to(model).values() if applied.trainable for p in applied.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}


def saved(model: nn.Module) -> dict[str, Tensor]:
    """name -> tensor for what a checkpoint needs beside the base: adapters, trained base parameters, changed
    buffers.
    """
    registry = registry_of(model)
    if registry is None:
        return {}
    kept = {id(p) for applied in registry.applied.values() for p in applied.parameters()}
    for applied in registry.applied.values():
        for placement in applied.placements:
            kept.update(id(b) for b in placement.adapter.buffers())
    kept.update(
        id(getattr(m, n))
        for m, n, old in registry.buffers
        if getattr(m, n, None) is not None and digest(getattr(m, n)) != old
    )
    state, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in kept and id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach()
    return state


def required(model: nn.Module) -> set[str]:
    """The names that a checkpoint must hold: `saved` without the buffers of the base."""
    buffers = {id(b) for _, _, b in persistent_buffers(model)}
    return {name for name, tensor in saved_with_identity(model).items() if id(tensor) not in buffers}


def saved_with_identity(model: nn.Module) -> dict[str, Tensor]:
    names = saved(model)
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in names}


# ------------------------------------------------------------------ masks
def mask_gradients(model: nn.Module) -> None:
    """Zero the gradient outside of each mask, so that clipping and moments see the selected entries only."""
    for applied in applied_to(model).values():
        for selected in applied.selected:
            gradient = selected.parameter.grad
            if selected.mask is not None and gradient is not None:
                gradient.mul_(selected.mask.to(gradient.device))


@torch.no_grad()
def restore_unselected(model: nn.Module) -> None:
    """After an optimizer step: put entries outside of each mask back, bit for bit (weight decay and momentum move
    them).
    """
    for applied in applied_to(model).values():
        for selected in applied.selected:
            if selected.mask is not None and selected.original is not None:
                p = selected.parameter
                p.copy_(torch.where(selected.mask.to(p.device), p, selected.original.to(p.device)))


# ------------------------------------------------------------------ which base
def fingerprint(tensors: list[tuple[str, Tensor]], samples: int = 16) -> str:
    """A hash of shapes and of a few values (rounded to bf16, so that a cast base is still the same base)."""
    sha = hashlib.sha256()
    for name, tensor in tensors:
        sha.update(f"{name}{tuple(tensor.shape)}".encode())
        if not tensor.is_meta and tensor.is_floating_point() and tensor.numel():
            flat = tensor.detach().flatten()
            picked = flat[:: max(1, flat.numel() // samples)][:samples]
            sha.update(picked.to(torch.bfloat16).contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:32]


def describe(model: nn.Module) -> dict[str, Any]:
    """Counts for one line of log: what trains, of how much, and what a checkpoint weighs."""
    parameters = {id(p): p for p in model.parameters()}
    mine = {id(p): p for p in trainable(model).values()}
    adapters = {id(p) for a in applied_to(model).values() for x in a.placements for p in x.adapter.parameters()}
    total = sum(p.numel() for p in parameters.values())
    base = sum(p.numel() for key, p in parameters.items() if key not in adapters)
    count = sum(_selected_count(model, p) for p in mine.values())
    return {
        "sites": sum(len(a.placements) for a in applied_to(model).values()),
        "trainable": count,
        "total": total,
        "base": base,
        "percent": 100.0 * count / max(total, 1),
        "bytes": sum(t.numel() * t.element_size() for t in saved(model).values()),
    }


def table(model: nn.Module) -> str:
    """One row a method: label, method, its places by role, the numbers of parameters in adapters, base and heads."""
    rows = [("label", "method", "places", "adapters", "base", "heads")]
    for label, applied in applied_to(model).items():
        roles = Counter(p.role or "pattern" for p in applied.placements if any(True for _ in p.adapter.parameters()))
        places = ", ".join(f"{role} {count}" for role, count in roles.items()) or "-"
        adapters = {id(p): p.numel() for x in applied.placements for p in x.adapter.parameters()}
        base, heads = (sum(_count(s) for s in applied.selected if s.head is head) for head in (False, True))
        counts = (f"{n:,}" for n in (sum(adapters.values()), base, heads))
        rows.append((label, applied.method.info.name, places, *counts))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _count(selected: Selected) -> int:
    return int(selected.mask.sum()) if selected.mask is not None else selected.parameter.numel()


def _selected_count(model: nn.Module, parameter: nn.Parameter) -> int:
    masks = [
        s.mask
        for a in applied_to(model).values()
        for s in a.selected
        if s.parameter is parameter and s.mask is not None
    ]
    return int(masks[0].sum()) if masks else parameter.numel()
