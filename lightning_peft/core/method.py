"""Method: the fields are the configuration, the class line is the registration, the hooks say what changes where."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import dataclass_transform

from lightning_peft.core import state
from lightning_peft.core.adapter import Adapter, LabelError, attach, check_label, detach
from lightning_peft.core.architectures import is_conv1d
from lightning_peft.core.basis import Basis
from lightning_peft.core.fields import FieldError, check_fields, unknown_field
from lightning_peft.core.init import Draw
from lightning_peft.core.merge import Into, MergeError, merge, seal, unmerge
from lightning_peft.core.projection import close_place, open_place
from lightning_peft.core.quantised import Quantised
from lightning_peft.core.sites import Site, Sites, TargetError, find, roles, sites
from lightning_peft.core.state import Applied, Placement, Selected, on_cpu

log = logging.getLogger("lightning_peft")

Family = Literal["reparametrisation", "additive", "soft prompt", "representation", "selective", "hybrid", "baseline"]
Scope = Literal["targets", "model", "nothing"]
Overhead = Literal["none", "products", "tokens", "prompt"]
Storage = Literal["adapter", "weights", "model"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Info:
    """What a method says about itself; the README row, the docs page, the tests and `choose` are made of it.

    overhead: what a forward pass costs more than the base's once training is over and what can be merged is merged:
    "none", "products" (small layers or scales), "tokens" (longer sequences, or more keys), "prompt" (on the prompt
    alone, nothing on the tokens generated after it). backprop: whether the backward pass goes through the backbone, so
    that its activations are kept. storage: what a task's file holds: an "adapter", "weights" of the base that train
    (all of a tensor, or the entries of a mask), the whole "model". batched: whether rows of one batch can be of
    different adapters by two thin products or a scale a row: a change that is linear in the input, or a prompt.
    """

    name: str
    family: Family
    paper: str
    mergeable: bool
    identity: bool  # the adapted model equals the base at step 0
    equation: str
    overhead: Overhead = "none"
    backprop: bool = True
    storage: Storage = "adapter"
    batched: bool = False


REGISTRY: dict[str, type[Method]] = {}


class NothingToTrainError(ValueError):
    """The method found no parameter to train."""


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(dataclasses.field,))
@dataclass(kw_only=True, eq=False)
class Method:
    """Common fields: where (`targets`, `layers`, `exclude`), what else trains (`heads`), under which `label`.

    targets: roles, globs or `re:` patterns (see `core.sites`); None where the method needs none.
    layers: "last:6", "2-5", [0, 3], ... of each stack; exclude: patterns that are left out. roles: role -> pattern,
    for a
        model whose names no table knows, such as {"q": "*.to_query"}.
    heads: "auto" trains task heads (classifier, score, head, ...; never a language-model head), None trains none,
        patterns train the modules they match; heads are saved with the adapter.
    label: the adapter's name on the model; None takes the method's name. seed: of the adapter's initial tensors.
    dtype: of the adapter's tensors; "base" takes that of the adapted weight.
    """

    targets: str | list[str] | None = None
    layers: str | int | list[int] | None = None
    exclude: str | list[str] | None = None
    roles: dict[str, str] = dataclasses.field(default_factory=dict)
    heads: str | list[str] | None = "auto"
    label: str | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16", "float64", "base"] = "float32"

    info: ClassVar[Info]
    by_hand: ClassVar[bool] = False  # what `select` chooses is changed by the method itself, and gets no gradient
    unused: ClassVar[tuple[str, ...]] = ()  # common fields that mean nothing to the method

    @property
    def scope(self) -> Scope:
        """Which parameters `select` is asked about: those of the target modules, all, or none."""
        return "targets"

    @property
    def places(self) -> str | list[str] | None:
        """Where adapters go; `targets` unless a method says otherwise."""
        return self.targets

    @property
    def keeps_original(self) -> bool:
        """Whether parameters that train in place are copied to the CPU first, so that `remove` can restore them."""
        return True

    def __init_subclass__(
        cls,
        name: str | None = None,
        family: Family | None = None,
        paper: str = "",
        mergeable: bool = False,
        identity: bool = True,
        overhead: Overhead | None = None,
        backprop: bool = True,
        storage: Storage | None = None,
        batched: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(kw_only=True, eq=False)(cls)
        if name is None or family is None:
            return
        if (taken := REGISTRY.get(name)) is not None and taken.__qualname__ != cls.__qualname__:
            raise ValueError(
                f"A method named {name!r} is registered: {taken.__module__}.{taken.__name__}. Choose another name."
            )
        equation = (inspect.getdoc(cls) or "").partition("\n")[0].rstrip(".")
        said = overhead or known_overhead(family, mergeable), backprop, storage or known_storage(family)
        cls.info = Info(name, family, paper, mergeable, identity, equation, *said, known_batched(family, batched))
        REGISTRY[name] = cls

    def __new__(cls, *_: Any, **fields: Any) -> Method:
        unknown_field(cls, set(fields))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_fields(self)
        if given := [name for name in self.unused if getattr(self, name)]:
            raise FieldError(f"{type(self).__name__} does not use {', '.join(given)}; leave it out.")
        self.check()

    # -------------------------------------------------------------- hooks that a method defines
    def check(self) -> None:
        """Raise `FieldError` on values that make no sense."""

    def adapter(self, site: Site) -> Adapter:
        """The adapter at one site."""
        raise NotImplementedError(f"{type(self).__name__} defines neither adapter(site) nor adapters(sites).")

    def adapters(self, sites: Sites) -> Iterable[tuple[Site, Adapter]]:
        """All adapters; to be overridden where they share parameters or come in pairs."""
        for site in sites:
            yield site, self.adapter(site)

    def select(self, name: str, parameter: nn.Parameter) -> bool | Tensor:
        """Which parameters of the base train in place: yes, no, or a mask of the parameter's shape."""
        return False

    def asked(self, model: nn.Module) -> Iterable[Site] | None:
        """The sites that `select` is asked about, where `targets` cannot name them; None: as `scope` says."""
        return None

    def parts(self) -> tuple[Method, ...]:
        """The methods that this one is made of; they act under its label."""
        return ()

    def parts_on(self, model: nn.Module) -> tuple[Method, ...]:
        """The same, where they depend on the model."""
        return self.parts()

    def go_on(self, config: Mapping[str, Any]) -> None:
        """Take over what the method counts in its own fields, from the config of the one that was here before."""

    def portable(self) -> Method:
        """The method as which collapsed adapters are loaded again (`Adapter.collapsed`); usually itself."""
        return self

    # -------------------------------------------------------------- what comes for free
    def config(self, *, defaults: bool = True) -> dict[str, Any]:
        """field -> value as plain containers; without those at their default if `defaults` is False."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        values = {f.name: getattr(self, f.name) for f in fields}
        return values if defaults else {f.name: values[f.name] for f in fields if values[f.name] != default(f)}

    def apply(self, model: nn.Module, *, trainable: bool = True) -> nn.Module:
        """Inject into `model` in place, freeze everything else, and return it. On an error the model is as before."""
        label = check_label(self.label or self.info.name)
        check_free(model, self, label)
        return apply_as(self, model, label, trainable)

    def merge(self, model: nn.Module, label: str | None = None, *, into: Into | None = None) -> Any:
        """Fold the adapters into the base weights; exact to one rounding, undone bit for bit by `unmerge`.

        into: for a quantised base, "float32" or "bfloat16" (its adapted weights become plain ones), or "requantise".
        """
        return merge(model, state.get_applied(model, label or self.label or self.info.name), into)

    def unmerge(self, model: nn.Module, label: str | None = None) -> None:
        """Write the original weights back from the snapshot taken by `merge`."""
        unmerge(model, state.get_applied(model, label or self.label or self.info.name))

    def remove(self, model: nn.Module, label: str | None = None) -> nn.Module:
        """Take everything off: the base is what it was before `apply`, bit for bit."""
        return remove(model, label or self.label or self.info.name)

    def unload(self, model: nn.Module, label: str | None = None, *, into: Into | None = None) -> nn.Module:
        """Make the change permanent: merge, then forget the adapters; what is left is a plain model."""
        return unload(model, label or self.label or self.info.name, into)

    def enabled(
        self, model: nn.Module, on: bool = True, label: str | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Switch the adapters on or off; as a `with` block, until its end. Never touches `requires_grad`."""
        return enabled(model, label or self.label or self.info.name, on)


