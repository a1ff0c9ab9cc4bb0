"""Codes of a weight: how they are kept, computed with, and written; nothing here knows a module.

    parts = encode(weight, Quantisation("nf4"))      {"weight": packed codes, "absmax": ..., "nested_absmax": ..., ...}
    decode(parts, weight.shape, q)                   the weight as it comes back

Files hold the keys of bitsandbytes' layers; of "int4", "int3" and "int2", which it does not know, a zero beside them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.core import quant
from lightning_peft.core.quant import Blocks, Integers, QuantisationError

CONSTANTS = ("absmax", "nested_absmax", "offset")  # buffers beside the packed weight
BLOCKWISE = ("nf4", "fp4")
INTEGERS = tuple(quant.INTEGERS)
MODES = (*BLOCKWISE, "int8", *INTEGERS)
COMPUTE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
STATE_KEY = "weight.quant_state.bitsandbytes__"


class Kernels(Protocol):
    """What a backend computes; `core.quant` itself is one, bitsandbytes' comes with `lightning_peft.kernels`."""

    def quantise(self, weight: Tensor, kind: str, blocksize: int, double: bool) -> Blocks:
        """(d_out, d_in) -> codes and constants"""

    def dequantise(self, blocks: Blocks, dtype: torch.dtype) -> Tensor:
        """Codes and constants -> (d_out, d_in)"""

    def int8_product(self, a: Tensor, b: Tensor) -> Tensor:
        """a (m, k) int8, b (n, k) int8 -> a b^T (m, n) int32"""


class TorchKernels:
    """Nothing but torch operations: for every device and dtype that torch knows."""

    quantise = staticmethod(quant.quantise)
    dequantise = staticmethod(quant.dequantise)

    @staticmethod
    def int8_product(a: Tensor, b: Tensor) -> Tensor:
        """torch's integer product on the CPU.

        Elsewhere (where it wants sizes in multiples of 8) in fp64, which is exact.
        """
        if a.device.type == "cpu":
            return torch._int_mm(a, b.T)
        return (a.double() @ b.double().T).to(torch.int32)


KERNELS: dict[str, Kernels] = {"torch": TorchKernels()}


def kernels(name: str) -> Kernels:
    """The backend of this name; "auto" takes bitsandbytes' where it is registered."""
    if name == "auto":
        return KERNELS.get("bitsandbytes", KERNELS["torch"])
    if name not in KERNELS:
        raise QuantisationError(f"backend={name!r} is not there. Known: auto, {', '.join(KERNELS)}.")
    return KERNELS[name]


