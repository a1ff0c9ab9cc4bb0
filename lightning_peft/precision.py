"""Base weights in 4 or 8 bits, as a precision plugin and as functions.

    Trainer(plugins=[NF4Precision()], callbacks=[LoRA(targets="all-linear")])          # QLoRA
    quantise(model, mode="nf4"); LoRA().apply(model)                                   # the same without a Trainer
    dequantise(model, "bfloat16")                                                      # plain weights again

What is quantised: projections in blocks (`targets`), never a head, embedding, norm, router, adapter or anything that
trains, whatever the order in which methods and the plugin come.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import re
import weakref
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft import kernels
from lightning_peft.core import state
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.architectures import is_conv1d
from lightning_peft.core.codes import COMPUTE, INTEGERS, Quantisation, all_finite
from lightning_peft.core.method import freeze
from lightning_peft.core.quant import QuantisationError
from lightning_peft.core.quantised import (
    Quantised,
    can_quantise,
    foreign,
    is_quantised,
    quantise_module,
    restore_floats,
    store_as,
    thaw,
)
from lightning_peft.core.sites import ALIASES, GROUPS, ROLES, TargetError, sites, tokens

log = logging.getLogger("lightning_peft")

Mode = Literal["nf4", "fp4", "int8", "int4", "int3", "int2"]
Dtype = Literal["bfloat16", "float16", "float32"]
Storage = Literal["uint8", "bfloat16", "float16", "float32"]
Backend = Literal["auto", "torch", "bitsandbytes"]
ROUTERS = re.compile(r"(?:.*\.)?(?:\w*router\w*(?:\..*)?|gate|wg|shared_expert_gate|gating)")
"""Names of what chooses between experts; a gated feed-forward layer's `gate_proj` is none."""


UNDER_OPTIMIZER = (
    "An optimizer is at work on this model already; it would go on with the old weights. Quantise before the optimizer "
    "is built: Trainer(plugins=[NF4Precision(...)]) and an optimizer made in configure_optimizers, or quantise(model) "
    "right after it is loaded. After a training that is over: model.zero_grad(), and let go of its optimizer and "
    "Trainer first."
)


@dataclass(frozen=True)
class Report:
    """What was quantised, what was left alone and why, and the bytes."""

    quantisation: Quantisation
    layers: int
    parameters: int
    bytes_before: int
    bytes_after: int
    left: dict[str, list[str]] = field(default_factory=dict)

    @property
    def bits_per_parameter(self) -> float:
        """Of what was quantised, constants included."""
        return 8 * self.bytes_after / self.parameters

    def __str__(self) -> str:
        left = "".join(f", {len(names)} {why}" for why, names in self.left.items())
        return (
            f"{self.quantisation.mode}: {self.layers} projections, {self.parameters:,} parameters at "
            f"{self.bits_per_parameter:.3f} bits ({self.bytes_before / 1e6:,.1f} MB -> "
            f"{self.bytes_after / 1e6:,.1f} MB)"
            f"; left as they are: heads, embeddings, norms{left}"
        )


# ------------------------------------------------------------------ functions
def quantisation(
    mode: Mode = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    compute_dtype: Dtype | None = None,
    storage_dtype: Storage = "uint8",
    backend: Backend = "auto",
    threshold: float = 6.0,
) -> Quantisation:
    """Checked settings. compute_dtype: None takes that of the activations."""
    known: dict[str, tuple[str | None, ...]] = {"compute_dtype": ("bfloat16", "float16", "float32", None)}
    known["storage_dtype"] = ("uint8", "bfloat16", "float16", "float32")
    for name, value in (("compute_dtype", compute_dtype), ("storage_dtype", storage_dtype)):
        if value not in known[name]:
            raise QuantisationError(f"{name}={value!r} is unsupported. Known: {', '.join(map(str, known[name]))}.")
    kernels.require(backend)
    compute = None if compute_dtype is None else getattr(torch, compute_dtype)
    return Quantisation(mode, blocksize, double_quant, compute, getattr(torch, storage_dtype), backend, threshold)


