"""Projections with a quantised weight: Linear and Conv1D changed in place, and changed back.

    quantise_module(linear, Quantisation("nf4"))      linear is still an nn.Linear, with its hooks, adapters and bias
    linear.weight                                     the dequantised weight, made anew whenever it is read
    linear.packed                                     the codes, a parameter without a gradient
    thaw(linear, torch.bfloat16)                      a plain Linear again; `refreeze` undoes that

What is written to a state dict has the keys of bitsandbytes' layers, so that either reads the other's files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import Host, adapters_of
from lightning_peft.core.architectures import is_conv1d
from lightning_peft.core.codes import (
    BLOCKWISE,
    CONSTANTS,
    BlockProduct,
    FileWeight,
    Int8Product,
    LowRankProduct,
    Quantisation,
    decode,
    encode,
    file_constants,
    from_file,
    int8_weight,
    kernels,
    packed_blocks,
    packed_bytes,
    restored,
    sample,
    stored,
)
from lightning_peft.core.quant import Blocks, QuantisationError

LowRankTerm = tuple[Tensor, Tensor, float]


# ------------------------------------------------------------------ the layer
class Quantised(nn.Module):
    """What a quantised projection has beside the class that it had before; its class is made by `quantised_class`."""

    quantisation: Quantisation
    source_dtype: torch.dtype
    samples: Tensor | None  # a few values of the weight before, to know the base again; None where they are not known
    features: tuple[int, int]  # d_out, d_in
    trained: bool  # whether the weight had a gradient before
    packed: nn.Parameter  # the codes as they are kept

    @property
    def weight(self) -> Tensor:
        """The dequantised weight in the shape and the dtype that the plain module would have."""
        weight = self.dequantised(self.source_dtype)
        return weight.T if is_conv1d(self) else weight

    @property
    def codes(self) -> Tensor:
        """The packed bytes, whatever dtype they are declared as; (d_out, d_in) int8 where a row has one scale."""
        if self.quantisation.mode == "int8":
            return self.packed
        return self.packed.detach().view(torch.uint8).view(-1, 1)[: packed_bytes(self.features, self.quantisation.mode)]

    def blocks(self) -> Blocks:
        """What `core.quant` works with."""
        return packed_blocks(self.codes, *self._constants())

    def _constants(self) -> tuple[Any, ...]:
        q = self.quantisation
        return (*(self._buffers.get(name) for name in CONSTANTS), self.features, q.mode, q.blocksize, q.backend)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(d_out, d_in)"""
        if self.quantisation.mode == "int8":
            return int8_weight(self.codes, cast(Tensor, self._buffers["absmax"]), dtype)
        return kernels(self.quantisation.backend).dequantise(self.blocks(), dtype)

    def forward(self, x: Tensor, low_rank: LowRankTerm | None = None) -> Tensor:
        """y = x W^T + b; (..., d_in) -> (..., d_out), in the dtype of x, or of autocast

        low_rank: A (r, d_in), B (d_out, r) and s of a term s (x A^T) B^T, where `takes_low_rank`.
        """
        out, autocast = dtype_around(x)
        x = x.to(self.quantisation.compute_dtype or out)
        if not autocast:
            return self._product(x, low_rank).to(out)
        with torch.autocast(x.device.type, enabled=False):
            return self._product(x, low_rank).to(out)

    def _product(self, x: Tensor, low_rank: LowRankTerm | None) -> Tensor:
        q = self.quantisation
        bias = None if self.bias is None else cast(Tensor, self.bias).to(x.dtype)
        if low_rank is not None:
            a, b, scale = low_rank
            given = (x, a.to(x.dtype), b.to(x.dtype), scale, bias, self.codes, *self._constants())
            return LowRankProduct.apply(*given)[0]
        if q.mode != "int8":
            return BlockProduct.apply(x, bias, self.codes, *self._constants())
        y = Int8Product.apply(x, self.codes, self._buffers["absmax"], q.threshold, q.backend)
        return y if bias is None else y + bias

    @property
    def nbytes(self) -> int:
        """Bytes of codes and constants."""
        return sum(t.nbytes for t in (self.packed, *self.constants().values()))

    def constants(self) -> dict[str, Tensor]:
        """The buffers with the scales, by name."""
        return {name: cast(Tensor, self._buffers[name]) for name in CONSTANTS if self._buffers.get(name) is not None}

    def extra_repr(self) -> str:
        """As the plain module, and how it is quantised."""
        shape = super().extra_repr() or f"nf={self.features[0]}, nx={self.features[1]}"
        return f"{shape}, {self.quantisation.short}"

    __repr__ = nn.Module.__repr__  # Conv1D has one that would not say it

    # -------------------------------------------------------------- copies, moves, files
    def __reduce_ex__(self, protocol: Any) -> Any:
        return revived, (plain_class(self),), vars(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Another weight cannot be assigned: there are codes."""
        if name == "weight":
            raise QuantisationError(
                f"A weight cannot be assigned to a projection in {self.quantisation.mode}. Load it, "
                "load_state_dict({'weight': ...}) quantises it; or `dequantise` the model first."
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantised:
        """Codes and scales follow to another device and keep their dtype, whatever they are declared as."""
        for child in self.children() if recurse else ():
            child._apply(fn)
        own = {id(self.packed)} | {id(t) for t in self.constants().values()}

        def keep(tensor: Tensor) -> Tensor:
            if id(tensor) not in own:
                return fn(tensor)
            raw = fn(tensor.reshape(-1).view(torch.uint8))  # moved, shared, emptied; a cast leaves bytes alone
            if raw.dtype != torch.uint8:  # .type(...) does not
                return tensor.to(raw.device)
            return raw.view(tensor.dtype).view(tensor.shape)

        super()._apply(keep, recurse=False)
        self.source_dtype = fn(torch.empty(0, dtype=self.source_dtype)).dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        held = {name: self._buffers.pop(name) for name in CONSTANTS if name in self._buffers}
        parameters, self._parameters = (
            self._parameters,
            {"weight" if n == "packed" else n: p for n, p in self._parameters.items()},
        )
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._parameters = parameters
            self._buffers.update(held)
        destination |= {
            prefix + key: tensor
            for key, tensor in file_constants(
                self.quantisation, self.constants(), self.features, self.source_dtype
            ).items()
        }
        if self.samples is not None:
            destination[f"{prefix}samples"] = self.samples

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        """Takes codes as they are, or a floating weight of the plain shape, which it quantises."""
        mine = {k.removeprefix(prefix): t for k, t in state_dict.items() if k.startswith(f"{prefix}weight")}
        mine |= {k: state_dict[prefix + k] for k in ("SCB", "weight_format", "samples") if prefix + k in state_dict}
        packed, held = self._parameters.pop("packed"), dict(self._buffers)
        self._buffers.clear()
        found: list[str] = []
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, found, errors)
        finally:
            self._parameters = {"packed": packed, **self._parameters}
            self._buffers.update(held)
        unexpected += [key for key in found if key.removeprefix(prefix) not in mine]
        if "weight" not in mine:
            missing.append(f"{prefix}weight")
            return
        try:
            load_weight(self, mine)
        except QuantisationError as error:
            errors.append(f"{prefix}weight: {error}")


def dtype_around(x: Tensor) -> tuple[torch.dtype, bool]:
    """The dtype that a product with x has, and whether that is for autocast."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype, False
    return torch.get_autocast_dtype(device), True


def takes_low_rank(base: Callable[..., Tensor], x: Tensor) -> bool:
    """Whether `base` is the own forward of a quantised projection that can add a low-rank term, in the same dtype.

    Not in a graph that is compiled: a compiler fuses by itself, and Functions do not take its symbol for the scale.
    """
    own = isinstance(base, functools.partial) and base.func is Quantised.forward  # not what another library put there
    if not own or torch.compiler.is_compiling():
        return False
    owner: Quantised = base.args[0]  # type: ignore[attr-defined]
    if owner.quantisation.mode == "int8":
        return False
    return owner.quantisation.compute_dtype in (None, dtype_around(x)[0])


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def quantised_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of quantised instances of `base`; still a subclass of it."""
    if base not in _CLASSES:
        _CLASSES[base] = type(f"Quantised{base.__name__}", (Quantised, base), {"__module__": __name__})
    return _CLASSES[base]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had, or has, without codes; bitsandbytes' layers stand for Linear."""
    kind = type(module)
    return kind.__mro__[2] if isinstance(module, Quantised) else nn.Linear if foreign(module) else kind


def revived(base: type[nn.Module]) -> nn.Module:
    """An empty instance, for pickle and copy."""
    kind = quantised_class(base)
    return cast(nn.Module, kind.__new__(kind))


# ------------------------------------------------------------------ changing modules
def can_quantise(module: nn.Module) -> bool:
    """Whether it is a projection whose only use of its weight is the product x W^T + b."""
    weight = module._parameters.get("weight")
    plain = type(module).forward is nn.Linear.forward or (is_conv1d(module) and "forward" in vars(type(module)))
    return plain and weight is not None and weight.dim() == 2 and not isinstance(module, Quantised)


@torch.no_grad()
def quantise_module(
    module: nn.Module,
    q: Quantisation,
    device: torch.device | None = None,
    compensate: bool = True,
    parts: dict[str, Tensor] | None = None,
) -> Quantised:
    """Replace the weight of a Linear or Conv1D by its codes, in place; nothing changes if it raises.

    device: where to quantise, and where the codes then are. compensate: ask the adapters on it first. parts: codes that
    were made already.
    """
    parameter = module._parameters.get("weight")
    if parameter is None or not can_quantise(module):
        raise QuantisationError(
            f"{type(module).__name__} cannot be quantised: it is not a Linear or Conv1D with a plain forward, or it is "
            "quantised already. Leave it out with skip=..."
        )
    weight = parameter.detach()
    matrix = oriented(module, weight if device is None else weight.to(device))
    if parts is None:
        parts = encode(compensated(module, matrix, q) if compensate else matrix, q)
    samples = None if weight.is_meta else sample(weight)
    module.quantisation, module.source_dtype, module.samples = q, weight.dtype, samples  # type: ignore[assignment]
    module.features, module.trained = tuple(matrix.shape), parameter.requires_grad  # type: ignore[assignment]
    install(module, parts)
    module.__class__ = quantised_class(type(module))
    if compensate:
        rebase(module)
    return cast(Quantised, module)


def rebase(module: nn.Module) -> None:
    """Tell the adapters on a module, and on slices of it, that its weight is in codes now."""
    for place in (module, *module.children()):
        for adapter in adapters_of(place):
            adapter.rebased()


def compensated(module: nn.Module, weight: Tensor, q: Quantisation) -> Tensor:
    """What to quantise in place of the weight, by the word of the adapters on the module (`Adapter.compensate`)."""
    if weight.is_meta:
        return weight

    def rounded(w: Tensor) -> Tensor:
        return decode(encode(w, q), (w.shape[0], w.shape[1]), q)

    for adapter in adapters_of(module):
        weight = adapter.compensate(weight, rounded)
    for host in (child for child in module.children() if isinstance(child, Host)):
        for adapter in adapters_of(host):
            columns: Any = host.columns
            weight = columns.put(weight, adapter.compensate(columns.take(weight, 0), rounded), 0)
    return weight


def oriented(module: nn.Module, weight: Tensor) -> Tensor:
    """(d_out, d_in): blocks run along the input."""
    return weight.T.contiguous() if is_conv1d(module) else weight


def install(module: nn.Module, parts: dict[str, Tensor]) -> None:
    """Hang codes and constants on the module in place of its weight; bias and adapters stay."""
    rename(module, "packed", nn.Parameter(parts["weight"], requires_grad=False))
    for name in CONSTANTS:
        module._buffers.pop(name, None)
        if name in parts:
            module._buffers[name] = parts[name]


def rename(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put the first parameter, weight or codes, under another name; those after it keep their order."""
    others = {n: p for n, p in module._parameters.items() if n not in ("weight", "packed")}
    module._parameters = {name: parameter, **others}


@dataclass(eq=False)
class Frozen:
    """A module as it was when it was quantised, tensors by reference; what `refreeze` needs."""

    module: nn.Module
    plain: type[nn.Module]  # its class without codes
    kind: type[nn.Module] | None  # bitsandbytes' class, if it was one of its layers
    parameter: nn.Parameter
    bias: Tensor | None  # its values; the parameter stays the one that it was
    source_dtype: torch.dtype
    buffers: dict[str, Tensor]
    attributes: dict[str, Any] = field(default_factory=dict)
    merged_dtype: torch.dtype | None = None  # of the bias that stands in for the original
    bias_changed: bool = False  # by what was merged


ATTRIBUTES = ("quantisation", "source_dtype", "samples", "features", "trained")


def foreign(module: nn.Module) -> bool:
    """Whether it is a layer of bitsandbytes with a quantised weight (4 bits, or 8)."""
    parameter: Any = module._parameters.get("weight")
    kind = type(parameter).__name__
    return kind == "Params4bit" or (kind == "Int8Params" and not parameter.has_fp16_weights)


def repacked(module: nn.Module) -> bool:
    """Whether an evaluation on a CPU has rewritten a layer of bitsandbytes: gradients through it are wrong ever
    after.
    """
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def is_quantised(module: nn.Module) -> bool:
    """Whether its weight is in codes, ours or bitsandbytes'."""
    return isinstance(module, Quantised) or foreign(module)


@torch.no_grad()
def thaw(module: nn.Module, dtype: torch.dtype) -> Frozen:
    """Make it a plain projection with the dequantised weight and a bias in `dtype`, in place; adapters stay."""
    ours = isinstance(module, Quantised)
    parameter = cast(nn.Parameter, module._parameters["packed" if ours else "weight"])
    bias = module._parameters.get("bias")
    weight = module.dequantised(dtype) if isinstance(module, Quantised) else foreign_weight(module, dtype)
    source = module.source_dtype if isinstance(module, Quantised) else foreign_dtype(parameter)
    values = None if bias is None else bias.data
    frozen = Frozen(module, plain_class(module), None if ours else type(module), parameter, values, source, {})
    if ours:
        frozen.buffers = {n: cast(Tensor, module._buffers.pop(n)) for n in CONSTANTS if n in module._buffers}
        frozen.attributes = {name: vars(module).pop(name) for name in ATTRIBUTES if name in vars(module)}
    module.__class__ = frozen.plain
    rename(module, "weight", nn.Parameter(weight.T.contiguous() if is_conv1d(module) else weight, False))
    if bias is not None:
        bias.data, frozen.merged_dtype = bias.data.to(dtype, copy=True), dtype
    return frozen


def refreeze(frozen: Frozen) -> None:
    """Undo `thaw`, bit for bit; on the device that the module is on by now."""
    module = frozen.module
    current = cast(Tensor, module._parameters.get("weight", module._parameters.get("packed")))
    device, bias = current.device, module._parameters.get("bias")
    if frozen.parameter.device != device:
        frozen.parameter = nn.Parameter(frozen.parameter.detach().to(device), False)
        frozen.buffers = {name: buffer.to(device) for name, buffer in frozen.buffers.items()}
    module.__class__ = frozen.kind or quantised_class(frozen.plain)
    rename(module, "weight" if frozen.kind else "packed", frozen.parameter)
    if frozen.bias is not None and bias is not None:
        dtype = frozen.bias.dtype if bias.dtype == frozen.merged_dtype else bias.dtype  # cast since
        kept = not frozen.bias_changed and not torch.equal(bias.data, frozen.bias.to(device, bias.dtype))
        bias.data = bias.data.to(dtype) if kept else frozen.bias.to(device, dtype)  # trained since, by another method
    for name in CONSTANTS:
        module._buffers.pop(name, None)
    for name in ATTRIBUTES:
        vars(module).pop(name, None)
    module._buffers.update(frozen.buffers)
    vars(module).update(frozen.attributes)


def restore_floats(module: nn.Module, kind: type[nn.Module], parameter: nn.Parameter) -> None:
    """Undo `quantise_module` with the weight from before."""
    for name in (*CONSTANTS, *ATTRIBUTES):
        module._buffers.pop(name, None)
        vars(module).pop(name, None)
    module.__class__ = kind
    rename(module, "weight", parameter)


def foreign_dtype(parameter: Any) -> torch.dtype:
    """What a weight of bitsandbytes was quantised from."""
    return getattr(getattr(parameter, "quant_state", None), "dtype", torch.float16)


def settings(frozen: Frozen) -> Quantisation:
    """How a module was quantised that `thaw` made plain."""
    if "quantisation" in frozen.attributes:
        return cast(Quantisation, frozen.attributes["quantisation"])
    state = getattr(frozen.parameter, "quant_state", None)
    if state is None:
        return Quantisation("int8")
    return Quantisation(state.quant_type, state.blocksize, state.nested, frozen.module.compute_dtype)  # type: ignore[arg-type]


def foreign_weight(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The dequantised weight of a layer of bitsandbytes, (d_out, d_in)."""
    parameter: Any = module._parameters["weight"]
    if type(parameter).__name__ == "Int8Params":
        state: Any = getattr(module, "state", None)
        absmax = parameter.SCB if parameter.SCB is not None else getattr(state, "SCB", None)
        if absmax is None:
            raise QuantisationError("This 8-bit layer holds no scales yet: move the model to its device first.")
        codes = parameter.data if parameter.data.dtype == torch.int8 else state.CB
        return int8_weight(codes, absmax, dtype)
    state = getattr(parameter, "quant_state", None)
    if repacked(module):
        raise QuantisationError("An evaluation on this CPU has repacked this layer of bitsandbytes. Load it again.")
    if state is None:
        raise QuantisationError("This 4-bit layer is not quantised yet: move the model to its device first.")
    nested, offset = (state.state2.absmax, state.offset) if state.nested else (None, None)
    codes = parameter.data.view(torch.uint8).view(-1, 1)
    blocks = Blocks(
        codes, state.absmax, nested, offset, tuple(state.shape), state.quant_type, state.blocksize, state.dtype
    )
    return kernels("auto").dequantise(blocks, dtype)


# ------------------------------------------------------------------ state dicts
@torch.no_grad()
def load_weight(module: Quantised, found: dict[str, Tensor]) -> None:
    """Put the entries of a state dict into a quantised layer: codes of the same kind, or a floating weight."""
    given, q, device = from_file(found), module.quantisation, module.packed.device
    if given is None:
        weight = found["weight"]
        shape = module.features[::-1] if is_conv1d(module) else module.features
        if tuple(weight.shape) != shape or not weight.is_floating_point():
            raise QuantisationError(
                f"{tuple(weight.shape)} {weight.dtype} is neither the floating weight {shape} nor codes with their "
                "scales. Use a file of this model."
            )
        parts = encode(oriented(module, weight.to(device if device.type != "meta" else weight.device)), q)
        samples: Tensor | None = sample(weight)
    else:
        check_same(module, given)
        parts, samples = restored(given, q), found.get("samples")
        module.source_dtype = given.source_dtype or module.source_dtype
    put(module, parts, device)
    module.samples = None if samples is None else samples.to("cpu", torch.bfloat16, copy=True)


def check_same(module: Quantised, given: FileWeight) -> None:
    """Raise where a file's codes are of another kind than the layer's."""
    q = module.quantisation
    if given.shape != module.features or not given.quantisation.same_weights(q):
        raise QuantisationError(
            f"the file holds {given.quantisation.mode} of {given.shape} in blocks of {given.quantisation.blocksize}"
            f"{' with' if given.quantisation.double else ' without'} double quantisation; this layer is {q.mode} of "
            f"{module.features}, {q.blocksize}, {'with' if q.double else 'without'}. Quantise with the settings of "
            f"the file."
        )


def store_as(module: Quantised, dtype: torch.dtype) -> None:
    """Declare the packed bytes of a 4-bit layer as another dtype."""
    if module.quantisation.mode in BLOCKWISE and module.quantisation.storage_dtype != dtype:
        rename(module, "packed", nn.Parameter(stored(module.codes, dtype), requires_grad=False))
        module.quantisation = replace(module.quantisation, storage_dtype=dtype)


def put(module: Quantised, parts: dict[str, Tensor], device: torch.device) -> None:
    """Copy into the tensors that are there; where there is no memory yet, take these."""
    here = {"weight": module.packed, **module.constants()}
    if device.type == "meta" or {k: t.shape for k, t in here.items()} != {k: t.shape for k, t in parts.items()}:
        target = parts["weight"].device if device.type == "meta" else device
        install(module, {name: tensor.to(target, copy=True) for name, tensor in parts.items()})
        return
    for name, tensor in parts.items():
        here[name].copy_(tensor)


def adopt_file(module: nn.Module, found: dict[str, Tensor], q: Quantisation) -> Quantised:
    """Make a plain projection (on the meta device, most often) the quantised one that a file holds.

    q: compute dtype, backend, and storage dtype; the rest is the file's.
    """
    given = from_file(found)
    if given is None or not can_quantise(module):
        raise QuantisationError(f"{type(module).__name__} is no projection that these entries could be put into.")
    weight = cast(Tensor, module._parameters["weight"])
    shape = tuple(weight.shape[::-1] if is_conv1d(module) else weight.shape)
    if shape != given.shape:
        raise QuantisationError(f"the file holds a weight of {given.shape}, the module has {shape}.")
    own: dict[str, Any] = {"compute_dtype": q.compute_dtype, "backend": q.backend}
    if given.quantisation.mode in BLOCKWISE:
        own["storage_dtype"] = q.storage_dtype
    mine = replace(given.quantisation, **own)  # type: ignore[arg-type]
    module.quantisation, module.source_dtype = mine, given.source_dtype or weight.dtype  # type: ignore[assignment]
    module.samples, module.trained = found.get("samples"), weight.requires_grad  # type: ignore[assignment]
    module.features = given.shape  # type: ignore[assignment]
    install(module, restored(given, mine))
    module.__class__ = quantised_class(type(module))
    return cast(Quantised, module)
