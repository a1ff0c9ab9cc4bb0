"""Codes, constants and values of quantised weights: against bitsandbytes bit for bit, and against slow oracles."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_peft.core import quant
from lightning_peft.core.quant import Blocks, QuantisationError, dequantise, quantise, quantise_integers

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what bitsandbytes takes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL_KINDS = tuple(quant.KINDS)


@pytest.fixture
def bnb() -> Iterator[Any]:
    """bitsandbytes.functional, with the fallbacks that it compiles run eagerly: the same arithmetic, no compiler."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    pytest.importorskip("bitsandbytes", minversion="0.50")
    import bitsandbytes.functional as functional

    with torch.compiler.set_stance("force_eager"):
        yield functional


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Tensor]:
    fresh: dict[Any, Tensor] = {}
    monkeypatch.setattr(quant, "_TABLES", fresh)
    return fresh


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def slow(blocks: Blocks) -> Tensor:
    """values[code] * scale, one block at a time, in double precision."""
    codes = quant.unpack(blocks.codes, quant.bits_of(blocks.kind), blocks.numel).long()
    values = quant.codebook(blocks.kind).double()[codes]
    pieces = [
        piece * scale for piece, scale in zip(values.split(blocks.blocksize), blocks.scales().double(), strict=True)
    ]
    return torch.cat(pieces).view(blocks.shape)


# ------------------------------------------------------------------ tables
def test_the_recipe_gives_the_released_table() -> None:
    assert quant._normal_float(4) == quant.KINDS["nf4"]


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_floats_are_quantiles(bits: int) -> None:
    """An oracle with other functions: `torch.special.ndtri` in double precision."""
    half = 2 ** (bits - 1)
    above, below = (
        torch.special.ndtri(torch.linspace(0.9677083, 0.5, n, dtype=torch.float32)[:-1].double())
        for n in (half + 1, half)
    )
    table = torch.cat((above, -below, torch.zeros(1))).sort().values
    got = quant.codebook(f"nf{bits}")
    assert got.dtype == torch.float32
    assert len(got) == 2**bits
    torch.testing.assert_close(got.double(), table / table.max(), rtol=0, atol=1e-7)
    assert (got[1:] > got[:-1]).all()
    assert {-1.0, 0.0, 1.0} <= set(got.tolist())


def test_nf2() -> None:
    torch.testing.assert_close(quant.codebook("nf2"), torch.tensor([-1, 0, 0.3379, 1]), rtol=0, atol=5e-5)