@dataclass(frozen=True)
class Quantisation:
    """How a weight is kept.

    mode: "nf4" and "fp4", 4 bits in blocks of `blocksize` along the input with one scale each; "int8", one scale a row;
    "int4", "int3", "int2": integers in groups of `blocksize` inputs with a scale and a zero each (QA-LoRA, 2309.14717).
    double: the scales are kept in 8 bits themselves. compute_dtype: of the product; None takes that of the activations.
    storage_dtype: as what the packed bytes are declared, for wrappers that want one dtype in a group (FSDP).
    backend: "auto", "torch" or "bitsandbytes". threshold: columns of activations with a magnitude of it or above stay
    out of the 8-bit product (LLM.int8, 2208.07339, section 3.2); 0 for none.
    """

    mode: str = "nf4"
    blocksize: int = 64
    double: bool = True
    compute_dtype: torch.dtype | None = None
    storage_dtype: torch.dtype = torch.uint8
    backend: str = "auto"
    threshold: float = 6.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise QuantisationError(f"mode={self.mode!r} is unknown. Known: {', '.join(MODES)}.")
        if self.mode in BLOCKWISE and self.blocksize not in quant.BLOCKSIZES:
            known = ", ".join(map(str, quant.BLOCKSIZES))
            raise QuantisationError(f"blocksize={self.blocksize!r} is unknown. Known: {known}.")
        if self.mode in INTEGERS and self.blocksize < 1:
            raise QuantisationError(
                f"blocksize={self.blocksize!r}: expected the inputs that share a scale, such as 32."
            )
        for name, known_dtypes in (("compute_dtype", (*COMPUTE, None)), ("storage_dtype", (torch.uint8, *COMPUTE[:3]))):
            if (value := getattr(self, name)) not in known_dtypes:
                shown = ", ".join(str(known).removeprefix("torch.") for known in known_dtypes)
                raise QuantisationError(f"{name}={value!r} is unsupported. Known: {shown}.")
        if not self.threshold >= 0:
            message = "expected 0 (no outliers apart) or a magnitude such as 6.0."
            raise QuantisationError(f"threshold={self.threshold!r}: {message}")
        if self.mode not in BLOCKWISE and self.storage_dtype != torch.uint8:
            raise QuantisationError(
                f"storage_dtype is for 4-bit codes in blocks; {self.mode} weights are kept as they are. Leave it out."
            )

    def same_weights(self, other: Quantisation) -> bool:
        """Whether the two keep a weight in the same bits."""
        names = self.settles
        return names == other.settles and all(getattr(self, name) == getattr(other, name) for name in names)

    @property
    def settles(self) -> tuple[str, ...]:
        """The fields that say which bits a weight is kept in."""
        return ("mode", "blocksize", "double")[: 3 if self.mode in BLOCKWISE else 2 if self.mode in INTEGERS else 1]

    @property
    def short(self) -> str:
        """ "nf4, block 64, double" """
        nested = ", double" if self.double else ""
        if self.mode in INTEGERS:
            return f"{self.mode}, group {self.blocksize}"
        return f"{self.mode}, block {self.blocksize}{nested}" if self.mode in BLOCKWISE else self.mode

    def describe(self) -> dict[str, Any]:
        """As plain types, for files."""
        return {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in asdict(self).items()}