# ------------------------------------------------------------------ what a class line leaves open
def known_overhead(family: Family, mergeable: bool) -> Overhead:
    """What is merged, or trained in place, costs nothing; prompts are tokens; the rest is computed beside."""
    if mergeable or family in ("selective", "baseline"):
        return "none"
    return "tokens" if family == "soft prompt" else "products"


def known_storage(family: Family) -> Storage:
    """Selective methods change weights of the base, the others come beside them."""
    return "weights" if family == "selective" else "adapter"


def known_batched(family: Family, batched: bool | None) -> bool:
    """Prompts are rows of a batch anyway; of other changes a method says so itself."""
    return family == "soft prompt" if batched is None else batched


def default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


# ------------------------------------------------------------------ applying
def check_free(model: nn.Module, method: Method, label: str) -> None:
    known = state.applied_to(model)
    if label in known:
        raise LabelError(
            f"label={label!r} is taken on this {type(model).__name__} by {known[label].method.info.name}; known: "
            f"{list(known)}. Give this one a label of its own: {type(method).__name__}(label=...)."
        )


def apply_as(method: Method, model: nn.Module, label: str, trainable: bool, keep: bool | None = None) -> nn.Module:
    """`Method.apply` after its checks. keep: note the originals of what trains in place, whatever the method says."""
    if next(model.parameters(), None) is None:
        raise NothingToTrainError(
            f"This {type(model).__name__} has no parameters: it is not built yet. Build it first; a "
            f"LightningModule by its "
            "configure_model() or setup('fit')."
        )
    state.check_not_repacked(model)
    parts = method.parts_on(model) or (method,)
    several = len(parts) > 1
    plans = [(f"{label}_{part.info.name}" if several else label, part, list(_plan(part, model))) for part in parts]
    heads = head_modules(model, method)
    selected = _select_all(parts, model, heads, method.keeps_original if keep is None else keep)
    if not selected and not any(plan for _, _, plan in plans):
        raise NothingToTrainError(
            f"{type(method).__name__} finds nothing to train in this {type(model).__name__}: "
            f"targets={method.targets!r}, heads={method.heads!r}. Roles known here: "
            f"{', '.join(sorted(roles(model))) or 'none'}."
        )
    mark = state.fingerprint(list(_base_tensors(plans, selected, model)))
    applied = Applied(method, label, state.Cell(), [], selected, trainable, mark)
    registry = state.open_registry(model)
    registry.record(model)
    try:
        _attach_all(applied, plans, {id(module): name for name, module in model.named_modules()})
    except Exception:
        _detach_all(applied)
        raise
    registry.applied[label] = applied
    registry.mark()
    registry.leave_fused_paths(model)
    freeze(model)
    return model