def test_tables_are_those_of_bitsandbytes(bnb: Any) -> None:
    for kind in ("nf4", "fp4"):
        theirs = bnb.get_4bit_type(kind, device="cpu")
        assert torch.equal(quant.codebook(kind).view(torch.int32), theirs.view(torch.int32))  # -0.0 is not 0.0
    assert torch.equal(quant.dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_nearest_value_is_the_one_between_its_midpoints(kind: str) -> None:
    """Bins and one comparison against a plain search, at every midpoint, beside it, and at random."""
    values, order = quant.codebook(kind).sort(stable=True)
    bounds = (values[:-1] + values[1:]) / 2
    x = torch.cat((bounds, bounds.nextafter(torch.ones(())), bounds.nextafter(-torch.ones(())), values))
    x = torch.cat((x, torch.rand(20000, generator=torch.Generator().manual_seed(1)) * 2 - 1))
    assert torch.equal(quant._nearest(x, kind).long(), order[torch.bucketize(x, bounds)])


# ------------------------------------------------------------------ against bitsandbytes
def compare(bnb: Any, weight: Tensor, kind: str, blocksize: int, double: bool) -> None:
    """They get it flat: in 0.50 their AVX-512 kernel takes wrong constants if a row is no multiple of the block."""
    codes, state = bnb.quantize_4bit(weight.flatten(), blocksize=blocksize, quant_type=kind, compress_statistics=double)
    ours = quantise(weight, kind, blocksize, double)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, state.absmax)
    if double:
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert torch.equal(ours.offset, state.offset)
    theirs = bnb.dequantize_4bit(codes, state).view(weight.shape)
    assert torch.equal(dequantise(ours, weight.dtype), theirs)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_equal_to_bitsandbytes(bnb: Any, dtype: torch.dtype, kind: str, double: bool) -> None:
    for seed, shape in enumerate([(64, 64), (1, 1), (7,), (130, 48), (257, 129), (3, 5, 7)]):
        for blocksize in BLOCKSIZES:
            compare(bnb, normal(*shape, seed=seed, dtype=dtype), kind, blocksize, double)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bit_equal_where_it_is_large_and_ragged(bnb: Any, kind: str) -> None:
    """Several chunks, several blocks of absmax, the last of each short."""
    compare(bnb, normal(2**18 + 4097, seed=3), kind, 64, double=True)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bit_equal_in_the_corners(bnb: Any, kind: str, double: bool) -> None:
    cases = {
        "zero": torch.zeros(3, 64),
        "zero, short": torch.zeros(65),
        "a zero block": torch.cat((normal(64), torch.zeros(64), normal(70))),
        "zeros in a short block": torch.cat((normal(64), torch.zeros(7))),
        "denormal": torch.full((100,), 1e-42),
        "denormal constants": torch.cat((torch.full((64,), 1e-42), torch.full((64,), 3e-42))),
        "huge": normal(100) * 1e38,
        "equal absmax": torch.ones(64, 64),
        "outliers": torch.cat((normal(6400), torch.tensor([30.0]), normal(6400, seed=1))),
        "heavy tails": normal(20000).pow(3) * 1e4,
    }
    for weight in cases.values():
        compare(bnb, weight, kind, 64, double)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_ties_are_rounded_as_in_bitsandbytes(bnb: Any, kind: str) -> None:
    """Full blocks are multiplied by the reciprocal of the absmax, a short one is divided: at a tie that shows."""
    values = quant.codebook(kind).sort().values
    ties = torch.cat(((values[:-1] + values[1:]) / 2, torch.ones(1)))
    for scale in torch.rand(100, generator=torch.Generator().manual_seed(0)):
        compare(bnb, ties * scale, kind, 64, double=False)
        compare(bnb, (ties * scale).repeat(4), kind, 64, double=False)


def test_many_constants_are_nested_as_in_bitsandbytes(bnb: Any) -> None:
    """Enough of them that a different rounding of the 65536 steps would show."""
    absmax = torch.rand(2**21 + 77, generator=torch.Generator().manual_seed(0))
    codes, nested, offset = quant._nest(absmax)
    theirs, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    assert torch.equal(codes, theirs)
    assert torch.equal(nested, state.absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_int8_are_those_of_bitsandbytes(bnb: Any, dtype: torch.dtype) -> None:
    """Codes and absmax bit for bit. Their values are (code * absmax) * fp32(1/127), ours code * (absmax / 127): 2 ulp."""
    weight = normal(64, 200, dtype=dtype)
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight.clone())
    ours = quantise_integers(weight, 8)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.scale[:, 0], absmax / 127)
    theirs = bnb.int8_vectorwise_dequant(codes, absmax)
    torch.testing.assert_close(quant.dequantise_integers(ours, torch.float32), theirs, rtol=2.5e-7, atol=0)


# ------------------------------------------------------------------ against oracles
@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot flush denormal numbers")
def test_zeros_where_denormal_numbers_are_flushed() -> None:
    """Then 1e-38 is zero too, and 0 / 0 must not become an index."""
    torch.set_flush_denormal(True)
    try:
        for kind in ALL_KINDS:
            assert not dequantise(quantise(torch.zeros(130), kind), torch.float32).any()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_code_is_the_nearest(kind: str, double: bool) -> None:
    weight = torch.cat((normal(37 * 64), torch.zeros(64), normal(29)))
    blocks = quantise(weight, kind, 64, double)
    values = quant.codebook(kind).double()
    codes = quant.unpack(blocks.codes, quant.bits_of(kind), weight.numel()).long()
    for piece, code in zip(weight.double().split(64), codes.split(64), strict=True):
        scaled = piece / piece.abs().max().clamp(min=1e-38)
        distance = (scaled[:, None] - values).abs()
        assert (distance.gather(1, code[:, None])[:, 0] <= distance.amin(1) + 1e-7).all()


