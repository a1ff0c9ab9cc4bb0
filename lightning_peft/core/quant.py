"""Quantised weights in plain torch: NF4, FP4 and NFk in blocks with double quantisation, and INT-N in groups.

QLoRA: Efficient Finetuning of Quantized LLMs. Dettmers, Pagnoni, Holtzman, Zettlemoyer. NeurIPS 2023.
https://arxiv.org/abs/2305.14314

Codes, constants and dequantised values of NF4 and FP4 are bit-equal to those of bitsandbytes 0.50 on a CPU.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad

BLOCKSIZES = tuple(2**n for n in range(4, 13))
NESTED = 256  # absmax values that share one fp32 constant after double quantisation
INTEGERS = {"int4": 4, "int3": 3, "int2": 2}  # kind -> bits of codes in groups with a scale and a zero each
SMALLEST = 1e-38  # stands for the absmax of an all-zero block where something is divided by it


class QuantisationError(ValueError):
    """A weight that cannot be quantised, or settings that do not exist."""


def _fp32(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])


def _linspace(first: float, last: float, steps: int) -> list[float]:
    """`torch.linspace` in single precision; tables must not depend on the default device or on fake tensors."""
    width = _fp32(_fp32(_fp32(last) - _fp32(first)) / (steps - 1))
    up = [_fp32(_fp32(first) + width * n) for n in range(steps // 2)]
    return up + [_fp32(_fp32(last) - width * (steps - 1 - n)) for n in range(steps // 2, steps)]


def _normal_float(bits: int) -> tuple[float, ...]:
    """NFk: 0 and quantiles of N(0, 1) at even steps from delta to 1/2, 2^(k-1) above zero, 2^(k-1) - 1 below; max 1.

    delta = ((1 - 1/30) + (1 - 1/32)) / 2 for every k, cut to seven digits as in the released table.
    """
    half = 2 ** (bits - 1)
    above, below = (
        [_fp32(NormalDist().inv_cdf(x)) for x in _linspace(0.9677083, 0.5, steps)[:-1]] for steps in (half + 1, half)
    )
    return tuple(_fp32(x / above[0]) for x in sorted([*(-x for x in below), 0.0, *above]))


def _dynamic() -> tuple[float, ...]:
    """0, 1 and +-10^(n - 6) m, n = 0..6, where m are the centres of 2^n even cells of [0.1, 1]; in fp32."""
    values = [0.0, 1.0]
    for n in range(7):
        edges = _linspace(0.1, 1.0, 2**n + 1)
        for low, high in pairwise(edges):
            value = _fp32(_fp32(10 ** (n - 6)) * _fp32(_fp32(low + high) / 2))
            values += [value, -value]
    return tuple(sorted(values))


_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = tuple(_fp32(x / 12) for x in (0, 1 / 16, 8, 12, 4, 6, 2, 3))  # two bits of exponent, one of mantissa
KINDS: dict[str, tuple[float, ...]] = {
    "nf4": _NF4,  # the released table, which `_normal_float(4)` gives too
    "fp4": _FP4 + tuple(0.0 - x for x in _FP4),  # the highest bit is the sign
    **{f"nf{bits}": _normal_float(bits) for bits in (2, 3, 5, 6, 7, 8)},
}
_DYNAMIC = _dynamic()
_TABLES: dict[tuple[str, str, torch.device], Tensor] = {}


def bits_of(kind: str) -> int:
    """Bits of a code: 4 for "nf4" and "fp4", k for "nfk"."""
    if kind not in KINDS:
        raise QuantisationError(f"Unknown kind {kind!r} of codes. Known: {', '.join(sorted(KINDS))}.")
    return int(kind[2:])


def codebook(kind: str, device: torch.device | str | None = None) -> Tensor:
    """The values of `kind`, (2**bits,) fp32 in [-1, 1]; the index is the code. FP4 is in the order of its bits."""
    bits_of(kind)
    return torch.tensor(KINDS[kind], dtype=torch.float32, device=device)


def dynamic_map(device: torch.device | str | None = None) -> Tensor:
    """The signed 8-bit dynamic map, (256,) fp32 ascending from -0.993 to 1: what the codes of an absmax stand for."""
    return torch.tensor(_DYNAMIC, dtype=torch.float32, device=device)


def _words(kind: str, device: torch.device) -> Tensor:
    """The values of two codes in a row, (4**bits, 2) fp32, or those of one, (2**bits, 1), where they are wide."""
    book = codebook(kind, device)
    if len(book) > 16:
        return book[:, None]
    return torch.stack((book[:, None].expand(-1, len(book)), book.expand(len(book), -1)), -1).flatten(0, 1)


def _order(kind: str, device: torch.device) -> Tensor:
    """The codes by ascending value, uint8."""
    order = sorted(range(len(KINDS[kind])), key=KINDS[kind].__getitem__)
    return torch.tensor(order, dtype=torch.uint8, device=device)


def _midpoints(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2


def _bins(kind: str, device: torch.device) -> Tensor:
    """Even bins of [-1, 1] with one midpoint of neighbouring values at most: (2 n + 1,) midpoints, inf where none is.

    Then the number of midpoints below x is that of the bins below that of x, and one more if x > bins[bin of x].
    """
    bounds = _midpoints(codebook(kind, device).sort().values)
    n = 1
    while (place := _bin(bounds, n)).unique().numel() < bounds.numel():
        n *= 2
    return torch.full((2 * n + 1,), math.inf, device=device).scatter_(0, place.long(), bounds)


def _bin(scaled: Tensor, n: int) -> Tensor:
    """[-1, 1] -> 0 .. 2n, int32; never falls where `scaled` rises. The ends take what lies beyond, and NaN."""
    return (scaled * n).add_(n).int().clamp_(0, 2 * n)


def _below(kind: str, device: torch.device) -> Tensor:
    """How many midpoints lie in the `_bins` below each, uint8."""
    here = _bins(kind, device).isfinite()
    return (here.cumsum(0) - here.long()).to(torch.uint8)


_MAKERS: dict[str, Callable[[str, torch.device], Tensor]] = {
    "dynamic": lambda _, device: dynamic_map(device),
    "words": _words,
    "order": _order,
    "bins": _bins,
    "below": _below,
}


def _abstract(like: Tensor) -> bool:
    return like.is_meta or isinstance(like, FakeTensor)


def _beside(like: Tensor) -> AbstractContextManager[object]:
    """Where a new tensor is one that `like` can be used with: fake tensors know only those of their own mode."""
    return like.fake_mode if isinstance(like, FakeTensor) else nullcontext()


def _table(name: str, kind: str, like: Tensor) -> Tensor:
    """The table `name` of `kind` beside `like`, made once per device; anew in a trace, which it must not outlive."""
    if torch.compiler.is_compiling() or _abstract(like):
        with _beside(like):
            return _MAKERS[name](kind, like.device)
    key = (name, kind, like.device)
    if key not in _TABLES:
        with torch.inference_mode(False), torch.no_grad():
            made = _MAKERS[name](kind, like.device)
        if _abstract(made):  # a mode is on that makes everything fake
            return made
        _TABLES[key] = made
    return _TABLES[key]


def _chunk(like: Tensor) -> int:
    """Elements at a time: on a CPU what its cache holds, elsewhere what is worth the launch of an operation."""
    if torch.compiler.is_compiling() or like.is_meta:
        return sys.maxsize
    if like.device.type != "cpu":
        return 2**23
    return 2**20 if isinstance(like, FakeTensor) else 2**17


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits each as one string of bits, the first code and its highest bit first.

    Any shape, integers in [0, 2**bits) -> (ceil(count * bits / 8), 1) uint8, zeros at the end. Add 2**(bits - 1) to
    signed codes first.
    """
    _check_bits(bits)
    count = codes.numel()
    each = 8 // bits if 8 % bits == 0 else 8  # codes in a word of whole bytes
    flat = pad(codes.reshape(-1).to(torch.uint8), (0, -count % each)).view(-(-count // each), each)
    if 8 % bits == 0:
        word = flat[:, 0] << (8 - bits)
        for n in range(1, each):
            word |= flat[:, n] << (8 - bits * (n + 1))
        return word.unsqueeze(1)
    words = (flat.long() << _shifts(7, bits, flat)).sum(1, keepdim=True)
    spread = (words >> _shifts(bits - 1, 8, flat)) & 255
    return spread.to(torch.uint8).view(-1, 1)[: _bytes(count, bits)].clone()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of what `pack` returned: (bytes, 1) uint8 -> (count,) uint8."""
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.numel() < _bytes(count, bits):
        raise QuantisationError(
            f"{count} codes of {bits} bits are {_bytes(count, bits)} bytes, not {packed.numel()} of {packed.dtype}: "
            "give what pack() returned, and the count and bits it was packed with."
        )
    codes = _unpack(packed.reshape(-1), bits)[:count]
    return codes.clone() if bits == 8 else codes


def _unpack(flat: Tensor, bits: int) -> Tensor:
    """All the codes of (bytes,), filled up with zeros to whole words: uint8, for 8 bits the bytes themselves."""
    if bits == 8:
        return flat
    if 8 % bits == 0:
        shifts = _shifts(8 // bits - 1, bits, flat).to(torch.uint8)
        return ((flat[:, None] >> shifts) & (2**bits - 1)).flatten()
    words = pad(flat, (0, -flat.numel() % bits)).view(-(-flat.numel() // bits), bits)
    words = (words.long() << _shifts(bits - 1, 8, flat)).sum(1, keepdim=True)
    return ((words >> _shifts(7, bits, flat)) & (2**bits - 1)).to(torch.uint8).flatten()


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _shifts(first: int, bits: int, like: Tensor) -> Tensor:
    """(first, ..., 1, 0) * bits"""
    with _beside(like):
        return torch.arange(first, -1, -1, device=like.device) * bits


def _check_bits(bits: int) -> None:
    if bits not in range(2, 9):
        raise QuantisationError(f"A code has 2 to 8 bits, not {bits!r}.")


def _check_weight(weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise QuantisationError(
            f"Only floating-point weights can be quantised, and this one is {weight.dtype}. "
            "If it is quantised already, dequantise it first or leave the layer as it is."
        )
    if weight.numel() == 0:
        raise QuantisationError(f"A weight of shape {tuple(weight.shape)} has no elements to quantise: skip its layer.")


def _check_finite(size: Tensor) -> None:
    if bool(torch.isfinite(size).all()):
        return
    bad = int((~torch.isfinite(size)).sum())
    raise QuantisationError(
        f"The weight has NaN or infinity in {bad} of the {size.numel()} blocks looked at; it would spoil them. "
        "Load the checkpoint again in the dtype it was saved in (a cast to float16 overflows above 65504), "
        "or skip this layer."
    )


def _scale_(values: Tensor, scale: Tensor, blocksize: int) -> Tensor:
    """values[n] *= scale[n // blocksize] in place; the last block may be short."""
    full = values.numel() // blocksize
    cut = full * blocksize
    if full:
        values[:cut].view(full, blocksize).mul_(scale[:full, None])
    if cut < values.numel():
        values[cut:].mul_(scale[full:])
    return values


def _absmax(values: Tensor, blocksize: int) -> Tensor:
    """max |values| of every block, (ceil(count / blocksize),); NaN stays NaN."""
    full = values.numel() // blocksize
    cut = full * blocksize
    parts = [values[:cut].view(full, blocksize).abs().amax(1)] if full else []
    if cut < values.numel():
        parts.append(values[cut:].abs().amax(0, keepdim=True))
    return torch.cat(parts)


def _nearest(scaled: Tensor, kind: str) -> Tensor:
    """The code of the value nearest to each of `scaled`, uint8; a tie goes to the lower value."""
    bins = _table("bins", kind, scaled)
    place = _bin(scaled, bins.numel() // 2)
    codes = _table("below", kind, scaled).index_select(0, place)
    codes += (scaled > bins.index_select(0, place)).view(torch.uint8)
    return codes if kind != "fp4" else _table("order", kind, scaled).index_select(0, codes.int())


def _encode(values: Tensor, absmax: Tensor, kind: str, blocksize: int) -> Tensor:
    """Packed codes of values / absmax: by the reciprocal in full blocks, by division in a short one, as they round."""
    full = values.numel() // blocksize
    cut = full * blocksize
    scaled = values.clone()
    _scale_(scaled[:cut], 1.0 / absmax[:full].clamp(min=SMALLEST), blocksize)
    scaled[cut:].div_(absmax[full:])
    if bits_of(kind) == 4 and scaled.numel() % 2:
        scaled = pad(scaled, (0, 1))  # the half byte left over holds the code of zero
    return pack(_nearest(scaled, kind), bits_of(kind))


def _nest(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit codes of absmax - mean in blocks of 256: (blocks,) uint8, (ceil(blocks / 256),) fp32, () fp32.

    The value is first put at one of 65536 even steps of [-1, 1], as the CPU kernel of bitsandbytes does; a block of
    zeros has code 0. `quantise` calls it on the CPU, so that every device gets the same codes.
    """
    offset = absmax.mean()
    scaled = absmax - offset
    nested = _absmax(scaled, NESTED)
    _scale_(scaled, 1.0 / nested, NESTED)
    step = (scaled + 1).mul_(0.5).mul_(65535).add_(0.5).trunc_()
    bounds = _midpoints(_table("dynamic", "", absmax))
    codes = torch.bucketize(2 * step / 65535 - 1, bounds, out_int32=True).to(torch.uint8)
    return codes.masked_fill_(scaled.isnan(), 0), nested, offset


@dataclass(frozen=True, eq=False)
class Blocks:
    """W[n] = values[codes[n]] * scale[n // blocksize], n the row-major index of an element of the weight.

    With double quantisation scale[m] = dynamic[absmax[m]] * nested_absmax[m // 256] + offset. Of the kinds `INTEGERS`
    absmax and offset are scale and zero of every group, (rows, groups): W = absmax * codes + offset.
    """

    codes: Tensor  # (ceil(numel * bits / 8), 1) uint8, see `pack`; 4 bits: the first code in the high half
    absmax: Tensor  # (blocks,) fp32, or uint8 codes of the dynamic map where `nested_absmax` is given
    nested_absmax: Tensor | None  # (ceil(blocks / 256),) fp32
    offset: Tensor | None  # () fp32, the mean of the absmax
    shape: tuple[int, ...]
    kind: str
    blocksize: int
    dtype: torch.dtype  # of the weight that was quantised

    def scales(self) -> Tensor:
        """The absmax of every block, (blocks,) fp32, nested ones decoded."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        values = _table("dynamic", "", self.absmax).index_select(0, self.absmax.int())
        return _scale_(values, self.nested_absmax, NESTED).add_(self.offset)

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of all constants."""
        parts = (self.codes, self.absmax, self.nested_absmax, self.offset)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def bits_per_parameter(self) -> float:
        """4.127 for 4-bit codes in blocks of 64 with double quantisation, 4.5 without."""
        return 8 * self.nbytes / self.numel


@torch.no_grad()
def quantise(weight: Tensor, kind: str = "nf4", blocksize: int = 64, double: bool = True) -> Blocks:
    """codes[n] = argmin_k |weight[n] / absmax - values[k]|, absmax = max |weight| over the block of n, in fp32.

    Any shape, read row by row; a block is `blocksize` elements, the last may be short. `double` makes 8-bit codes of
    the absmax too. On the meta device, and of fake tensors, only the shapes are made.
    Raises QuantisationError for NaN or infinity, a dtype without fractions, an empty weight, an unknown kind or
    blocksize.
    """
    bits = bits_of(kind)
    if blocksize not in BLOCKSIZES:
        raise QuantisationError(f"Unknown blocksize {blocksize!r}. Known: {', '.join(map(str, BLOCKSIZES))}.")
    _check_weight(weight)
    absmax = weight.new_empty(-(-weight.numel() // blocksize), dtype=torch.float32)
    codes = weight.new_empty((_bytes(weight.numel(), bits), 1), dtype=torch.uint8)
    nested: Tensor | None = None
    offset: Tensor | None = None
    if not _abstract(weight):
        _fill(codes, absmax, weight.reshape(-1), kind, blocksize)
        if double:
            absmax, nested, offset = (part.to(weight.device) for part in _nest(absmax.cpu()))
    elif double:
        nested, offset = absmax.new_empty(-(-absmax.numel() // NESTED)), absmax.new_empty(())
        absmax = absmax.new_empty(absmax.shape, dtype=torch.uint8)
    return Blocks(codes, absmax, nested, offset, tuple(weight.shape), kind, blocksize, weight.dtype)


def _fill(codes: Tensor, absmax: Tensor, flat: Tensor, kind: str, blocksize: int) -> None:
    for start in range(0, flat.numel(), step := _chunk(flat)):
        values = flat[start : start + step].float()
        size = _absmax(values, blocksize)
        _check_finite(size)
        if values.numel() % blocksize:
            size[-1:].clamp_(min=SMALLEST)
        absmax[start // blocksize :][: size.numel()] = size
        packed = _encode(values, size, kind, blocksize)
        codes[start * bits_of(kind) // 8 :][: packed.numel()] = packed


@torch.no_grad()
def dequantise(blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """W[n] = values[codes[n]] * scale[n // blocksize], multiplied in fp32, then rounded to `dtype`: `blocks.shape`."""
    if blocks.kind in INTEGERS:
        return _dequantise_groups(blocks, dtype)
    codes, count, size = blocks.codes.reshape(-1), blocks.numel, blocks.blocksize
    scales, words = blocks.scales(), _table("words", blocks.kind, codes)
    if torch.compiler.is_compiling():  # expressions that a compiler fuses
        values = words[_indices(codes, blocks.kind, count)].flatten()[:count]
        return _scale_(values, scales, size).to(dtype).view(blocks.shape)
    weight = codes.new_empty(-(-count // words.shape[1]) * words.shape[1], dtype=dtype)
    step = min(_chunk(codes), weight.numel())
    scratch = weight if dtype == torch.float32 else codes.new_empty(step, dtype=torch.float32)
    for start in range(0, count, step):
        stop = min(start + step, weight.numel())
        values = scratch[start:stop] if scratch is weight else scratch[: stop - start]
        part = codes[start * bits_of(blocks.kind) // 8 :]
        _gather_(values, words, _indices(part, blocks.kind, stop - start))
        _scale_(values[: count - start], scales[start // size :], size)
        if scratch is not weight:
            weight[start:stop] = values
    return weight[:count].view(blocks.shape)


def _dequantise_groups(blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """W[o, n] = absmax[o, n // group] codes[o, n] + offset[o, n // group] in fp32, then rounded to `dtype`"""
    (rows, width), bits, flat = blocks.shape, INTEGERS[blocks.kind], blocks.codes.reshape(-1)
    weight = flat.new_empty(rows, width, dtype=dtype)
    step = max(1, _chunk(flat) // width // 8) * 8  # the codes of eight rows are whole bytes
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = flat[start * width * bits // 8 : _bytes(stop * width, bits)]
        values = _unpack(part, bits)[: (stop - start) * width].float().view(stop - start, -1, blocks.blocksize)
        values.mul_(blocks.absmax[start:stop, :, None]).add_(blocks.offset[start:stop, :, None])  # type: ignore[index]
        weight[start:stop] = values.flatten(1)
    return weight


def _indices(codes: Tensor, kind: str, count: int) -> Tensor:
    """(bytes,) uint8 -> rows of the table "words" that hold the first `count` values, int32."""
    bits = bits_of(kind)
    codes = codes[: _bytes(count, bits)]
    return _unpack(codes, bits)[:count].int() if bits > 4 else _unpack(codes, 2 * bits)[: -(-count // 2)].int()


def _gather_(values: Tensor, words: Tensor, rows: Tensor) -> None:
    """values = words[rows]; two fp32 in a row are moved as one int64."""
    word = torch.int64 if words.shape[1] == 2 else torch.float32
    torch.index_select(words.view(word).flatten(), 0, rows, out=values.view(word))


@dataclass(frozen=True, eq=False)
class Integers:
    """W[o, n] = scale[o, n // group] * codes[o, n] + zero[o, n // group]; without `zero` it is 0."""

    codes: Tensor  # (o, i) uint8 with `zero`, int8 without
    scale: Tensor  # (o, i / group) fp32
    zero: Tensor | None  # (o, i / group) fp32
    bits: int
    group: int

    @property
    def zero_point(self) -> Tensor | None:
        """z of the other convention, W = scale * (codes - z): z = -zero / scale; it is no integer."""
        return None if self.zero is None else -self.zero / self.scale


@torch.no_grad()
def quantise_integers(
    weight: Tensor, bits: int, group: int | None = None, symmetric: bool = True, full_range: bool = False
) -> Integers:
    """codes = round((weight - zero) / scale), one scale and zero for `group` columns of a row (None: the whole row).

    weight (o, i) -> codes (o, i).
    symmetric: zero = 0, scale = max |w| / (2^(bits-1) - 1), codes in +-(2^(bits-1) - 1).
    symmetric, full_range: scale = max |w| / (2^(bits-1) - 1/2), codes in [-2^(bits-1), 2^(bits-1) - 1].
    Not symmetric (QA-LoRA, 2309.14717): zero = min w, scale = (max w - min w) / (2^bits - 1), codes in [0, 2^bits - 1].
    Where a group has no span its scale is 1. Raises QuantisationError as `quantise` does, and where `group` does not
    divide i.
    """
    _check_bits(bits)
    _check_weight(weight)
    if weight.dim() != 2:
        raise QuantisationError(f"Integer codes need a weight (out, in), not one of shape {tuple(weight.shape)}.")
    rows, width = weight.shape
    group = width if group is None else group
    if group < 1 or width % group:
        raise QuantisationError(
            f"group={group} does not divide the {width} input features: take a divisor of {width}, or None for the row."
        )
    if full_range and not symmetric:
        raise QuantisationError("full_range=True is about symmetric codes; the others always use the full range.")
    codes = weight.new_empty(weight.shape, dtype=torch.int8 if symmetric else torch.uint8)
    scale = weight.new_empty((rows, width // group), dtype=torch.float32)
    found = Integers(codes, scale, None if symmetric else torch.empty_like(scale), bits, group)
    if not _abstract(weight):
        for part in _rows(weight):
            _fill_integers(found, part, weight[part].float().unflatten(1, (-1, group)), full_range)
    return found


def _rows(like: Tensor) -> list[slice]:
    step = max(1, _chunk(like) // like.shape[1])
    return [slice(start, start + step) for start in range(0, like.shape[0], step)]


def _fill_integers(found: Integers, part: slice, values: Tensor, full_range: bool) -> None:
    """values (rows, groups, group) fp32 -> the rows `part` of `found`."""
    low, high = values.aminmax(dim=2)
    half = 2 ** (found.bits - 1)
    if found.zero is None:
        span, steps = torch.maximum(high, -low), half - (0.5 if full_range else 1.0)
        first, last = (-half if full_range else 1 - half), half - 1
    else:
        span, steps = high - low, 2.0 * half - 1
        first, last = 0, 2 * half - 1
        found.zero[part] = low
        values = values - low[..., None]
    _check_finite(span)
    flat = span == 0
    found.scale[part] = (span / steps).masked_fill_(flat, 1.0)
    inverse = (steps / span).masked_fill_(flat, 1.0)
    found.codes[part] = (values * inverse[..., None]).round_().clamp_(first, last).flatten(1).to(found.codes.dtype)


@torch.no_grad()
def dequantise_integers(integers: Integers, dtype: torch.dtype) -> Tensor:
    """W = scale * codes + zero in fp32, then rounded to `dtype`: (o, i)."""
    codes, scale, zero = integers.codes, integers.scale, integers.zero
    weight = codes.new_empty(codes.shape, dtype=dtype)
    for part in _rows(codes):
        values = codes[part].float().unflatten(1, (-1, integers.group)) * scale[part][..., None]
        if zero is not None:
            values += zero[part][..., None]
        weight[part] = values.flatten(1)
    return weight