def _plan(part: Method, model: nn.Module) -> Iterator[tuple[Site, Adapter]]:
    if type(part).adapter is Method.adapter and type(part).adapters is Method.adapters:
        return
    if part.places is None:
        if type(part).places is Method.places:
            raise TargetError(
                f"{type(part).__name__}(targets=None) has no place to act. Name roles or modules, such as 'q,v'."
            )
        return
    found = sites(model, part.places, layers=part.layers, exclude=part.exclude, roles=part.roles)
    found = Sites(outside_frozen_networks(model, found), found.report, found.known, model)
    log.debug("%s: %s", part.info.name, found.report)
    for site, adapter in part.adapters(found):
        _prepare(part, site, adapter)
        yield site, adapter


def outside_frozen_networks(model: nn.Module, found: Iterable[Site]) -> list[Site]:
    """Leave out a network that was frozen as a whole (a teacher) where there are sites in one that was not.

    What has no parameters (an activation, a metric) cannot be frozen, and a head that trains is no other network.
    """
    found = list(found)
    before = state.trainable_before(model)
    networks = {site.name.partition(".")[0] for site in found}
    held = {name: [id(p) for p in model.get_submodule(name).parameters()] for name in networks}
    frozen = {name for name, own in held.items() if own and before.isdisjoint(own)}
    if not frozen:
        return found
    heads = {id(p) for site in roles(model).get("head", []) for p in site.module.parameters()}
    if all(name in frozen for name, own in held.items() if not heads.issuperset(own)):
        return found
    log.info("left out, since they were frozen before: %s", ", ".join(sorted(frozen)))
    return [site for site in found if site.name.partition(".")[0] not in frozen]