def test_nested_constants_are_near_the_absmax() -> None:
    """Nearest codes of the dynamic map, but for the 65536 steps at which they are looked up."""
    weight = normal(700 * 64 + 5)
    plain, nested = quantise(weight, double=False), quantise(weight, double=True)
    absmax = plain.absmax.double()
    assert nested.nested_absmax is not None
    assert nested.nested_absmax.shape == (3,)
    assert nested.absmax.dtype == torch.uint8
    for piece, got in zip((absmax - absmax.mean()).split(256), nested.scales().double().split(256), strict=True):
        grid = quant.dynamic_map().double() * piece.abs().max()
        nearest = (piece[:, None] - grid).abs().amin(1)
        assert ((got - absmax.mean() - piece).abs() <= nearest + piece.abs().max() / 65535).all()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 63, 64, 65, 4097, 2**17 + 3])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_dequantise_looks_every_code_up(kind: str, count: int) -> None:
    weight = normal(count)
    blocks = quantise(weight, kind)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        got = dequantise(blocks, dtype)
        assert got.shape == weight.shape
        assert got.is_contiguous()
        want = slow(blocks).float()  # the product of two fp32 is exact in fp64, so this rounds once
        assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("kind", ["nf4", "nf3", "fp4", "nf8"])
def test_chunks_do_not_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(3, 4097, dtype=torch.bfloat16)
    whole = quantise(weight, kind, 256)
    values = dequantise(whole, torch.bfloat16), dequantise(whole, torch.float32)
    monkeypatch.setattr(quant, "_chunk", lambda like: 4096)
    parts = quantise(weight, kind, 256)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.absmax, whole.absmax)
    assert torch.equal(dequantise(parts, torch.bfloat16), values[0])
    assert torch.equal(dequantise(parts, torch.float32), values[1])


def test_error_of_a_normal_weight() -> None:
    weight = normal(256, 512)
    for double in (False, True):
        error = dequantise(quantise(weight, double=double), torch.float32) - weight
        assert float(error.norm() / weight.norm()) == pytest.approx(0.092, abs=1e-3)


def test_a_view_and_a_parameter_are_quantised_as_their_values() -> None:
    weight = normal(64, 48)
    want = quantise(weight.T.contiguous(), double=False)
    got = quantise(torch.nn.Parameter(weight).T, double=False)
    assert torch.equal(got.codes, want.codes)
    assert got.shape == (48, 64)
    assert not got.absmax.requires_grad
    found = quantise_integers(torch.nn.Parameter(weight).T, 4, 8, symmetric=False)
    assert torch.equal(found.codes, quantise_integers(weight.T.contiguous(), 4, 8, symmetric=False).codes)
    assert not found.scale.requires_grad


def test_bits_per_parameter() -> None:
    weight = torch.empty(4096, 4096, device="meta")
    assert quantise(weight, double=False).bits_per_parameter == 4.5
    assert quantise(weight).bits_per_parameter == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-5)
    assert round(quantise(weight).bits_per_parameter, 3) == 4.127
    assert round(quantise(weight, "nf3").bits_per_parameter, 3) == 3.127  # the row NF3 of LQ-LoRA
    assert quantise(normal(256, 512)).bits_per_parameter == pytest.approx(4.12720, abs=1e-5)