def quantise(
    model: nn.Module,
    settings: Quantisation | None = None,
    *,
    targets: str | list[str] = "all-linear",
    skip: str | list[str] | None = None,
    device: torch.device | str | None = None,
    allow_meta: bool = False,
    **options: Any,
) -> Report:
    """Quantise the projections of `model` in place, layer by layer; -> what was done

    settings, or `options` of `quantisation`. targets, skip: roles, globs, `re:` patterns. device: where to quantise,
    and
    where the codes stay. allow_meta: weights without memory give codes without memory (for plans).
    Errors: QuantisationError, before anything was changed.
    """
    if settings is not None and options:
        raise QuantisationError(f"Both settings={settings} and {', '.join(options)} are given. Give one of the two.")
    q = settings or quantisation(**options)
    check_before(model)
    check_untrained(model)
    return _quantise(model, q, targets, skip, device, allow_meta)


def _quantise(
    model: nn.Module,
    q: Quantisation,
    targets: str | list[str],
    skip: str | list[str] | None,
    device: torch.device | str | None = None,
    allow_meta: bool = False,
) -> Report:
    chosen, left = choose(model, targets, skip)
    check_weights(chosen, allow_meta)
    check_groups(chosen, q)
    where = None if device is None else torch.device(device)
    before = after = parameters = 0
    undo = Undo(list(chosen.values()))
    try:
        for module in chosen.values():
            weight = cast(Tensor, module._parameters["weight"])
            parameters, before = parameters + weight.numel(), before + weight.nbytes
            del weight  # nothing but the module holds it: its memory is free before the next one is quantised
            after += quantise_module(module, q, where).nbytes
    except Exception:
        undo()
        raise
    return Report(q, len(chosen), parameters, before, after, left)


class Undo:
    """The weights before, kept until all are quantised; only where adapters have a word in it, which may fail."""

    def __init__(self, modules: list[nn.Module]) -> None:
        adapters = [a for module in modules for a in compensating(module)]
        self.weights = [(m, type(m), cast(nn.Parameter, m._parameters["weight"])) for m in modules if adapters]
        self.tensors = [(a, {k: t.detach().clone() for k, t in a.state_dict().items()}) for a in adapters]

    def __call__(self) -> None:
        for module, kind, parameter in self.weights:
            restore_floats(module, kind, parameter)
        for adapter, tensors in self.tensors:
            adapter.load_state_dict(tensors)
            vars(adapter).pop("absorbed", None)


def compensating(module: nn.Module) -> list[Adapter]:
    """The adapters on it, and on slices of it, that may replace what is quantised."""
    return [a for a in module.modules() if isinstance(a, Adapter) and type(a).compensate is not Adapter.compensate]


def dequantise(model: nn.Module, dtype: Dtype | torch.dtype = "bfloat16") -> int:
    """Make every quantised projection of `model` a plain one in `dtype`, in place -> how many"""
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(
        str(dtype).removeprefix("torch.")
    )
    if kind is None:
        raise QuantisationError(f"dtype={dtype!r} is no dtype to dequantise into. Known: float32, bfloat16, float16.")
    merged = [a.label for a in state.all_applied(model) if a.cell.merged]
    if merged:
        raise QuantisationError(f"{merged[0]!r} is merged into this model. Unmerge it first, or unload it for good.")
    state.check_not_repacked(model)
    found = [m for m in state.base_modules(model) if is_quantised(m)]
    if not found:
        raise QuantisationError(f"This {type(model).__name__} has no quantised projection.")
    for module in found:
        trained = isinstance(module, Quantised) and module.trained
        thaw(module, kind)
        cast(nn.Parameter, module._parameters["weight"]).requires_grad_(trained)
        for registry in state.registries(model):
            registry.note(module, trained)
    if state.all_applied(model):
        freeze(model)
    return len(found)


def footprint(model: nn.Module) -> dict[str, int]:
    """Quantised parameters, the bytes of their codes, the bytes of their constants"""
    found = [m for m in state.base_modules(model) if isinstance(m, Quantised)]
    constants = sum(t.nbytes for m in found for t in m.constants().values())
    parameters = sum(m.features[0] * m.features[1] for m in found)
    return {"parameters": parameters, "codes": sum(m.packed.nbytes for m in found), "constants": constants}