def frozen_networks(model: nn.Module) -> set[str]:
    """The children of the model with blocks that were frozen as a whole, where another with blocks was not."""
    blocks = roles(model).get("block", [])
    kept = {site.name.partition(".")[0] for site in outside_frozen_networks(model, blocks)}
    return {site.name.partition(".")[0] for site in blocks} - kept


def _prepare(part: Method, site: Site, adapter: Adapter) -> None:
    """To the device and, if asked, the dtype of the place."""
    near = next((p for p in site.module.parameters()), None)
    if near is not None:
        dtype = state.base_dtype(site.module)
        dtype = dtype if part.dtype == "base" else DTYPES[part.dtype]
        if any(t.device != near.device for t in (*adapter.parameters(), *adapter.buffers())):
            adapter.to(near.device)
        if any(p.dtype != dtype for p in adapter.parameters()):
            adapter.cast_(dtype)
        for module in adapter.modules():
            if isinstance(module, Adapter):
                module.follows_dtype = part.dtype == "base"


def draw(placement: Placement) -> None:
    """Initial tensors from (seed, name)."""
    part = placement.part
    placement.adapter.reset(Draw(part.seed, f"{placement.site}/{placement.role}/{part.info.name}"))


def _attach_all(applied: Applied, plans: list[Any], names: dict[int, str]) -> None:
    for key, part, plan in plans:
        for site, adapter in plan:
            place = open_place(site)
            for module in adapter.modules():
                if isinstance(module, Adapter):
                    module.cell = applied.cell
            try:
                attach(place, key, adapter)
            except Exception:
                close_place(place)
                raise
            applied.placements.append(Placement(place, key, adapter, part, names[id(site.module)], site.role))
    for placement in applied.placements:
        draw(placement)


def _detach_all(applied: Applied) -> None:
    for placement in reversed(applied.placements):
        detach(placement.place, placement.key)
        close_place(placement.place)
    applied.placements.clear()


def _base_tensors(
    plans: list[Any], selected: list[Selected], model: nn.Module
) -> Iterator[tuple[str, Tensor | state.Known]]:
    """What identifies the base: all parameters of the smallest part that holds what is adapted, without heads.

    A norm alone says too little: the part holds a matrix, too. What another method trains in place counts as it was.
    """
    heads = {id(s.parameter) for s in selected if s.head}
    before = {s.key: s.original for a in state.all_applied(model) for s in a.selected if s.original is not None}
    names = [site.name for _, _, plan in plans for site, _ in plan]
    if not names:
        where = {id(m): name for name, m in model.named_modules()}
        names = [where[id(s.module)] for s in selected if not s.head]
    name = common(names) if names else ""
    while name and not has_matrix(model.get_submodule(name)):
        name = name.rpartition(".")[0]
    for module in sorted_modules(model.get_submodule(name)):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in heads:
                known = state.known_weight(module, name, before.get((id(module), name), parameter))
                yield "weight" if isinstance(known, state.Known) else name, known


def has_matrix(tower: nn.Module) -> bool:
    return any(
        len(state.known_weight(module, name, parameter).shape) > 1
        for module in state.base_modules(tower)
        for name, parameter in module.named_parameters(recurse=False)
    )


def common(names: list[str]) -> str:
    """The dotted name of what holds all of these."""
    parts = [name.split(".") for name in names]
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return ".".join(column[0] for column in shared)


def sorted_modules(model: nn.Module) -> list[nn.Module]:
    """The base's modules in the order of their names, so that adapters that came and went do not matter."""
    inside = {id(m) for m in state.base_modules(model)}
    return [m for _, m in model.named_modules() if id(m) in inside]


def _select_all(parts: tuple[Method, ...], model: nn.Module, heads: Any, keep: bool) -> list[Selected]:
    chosen: dict[tuple[int, str], Selected] = {}
    originals = {s.key: s.original for a in state.all_applied(model) for s in a.selected}
    for module, attribute, mask, head in _selections(parts, model, heads):
        key = (id(module), attribute)
        if (known := chosen.get(key)) is not None:
            known.mask = None if mask is None or known.mask is None else known.mask | mask
            continue
        fresh = (keep or mask is not None) and key not in originals
        original = on_cpu(getattr(module, attribute)) if fresh else originals.get(key)
        chosen[key] = Selected(module, attribute, mask, original, head, by_hand=not head and parts[0].by_hand)
    return list(chosen.values())