# ------------------------------------------------------------------ the product
class BlockProduct(torch.autograd.Function):
    """y = x W^T + b with W dequantised for this product, and again for dL/dx = dL/dy W: no floating weight is kept."""

    @staticmethod
    def forward(  # type: ignore[override]  # all arguments by name: torch.compile counts them
        x: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        absmax: Tensor,
        nested: Tensor | None,
        offset: Tensor | None,
        shape: tuple[int, int],
        kind: str,
        blocksize: int,
        backend: str,
    ) -> Tensor:
        blocks = packed_blocks(codes, absmax, nested, offset, shape, kind, blocksize)
        return as_input(F.linear(x.reshape(-1, shape[1]), kernels(backend).dequantise(blocks, x.dtype), bias), x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.blocks, ctx.backend = packed_blocks(*inputs[2:]), inputs[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = grads[0] @ kernels(ctx.backend).dequantise(ctx.blocks, grads[0].dtype)
        if ctx.needs_input_grad[1]:
            to_bias = grads[0].reshape(-1, grads[0].shape[-1]).sum(0)
        return (to_x, to_bias, *[None] * 8)


class LowRankProduct(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T: what is of low rank is added in place to what W gives, forward and backward.

    The second of what it returns, z = s x A^T, is for its own backward: x itself is kept only where A trains.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        bias: Tensor | None,
        codes: Tensor,
        absmax: Tensor,
        nested: Tensor | None,
        offset: Tensor | None,
        shape: tuple[int, int],
        kind: str,
        blocksize: int,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        blocks = packed_blocks(codes, absmax, nested, offset, shape, kind, blocksize)
        rows = x.reshape(-1, shape[1])
        y = F.linear(rows, kernels(backend).dequantise(blocks, x.dtype), bias)
        z = scale * F.linear(rows, a)
        return as_input(y.addmm_(z, b.T), x), z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        (x, a, b, ctx.scale), needs = inputs[:4], ctx.needs_input_grad
        ctx.blocks, ctx.backend, ctx.leading = packed_blocks(*inputs[5:]), inputs[-1], x.shape[:-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b, x if needs[1] else None, output[1] if needs[2] else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (a, b, x, z), needs = ctx.saved_tensors, ctx.needs_input_grad
        up = b.new_zeros(ctx.leading.numel(), len(b)) if grads[0] is None else grads[0].reshape(-1, len(b))
        to_z = ctx.scale * (up @ b)
        if grads[1] is not None:  # only in a second derivative
            to_z = to_z + ctx.scale * grads[1]
        to_x = to_a = to_b = to_bias = None
        if needs[0]:
            to_x = up @ kernels(ctx.backend).dequantise(ctx.blocks, up.dtype)  # under autocast, of its dtype
            to_x = to_x.addmm_(to_z, a.to(to_x.dtype)).view(*ctx.leading, a.shape[1])
        if needs[1]:
            to_a = to_z.T @ x.reshape(-1, a.shape[1])
        if needs[2]:
            to_b = up.T @ z
        if needs[4]:
            to_bias = up.sum(0)
        return (to_x, to_a, to_b, None, to_bias, *[None] * 8)


class Int8Product(torch.autograd.Function):
    """y = x W^T by a product of 8-bit integers, columns of x with outliers apart; dL/dx = dL/dy W

    x[t] ~ c[t] a[t] / 127 and W[o] ~ C[o] A[o] / 127, c and C integers: y = (c C^T) a A^T / 127^2.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, absmax: Tensor, threshold: float, backend: str) -> Tensor:
        ctx.codes, ctx.absmax = codes, absmax
        rows = x.reshape(-1, x.shape[-1]).float()
        outliers = (rows.abs() >= threshold).any(0) if threshold else None
        regular = rows if outliers is None else rows.masked_fill(outliers, 0)
        largest = regular.abs().amax(1, keepdim=True)
        scaled = (regular * (127 / largest.clamp_min(torch.finfo(torch.float32).tiny))).round().to(torch.int8)
        y = kernels(backend).int8_product(scaled, codes).float() * (largest * (absmax / (127 * 127)))
        if outliers is not None and (rows.is_meta or torch.compiler.is_compiling()):  # no sizes that depend on values
            y += rows.masked_fill(~outliers, 0) @ int8_weight(codes, absmax, torch.float32).T
        elif outliers is not None and outliers.any():
            index = outliers.nonzero().squeeze(1)
            y += rows[:, index] @ int8_weight(codes[:, index], absmax, torch.float32).T
        return as_input(y.to(x.dtype), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] @ int8_weight(ctx.codes, ctx.absmax, grads[0].dtype), None, None, None, None


def as_input(y: Tensor, x: Tensor) -> Tensor:
    """(n, d_out) -> (..., d_out) as x is (..., d_in)

    Not a view: what a Function returns could not be changed in place then, as `nn.ReLU(inplace=True)` does.
    """
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def packed_blocks(
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    shape: tuple[int, int],
    kind: str,
    blocksize: int,
    *_: Any,
) -> Blocks:
    return Blocks(codes, absmax, nested, offset, shape, kind, blocksize, torch.float32)


def int8_weight(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """W = C A / 127, in `dtype`"""
    return (codes * (absmax / 127)[:, None]).to(dtype)


# ------------------------------------------------------------------ codes of one weight
def all_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity in it; without a copy of it."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


def encode(weight: Tensor, q: Quantisation) -> dict[str, Tensor]:
    """(d_out, d_in) -> "weight", the codes as they are stored, and the constants"""
    if q.mode == "int8":
        found = quant.quantise_integers(weight.float(), 8)
        return {"weight": found.codes, "absmax": (found.scale * 127).flatten()}
    if q.mode in INTEGERS:
        return packed_integers(quant.quantise_integers(weight, quant.INTEGERS[q.mode], q.blocksize, symmetric=False))
    blocks = kernels(q.backend).quantise(weight, q.mode, q.blocksize, q.double)
    values = (blocks.absmax, blocks.nested_absmax, blocks.offset)
    constants = {name: t for name, t in zip(CONSTANTS, values, strict=True) if t is not None}
    return {"weight": stored(blocks.codes, q.storage_dtype), **constants}


def packed_integers(found: Integers) -> dict[str, Tensor]:
    """Integer codes with a scale and a zero for every group, as a layer holds them."""
    return {"weight": quant.pack(found.codes, found.bits), "absmax": found.scale, "offset": cast(Tensor, found.zero)}


def packed_bytes(shape: tuple[int, int], mode: str) -> int:
    """Bytes of the codes of a weight, but for "int8"."""
    return -(-shape[0] * shape[1] * quant.INTEGERS.get(mode, 4) // 8)


def stored(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes (n, 1) declared as `dtype`, filled up to whole elements."""
    if dtype == torch.uint8:
        return codes
    size = torch.empty(0, dtype=dtype).element_size()
    return F.pad(codes.flatten(), (0, -codes.numel() % size)).view(dtype).view(-1, 1)


def decode(parts: dict[str, Tensor], shape: tuple[int, int], q: Quantisation) -> Tensor:
    """What `encode` made -> (d_out, d_in) in fp32"""
    if q.mode == "int8":
        return int8_weight(parts["weight"], parts["absmax"], torch.float32)
    codes = parts["weight"].view(torch.uint8).view(-1, 1)[: packed_bytes(shape, q.mode)]
    constants = (parts.get(name) for name in CONSTANTS)
    return kernels(q.backend).dequantise(packed_blocks(codes, *constants, shape, q.mode, q.blocksize), torch.float32)  # type: ignore[misc, arg-type]


def sample(weight: Tensor, count: int = 4) -> Tensor:
    """`count` values of it, as `core.state.fingerprint` picks them; copies, which do not hold on to it."""
    return weight.flatten()[:: max(1, weight.numel() // count)][:count].to("cpu", torch.bfloat16, copy=True)


# ------------------------------------------------------------------ what files hold
def file_constants(
    q: Quantisation, constants: dict[str, Tensor], shape: tuple[int, int], source_dtype: torch.dtype
) -> dict[str, Tensor]:
    """What a state dict holds beside the codes, under bitsandbytes' names."""
    if q.mode == "int8":
        return {"SCB": constants["absmax"], "weight_format": torch.tensor(0, dtype=torch.uint8)}
    device = constants["absmax"].device
    out = {"weight.absmax": constants["absmax"]}
    out["weight.zero" if q.mode in INTEGERS else "weight.quant_map"] = (
        constants["offset"] if q.mode in INTEGERS else quant.codebook(q.mode, device)
    )
    facts: dict[str, Any] = {
        "quant_type": q.mode,
        "blocksize": q.blocksize,
        "dtype": str(source_dtype).removeprefix("torch."),
        "shape": shape,
    }
    if "nested_absmax" in constants:
        out["weight.nested_absmax"] = constants["nested_absmax"]
        out["weight.nested_quant_map"] = quant.dynamic_map(device).clone()
        offset = constants["offset"]
        nested_offset = 0.0 if offset.is_meta else offset.item()
        facts |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": nested_offset}
    text = torch.frombuffer(bytearray(json.dumps(facts), "utf-8"), dtype=torch.uint8)
    return out | {f"{STATE_KEY}{q.mode}": text}


@dataclass(frozen=True)
class FileWeight:
    """A quantised weight as a file holds it."""

    quantisation: Quantisation
    parts: dict[str, Tensor]
    shape: tuple[int, int]
    source_dtype: torch.dtype | None  # None where the file does not say


def from_file(found: dict[str, Tensor]) -> FileWeight | None:
    """The entries of one layer, keys from "weight" on -> what they say; None for a floating weight."""
    if "SCB" in found:
        parts = {"weight": found["weight"], "absmax": found["SCB"].float().flatten()}
        check_rows(parts)
        shape = cast("tuple[int, int]", tuple(found["weight"].shape))
        return FileWeight(Quantisation("int8"), parts, shape, None)
    key = next((k for k in found if k.startswith(STATE_KEY)), None)
    if key is None:
        return None
    try:
        facts = json.loads(bytes(found[key].cpu().tolist()))
        shape, dtype = (int(facts["shape"][0]), int(facts["shape"][1])), getattr(torch, facts["dtype"])
        kind, blocksize = facts["quant_type"], facts["blocksize"]
        integers = kind in INTEGERS
        if (
            not isinstance(dtype, torch.dtype)
            or integers != ("weight.zero" in found)
            or ("nested_offset" in facts) != ("weight.nested_absmax" in found)
        ):
            raise TypeError("dtype or the scales of the scales")
        parts = {"weight": found["weight"], "absmax": found["weight.absmax"]}
        if integers:
            parts["offset"] = found["weight.zero"]
        if nested := "weight.nested_absmax" in found:
            device = found["weight.absmax"].device
            offset = torch.tensor(float(facts["nested_offset"]), dtype=torch.float32, device=device)
            parts |= {"nested_absmax": found["weight.nested_absmax"], "offset": offset}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise QuantisationError(f"{key} is damaged ({error!r}). Export the base again.") from error
    q = Quantisation(kind, blocksize, nested, storage_dtype=found["weight"].dtype)
    check_parts(parts, shape, q)
    return FileWeight(q, parts, shape, dtype)


def check_rows(parts: dict[str, Tensor]) -> None:
    """Raise where 8-bit codes and their scales do not belong together."""
    codes, absmax = parts["weight"], parts["absmax"]
    if codes.dtype != torch.int8 or codes.dim() != 2 or len(absmax) != len(codes):
        raise QuantisationError(
            f"weight is {tuple(codes.shape)} {codes.dtype} and has {len(absmax)} scales; expected int8 (d_out, "
            f"d_in) and "
            "d_out. The file is damaged: export the base again."
        )
    if not absmax.is_meta and not all_finite(absmax):
        raise QuantisationError("SCB holds NaN or infinity. The file is damaged: export the base again.")


def check_parts(parts: dict[str, Tensor], shape: tuple[int, int], q: Quantisation) -> None:
    """Raise where codes and scales are not what a weight of this shape has."""
    count = shape[0] * shape[1]
    blocks, size = -(-count // q.blocksize), packed_bytes(shape, q.mode)
    wanted = {"absmax": (torch.uint8 if q.double else torch.float32, blocks)}
    if q.mode in INTEGERS:
        wanted["offset"] = torch.float32, blocks
    if q.double:
        wanted["nested_absmax"] = torch.float32, -(-blocks // 256)
    fits = {name: (parts[name].dtype, parts[name].numel()) == expected for name, expected in wanted.items()}
    codes = parts["weight"]
    fits["weight"] = size <= codes.nbytes < size + max(codes.element_size(), 1)  # filled up to whole elements
    for name in ("absmax", "nested_absmax", "offset"):
        if (constant := parts.get(name)) is not None and constant.is_floating_point() and not constant.is_meta:
            fits[name] = fits.get(name, True) and all_finite(constant)
    if wrong := [name for name, right in fits.items() if not right]:
        shown = ", ".join(f"{name} {tuple(parts[name].shape)} {parts[name].dtype}" for name in wrong)
        raise QuantisationError(
            f"{shown}: not what {q.short} of {shape} has, or not finite. The file is damaged: export the base again."
        )


def restored(given: FileWeight, q: Quantisation) -> dict[str, Tensor]:
    """The parts of a file's weight as the layer holds them."""
    codes = given.parts["weight"]
    return {
        **given.parts,
        "weight": codes if q.mode == "int8" else stored(codes.view(torch.uint8).view(-1, 1), q.storage_dtype),
    }