def choose(
    model: nn.Module, targets: str | list[str], skip: str | list[str] | None
) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """name -> projection that will be quantised; reason -> names of those that will not"""
    try:
        found = {site.name: site.module for site in sites(model, targets)}
    except TargetError as error:
        raise QuantisationError(f"Nothing to quantise in this {type(model).__name__}: {error}") from error
    try:
        skipped = {id(m) for site in sites(model, skip) for m in site.module.modules()} if skip else set()
    except TargetError as error:
        raise QuantisationError(str(error).replace("targets=", "skip=")) from error
    chosen: dict[str, nn.Module] = {}
    left: dict[str, list[str]] = {}
    tied, named = tied_weights(model), named_by_pattern(model, targets)
    training = {id(s.parameter) for a in state.all_applied(model) for s in a.selected}
    for name, module in found.items():
        why = reason(name, module, skipped, tied, training, named)
        if why:
            left.setdefault(why, []).append(name)
        else:
            chosen[name] = module
    if not chosen:
        seen = "; ".join(f"{why}: {', '.join(names[:3])}" for why, names in left.items())
        raise QuantisationError(
            f"targets={targets!r}, skip={skip!r} leave no Linear or Conv1D of this {type(model).__name__} to quantise "
            f"({seen}). Choose others, or leave the plugin out."
        )
    return chosen, left


def named_by_pattern(model: nn.Module, targets: str | list[str]) -> set[str]:
    """Names that `targets` gives by a glob or a regex, not by a role."""
    words = {*ROLES, *GROUPS, *ALIASES}
    patterns = [token for token in tokens(targets, "targets") if token.removesuffix("?") not in words]
    return {site.name for site in sites(model, patterns)} if patterns else set()


def reason(name: str, module: nn.Module, skipped: set[int], tied: set[int], training: set[int], named: set[str]) -> str:
    """Why a projection is left as it is; "" if it is not."""
    weight = module._parameters.get("weight")
    if id(module) in skipped:
        return "skipped"
    if ROUTERS.fullmatch(name) and name not in named:
        return "routers"
    if not can_quantise(module) or weight is None:
        return "with a forward of their own"
    if id(weight) in tied:
        return "tied to another module"
    return "that train" if id(weight) in training else ""


def tied_weights(model: nn.Module) -> set[int]:
    """ids of the parameters that more than one module holds"""
    count = Counter(id(p) for m in state.base_modules(model) for p in m._parameters.values() if p is not None)
    return {key for key, times in count.items() if times > 1}


# ------------------------------------------------------------------ checks
def check_before(model: nn.Module) -> None:
    """Raise on a model that is quantised already, or that an optimizer holds."""
    known = [m for m in state.base_modules(model) if is_quantised(m)]
    if known:
        how = known[0].quantisation.mode if isinstance(known[0], Quantised) else type(known[0]).__name__
        raise QuantisationError(
            f"{len(known)} projections of this {type(model).__name__} are quantised already ({how}). Quantising codes "
            "again would only add error: load the base anew, or `dequantise` it first."
        )
    if merged := [a.label for a in state.all_applied(model) if a.cell.merged]:
        raise QuantisationError(f"{merged[0]!r} is merged into this model. Unmerge it first, or unload it for good.")


def check_untrained(model: nn.Module) -> None:
    """Raise where an optimizer holds what would become codes."""
    weights = {id(p): p for m in state.base_modules(model) for p in m._parameters.values() if p is not None}
    trainer = getattr(model, "_trainer", None)
    busy = any(p.grad is not None for p in weights.values()) or (trainer is not None and trainer.optimizers)
    if busy or held_by_optimizer(weights):
        raise QuantisationError(UNDER_OPTIMIZER)