Selection = tuple[nn.Module, str, "Tensor | None", bool]  # module, attribute, mask, whether it is of a head


def _selections(parts: tuple[Method, ...], model: nn.Module, heads: Any) -> Iterator[Selection]:
    mine = {id(p) for a in state.all_applied(model) for x in a.placements for p in x.adapter.parameters()}
    check_tied_heads(model, heads)
    for module in heads.values():
        for child in state.base_modules(module):
            for name, _ in child.named_parameters(recurse=False):
                check_trains(parts[0], child, name, "the head's")
                yield child, name, None, True
    for part in parts:
        if type(part).select is not Method.select and part.scope != "nothing":
            yield from _part_selections(part, model, mine)


def _part_selections(part: Method, model: nn.Module, mine: set[int]) -> Iterator[Selection]:
    seen: dict[int, tuple[nn.Module, str]] = {}
    excluded = _excluded(part, model)
    for prefix, module, site in _select_scope(part, model):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in mine or seen.setdefault(id(parameter), (module, name)) != (module, name):
                continue  # an adapter's own, or tied to one that was asked about already
            shown = state.asked_about(module, name, parameter)
            asked = name if shown is parameter else "weight"
            answer = part.select(f"{prefix}.{asked}" if prefix else asked, shown)
            if isinstance(answer, Tensor):
                answer = check_mask(answer, shown, name)
            elif answer and site is not None:
                answer = rows_of(site, shown) if owns(site, module, asked) else False
            mask = without(answer, excluded.get((id(module), name)), shown)
            if shown is not parameter and isinstance(mask, Tensor) and not mask.any():
                continue  # nothing of the codes
            if mask is not False:
                check_trains(part, module, name, prefix)
                yield module, name, None if mask is True else mask, False


def check_trains(part: Method, module: nn.Module, name: str, prefix: str) -> None:
    """Raise where a method would train a weight that is in codes."""
    if state.is_codes(module, name):
        raise TargetError(
            f"{type(part).__name__} trains {prefix}.weight, which is quantised: no gradient reaches its codes. "
            f"Leave it "
            "out (exclude=...), load the base without quantisation, or `dequantise` it first."
        )


def _select_scope(part: Method, model: nn.Module) -> Iterator[tuple[str, nn.Module, Site | None]]:
    """Modules whose parameters a selective method is asked about: those of its target sites, else the whole model's."""
    found = part.asked(model)
    if found is None and part.targets is not None and part.scope != "model":
        chosen = sites(model, part.targets, layers=part.layers, exclude=part.exclude, roles=part.roles)
        found = outside_frozen_networks(model, chosen)
    if found is not None:
        for site in found:
            inside = site.module.named_modules(prefix=site.name)
            yield from ((name, module, site) for name, module in inside if not isinstance(module, Adapter))
    elif part.layers is not None:
        blocks = sites(model, "block", layers=part.layers, exclude=part.exclude, roles=part.roles)
        for site in outside_frozen_networks(model, blocks):
            yield from ((name, module, None) for name, module in site.module.named_modules(prefix=site.name))
    else:
        frozen = frozen_networks(model)
        named = ((name, m) for name, m in model.named_modules() if name.partition(".")[0] not in frozen)
        yield from ((name, m, None) for name, m in named if not isinstance(m, Adapter))


def _excluded(part: Method, model: nn.Module) -> dict[tuple[int, str], bool | Tensor]:
    """What `exclude` takes from a selection of the whole model: all of a parameter, or the rows of a slice."""
    out: dict[tuple[int, str], bool | Tensor] = {}
    if part.exclude is None or (part.targets is not None and part.scope != "model"):
        return out
    for site in sites(model, part.exclude, roles=part.roles):
        for module in state.base_modules(site.module):
            for name, parameter in module.named_parameters(recurse=False):
                if owns(site, module, name):
                    before = out.get((id(module), name))
                    rows = rows_of(site, state.asked_about(module, name, parameter))
                    out[id(module), name] = before | rows if isinstance(before, Tensor) and rows is not True else rows
    return out


def without(answer: bool | Tensor, excluded: bool | Tensor | None, parameter: Tensor) -> bool | Tensor:
    """The answer of `select` less what is excluded."""
    if excluded is None or excluded is False or answer is False:
        return answer
    if excluded is True:
        return False
    return ~excluded if answer is True else answer & ~excluded