# ------------------------------------------------------------------ packing
@given(bits=st.integers(2, 8), data=st.data())
@settings(max_examples=100, deadline=None)
def test_packed_codes_are_one_string_of_bits(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    packed = quant.pack(torch.tensor(codes, dtype=torch.uint8), bits)
    text = "".join(f"{code:0{bits}b}" for code in codes)
    text += "0" * (-len(text) % 8)
    assert packed.flatten().tolist() == [int(text[n : n + 8], 2) for n in range(0, len(text), 8)]
    assert packed.shape == (math.ceil(len(codes) * bits / 8), 1)
    assert quant.unpack(packed, bits, len(codes)).tolist() == codes


def test_unpacked_codes_are_a_copy() -> None:
    for bits in (2, 4, 8):
        packed = quant.pack(torch.arange(4), bits)
        quant.unpack(packed, bits, 4).zero_()
        assert quant.unpack(packed, bits, 4).tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------------ without memory, in traces, on devices
def same_shapes(got: Blocks, want: Blocks) -> None:
    for name in ("codes", "absmax", "nested_absmax", "offset"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None)
        assert a is None or (a.shape == b.shape and a.dtype == b.dtype)
    assert (got.shape, got.nbytes) == (want.shape, want.nbytes)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("double", [False, True])
def test_meta_weights_have_the_shapes(kind: str, double: bool, tables: dict[Any, Tensor]) -> None:
    weight = normal(33, 101, dtype=torch.bfloat16)
    meta = quantise(weight.to("meta"), kind, double=double)
    assert meta.codes.is_meta
    values = dequantise(meta, torch.float16)
    assert (values.is_meta, values.shape, values.dtype) == (True, (33, 101), torch.float16)
    assert meta.scales().shape == (53,)
    assert not tables
    same_shapes(meta, quantise(weight, kind, double=double))


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("inside", [False, True])
def test_fake_tensors(kind: str, inside: bool, tables: dict[Any, Tensor]) -> None:
    weight = normal(33, 101)
    mode = FakeTensorMode()
    fake = mode.from_tensor(weight)

    def run() -> tuple[Blocks, Tensor, Tensor]:
        blocks = quantise(fake, kind)
        integers = quantise_integers(fake, 4, symmetric=False)
        return blocks, dequantise(blocks, torch.bfloat16), quant.dequantise_integers(integers, torch.float16)

    if inside:
        with mode:
            blocks, *values = run()
    else:
        blocks, *values = run()
    assert all(isinstance(v, FakeTensor) and v.shape == weight.shape for v in (*values,))
    assert not tables
    same_shapes(blocks, quantise(weight, kind))


def test_real_codes_in_a_fake_mode_leave_no_fake_table_behind(tables: dict[Any, Tensor]) -> None:
    blocks = quantise(normal(64))
    tables.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(dequantise(blocks, torch.float32), FakeTensor)
    assert not tables


def test_tables_do_not_remember_how_they_were_made(tables: dict[Any, Tensor]) -> None:
    weight = normal(64, 64)
    with torch.device("meta"), torch.inference_mode():
        blocks = quantise(weight)
        dequantise(blocks, torch.float32)
    assert {type(t) for t in tables.values()} == {Tensor}
    assert not any(t.is_meta or t.is_inference() or t.requires_grad for t in tables.values())
    again = quantise(weight)
    assert torch.equal(again.codes, blocks.codes)


@pytest.mark.parametrize(("kind", "warm"), [("nf4", False), ("nf4", True), ("nf3", False), ("nf8", False)])
def test_dequantise_compiles_in_one_graph(kind: str, warm: bool, tables: dict[Any, Tensor]) -> None:
    blocks = quantise(normal(33, 101), kind)
    want = dequantise(blocks, torch.bfloat16)
    if not warm:
        tables.clear()
    before = set(tables)
    operations: list[Any] = []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        operations.extend(node.target for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    torch._dynamo.reset()
    got = torch.compile(dequantise, fullgraph=True, backend=backend)(blocks, torch.bfloat16)
    assert torch.equal(got, want)
    assert set(tables) == before
    assert torch.index_select not in operations  # it writes into given memory, which keeps a compiler from fusing


def test_integers_compile_in_one_graph() -> None:
    sizes = []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        sizes.append(len(module.graph.nodes))
        return module.forward

    for rows in (33, 3000):  # one chunk and several
        found = quantise_integers(normal(rows, 100), 4, 20, symmetric=False)
        torch._dynamo.reset()
        got = torch.compile(quant.dequantise_integers, fullgraph=True, backend=backend)(found, torch.bfloat16)
        assert torch.equal(got, quant.dequantise_integers(found, torch.bfloat16))
    assert sizes[0] == sizes[1]


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made, except views of `known`."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.sizes = [0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.sizes.append(t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("kind", ["nf4", "nf3", "nf8"])
def test_temporaries_are_small(kind: str) -> None:
    """Beside codes and values nothing is as large as the weight: 2 MiB at a time whatever its size."""
    weight = normal(2048, 1024, dtype=torch.bfloat16)
    with Largest([weight]) as quantising:
        blocks = quantise(weight, kind)
    assert max(quantising.sizes) <= max(2**21, blocks.codes.nbytes)
    with Largest([blocks.codes]) as dequantising:
        values = dequantise(blocks, torch.bfloat16)
    assert sorted(set(dequantising.sizes))[-2] <= 2**21 < values.nbytes
    with Largest([weight]) as integers:
        found = quantise_integers(weight, 4, 32)
    assert max(integers.sizes) <= max(2**21, found.codes.nbytes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_codes_do_not_depend_on_the_device(kind: str) -> None:
    weight = normal(700, 129)
    here, there = quantise(weight, kind), quantise(weight.cuda(), kind)
    assert torch.equal(here.codes, there.codes.cpu())
    assert torch.equal(here.absmax, there.absmax.cpu())
    assert torch.equal(dequantise(here, torch.bfloat16), dequantise(there, torch.bfloat16).cpu())


# ------------------------------------------------------------------ integers
def reference(weight: Tensor, bits: int, group: int, low: int, high: int, symmetric: bool, steps: float) -> Tensor:
    """Row by row, group by group, in double precision: the best multiple of the step, or distance zero."""
    rows = []
    for row in weight.double():
        pieces = []
        for piece in row.split(group):
            zero = 0.0 if symmetric else float(piece.min())
            span = float(piece.abs().max()) if symmetric else float(piece.max() - piece.min())
            scale = span / steps if span else 1.0
            pieces.append(zero + scale * ((piece - zero) / scale).round().clamp(low, high))
        rows.append(torch.cat(pieces))
    return torch.stack(rows)


@pytest.mark.parametrize("group", [None, 8, 24])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("symmetric", "full_range"), [(True, False), (True, True), (False, False)], ids=["restricted", "full", "min-max"]
)
def test_integers_against_a_slow_oracle(bits: int, group: int | None, symmetric: bool, full_range: bool) -> None:
    weight = normal(13, 48)
    weight[3], weight[5, :24], weight[7] = 0.0, 0.5, -0.25  # groups without a span
    half = 2 ** (bits - 1)
    low, high, steps = 0, 2**bits - 1, 2**bits - 1.0
    if symmetric:
        low, high, steps = (-half, half - 1, half - 0.5) if full_range else (1 - half, half - 1, half - 1.0)
    found = quantise_integers(weight, bits, group, symmetric, full_range)
    assert found.codes.dtype == (torch.int8 if symmetric else torch.uint8)
    assert found.scale.shape == (13, 48 // (group or 48))
    assert found.group == (group or 48)
    assert (int(found.codes.min()), int(found.codes.max())) == (low, high)
    assert torch.isfinite(found.scale).all()
    assert (found.scale > 0).all()
    values = quant.dequantise_integers(found, torch.float32)
    scale = found.scale.repeat_interleave(found.group, 1)
    assert ((values - weight).abs() <= scale * (0.5 + 1e-5) + 1e-7 * weight.abs()).all()
    far = (values - weight).abs() < scale * (0.5 - 1e-4)  # not halfway between two codes, where either is right
    assert int(far.sum()) > 400
    want = reference(weight, bits, group or 48, low, high, symmetric, steps)
    torch.testing.assert_close(values.double()[far], want[far], rtol=1e-5, atol=1e-8)


def test_a_shift_of_the_zeros_is_a_constant_on_each_group() -> None:
    """What QA-LoRA merges: zero + delta, and in the other convention zero_point - delta / scale."""
    weight, delta = normal(6, 32), normal(6, 4, seed=1)
    found = quantise_integers(weight, 4, 8, symmetric=False)
    assert found.zero is not None
    assert found.zero_point is not None
    codes = found.codes.float().unflatten(1, (4, 8))
    other = found.scale[..., None] * (codes - (found.zero_point - delta / found.scale)[..., None])
    want = quant.dequantise_integers(found, torch.float32) + delta.repeat_interleave(8, 1)
    torch.testing.assert_close(other.flatten(1), want, rtol=0, atol=1e-7)
    assert quantise_integers(weight, 4, 8).zero_point is None


def test_integers_go_through_pack() -> None:
    for bits in (2, 3, 4):
        found = quantise_integers(normal(6, 32), bits, 8)
        unsigned = (found.codes.short() + 2 ** (bits - 1)).to(torch.uint8)
        again = quant.unpack(quant.pack(unsigned, bits), bits, 6 * 32).view(6, 32)
        assert torch.equal(again.short() - 2 ** (bits - 1), found.codes.short())


def test_meta_integers_have_the_shapes() -> None:
    weight = normal(6, 32)
    meta, real = (quantise_integers(w, 3, 8, symmetric=False) for w in (weight.to("meta"), weight))
    assert meta.codes.is_meta
    assert (meta.codes.shape, meta.codes.dtype) == (real.codes.shape, real.codes.dtype)
    assert meta.scale.shape == real.scale.shape
    assert quant.dequantise_integers(meta, torch.bfloat16).shape == (6, 32)


# ------------------------------------------------------------------ errors
def bad(value: float) -> Tensor:
    weight = normal(8, 64)
    weight[2, 5] = value
    return weight


ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "nan": (lambda: quantise(bad(math.nan)), "NaN or infinity in 1 of the 8 blocks.*Load the checkpoint again"),
    "inf": (lambda: quantise(bad(-math.inf), "fp4"), "NaN or infinity in 1 of the 8 blocks"),
    "nan in a short block": (lambda: quantise(torch.tensor([math.nan, 1.0])), "NaN or infinity in 1 of the 1 blocks"),
    "too large for fp32": (lambda: quantise(normal(64).double() + 1e300), "NaN or infinity"),
    "nan among integers": (lambda: quantise_integers(bad(math.nan), 4, 32), "NaN or infinity in 1 of the 16 blocks"),
    "span too large": (lambda: quantise_integers(torch.tensor([[3e38, -3e38]]), 4, symmetric=False), "NaN or infinity"),
    "integer weight": (lambda: quantise(torch.ones(4, 4, dtype=torch.uint8)), "torch.uint8.*dequantise it first"),
    "integer weight again": (lambda: quantise_integers(torch.ones(4, 4, dtype=torch.int8), 4), "torch.int8"),
    "complex weight": (lambda: quantise(torch.ones(4, dtype=torch.complex64)), "torch.complex64"),
    "empty": (lambda: quantise(torch.empty(0, 4)), r"shape \(0, 4\) has no elements"),
    "kind": (lambda: quantise(normal(64), "nf9"), "Unknown kind 'nf9'.*Known: fp4, nf2, nf3, nf4"),
    "kind of a codebook": (lambda: quant.codebook("dynamic"), "Unknown kind 'dynamic'"),
    "blocksize": (lambda: quantise(normal(64), blocksize=48), "Unknown blocksize 48. Known: 16, 32, 64, .*, 4096"),
    "bits": (lambda: quant.pack(torch.zeros(4), 9), "2 to 8 bits, not 9"),
    "bits of integers": (lambda: quantise_integers(normal(4, 4), 1), "2 to 8 bits, not 1"),
    "too few bytes": (
        lambda: quant.unpack(torch.zeros(2, 1, dtype=torch.uint8), 4, 5),
        "5 codes of 4 bits are 3 bytes, not 2",
    ),
    "no bytes": (lambda: quant.unpack(torch.zeros(9), 4, 5), "3 bytes, not 9 of torch.float32"),
    "three dimensions": (lambda: quantise_integers(normal(2, 2, 2), 4), r"\(out, in\), not one of shape \(2, 2, 2\)"),
    "group": (lambda: quantise_integers(normal(4, 48), 4, 32), "group=32 does not divide the 48 input features"),
    "no group": (lambda: quantise_integers(normal(4, 48), 4, 0), "group=0 does not divide"),
    "full range": (lambda: quantise_integers(normal(4, 4), 4, None, False, True), "full_range=True is about symmetric"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case: str) -> None:
    call, message = ERRORS[case]
    with pytest.raises(QuantisationError, match=message):
        call()