def held_by_optimizer(weights: dict[int, nn.Parameter]) -> bool:
    """Whether an optimizer that is still there was given one of these parameters."""

    def found() -> bool:
        alive = [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]
        return any(id(p) in weights for o in alive for group in getattr(o, "param_groups", ()) for p in group["params"])

    if not found():
        return False
    gc.collect()  # those that only wait to be collected do no harm
    return found()


def check_weights(chosen: dict[str, nn.Module], allow_meta: bool) -> None:
    """Raise on weights that were never loaded, that are not floating or that hold NaN: before the first is changed."""
    for name, module in chosen.items():
        weight = cast(Tensor, module._parameters["weight"])
        if weight.is_meta and not allow_meta:
            raise QuantisationError(
                f"The weight of {name!r} is on the meta device: it was never loaded. Use load_quantised(model, path), "
                "which reads and quantises layer by layer, or load the weights first."
            )
        if weight.dtype not in COMPUTE:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in COMPUTE)
            raise QuantisationError(f"The weight of {name!r} is {weight.dtype}; expected one of {known}.")
        if not weight.is_meta and not all_finite(weight):
            raise QuantisationError(
                f"The weight of {name!r} holds NaN or infinity, which would spoil its blocks. Load the base again, or "
                f"leave it out: skip={name!r}."
            )


def no_packed_eval(model: nn.Module) -> int:
    """Make layers of bitsandbytes safe to train after an eval forward on CPUs with AVX512-BF16 -> how many there are"""
    found = [m for m in state.base_modules(model) if foreign(m)]
    for module in found:
        if hasattr(module, state.REPACKING):
            setattr(module, state.REPACKING, False)
    return len(found)