def owns(site: Site, module: nn.Module, name: str) -> bool:
    """Whether the parameter `name` of `module` belongs to the site; an `nn.MultiheadAttention` holds those of four."""
    if site.part in ("q", "k", "v"):
        return module is site.module and name in ("in_proj_weight", "in_proj_bias", f"{site.part}_proj_weight")
    return site.part != "o" or module is not site.module


def rows_of(site: Site, parameter: Tensor) -> Tensor | Literal[True]:
    """A mask of the entries that the site owns in a packed parameter; True where it owns them all."""
    if site.columns is None and site.part not in ("q", "k", "v"):
        return True
    mask = torch.zeros(parameter.shape, dtype=torch.bool)
    if site.columns is not None:
        dim = parameter.dim() - 1 if is_conv1d(site.module) else 0
        return site.columns.put(mask, torch.ones_like(site.columns.take(mask, dim)), dim)
    width: Any = site.module.embed_dim
    index = "qkv".index(str(site.part)) if len(mask) == 3 * width else 0
    mask[index * width : (index + 1) * width] = True
    return mask


def check_mask(mask: Tensor, parameter: Tensor, name: str) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != parameter.shape:
        raise ValueError(
            f"select({name!r}) gave a mask of {mask.dtype} {tuple(mask.shape)}; expected torch.bool "
            f"{tuple(parameter.shape)}."
        )
    return mask


def head_modules(model: nn.Module, method: Method) -> dict[str, nn.Module]:
    """name -> module of the heads that train along. A pattern that matches nothing is an error; "auto" may find none.

    "auto" leaves out what `exclude` names, and a head that is frozen in a model of which something else is not.
    """
    known = {site.name: site.module for site in roles(model).get("head", [])}
    if method.heads is None:
        return {}
    if method.heads != "auto":
        try:
            return find(model, method.heads)
        except TargetError as error:
            message = str(error).replace("patterns=", "heads=")
            raise TargetError(f"{message} Heads known here: {', '.join(known) or 'none'}.") from None
    if known and method.exclude is not None:
        left_out = {id(m) for site in sites(model, method.exclude, roles=method.roles) for m in site.module.modules()}
        known = {name: head for name, head in known.items() if id(head) not in left_out}
    before = state.trainable_before(model)
    frozen = [name for name, head in known.items() if before and not any(id(p) in before for p in head.parameters())]
    return {name: head for name, head in known.items() if name not in frozen}


def check_tied_heads(model: nn.Module, heads: dict[str, nn.Module]) -> None:
    """Raise where training a head in place would train something else too."""
    inside = {id(m) for head in heads.values() for m in head.modules()}
    outside = {id(p) for m in state.base_modules(model) if id(m) not in inside for p in m._parameters.values()}
    for name, head in heads.items():
        if any(id(p) in outside for p in head.parameters()):
            raise TargetError(
                f"The head {name!r} is tied to another module (its embeddings, most often), which would train "
                f"along. Untie "
                f"it first (a copy as its own nn.Parameter), or put an adapter on it: targets='...,{name}'."
            )


def freeze(model: nn.Module) -> None:
    """Everything off, then what the methods on this model train on; the trainable set is derived, never accumulated."""
    wanted = {id(p) for p in state.trainable(model).values()}
    for registry in state.registries(model):
        registry.held.clear()
    for parameter in model.parameters():
        if parameter.requires_grad != (id(parameter) in wanted):
            parameter.requires_grad_(id(parameter) in wanted)


# ------------------------------------------------------------------ operations on a label
def remove(model: nn.Module, label: str | None = None) -> nn.Module:
    applied = state.get_applied(model, label)
    check_not_absorbed(applied, "removed")
    lost = [s.attribute for s in applied.selected if s.original is None or s.original.is_meta]
    if lost:
        raise LabelError(
            f"{applied.label!r} trained {len(lost)} parameters of the base in place without keeping the originals "
            "(keep_base=False), so the base cannot be restored. Load the base again, or `unload` to keep the result."
        )
    if applied.cell.merged:
        unmerge(model, applied)
    put_back(model, applied)
    _forget(model, applied)
    return model


