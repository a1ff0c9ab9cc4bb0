"""What is active, what is trainable, what is saved: three sets, kept apart, all derived from objects and never
from names.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter, Adapters, Cell, Host, LabelError
from lightning_peft.core.architectures import is_conv1d
from lightning_peft.core.basis import Basis
from lightning_peft.core.codes import CONSTANTS, sample
from lightning_peft.core.quantised import Frozen, Quantised, foreign, foreign_dtype, repacked

if TYPE_CHECKING:
    from lightning_peft.core.method import Method

FUSED: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
REPACKING = "support_avx512bf16_for_cpu"
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
    before: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)  # of parameters beyond weight and bias


@dataclass(eq=False)
class Selected:
    """A parameter of the base that is trained in place: all of it, or the entries where `mask` is True."""

    module: nn.Module
    attribute: str
    mask: Tensor | None
    original: Tensor | None  # on the CPU; None where the method was told not to keep it
    head: bool = False
    trained: Tensor | None = None  # the trained values, while the method is switched off
    by_hand: bool = False  # changed by the method itself, and not by a gradient

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)

    @property
    def key(self) -> Key:
        return id(self.module), self.attribute


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
    sealed_by: str = ""  # the label that was unloaded into weights which this one had been merged into
    thawed: list[Frozen] = field(default_factory=list)  # quantised modules as they were before this was merged
    shifted: list[tuple[Quantised, Tensor]] = field(default_factory=list)  # and their zeros, where these took it

    def parameters(self) -> Iterator[nn.Parameter]:
        for placement in self.placements:
            yield from placement.adapter.parameters()
        for selected in self.selected:
            yield selected.parameter

    def by_gradient(self) -> Iterator[nn.Parameter]:
        """Those that an optimizer is to have."""
        for placement in self.placements:
            yield from placement.adapter.parameters()
        for selected in self.selected:
            if not selected.by_hand:
                yield selected.parameter

    def modules(self) -> Iterator[nn.Module]:
        """The modules of the base that this touches."""
        for placement in self.placements:
            yield vars(placement.place).get("owner", placement.place)
        for selected in self.selected:
            yield selected.module


Key = tuple[int, str]  # a parameter, by its module and its name there


@dataclass(eq=False)
class Registry:
    """Everything that was applied to a model, and how the model was before.

    It hangs on the root, and every module that is touched has a link to it, so that a part of the model finds it too.
    """

    root: nn.Module
    applied: dict[str, Applied] = field(default_factory=dict)
    flags: list[tuple[nn.Module, str, bool]] = field(default_factory=list)  # requires_grad before the first method
    buffers: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)  # their values then, on the CPU
    switches: list[tuple[nn.Module, str, Any]] = field(default_factory=list)  # attributes that kept a fused path on
    held: dict[Key, tuple[nn.Parameter, Tensor, Tensor]] = field(default_factory=dict)  # parameter, mask, values

    def record(self, model: nn.Module) -> None:
        known = {(id(module), name) for other in registries(model) for module, name, _ in other.flags}
        buffers = {(id(module), name) for other in registries(model) for module, name, _ in other.buffers}
        for module in base_modules(model):
            for name, parameter in module._parameters.items():
                if parameter is not None and (id(module), name) not in known and not is_codes(module, name):
                    self.flags.append((module, name, parameter.requires_grad))
        for module, name, buffer in persistent_buffers(model):
            if (id(module), name) not in buffers:
                self.buffers.append((module, name, on_cpu(buffer)))

    def touched(self) -> dict[int, nn.Module]:
        """The root and what the methods touch; nothing where there are none."""
        modules = [m for applied in self.applied.values() for m in applied.modules()]
        return {id(m): m for m in [self.root, *modules]} if self.applied else {}

    def mark(self, before: Iterable[nn.Module] = ()) -> None:
        """Hang on the root and link from what is touched; let go of what was touched `before` and no more."""
        now = self.touched()
        for module in now.values():
            if found(module) is not self:
                vars(module)[ATTRIBUTE] = self if module is self.root else Link(self)
        for module in before:
            if id(module) not in now and found(module) is self:
                del vars(module)[ATTRIBUTE]

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.mark()

    def note(self, module: nn.Module, trained: bool) -> None:
        """The flag of a weight that was in codes when the first method came."""
        if not any(known is module and name == "weight" for known, name, _ in self.flags):
            self.flags.append((module, "weight", trained))

    def changed_buffers(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        for module, name, before in self.buffers:
            buffer = module._buffers.get(name)
            if buffer is not None and not same(buffer, before):
                yield module, name, before

    def leave_fused_paths(self, model: nn.Module) -> None:
        """torch.nn's encoder layers skip their children in eval mode; those that hold adapters must not.

        bitsandbytes' 4-bit layers repack themselves in eval mode on some CPUs, and give wrong gradients ever after.
        """
        switched = {id(module) for module, _, _ in self.switches}
        for module in model.modules():
            name = FUSED.get(next((kind for kind in FUSED if isinstance(module, kind)), nn.Module))
            held = name and any(isinstance(child, Adapter) for child in module.modules())
            if foreign(module) and hasattr(module, REPACKING):
                name, held = REPACKING, True
            if name and held and id(module) not in switched:
                self.switches.append((module, name, getattr(module, name)))
                setattr(module, name, False)

    def restore(self, buffers: bool = True) -> None:
        """Put back what no single method owns: switches, buffers, requires_grad."""
        for module, name, value in self.switches:
            setattr(module, name, value)
        with torch.no_grad():
            for module, name, before in self.changed_buffers() if buffers else ():
                module._buffers[name].copy_(before)  # type: ignore[union-attr]
        for module, name, flag in self.flags:
            parameter = module._parameters.get(name)
            if isinstance(module, Quantised) and name == "weight":
                module.trained = flag
            elif parameter is not None and not is_codes(module, name):
                parameter.requires_grad_(flag)


class Link:
    """From a touched module to the registry; a copy of the module alone does not drag the whole model along."""

    def __init__(self, registry: Registry | None = None) -> None:
        self.registry = registry

    def __reduce__(self) -> Any:
        return Link, ()


def found(module: nn.Module) -> Registry | None:
    """The registry that hangs on this very module, or that it links to."""
    value = vars(module).get(ATTRIBUTE)
    return value.registry if isinstance(value, Link) else value


def base_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of the model without adapters and places."""
    stack, seen = [model], set()
    while stack:
        module = stack.pop()
        if id(module) not in seen and not isinstance(module, (Adapters, Host)):
            seen.add(id(module))
            yield module
            stack.extend(child for child in module._modules.values() if child is not None)