# ------------------------------------------------------------------ the plugin
class QuantisedBase:
    """What `NF4Precision` and `NF4FSDPPrecision` share: quantising once, at the right moment, and the compute dtype."""

    settings: Quantisation
    targets: str | list[str]
    skip: str | list[str] | None
    rest_dtype: Dtype | None
    scaling: MixedPrecision | None
    mixed: torch.dtype | None  # of autocast
    replaced: list[Any]  # weak references to the weights that are in codes now, while a run is set up

    def configure(self, settings: Quantisation, targets: Any, skip: Any, rest_dtype: Dtype | None) -> None:
        self.settings, self.targets, self.skip, self.rest_dtype = settings, targets, skip, rest_dtype
        rest = None if rest_dtype is None else getattr(torch, rest_dtype)
        halves = [dtype for dtype in (settings.compute_dtype, rest) if dtype in (torch.bfloat16, torch.float16)]
        self.scaling, self.mixed = None, halves[0] if halves else None
        self.replaced = []

    def prepare_base(self, module: nn.Module, device: torch.device | None = None) -> None:
        """Quantise what is not; called when the module is built and has its adapters, and again by the strategy."""
        state.check_not_repacked(module)
        if no_packed_eval(module):
            return  # quantised by another library; accepted as it is
        known = [m for m in state.base_modules(module) if isinstance(m, Quantised)]
        if not known:
            self.replaced = [weakref.ref(p) for p in module.parameters()]
            with keeping_applied(module):
                check_before(module)
                rank_zero_info(str(_quantise(module, self.settings, self.targets, self.skip, device)))
            now = {id(p) for p in module.parameters()}
            self.replaced = [r for r in self.replaced if (p := r()) is not None and id(p) not in now]
        elif other := next((m for m in known if not m.quantisation.same_weights(self.settings)), None):
            raise QuantisationError(
                f"This {type(module).__name__} is quantised already, as {other.quantisation.describe()}; this plugin "
                f"says {self.settings.describe()}. Use the same settings, or load the base anew."
            )
        for layer in known:
            store_as(layer, self.settings.storage_dtype)
            layer.quantisation = with_compute(layer.quantisation, self.settings)
        self.cast_rest(module)

    def cast_rest(self, module: nn.Module) -> None:
        """What is neither quantised nor trained nor an adapter goes to `rest_dtype`, if one is given."""
        if self.rest_dtype is None:
            return
        dtype = getattr(torch, self.rest_dtype)
        trainer = getattr(module, "_trainer", None)
        trains = bool(state.all_applied(module)) or (trainer is not None and trainer.state.fn == "fit")
        for owner in state.base_modules(module):
            for name, p in owner._parameters.items():
                codes = state.is_codes(owner, name)
                if p is not None and p.is_floating_point() and not codes and not (p.requires_grad and trains):
                    p.data = p.data.to(dtype)
                    for kept, buffer in owner._buffers.items():  # running statistics; tables that no file holds stay
                        floats = buffer is not None and buffer.is_floating_point() and not isinstance(owner, Quantised)
                        if floats and kept not in owner._non_persistent_buffers_set:
                            owner._buffers[kept] = cast(Tensor, buffer).to(dtype)

    # -------------------------------------------------------------- Lightning's hooks
    def convert_module(self, module: nn.Module) -> nn.Module:
        """For runs without a method, where nothing was quantised yet."""
        trainer = getattr(module, "_trainer", None)
        fresh = not any(is_quantised(m) for m in state.base_modules(module))
        if fresh and trainer is not None and trainer.state.fn == "fit":
            log.warning(
                "No method is on this module, so checkpoints of this run hold the base's codes, which load into a "
                "quantised "
                "module only. To resume, use a method (LinearProbe trains a head), or call quantise(self) in "
                "configure_model."
            )
        self.prepare_base(module)
        return module

    def connect(self, model: nn.Module, optimizers: list[Any], lr_schedulers: list[Any]) -> Any:
        """Raise on optimizers with weights that are in codes by now, or whose gradients cannot be unscaled."""
        held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        old, self.replaced = {id(p) for r in self.replaced if (p := r()) is not None}, []
        if any(id(p) in old for p in held):
            raise QuantisationError(UNDER_OPTIMIZER)
        halves = sum(p.requires_grad and p.dtype == torch.float16 for p in held)
        if halves and self.scaling is not None:
            raise QuantisationError(
                f"{halves} parameters train in float16, where a scaled loss has no exact gradients (a head of a base "
                "that was loaded in float16, most often). Load the base in float32 or bfloat16 (rest_dtype='float16' "
                "casts what is frozen), or cast what trains: module.classifier.float()."
            )
        return model, optimizers, lr_schedulers

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: what belongs to a run stays with it."""
        return {**vars(self), "replaced": []}

    @contextlib.contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Autocast to the compute dtype, or that of the rest, where it has 16 bits."""
        if self.mixed is None:
            yield
            return
        kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        with contextlib.ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, dtype=self.mixed))
            yield

    def state_dict(self) -> dict[str, Any]:
        """What was trained with, so that another quantisation is not mistaken for it."""
        saved: dict[str, Any] = {"quantisation": self.settings.describe()}
        if self.scaling is not None:
            saved["scaler"] = self.scaling.state_dict()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise where the base of the checkpoint was quantised otherwise."""
        own, before = self.settings.describe(), state_dict.get("quantisation", {})
        fields = self.settings.settles
        if other := [f"{k}: {before.get(k)!r} there, {own[k]!r} here" for k in fields if before.get(k) != own[k]]:
            raise QuantisationError(
                f"The checkpoint was trained on a base that was quantised otherwise ({', '.join(other)}). Use the same "
                "settings, or load its adapter on this base: load_checkpoint(module, path)."
            )
        if self.scaling is not None and "scaler" in state_dict:
            self.scaling.load_state_dict(state_dict["scaler"])


def check_groups(chosen: dict[str, nn.Module], q: Quantisation) -> None:
    """Raise where groups of integers do not fit into a row."""
    for name, module in chosen.items():
        weight = cast(Tensor, module._parameters["weight"])
        if q.mode in INTEGERS and (d_in := weight.shape[0 if is_conv1d(module) else 1]) % q.blocksize:
            raise QuantisationError(
                f"blocksize={q.blocksize} does not divide the {d_in} inputs of {name!r}, which {q.mode} needs. Choose "
                f"one that does, or leave it out: skip={name!r}."
            )


def with_compute(own: Quantisation, given: Quantisation) -> Quantisation:
    """The same bits, computed with as the other says."""
    return Quantisation(
        own.mode, own.blocksize, own.double, given.compute_dtype, own.storage_dtype, given.backend, given.threshold
    )


@contextlib.contextmanager
def keeping_applied(module: nn.Module) -> Iterator[None]:
    """Quantising must not change what methods on the module train."""
    before = set(state.trainable(module))
    yield
    if set(state.trainable(module)) != before:
        raise QuantisationError("Quantising changed what trains; this is an error in lightning_peft. Please report it.")


class NF4Precision(QuantisedBase, Precision):
    """W ~ absmax[block] codebook[code]: the frozen base in 4-bit NormalFloat; QLoRA, 2305.14314, sections 2 and 3

    mode: "nf4", "fp4", "int8" (LLM.int8, 2208.07339), or "int4", "int3", "int2": integers with a scale and a zero in
    groups of `blocksize` inputs (QA-LoRA, 2309.14717). blocksize: weights that share a scale. double_quant: scales in
    8 bits; 4.127 bits a parameter instead of 4.5 at 64. compute_dtype: of products; with a 16-bit one the forward runs
    under autocast, as with "bf16-mixed" (float16 scales the loss). rest_dtype: what embeddings, norms and frozen heads
    are cast to; None leaves them. storage_dtype: what the packed bytes are declared as, for FSDP. targets, skip: the
    one
    selector; heads, embeddings, norms, routers are never among them unless named. backend: "torch" needs nothing,
    "bitsandbytes" is faster, "auto" takes it where it is installed. Adapters stay as they are, in fp32 unless their
    method says otherwise. Works on CPU and CUDA. Errors: QuantisationError.
    """

    precision: Any = "32-true"

    def __init__(
        self,
        mode: Mode = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: Dtype = "bfloat16",
        storage_dtype: Storage = "uint8",
        rest_dtype: Dtype | None = None,
        targets: str | list[str] = "all-linear",
        skip: str | list[str] | None = None,
        backend: Backend = "auto",
        threshold: float = 6.0,
    ) -> None:
        settings = quantisation(mode, blocksize, double_quant, compute_dtype, storage_dtype, backend, threshold)
        if rest_dtype not in (None, "bfloat16", "float16", "float32"):
            raise QuantisationError(
                f"rest_dtype={rest_dtype!r} is unsupported. Known: bfloat16, float16, float32, None."
            )
        self.configure(settings, targets, skip, rest_dtype)
        if self.mixed == torch.float16:
            self.scaling = MixedPrecision("16-mixed", "cuda" if torch.cuda.is_available() else "cpu")

    # float16 needs a scaled loss: Lightning's own plugin does that
    @override
    def pre_backward(self, tensor: Tensor, module: pl.LightningModule) -> Any:  # type: ignore[override]
        return (
            super().pre_backward(tensor, module) if self.scaling is None else self.scaling.pre_backward(tensor, module)
        )

    @override
    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        plugin: Any = super() if self.scaling is None else self.scaling
        return plugin.optimizer_step(optimizer, model=model, closure=closure, **kwargs)

    @override
    def clip_gradients(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        plugin: Any = super() if self.scaling is None else self.scaling
        plugin.clip_gradients(optimizer, *args, **kwargs)


class NF4FSDPPrecision(QuantisedBase, FSDPPrecision):
    """`NF4Precision` for strategies that insist on an `FSDPPrecision`; storage_dtype is that of the compute dtype.

    FSDP flattens the parameters of a group, which must then have one dtype: the packed bytes are declared as it.
    """

    def __init__(
        self,
        mode: Literal["nf4", "fp4"] = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: Literal["bfloat16", "float32"] = "bfloat16",
        targets: str | list[str] = "all-linear",
        skip: str | list[str] | None = None,
        backend: Backend = "auto",
    ) -> None:
        FSDPPrecision.__init__(self, "bf16-true" if compute_dtype == "bfloat16" else "32-true")
        settings = quantisation(mode, blocksize, double_quant, compute_dtype, compute_dtype, backend)
        self.configure(settings, targets, skip, compute_dtype)