@torch.no_grad()
def put_back(model: nn.Module, applied: Applied) -> None:
    """Write the originals of what a method trains in place, except where another method that is on trains it too."""
    for selected in applied.selected:
        mine = torch.ones(selected.parameter.shape, dtype=torch.bool) if selected.mask is None else selected.mask.cpu()
        put_entries_back(model, applied, selected, mine)


def put_entries_back(model: nn.Module, applied: Applied, selected: Selected, entries: Tensor) -> None:
    """Write these entries of the original, except those that another method that is on trains too."""
    for other in state.all_applied(model):
        for s in other.selected if other is not applied and other.cell.enabled else ():
            if s.key == selected.key:
                entries = entries & (torch.zeros_like(entries) if s.mask is None else ~s.mask.cpu())
    if entries.any():
        p, original = selected.parameter, selected.original
        p.copy_(torch.where(entries.to(p.device), original.to(p), p))  # type: ignore[union-attr]


def _forget(model: nn.Module, applied: Applied, buffers: bool = True) -> None:
    """Adapters off, and no trace of the method; the last one leaves the model (with `buffers`, these too) as found."""
    registry = state.registry_with(model, applied)
    before = list(registry.touched().values())
    _detach_all(applied)
    del registry.applied[applied.label]
    registry.mark(before)
    if not registry.applied:
        registry.restore(buffers)
    if state.all_applied(model):
        freeze(model)


def unload(model: nn.Module, label: str | None = None, into: Into | None = None) -> nn.Module:
    applied = state.get_applied(model, label)
    if not applied.cell.merged:
        merge(model, applied, into)
    seal(model, applied)
    for frozen in applied.thawed:  # what was in codes trains again as it did
        trained = bool(frozen.attributes.get("trained", True))
        if isinstance(frozen.module, Quantised):
            frozen.module.trained = trained
        else:
            state.registry_with(model, applied).note(frozen.module, trained)
    _forget(model, applied, buffers=False)
    return model


class enabled(contextlib.AbstractContextManager[None]):  # noqa: N801
    """Switch a label now; leaving the `with` block, if there is one, switches it back.

    Adapters are one flag. What trains in place is swapped with its originals, and back.
    """

    def __init__(self, model: nn.Module, label: str | None = None, on: bool = True) -> None:
        self.model, self.applied = model, state.get_applied(model, label)
        if self.applied.cell.merged and on != self.applied.cell.enabled:
            raise MergeError(
                f"{self.applied.label!r} is merged into the weights, where no switch reaches it. Unmerge it first."
            )
        self.before = self.applied.cell.enabled
        switch(model, self.applied, on)

    def __exit__(self, *_: object) -> None:
        switch(self.model, self.applied, self.before)


def check_not_absorbed(applied: Applied, what: str) -> None:
    """Raise where the base was quantised around the adapters: without them it is not the base."""
    if count := sum(x.adapter.absorbed for x in applied.placements):
        raise LabelError(
            f"{applied.label!r} cannot be {what}: {count} weights were quantised around it, as what it starts with was "
            "taken from them. Load the base again, or merge it into floats (merge or unload with into='float32')."
        )


@torch.no_grad()
def switch(model: nn.Module, applied: Applied, on: bool) -> None:
    if on == applied.cell.enabled:
        return
    check_not_absorbed(applied, "switched off")
    if any(s.original is None for s in applied.selected):
        raise LabelError(
            f"{applied.label!r} trains in place and kept no originals (keep_base=False), so it cannot be switched."
        )
    applied.cell.set(enabled=on)
    if not on:
        for selected in applied.selected:
            selected.trained = on_cpu(selected.parameter)
        put_back(model, applied)
        return
    for selected in applied.selected:
        p, mask = selected.parameter, selected.mask
        trained = selected.trained.to(p)  # type: ignore[union-attr]
        p.copy_(trained if mask is None else torch.where(mask.to(p.device), trained, p))
        selected.trained = None


def materialize(model: nn.Module) -> nn.Module:
    """For methods that were applied on the meta device: call it when `to_empty` gave memory and the weights are loaded.

    Draws the adapters' initial tensors from their seeds and notes the originals of what trains in place.
    """
    for module in model.modules():
        if isinstance(module, Basis):
            module.filled = False  # what was drawn before is gone
    for applied in state.all_applied(model):
        for placement in applied.placements:
            draw(placement)
        for selected in applied.selected:
            if selected.original is not None and selected.original.is_meta:
                selected.original = on_cpu(selected.parameter)
    return model