class RepackedError(RuntimeError):
    """Layers of bitsandbytes that an evaluation on a CPU has rewritten."""


def check_not_repacked(model: nn.Module) -> None:
    """Raise where gradients would be wrong."""
    found = [name for name, module in model.named_modules() if repacked(module)]
    if found:
        raise RepackedError(
            f"{len(found)} 4-bit layers of bitsandbytes ({found[:2]}) were repacked by an evaluation on this CPU, "
            f"rounded "
            "scales included: gradients through them would be wrong. Load the model again, and apply the method, "
            "or use "
            "NF4Precision, before its first evaluation."
        )


def asked_about(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    """The parameter, or what stands for a quantised one: its shape, without memory."""
    known = known_weight(module, name, parameter)
    return parameter if known is parameter else nn.Parameter(torch.empty(known.shape, device="meta"))


def is_codes(module: nn.Module, name: str) -> bool:
    """Whether the parameter `name` of `module` is a quantised weight, which no gradient reaches."""
    return name == "packed" if isinstance(module, Quantised) else name == "weight" and foreign(module)


def quantised_as(applied: Applied) -> str:
    """How the projections that a method touches are kept: "nf4, block 64, double", or "floats"."""
    kinds = {m.quantisation.short for m in applied.modules() if isinstance(m, Quantised)}
    kinds |= {"codes of bitsandbytes" for m in applied.modules() if foreign(m)}
    return "; ".join(sorted(kinds)) or "floats"


def constant_names(model: nn.Module) -> list[str]:
    """Names of the buffers that no forward changes: the scales of quantised weights, and all that adapters hold.

    What several modules share has several names.
    """
    names: dict[str, None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Quantised):
            held = list(module.constants())
        else:
            held = [n for n, _ in module.named_buffers()] if isinstance(module, Adapter) else []
        names |= {f"{name}.{constant}".lstrip("."): None for constant in held}
    return list(names)


def verify_bases(model: nn.Module) -> None:
    """Raise where adapters were just given the marks of another random basis."""
    for module in model.modules():
        if isinstance(module, Basis):
            module.verify()


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a part of the base: that of its first weight, before it was quantised if it is."""
    for module in base_modules(model):
        for name, p in module._parameters.items():
            if isinstance(module, Quantised) and name == "packed":
                return module.source_dtype
            if p is not None and is_codes(module, name):
                return foreign_dtype(p)
            if p is not None and p.is_floating_point():
                return p.dtype
    return torch.get_default_dtype()


def persistent_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in base_modules(model):
        constants = CONSTANTS if isinstance(module, Quantised) else ()  # of a weight that stays as it is
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and name not in constants:
                yield module, name, buffer


def on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.is_meta else tensor.detach().cpu().clone()


def same(buffer: Tensor, before: Tensor) -> bool:
    """Equal values; a cast or a move is no change."""
    if buffer.is_meta or before.is_meta:
        return buffer.is_meta == before.is_meta
    return buffer.shape == before.shape and torch.equal(buffer.detach().cpu(), before.to(buffer.dtype))


# ------------------------------------------------------------------ finding registries
def registries(model: nn.Module) -> list[Registry]:
    """Those of the model, of modules inside it, and of a larger model that it is a part of."""
    distinct = {id(registry): registry for registry in map(found, model.modules()) if registry is not None}
    return list(distinct.values())


def registry_of(model: nn.Module) -> Registry | None:
    return next(iter(registries(model)), None)


def open_registry(model: nn.Module) -> Registry:
    return registry_of(model) or Registry(model)


def all_applied(model: nn.Module) -> list[Applied]:
    return [applied for registry in registries(model) for applied in registry.applied.values()]


def applied_to(model: nn.Module) -> dict[str, Applied]:
    """label -> what was applied, in the order of application."""
    out: dict[str, Applied] = {}
    for applied in all_applied(model):
        out.setdefault(applied.label, applied)
    return out


def get_applied(model: nn.Module, label: str | None = None) -> Applied:
    """The method applied under `label`; without a label, the only one there is."""
    everything = all_applied(model)
    named = [applied for applied in everything if label in (None, applied.label)]
    if len(named) == 1:
        return named[0]
    known = [applied.label for applied in everything]
    what = "names several methods" if named else "names no method"
    raise LabelError(
        f"label={label!r} {what} on this {type(model).__name__}; known: {known}. Name one, on its own part."
    )


def registry_with(model: nn.Module, applied: Applied) -> Registry:
    return next(registry for registry in registries(model) if applied in registry.applied.values())


# ------------------------------------------------------------------ the three sets
def active(model: nn.Module) -> list[str]:
    """Labels whose adapters run in the forward pass."""
    return [label for label, applied in applied_to(model).items() if applied.cell.on]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """name -> parameter for everything that the methods on this model train; shared parameters once."""
    wanted = {id(p) for applied in all_applied(model) if applied.trainable for p in applied.by_gradient()}
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}


def saved(model: nn.Module) -> dict[str, Tensor]:
    """name -> tensor for what a checkpoint needs beside the base: adapters, trained base parameters, changed
    buffers.
    """
    off = {id(s.parameter): s.trained for a in all_applied(model) for s in a.selected if s.trained is not None}
    return {name: off.get(id(tensor), tensor).detach() for name, tensor in _kept(model).items()}


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """As `saved`, but the tensors themselves; each once."""
    everything = all_applied(model)
    if not everything:
        return {}
    kept = {id(p) for applied in everything for p in applied.parameters()}
    kept |= {id(b) for applied in everything for x in applied.placements for b in x.adapter.buffers()}
    kept |= {id(p) for p in model.parameters() if p.requires_grad}  # somebody trains it, whoever that is
    kept |= {id(m._buffers[name]) for registry in registries(model) for m, name, _ in registry.changed_buffers()}
    state: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in nn.Module.state_dict(model, keep_vars=True).items():  # past overrides
        if id(tensor) in kept:
            state.setdefault(id(tensor), (name, tensor))
    return dict(state.values())


def trainable_before(model: nn.Module) -> set[int]:
    """ids of the parameters of the base that had gradients before the first method."""
    flags = {(id(m), name): flag for registry in registries(model) for m, name, flag in registry.flags}
    return {
        id(p)
        for m in base_modules(model)
        for name, p in m._parameters.items()
        if p is not None and flags.get((id(m), name), had_gradient(m, name, p))
    }


def had_gradient(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter trains, or would if it were not in codes."""
    if not is_codes(module, name):
        return parameter.requires_grad
    return module.trained if isinstance(module, Quantised) else True


def reachable(model: nn.Module, applied: Applied) -> bool:
    """Whether what a method touches is still in the model; a part may have been built anew."""
    inside = {id(m) for m in model.modules()}
    return all(id(m) in inside for m in applied.modules())


def drop(model: nn.Module) -> None:
    """Forget everything; for a model whose adapted parts are gone."""
    for module in model.modules():
        vars(module).pop(ATTRIBUTE, None)


def required(model: nn.Module) -> set[str]:
    """The names that a checkpoint must hold: adapters, and parameters that methods train."""
    mine = {
        id(t) for a in all_applied(model) for x in a.placements for t in (*x.adapter.parameters(), *x.adapter.buffers())
    }
    mine |= {id(s.parameter) for a in all_applied(model) for s in a.selected}
    return {name for name, tensor in _kept(model).items() if id(tensor) in mine}


# ------------------------------------------------------------------ masks
def hold(model: nn.Module) -> None:
    """Note the values of masked parameters: those outside of all masks must not move. Once per set of methods."""
    for registry in registries(model):
        if not registry.held:
            for parameter, mask in masked(model):
                registry.held[id(parameter), ""] = parameter, mask.to(parameter.device), parameter.detach().clone()


def masked(model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter that trains in part, with the union of the masks of the methods that train it."""
    chosen: dict[Key, list[Selected]] = {}
    for applied in all_applied(model):
        for selected in applied.selected if applied.trainable else []:
            if selected.by_hand:
                continue
            chosen.setdefault(selected.key, []).append(selected)
    for group in chosen.values():
        masks = [selected.mask for selected in group]
        if all(mask is not None for mask in masks):
            yield group[0].parameter, torch.stack([mask.cpu() for mask in masks]).any(0)  # type: ignore[union-attr]


def mask_gradients(model: nn.Module) -> None:
    """Zero the gradient outside of the masks, so that clipping and moments see the selected entries only."""
    hold(model)
    for registry in registries(model):
        for parameter, mask, _ in registry.held.values():
            if parameter.grad is not None:
                parameter.grad.mul_(mask)


@torch.no_grad()
def restore_unselected(model: nn.Module) -> None:
    """After an optimizer step: put entries outside of the masks back, bit for bit.

    Weight decay and momentum move them.
    """
    hold(model)
    for registry in registries(model):
        for parameter, mask, values in registry.held.values():
            parameter.copy_(torch.where(mask, parameter, values))


# ------------------------------------------------------------------ which base
@dataclass(frozen=True)
class Known:
    """What is known of a quantised weight from before: its shape, and a few values; NaN for "anything"."""

    shape: tuple[int, ...]
    values: Tensor


def known_weight(module: nn.Module, name: str, parameter: Tensor) -> Tensor | Known:
    """The parameter itself, or what a quantised one was."""
    if not is_codes(module, name):
        return parameter
    shape: tuple[int, ...]
    if isinstance(module, Quantised):
        shape = module.features[::-1] if is_conv1d(module) else module.features
        values = module.samples
    else:
        shape, values = (int(module.out_features), int(module.in_features)), None  # type: ignore[arg-type]
    count = min(4, shape[0] * shape[1])
    return Known(shape, torch.full((count,), torch.nan, dtype=torch.bfloat16) if values is None else values)


def fingerprint(tensors: Sequence[tuple[str, Tensor | Known]], count: int = 64, samples: int = 4) -> str:
    """A hash of names and shapes, and a few values of at most `count` of the tensors: "<hash>:<bf16 values in hex>"."""
    sha = hashlib.sha256("".join(f"{name}{tuple(tensor.shape)}" for name, tensor in tensors).encode())
    with_values = [
        t for _, t in tensors if isinstance(t, Known) or (not t.is_meta and not t.is_complex() and t.numel())
    ]
    chosen = with_values[:: max(1, -(-len(with_values) // count))]
    picked = [t.values if isinstance(t, Known) else sample(t.detach(), samples) for t in chosen]
    values = torch.cat(picked).view(torch.uint8).numpy().tobytes().hex() if picked else ""
    return f"{sha.hexdigest()[:16]}:{values}"


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints are of one base: the same shapes, and values that agree to the rounding of a cast."""
    (shapes, values), (other_shapes, other_values) = (text.partition(":")[::2] for text in (one, other))
    if shapes != other_shapes or len(values) != len(other_values):
        return False
    try:
        numbers = [torch.frombuffer(bytearray.fromhex(v), dtype=torch.bfloat16) for v in (values, other_values) if v]
    except ValueError:
        return False
    if len(numbers) < 2:
        return True
    one_value, other_value = (n.float() for n in numbers)
    known = ~(one_value.isnan() | other_value.isnan())
    return torch.allclose(one_value[known], other_value[known], rtol=2e-2, atol=1e-6)


def describe(model: nn.Module) -> dict[str, Any]:
    """Counts for one line of log: what trains, of how much, and what a checkpoint weighs."""
    sizes = parameter_sizes(model)
    mine = {id(p): p for p in trainable(model).values()}
    adapters = {id(p) for a in all_applied(model) for x in a.placements for p in x.adapter.parameters()}
    total = sum(sizes.values())
    base = sum(size for key, size in sizes.items() if key not in adapters)
    partly = {id(p): int(mask.sum()) for p, mask in masked(model)}
    partly |= {id(p): count for a in all_applied(model) for x in a.placements for p, count in x.adapter.counted()}
    count = sum(partly.get(key, p.numel()) for key, p in mine.items())
    return {
        "sites": sum(len(a.placements) for a in all_applied(model)),
        "trainable": count,
        "total": total,
        "base": base,
        "percent": 100.0 * count / max(total, 1),
        "bytes": sum(t.numel() * t.element_size() for t in saved(model).values()),
    }


def parameter_sizes(model: nn.Module) -> dict[int, int]:
    """id of a parameter -> how many numbers it stands for; a quantised weight is packed."""
    sizes: dict[int, int] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                shape = known_weight(module, name, p).shape
                sizes[id(p)] = math.prod(shape)
    return sizes


def table(model: nn.Module) -> str:
    """One row a method: label, method, its places by role, the numbers of parameters in adapters, base and heads."""
    rows: list[tuple[str, ...]] = [("label", "method", "places", "adapters", "base", "heads")]
    for label, applied in applied_to(model).items():
        roles = Counter(p.role or "pattern" for p in applied.placements if any(True for _ in p.adapter.parameters()))
        places = ", ".join(f"{role} {count}" for role, count in roles.items()) or "-"
        adapters = {id(p): p.numel() for x in applied.placements for p in x.adapter.parameters()}
        adapters |= {id(p): count for x in applied.placements for p, count in x.adapter.counted()}
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
    if selected.by_hand:
        return 0
    return int(selected.mask.sum()) if selected.mask is not None else selected.parameter.numel()
