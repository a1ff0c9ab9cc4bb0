"""Changes of high rank from few numbers: Kronecker products, square matrices, spectra, subspaces.

Each against a dense fp64 update written from the paper's equation, and against peft where peft has the method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import zoo
from harness import forward, output, perturb
from peft import FourierFTConfig, GloraConfig, LoKrConfig, WaveFTConfig, get_peft_model
from peft.tuners.lokr.layer import factorization
from peft.tuners.waveft.wavelet import Wavelet
from settings import make
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lightning_peft import (
    DID,
    IA3,
    OFT,
    SAID,
    DoRA,
    FourierFT,
    GLoRA,
    HiRA,
    KronA,
    KronAB,
    KronABRes,
    LoKr,
    LoRA,
    MoRA,
    WaveFT,
    load_adapter,
    quantise,
    save_adapter,
)
from lightning_peft.core import state
from lightning_peft.core.adapter import NotMergeableError
from lightning_peft.core.fields import FieldError
from lightning_peft.core.kronecker import factorise
from lightning_peft.core.merge import MergeError
from lightning_peft.core.sites import TargetError
from lightning_peft.core.spectrum import daubechies, mirror
from lightning_peft.methods.glora import search
from lightning_peft.methods.mora import square
from lightning_peft.methods.said import Fastfood, hadamard
from tests import test_oracles as by_hand
from tests.test_counts import fresh

Values = dict[str, Tensor]
D_IN, D_OUT = 24, 36


def place(kind: str, d_in: int = D_IN, d_out: int = D_OUT, bias: bool = True) -> nn.Sequential:
    """One projection in fp64, as torch or as GPT-2 stores it."""
    torch.manual_seed(0)
    module = nn.Linear(d_in, d_out, bias=bias) if kind == "linear" else Conv1D(d_out, d_in)
    net = nn.Sequential(module).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    return net


def matrix(net: nn.Module) -> tuple[Tensor, Tensor]:
    """W (d_out, d_in) and b"""
    weight = net[0].weight.detach()
    bias = net[0].bias
    return weight.T if isinstance(net[0], Conv1D) else weight, torch.zeros(()) if bias is None else bias.detach()


def values_of(net: nn.Module) -> Values:
    (only,) = state.get_applied(net).placements
    return {n: p.detach().clone().requires_grad_() for n, p in only.adapter.named_parameters()}


def compare(
    net: nn.Module, values: Values, expected: Callable[[Tensor], Tensor], x: Tensor, tolerance: float = 1e-10
) -> None:
    """Output, gradients of the adapter and of the input, then the merged output."""
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, wanted = net(mine), expected(theirs)
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)
    goal = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=got.dtype)
    (got * goal).sum().backward()
    (wanted * goal).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=tolerance, rtol=tolerance)
    (only,) = state.get_applied(net).placements
    for name, parameter in only.adapter.named_parameters():
        if values[name].grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        assert values[name].grad.any(), name
        torch.testing.assert_close(
            parameter.grad, values[name].grad, atol=tolerance, rtol=tolerance, msg=f"{name}: {{}}".format
        )
    method = state.get_applied(net).method
    if method.info.mergeable:
        method.merge(net)
        torch.testing.assert_close(net(x), wanted.detach(), atol=tolerance, rtol=tolerance)


def check(
    method: Any, dense: Callable[[Values, Tensor, Tensor], tuple[Tensor, Tensor]], kind: str = "linear", **size: Any
) -> Values:
    """`dense(values, W, b)` gives the weight and the bias that the adapted projection should have."""
    net = place(kind, **size)
    weight, bias = matrix(net)
    method.apply(net)
    perturb(net, scale=0.5)
    values = values_of(net)
    x = torch.randn(2, 5, weight.shape[1], dtype=torch.float64)

    def expected(x: Tensor) -> Tensor:
        new_weight, new_bias = dense(values, weight, bias)
        return x @ new_weight.T + new_bias

    compare(net, values, expected, x)
    return values


def count(model: str, method: Any) -> int:
    return state.describe(method.apply(fresh(model)))["trainable"]


def same_as_peft(
    method: Any, config: Any, copy: Callable[[nn.Module, nn.Module], None], net: Callable[[], nn.Module] | None = None
) -> tuple[float, float]:
    """Largest differences of logits and of gradients (x, and the adapter's by `copy`'s order) on a small network.

    copy(ours, theirs): sets their tensors from our adapter.
    """
    torch.manual_seed(1)
    build = net or (lambda: nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Tanh(), nn.Linear(D_OUT, D_IN)))
    base = build()
    ours, theirs = build(), build()
    for other in (ours, theirs):
        other.load_state_dict(base.state_dict())
    method.apply(ours)
    perturb(ours, scale=0.3)
    theirs = get_peft_model(theirs, config)
    layers = [m for n, m in theirs.named_modules() if hasattr(m, "base_layer") and hasattr(m, "update_layer")]
    placements = state.get_applied(ours).placements
    assert len(layers) == len(placements)
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    for placement, layer in zip(placements, layers, strict=True):
        pairs += copy(placement.adapter, layer)
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine.view_as(other))
    x = torch.randn(4, 3, D_IN)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = ours(a), theirs(b)
    goal = torch.randn_like(y)
    (y * goal).sum().backward()
    (z * goal).sum().backward()
    assert not torch.allclose(y, base(x), atol=1e-2)
    gradients = [(a.grad, b.grad), *((mine.grad, other.grad.view_as(mine)) for mine, other in pairs)]
    assert all(g.any() for pair in gradients for g in pair)
    y, z = y.detach(), z.detach()
    scale = max(float(g.abs().max()) for g, _ in gradients)
    return float((y - z).abs().max() / z.abs().max()), max(float((g - h).abs().max()) / scale for g, h in gradients)


def agree(differences: tuple[float, float]) -> None:
    assert differences[0] < 1e-6
    assert differences[1] < 1e-6


# ------------------------------------------------------------------ KronA
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("left", [None, [3, 2], [18, 4], [1, 24], [36, 1]])
def test_krona(kind: str, left: list[int] | None) -> None:
    """W + s A kron B, with rows of X as the outer index; both orders of the two products occur."""
    method = KronA(targets="0", scale=3.0, left=left, dtype="float64")
    values = check(method, lambda v, w, b: (w + 3.0 * torch.kron(v["a"], v["b"]), b), kind)
    assert values["a"].shape == tuple(left or (6, 6))
    assert values["b"].shape == (D_OUT // values["a"].shape[0], D_IN // values["a"].shape[1])


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_krona_of_a_convolution(padding_mode: str) -> None:
    """The kernel lies in B: W[o, i] = s A kron B over the channels, at each of its places."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(6, 8, (3, 2), 2, 1, padding_mode=padding_mode)).double()
    weight, bias = net[0].weight.detach(), net[0].bias.detach()
    KronA(targets="0", scale=2.0, left=[4, 3], dtype="float64").apply(net)
    perturb(net, scale=0.5)
    values = values_of(net)

    def expected(x: Tensor) -> Tensor:
        b = values["b"].view(2, 2, 3, 2)
        change = torch.einsum("ab,cdhw->acbdhw", values["a"], b).reshape(8, 6, 3, 2)
        x = F.pad(x, (1, 1, 1, 1), mode="reflect" if padding_mode == "reflect" else "constant")
        return F.conv2d(x, weight + 2.0 * change, bias, 2)

    x = torch.randn(3, 6, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(net(x[0]), expected(x)[0].detach(), atol=1e-10, rtol=1e-10)
    compare(net, values, expected, x)


def test_counts_of_kronecker_products() -> None:
    assert count("t5-base", KronA(targets="q,v,cross.q,cross.v", heads=None)) == 110_592  # 72 sites of 24 * 32 * 2
    assert count("llama-7b", KronA(heads=None)) == 64 * 2 * 64 * 64
    assert count("roberta-base", LoKr(heads=None)) == 24 * (24 * 24 + 8 * 64)


def test_widths_that_do_not_divide_are_errors() -> None:
    with pytest.raises(TargetError, match=r"left=\[5, 2\] does not divide '0', which has 36 outputs and 24 inputs"):
        KronA(targets="0", left=[5, 2]).apply(place("linear"))
    for left in ([0, 3], [4], [2, 3, 4]):
        with pytest.raises(FieldError, match="two numbers above 0, the shape of A"):
            KronA(left=left)
    with pytest.raises(TargetError, match="'0' is an Embedding"):
        KronA(targets="0").apply(nn.Sequential(nn.Embedding(6, 4)))
    with pytest.raises(TargetError, match="a convolution in 2 groups"):
        LoKr(targets="0").apply(nn.Sequential(nn.Conv1d(6, 4, 3, groups=2)))


# ------------------------------------------------------------------ LoKr
LOKR = {  # rank, decompose_both, factor -> names of the parameters
    (3, False, -1): "w1 w2",
    (2, False, -1): "w1 w2_a w2_b",
    (2, True, -1): "w1_a w1_b w2_a w2_b",
    (2, False, 2): "w1 w2_a w2_b",
}


def whole(values: Values, name: str) -> Tensor:
    return values[name] if name in values else values[f"{name}_a"] @ values[f"{name}_b"]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(("rank", "both", "factor"), LOKR)
def test_lokr(rank: int, both: bool, factor: int, kind: str) -> None:
    """W + (alpha / rank) w1 kron w2"""
    method = LoKr(targets="0", rank=rank, alpha=5.0, decompose_both=both, factor=factor, dtype="float64")

    def dense(v: Values, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return w + 5.0 / rank * torch.kron(whole(v, "w1"), whole(v, "w2")), b

    values = check(method, dense, kind)
    assert " ".join(values) == LOKR[rank, both, factor]
    assert whole(values, "w1").shape == ((6, 4) if factor == -1 else (2, 2))


@pytest.mark.parametrize("zero", ["w1", "w2"])
@pytest.mark.parametrize("rank", [2, 9])
def test_lokr_starts_with_one_factor_at_zero(zero: str, rank: int) -> None:
    net = LoKr(targets="0", rank=rank, zero=zero, decompose_both=True).apply(nn.Sequential(nn.Linear(D_IN, D_OUT)))
    none = {n for n, v in values_of(net).items() if not v.any()}
    assert none == {{("w1", 2): "w1_a", ("w1", 9): "w1", ("w2", 2): "w2_b", ("w2", 9): "w2"}[zero, rank]}


def lokr_tensors(ours: nn.Module, theirs: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    return [(p, getattr(theirs, f"lokr_{n}")["default"]) for n, p in ours.named_parameters()]


@pytest.mark.parametrize(("rank", "both", "factor"), [*LOKR, (2, True, 4), (1, True, 5), (3, False, 7)])
def test_lokr_as_in_peft(rank: int, both: bool, factor: int) -> None:
    config = LoKrConfig(
        target_modules=["0", "2"], r=rank, alpha=5, decompose_both=both, decompose_factor=factor, init_weights=False
    )
    ours = LoKr(targets="0,2", rank=rank, alpha=5.0, decompose_both=both, factor=factor)
    agree(same_as_peft(ours, config, lokr_tensors))


@pytest.mark.parametrize(("rank", "kernel"), [(2, 3), (1, 3), (1, 1), (4, 2)])
def test_lokr_of_a_convolution_as_in_peft(rank: int, kernel: int) -> None:
    def build() -> nn.Module:
        pixels = nn.Unflatten(-1, (4, 6, 6))
        return nn.Sequential(nn.Linear(D_IN, 144), nn.Flatten(0, 1), pixels, nn.Conv2d(4, 6, kernel, 2, 1))

    config = LoKrConfig(target_modules=["3"], r=rank, alpha=5, init_weights=False)
    agree(same_as_peft(LoKr(targets="3", rank=rank, alpha=5.0), config, lokr_tensors, build))


def test_lokr_of_a_convolution_of_time_and_a_full_factor_is_no_kronecker_product_in_peft() -> None:
    """peft gives w2 (o2, i2, k) and w1 (o1, i1) to torch.kron, which lines up their last axes: i1 meets the kernel.

    Rank 1, where w2 is a matrix (o2, i2 k), is right there and equal to ours.
    """

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(D_IN, 64), nn.Flatten(0, 1), nn.Unflatten(-1, (4, 16)), nn.Conv1d(4, 6, 3, 2, 1))

    def both(rank: int) -> tuple[float, float]:
        config = LoKrConfig(target_modules=["3"], r=rank, alpha=5, init_weights=False)
        return same_as_peft(LoKr(targets="3", rank=rank, alpha=5.0), config, lokr_tensors, build)

    agree(both(1))
    assert both(2)[0] > 0.1
    layer = LoKr(targets="0", rank=2).apply(nn.Sequential(nn.Conv1d(4, 6, 3)))
    perturb(layer)
    w1, w2 = state.get_applied(layer).placements[0].adapter.factors()
    change = torch.kron(w1[..., None], w2[0].view(3, 2, 3)) * 4.0  # what was meant
    x = torch.randn(2, 4, 9)
    torch.testing.assert_close(layer(x), F.conv1d(x, layer[0].weight + change, layer[0].bias), atol=1e-6, rtol=1e-5)


def test_krona_is_lokr_with_both_factors_full() -> None:
    config = LoKrConfig(target_modules=["0"], r=9, alpha=9 * 16, init_weights=False)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Tanh(), nn.Linear(D_OUT, D_OUT))

    def copy(ours: Any, theirs: Any) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [(ours.a, theirs.lokr_w1["default"]), (ours.b, theirs.lokr_w2["default"])]

    agree(same_as_peft(KronA(targets="0", left=[6, 4]), config, copy, build))


@pytest.mark.parametrize("near", [-1, 1, 2, 4, 5, 8, 100])
def test_factors_as_in_peft(near: int) -> None:
    assert [factorise(n, near) for n in range(1, 300)] == [factorization(n, near) for n in range(1, 300)]


def test_a_factor_of_zero_is_an_error() -> None:
    for factor in (0, -2):
        with pytest.raises(FieldError, match="expected a number above 0, or -1"):
            LoKr(factor=factor)


class Sizes(TorchDispatchMode):
    """Notes the shape of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            made = out if isinstance(out, (tuple, list)) else [out]
            self.shapes += [tuple(t.shape) for t in made if isinstance(t, Tensor)]
        return out


def largest(method: Any, width: int = 256) -> int:
    """Entries of the largest tensor that a step on two inputs makes; the dense change would have width^2."""
    net = method.apply(nn.Sequential(nn.Linear(width, width)))
    perturb(net)
    x = torch.randn(2, width, requires_grad=True)
    with Sizes() as sizes:
        net(x).sum().backward()
    return max(math.prod(shape) for shape in sizes.shapes)


@pytest.mark.parametrize("method", [KronA(targets="0"), LoKr(targets="0", rank=2), LoKr(targets="0", rank=99)])
def test_kronecker_products_are_never_built(method: Any) -> None:
    assert largest(method) == 2 * 256


# ------------------------------------------------------------------ MoRA
def mora_dense(m: Tensor, d_in: int, d_out: int, type: int) -> Tensor:
    """Entry by entry, as the method's sheet defines each type."""
    n = len(m)
    groups = lambda width: [g for g in range(n) for _ in range(width // n + (g < width % n))]  # noqa: E731
    change = [[m.new_zeros(()) for _ in range(d_in)] for _ in range(d_out)]
    padded = -(-d_in // n) * n
    blocks = -(-d_in // n)
    for p in range(d_out):
        if type == 6:
            row = p % (blocks * n)
            t = row // n
            for j in range(n):
                angle = t * 10000 ** (-2 * (j % (n // 2)) / n)
                partner = m[row % n, j + n // 2] if j < n // 2 else -m[row % n, j - n // 2]
                entry = m[row % n, j] * math.cos(angle) + partner * math.sin(angle)
                q = (t * n + j) % d_in
                change[p][q] = change[p][q] + entry
            continue
        row = p % n if type in (1, 3) else groups(d_out)[p]
        if type in (1, 4):
            for q in range(padded):
                change[p][q % d_in] = change[p][q % d_in] + m[row, q % n]
        else:
            for q in range(d_in):
                change[p][q] = m[row, groups(d_in)[q]]
    return torch.stack([torch.stack(row) for row in change])


@pytest.mark.parametrize("type", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(11, 7, 1), (12, 20, 2), (7, 17, 1), (3, 20, 6), (8, 8, 4)])
def test_mora(type: int, d_in: int, d_out: int, rank: int) -> None:
    """Widths that M divides and that it does not, M wider than x (twice over), fewer outputs than rows of x."""
    method = MoRA(targets="0", rank=rank, type=type, dtype="float64")
    for kind in ("linear", "conv1d"):
        values = check(
            method, lambda v, w, b: (w + mora_dense(v["m"], d_in, d_out, type), b), kind, d_in=d_in, d_out=d_out
        )
    n = len(values["m"])
    assert n == int(math.sqrt((d_in + d_out) * rank) + 0.5) // (2 if type == 6 else 1) * (2 if type == 6 else 1)
    assert abs(n * n - rank * (d_in + d_out)) <= (4 if type == 6 else 2) * n + 1


def test_mora_rounds_as_its_code_and_on_request_as_the_paper() -> None:
    sizes = {(4096, 11008): (348, 347), (4096, 4096): (256, 256), (48, 32): (13, 12)}
    for (d_in, d_out), (nearest, floor) in sizes.items():
        rank = 2 if d_in == 48 else 8
        assert square(d_in, d_out, rank, 1, "nearest") == nearest
        assert square(d_in, d_out, rank, 1, "floor") == floor
        assert square(d_in, d_out, rank, 6, "nearest") == nearest // 2 * 2
    assert count("llama-7b", MoRA(targets="all-linear", rank=8, heads=None)) == 20_014_592


def test_the_rank_of_moras_change() -> None:
    for type, rank in ((1, 12), (2, 12), (3, 12), (4, 12), (6, 32)):
        adapter = MoRA(targets="0", rank=2, type=type, rounding="floor").apply(place("linear", 32, 40))
        perturb(adapter)
        delta = state.get_applied(adapter).placements[0].adapter.delta(torch.empty(40, 32, dtype=torch.float64))
        assert torch.linalg.matrix_rank(delta) == rank


def test_mora_switches_among_the_types_that_share_their_matrix() -> None:
    net = place("linear")
    method = MoRA(targets="0", rank=2, type=1, dtype="float64")
    method.apply(net)
    perturb(net)
    m = values_of(net)["m"].detach()
    x = torch.randn(3, D_IN, dtype=torch.float64)
    weight, bias = matrix(net)
    for type in (2, 3, 4, 1):
        method.switch(net, type)
        expected = F.linear(x, weight + mora_dense(m, D_IN, D_OUT, type), bias)
        torch.testing.assert_close(net(x), expected, atol=1e-10, rtol=1e-10)
        assert method.type == type
    for other in (6, 5):
        with pytest.raises(FieldError, match="only types 1, 2, 3, 4 share their M"):
            method.switch(net, other)


def test_mora_drops_features_before_they_are_compressed() -> None:
    net = place("linear")
    MoRA(targets="0", rank=2, type=1, dropout=0.5, dtype="float64").apply(net)
    perturb(net)
    x = torch.randn(3, D_IN, dtype=torch.float64)
    weight, bias = matrix(net)
    change = mora_dense(values_of(net)["m"].detach(), D_IN, D_OUT, 1)
    torch.manual_seed(3)
    y = net.train()(x)
    torch.manual_seed(3)
    torch.testing.assert_close(y, F.linear(x, weight, bias) + F.dropout(x, 0.5) @ change.T)


@pytest.mark.parametrize("type", [1, 2, 3, 4, 6])
def test_mora_never_makes_the_dense_change(type: int) -> None:
    assert largest(MoRA(targets="0", rank=8, type=type)) == 64 * 64


# ------------------------------------------------------------------ FourierFT
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(("d_in", "d_out"), [(6, 10), (7, 10), (6, 9), (7, 9), (1, 8), (8, 1)])
def test_fourierft(kind: str, d_in: int, d_out: int) -> None:
    """All entries, so that those which are their own conjugates, and both of a pair, are among them."""
    n = d_in * d_out
    method = FourierFT(targets="0", count=n, scale=7.0, places_seed=3, dtype="float64")

    def dense(v: Values, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(d_out).outer(torch.arange(d_out)).double() / d_out
        columns = torch.arange(d_in).outer(torch.arange(d_in)).double() / d_in
        turns = rows[:, None, :, None] + columns[None, :, None]
        order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
        spectrum = torch.zeros(n, dtype=torch.float64).index_put((order,), v["c"]).view(d_out, d_in)
        return w + 7.0 / n * (spectrum * torch.cos(2 * math.pi * turns)).sum((-1, -2)), b

    check(method, dense, kind, d_in=d_in, d_out=d_out)


def fourier_tensors(ours: Any, theirs: Any) -> list[tuple[nn.Parameter, nn.Parameter]]:
    return [(ours.c, theirs.fourierft_spectrum["default"])]


@pytest.mark.parametrize("count", [1, 50])
def test_fourierft_as_in_peft(count: int) -> None:
    config = FourierFTConfig(target_modules=["0", "2"], n_frequency=count, scaling=90.0, random_loc_seed=5)
    agree(same_as_peft(FourierFT(targets="0,2", count=count, scale=90.0, places_seed=5), config, fourier_tensors))


def test_fourierft_starts_as_asked_and_counts_its_entries() -> None:
    assert count("roberta-base", FourierFT(heads=None)) == 24_000
    assert count("roberta-large", FourierFT(heads=None)) == 48_000
    assert count("roberta-base", FourierFT(heads=None, counts={"v": 10})) == 12 * 1010
    net, base = place("linear"), place("linear")
    FourierFT(targets="0", count=5, init="zero").apply(net)
    x = torch.randn(3, D_IN, dtype=torch.float64)
    assert torch.equal(net(x), base(x))
    with pytest.raises(TargetError, match=r"count=1000\) is more than the 36 x 24 entries of '0'"):
        FourierFT(targets="0").apply(place("linear"))
    with pytest.raises(FieldError, match="expected numbers above 0"):
        FourierFT(counts={"q": 0})


def test_sites_of_one_shape_share_the_places_of_their_entries() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 9))
    FourierFT(targets="0,1,2", count=6).apply(net)
    first, second, third = (p.adapter for p in state.get_applied(net).placements)
    assert first.basis is second.basis is not third.basis
    assert not torch.equal(first.c, second.c)


def test_spectra_are_never_made_dense() -> None:
    """What autograd keeps is x; the largest temporary is one row a token and entry."""
    assert largest(FourierFT(targets="0", count=300)) <= 300 * 2 * 2


# ------------------------------------------------------------------ GLoRA
def glora_part(v: Values, name: str, word: str) -> Tensor:
    """As (d, 1) or (d_out, d_in), or a number."""
    if word == "none":
        return torch.zeros((), dtype=torch.float64)
    if word == "lora":
        return v[f"{name}_up"] @ v[f"{name}_down"]
    return v[name][:, None]


GLORA = [  # of A, B, C, D, E
    "lora lora lora vector vector",
    "vector none vector constant constant",
    "constant constant none vector none",
    "none vector lora none constant",
    "lora none none none none",
    "none lora none none none",  # LoRA
    "none none none none vector",  # BitFit
]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("words", GLORA)
def test_glora(words: str, kind: str) -> None:
    """(W + W * A + B) x + b + W C + D * b + E"""
    word = dict(zip("abcde", words.split(), strict=True))

    def dense(v: Values, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        part = {name: glora_part(v, name, word[name]) for name in "abcde"}
        shift = b * part["d"].reshape(-1) + part["e"].reshape(-1)
        if word["c"] != "none":
            shift = shift + (w @ part["c"])[:, 0]
        return w + w * part["a"] + part["b"], b + shift

    values = check(GLoRA(targets="0", rank=2, **word, dtype="float64"), dense, kind)
    sizes = {"lora": {"a": 120, "b": 120, "c": 50}, "vector": {"c": 24}, "constant": {}, "none": {}}
    alone = {"vector": 36, "constant": 1, "none": 0}
    assert sum(v.numel() for v in values.values()) == sum(sizes[w].get(n) or alone[w] for n, w in word.items())


def test_glora_without_a_bias() -> None:
    """E and C make one, which has no place to be folded into; D has nothing to act on."""
    net = place("linear", bias=False)
    weight, _ = matrix(net)
    GLoRA(targets="0", rank=2, a="vector", dtype="float64").apply(net)
    perturb(net)
    v = values_of(net)
    assert set(v) == {"a", "b_up", "b_down", "c_up", "c_down", "e"}
    new = weight * (1 + v["a"][:, None]) + v["b_up"] @ v["b_down"]
    x = torch.randn(4, D_IN, dtype=torch.float64)
    shift = (weight @ v["c_up"] @ v["c_down"])[:, 0] + v["e"]
    torch.testing.assert_close(net(x), x @ new.T + shift, atol=1e-10, rtol=1e-10)
    with pytest.raises(NotMergeableError, match="GLoRA's C and E are a bias"):
        state.get_applied(net).method.merge(net)
    check(
        GLoRA(targets="0", rank=2, c="none", e="none", dtype="float64"),
        lambda v, w, b: (w + w * (v["a_up"] @ v["a_down"]) + v["b_up"] @ v["b_down"], b),
        bias=False,
    )


@pytest.mark.parametrize(
    ("ab", "c", "de"), [("lora", "lora", "constant"), ("vector", "vector", "vector"), ("constant", "none", "none")]
)
def test_glora_as_in_peft(ab: str, c: str, de: str) -> None:
    def copy(ours: Any, theirs: Any) -> list[tuple[nn.Parameter, nn.Parameter]]:
        found = []
        for name in "abcde":
            path = getattr(theirs, f"glora_{name.upper()}")["default"]
            for mine, other in ((name, "X"), (f"{name}_up", "Xd"), (f"{name}_down", "Xu")):
                if hasattr(ours, mine):
                    found.append((getattr(ours, mine), getattr(path, other)))
        return found

    config = GloraConfig(target_modules=["0", "2"], r=2, config_A_B=ab, config_C=c, config_D_E=de)
    agree(same_as_peft(GLoRA(targets="0,2", rank=2, a=ab, b=ab, c=c, d=de, e=de), config, copy))


def test_glora_without_a_bias_in_peft_has_no_c_and_e() -> None:
    """There they are left out; the authors' code, the paper and we have them: (W + ...) x + W C + E."""
    config = GloraConfig(target_modules=["0"], r=2)
    theirs = get_peft_model(nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False)), config)
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == 2 * 2 * (D_IN + D_OUT)
    net = GLoRA(targets="0", rank=2).apply(place("linear", bias=False))
    assert state.describe(net)["trainable"] == 2 * 2 * (D_IN + D_OUT) + 2 * (D_IN + 1) + 1


def two() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)).double()


def test_gloras_choice_by_site() -> None:
    net = two()
    GLoRA(targets="0,2", rank=2, choices={"2": "none none none none vector"}).apply(net)
    assert [n.partition("adapters.glora.")[2] for n in state.trainable(net)] == [
        "a_down", "a_up", "b_down", "b_up", "c_down", "c_up", "d", "e", "e",
    ]  # fmt: skip
    for words in ("lora", "lora lora constant none none", "lora none none none lora"):
        with pytest.raises(FieldError, match="is no choice. Expected five words"):
            GLoRA(choices={"0": words})
    with pytest.raises(FieldError, match="leave `choices` out"):
        GLoRA(supernet=True, choices={"0": GLORA[0]})
    with pytest.raises(TargetError, match="is for 1 sites, and there are 2"):
        GLoRA(targets="0,2", chosen=GLORA[:1]).apply(two())


def test_a_supernet_takes_a_choice_by_seed_and_batch_and_trains_its_parts_alone() -> None:
    net, base = two(), two()
    method = GLoRA(targets="0,2", rank=2, supernet=True, dtype="float64")
    method.apply(net)
    assert state.describe(net)["trainable"] == sum(2 * 2 * (o + i) + 2 * (i + 1) + 2 * o for o, i in ((6, 8), (5, 6)))
    perturb(net)
    first, second = (p.adapter for p in state.get_applied(net).placements)
    net.train()
    seen = set()
    for index in range(40):
        method.sample(net, index)
        seen |= {first.sampled, second.sampled}
    assert len(seen) > 60
    method.sample(net, 3)
    before = first.sampled, second.sampled
    method.sample(net, 4)
    assert (first.sampled, second.sampled) != before
    method.sample(net, 3)
    assert (first.sampled, second.sampled) == before
    first.sampled, second.sampled = ("vector", "constant", "none", "constant", "none"), ("none",) * 5
    x = torch.randn(4, 8, dtype=torch.float64)
    y = net(x)
    w, b, p = base[0].weight, base[0].bias, dict(first.named_parameters())
    new = w * (1 + p["a_up"][:, :1]) + p["b_up"][0, 0]
    expected = base[2](torch.tanh(F.linear(x, new, b * (1 + p["d"][0]))))
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    y.sum().backward()
    assert {n for n, q in first.named_parameters() if q.grad is not None} == {"a_up", "b_up", "d"}
    assert p["a_up"].grad[:, 1:].abs().sum() == 0
    net.eval()
    assert not torch.allclose(net(x), expected)  # all parts, until one is chosen


def test_search_finds_the_choice_with_the_best_score_and_files_hold_no_more(tmp_path: Any) -> None:
    net = two()
    method = GLoRA(targets="0,2", rank=2, supernet=True, dtype="float64")
    method.apply(net)
    perturb(net, scale=0.5)
    adapters = [p.adapter for p in state.get_applied(net).placements]
    goal = [("vector", "lora", "none", "none", "vector"), ("none", "constant", "vector", "vector", "none")]

    def score(model: nn.Module) -> float:
        assert model is net
        return float(sum(a == b for x, g in zip(adapters, goal, strict=True) for a, b in zip(x.words, g, strict=True)))

    def size() -> int:
        return sum(a.size(a.words) for a in adapters)

    assert search(net, method, score, generations=30, top=5, probability=0.4, seed=1) == 10.0
    assert [a.words for a in adapters] == goal
    assert size() == (6 + 2 * 14 + 0 + 0 + 6) + (0 + 1 + 6 + 5 + 0)
    x = torch.randn(4, 8, dtype=torch.float64)
    save_adapter(net, tmp_path / "a")
    other = two()
    loaded = load_adapter(other, tmp_path / "a")
    assert not loaded.supernet
    assert loaded.chosen == [" ".join(words) for words in goal]
    assert sum(p.numel() for p in state.get_applied(other).placements[0].adapter.parameters()) == 6 + 28 + 6
    torch.testing.assert_close(other(x), net.eval()(x), atol=1e-12, rtol=1e-12)
    before = net(x)
    method.merge(net)
    torch.testing.assert_close(net(x), before, atol=1e-10, rtol=1e-10)
    method.unmerge(net)
    small = search(net, method, lambda model: float(size()), generations=3, limit=40, seed=2)
    assert 20 < small <= 40
    with pytest.raises(ValueError, match=r"search\(limit=-1\): none of 500 random choices"):
        search(net, method, score, population=5, limit=-1)


def test_a_supernet_in_a_trainer_takes_another_choice_each_batch() -> None:
    seen: list[Any] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = two().float()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            seen.append([p.adapter.sampled for p in state.get_applied(self).placements])
            return self.net(batch).pow(2).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 1e-3)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.randn(6, 8), batch_size=2)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    method = GLoRA(targets="net.0,net.2", rank=2, supernet=True)
    pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[method], **quiet).fit(Module())
    assert len(seen) == 6
    assert len({str(choice) for choice in seen}) == 6


# ------------------------------------------------------------------ WaveFT
@pytest.mark.parametrize("order", range(1, 11))
def test_wavelets(order: int) -> None:
    """The table of peft; orthonormal to its own even shifts, and with as many vanishing moments."""
    taps = torch.tensor(daubechies(order), dtype=torch.float64)
    torch.testing.assert_close(taps, torch.tensor(Wavelet(f"db{order}").rec_lo, dtype=torch.float64), atol=1e-9, rtol=0)
    high = torch.tensor(mirror(daubechies(order)), dtype=torch.float64)
    torch.testing.assert_close(high, torch.tensor(Wavelet(f"db{order}").rec_hi, dtype=torch.float64), atol=1e-9, rtol=0)
    for shift in range(0, 2 * order, 2):
        assert abs(float(taps[: 2 * order - shift] @ taps[shift:]) - (shift == 0)) < 1e-9
    assert abs(float(high @ torch.arange(2 * order).double() ** (order - 1))) < 1e-6 * (2 * order) ** order


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("wavelet", ["db1", "db2", "db3", "none"])
@pytest.mark.parametrize(("d_in", "d_out"), [(6, 10), (7, 9)])
def test_waveft(kind: str, wavelet: str, d_in: int, d_out: int) -> None:
    """W + s sum_k c_k column_k row_k, a filter placed at twice the coefficient's index on each axis, cut to W."""
    n = d_in * d_out
    method = WaveFT(targets="0", count=n, scale=3.0, wavelet=wavelet, places_seed=2, init="normal", dtype="float64")

    def axis(place: int, high: bool, width: int) -> Tensor:
        filters = Wavelet(wavelet)
        out = torch.zeros(width, dtype=torch.float64)
        for t, tap in enumerate(filters.rec_hi if high else filters.rec_lo):
            at = 2 * place + t - (len(filters.rec_lo) - 2)
            if 0 <= at < width:
                out[at] += tap
        return out

    def dense(v: Values, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(2)).tolist()
        if wavelet == "none":
            return w + 3.0 * torch.zeros(n, dtype=torch.float64).index_put((torch.tensor(order),), v["c"]).view_as(w), b
        taps = len(Wavelet(wavelet).rec_lo)
        height, width = (2 * -(-(d + taps - 2) // 2) for d in (d_out, d_in))
        for c, place in zip(v["c"], order, strict=True):
            p, q = place // d_in + (height - d_out) // 2, place % d_in + (width - d_in) // 2
            column = axis(p % (height // 2), q >= width // 2, d_out)
            w = w + 3.0 * c * torch.outer(column, axis(q % (width // 2), p >= height // 2, d_in))
        return w, b

    check(method, dense, kind, d_in=d_in, d_out=d_out)


@pytest.mark.parametrize("wavelet", ["db1", "db2", "db5", "none"])
def test_waveft_as_in_peft(wavelet: str) -> None:
    config = WaveFTConfig(
        target_modules=["0", "2"], n_frequency=70, scaling=9.0, random_loc_seed=5, init_weights=False,
        wavelet_family="db1" if wavelet == "none" else wavelet, use_idwt=wavelet != "none",
    )  # fmt: skip

    def copy(ours: Any, theirs: Any) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [(ours.c, theirs.waveft_spectrum["default"])]

    agree(same_as_peft(WaveFT(targets="0,2", count=70, scale=9.0, wavelet=wavelet, places_seed=5), config, copy))


def test_waveft_counts_its_entries_and_makes_nothing_dense() -> None:
    assert count("roberta-base", WaveFT(heads=None)) == 24 * 2592
    assert count("roberta-base", WaveFT(heads=None, counts={"v": 10})) == 12 * 2602
    assert largest(WaveFT(targets="0", count=300, wavelet="db2")) <= 300 * 2 * 2
    with pytest.raises(FieldError, match="expected numbers above 0"):
        WaveFT(counts={"q": -1})
    with pytest.raises(FieldError, match="wavelet='db11'"):
        WaveFT(wavelet="db11")


# ------------------------------------------------------------------ KronA-B and KronA-B-res
@pytest.mark.parametrize("model", list(by_hand.BY_HAND))
@pytest.mark.parametrize("residual", [False, True])
def test_krona_b(model: str, residual: bool) -> None:
    """f + s (A kron B) u [+ s_res u], u what the feed-forward layer reads: post-norm and pre-norm blocks."""
    method = (KronABRes if residual else KronAB)(scale=3.0, left=[4, 16], dtype="float64", heads=None)
    net, base, values = by_hand.pair(model, method)
    label = method.info.name

    def beside(place: str, u: Tensor) -> Tensor:
        a, b = (values[f"{place}.adapters.{label}.{name}"] for name in "ab")
        assert (a.shape, b.shape) == ((4, 16), (8, 2))
        change = 3.0 * u @ torch.kron(a, b).T
        return change + values[f"{place}.adapters.{label}.gain"] * u if residual else change

    expected = by_hand.BY_HAND[model](base, by_hand.inputs(model), beside=beside)
    by_hand.compare(net, forward(net, model), values, expected)


def test_krona_b_starts_as_the_base_or_on_request_beside_it() -> None:
    for cls, numbers in ((KronAB, 12 * 1536), (KronABRes, 12 * 1537)):
        assert count("roberta-base", cls(heads=None)) == numbers
        net, base = zoo.build("bert"), zoo.build("bert")
        cls(init="random").apply(net)
        assert not torch.equal(output(net, "bert"), output(base, "bert"))
        gains = {float(p.detach()) for n, p in state.trainable(net).items() if n.endswith("gain")}
        assert gains == ({1.0} if cls is KronABRes else set())
        with pytest.raises(TargetError, match=f"{cls.__name__} needs the feed-forward layer around"):
            cls(targets="q").apply(zoo.build("bert"))
        with pytest.raises(FieldError, match="the shape of A"):
            cls(left=[3])


# ------------------------------------------------------------------ SAID and DID
def fastfood(adapter: Any, name: str) -> Tensor:
    """P (D, d) with the Hadamard matrix written out: (H G Pi H B)[:D, :d] / (|G| sqrt(D))"""
    transform = adapter.projections[list(adapter.names).index(name)]
    n = len(transform.order)
    h = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)], dtype=torch.float64)
    g = transform.gauss.double()
    pi = torch.eye(n, dtype=torch.float64)[transform.order.long()]
    whole = h @ torch.diag(g) @ pi @ h @ torch.diag(transform.signs.double())
    d = min(len(adapter.space.v), n)
    p = whole[: transform.count, :d] / (g.norm() * math.sqrt(transform.count))
    return F.pad(p, (0, len(adapter.space.v) - d))  # a short tensor sees the first n numbers of v


@pytest.mark.parametrize("cls", [SAID, DID])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_said_and_did(cls: Any, kind: str) -> None:
    """W + lambda_1 P_1 v and b + lambda_2 P_2 v; the bias (5) is shorter than v, the weight (5, 6) longer."""
    net = place(kind, 6, 5)
    weight, bias = matrix(net)
    cls(targets="0", dimension=14, dtype="float64").apply(net)
    perturb(net, scale=0.5)
    values = values_of(net)
    adapter = state.get_applied(net).placements[0].adapter
    assert set(values) == ({"space.v", "space.gains"} if cls is SAID else {"space.v"})
    gains = values.get("space.gains", torch.ones(2, dtype=torch.float64))
    index = adapter.names
    shape = (6, 5) if kind == "conv1d" else (5, 6)

    def expected(x: Tensor) -> Tensor:
        change = gains[index["weight"]] * (fastfood(adapter, "weight") @ values["space.v"]).view(shape)
        new = weight + (change.T if kind == "conv1d" else change)
        return x @ new.T + bias + gains[index["bias"]] * (fastfood(adapter, "bias") @ values["space.v"])

    compare(net, values, expected, torch.randn(3, 6, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 16, 64])
def test_the_hadamard_transform_and_its_gradient(n: int) -> None:
    """Unnormalised; its gradient is itself, without the 1 / sqrt(n) of the released code, which turns v's gradient."""
    x = torch.randn(n, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(hadamard(hadamard(x)), n * x)
    assert torch.autograd.gradcheck(hadamard, (x,))
    goal = torch.randn(n, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(hadamard(x) @ goal, x)
    torch.testing.assert_close(gradient, hadamard(goal))


def test_fastfood_keeps_lengths_and_comes_from_the_seed_alone() -> None:
    def change(seed: int, index: int, v: Tensor) -> Tensor:
        transform = Fastfood(seed, index, torch.Size((30, 20)))
        transform.fill()
        return transform(v)

    v = torch.randn(100)
    lengths = torch.stack([change(seed, 0, v).norm() / v.norm() for seed in range(60)])
    assert abs(float(lengths.mean()) - 1) < 0.05
    torch.manual_seed(1)
    first = change(3, 1, v)
    torch.manual_seed(2)
    assert torch.equal(change(3, 1, v), first)
    assert not torch.equal(change(3, 2, v), first)
    assert not torch.equal(change(4, 1, v), first)


def test_said_moves_every_module_norms_and_tied_weights_as_one() -> None:
    net = zoo.build("gpt2")
    SAID(dimension=2000).apply(net)
    placements = state.get_applied(net).placements
    tensors = {id(p) for n, p in zoo.build("gpt2").named_parameters()}
    gains = placements[0].adapter.space.gains
    assert len(gains) == len(tensors)
    assert {p.site for p in placements} == {
        n for n, m in zoo.build("gpt2").named_modules() if any(True for _ in m.parameters(recurse=False))
    }
    perturb(net)
    by_site = {p.site: p.adapter for p in placements}
    assert torch.equal(by_site["transformer.wte"].changes()["weight"], by_site["lm_head"].changes()["weight"])
    base = zoo.build("gpt2")
    with torch.no_grad():
        for site, adapter in by_site.items():
            for name, change in adapter.changes().items():
                if site != "lm_head":
                    base.get_submodule(site).get_parameter(name).add_(change)
    torch.testing.assert_close(output(net, "gpt2"), output(base, "gpt2"), atol=1e-5, rtol=1e-5)


def test_counts_of_subspaces() -> None:
    assert count("t5-base", SAID(heads=None, dimension=20000)) == 20000  # 0.009 %
    assert count("t5-base", DID(heads=None, dimension=20000)) == 20000
    net = zoo.build("mlp")
    SAID(targets="mlp,lora", dimension=40, heads=None).apply(net)
    assert {n.rpartition(".")[2]: len(p) for n, p in state.trainable(net).items()} == {"v": 37, "gains": 3}
    with pytest.raises(TargetError, match=r"SAID\(dimension=3\) leaves nothing beside a number for each of 3 tensors"):
        SAID(targets="mlp,lora", dimension=3).apply(zoo.build("mlp"))


def test_a_failing_forward_leaves_the_parameters_in_their_places() -> None:
    net = place("linear")
    SAID(targets="0", dimension=30).apply(net)
    with pytest.raises(RuntimeError):
        net(torch.randn(3, 5, dtype=torch.float64))
    assert isinstance(net[0].weight, nn.Parameter)
    assert "weight" not in vars(net[0])


def test_subspaces_before_and_after_quantising() -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    original = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    SAID(targets="0", dimension=30).apply(net)
    quantise(net)
    perturb(net)
    adapter = state.get_applied(net).placements[0].adapter
    x = torch.randn(3, 64)
    weight = net[0].weight.detach() + adapter.changes()["weight"]
    torch.testing.assert_close(
        net(x), F.linear(x, weight, net[0].bias + adapter.changes()["bias"]), atol=1e-5, rtol=1e-5
    )
    other = nn.Sequential(nn.Linear(64, 64))
    other.load_state_dict(original)
    quantise(other)
    SAID(targets="0", dimension=30).apply(other)
    perturb(other)
    torch.testing.assert_close(other(x), net(x), atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------ beside other methods, and at the edges
@pytest.mark.parametrize("other", [IA3, DoRA, HiRA, GLoRA, OFT])
def test_a_subspace_around_what_scales_or_turns_is_merged_exactly(other: Any) -> None:
    """GPT-2's packed projection, too, where the others are at slices inside of it."""
    net = zoo.build("gpt2")
    first, second = make(other.info.name, "gpt2"), make("said", "gpt2")
    first.apply(net)
    second.apply(net)
    perturb(net)
    expected = output(net, "gpt2")
    with pytest.raises(MergeError, match="lies inside of 'said' and is not merged"):
        second.merge(net)
    for method in (first, second):
        method.merge(net)
        torch.testing.assert_close(output(net, "gpt2"), expected, atol=1e-6, rtol=1e-5)


def test_merging_under_glora_is_refused_as_it_computes_with_the_weight() -> None:
    net = place("linear").float()
    lora, glora = LoRA(targets="0", rank=2), GLoRA(targets="0", rank=2)
    lora.apply(net)
    glora.apply(net)
    with pytest.raises(MergeError, match=r"\(Generalized\) computes with the weight that merging 'lora' would change"):
        lora.merge(net)
    with pytest.raises(MergeError, match="lies inside of 'glora' and is not merged"):
        glora.merge(net)


def test_a_supernet_in_training_is_merged_as_chosen_not_as_last_drawn() -> None:
    net = place("linear")
    method = GLoRA(targets="0", rank=2, supernet=True, dtype="float64")
    method.apply(net)
    perturb(net, scale=0.5)
    x = torch.randn(4, D_IN, dtype=torch.float64)
    expected = net.eval()(x)
    (only,) = state.get_applied(net.train()).placements
    only.adapter.sampled = ("none",) * 5
    method.merge(net)
    assert only.adapter.sampled == ("none",) * 5
    torch.testing.assert_close(net(x), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("words", ["lora lora lora vector vector", "none none vector none none"])
def test_glora_over_codes_keeps_no_weight(words: str) -> None:
    net = nn.Sequential(nn.Linear(256, 256))
    quantise(net)
    GLoRA(targets="0", rank=2, choices={"0": words}).apply(net)
    perturb(net)
    sizes: list[int] = []
    x = torch.randn(3, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        y = net(x)
    assert max(sizes) <= 256 * 256 // 2  # the codes
    y.sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("cls", [KronA, LoKr, MoRA, FourierFT, WaveFT, GLoRA, SAID])
def test_no_tokens_give_no_outputs(cls: Any) -> None:
    """As at an expert that the router left out."""
    net = place("linear").float()
    cls(targets="0", **({"count": 20} if cls in (FourierFT, WaveFT) else {})).apply(net)
    x = torch.randn(2, 0, D_IN, requires_grad=True)
    y = net(x)
    assert y.shape == (2, 0, D_OUT)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in state.trainable(net).values())


@pytest.mark.parametrize("type", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("widths", [(1, 1), (2, 1), (1, 2)])
def test_mora_on_the_narrowest_projections(type: int, widths: tuple[int, int]) -> None:
    net = place("linear", *widths)
    MoRA(targets="0", rank=1, type=type, rounding="floor", dtype="float64").apply(net)
    perturb(net)
    x = torch.randn(3, widths[0], dtype=torch.float64)
    expected = net(x).detach()
    state.get_applied(net).method.merge(net)
    torch.testing.assert_close(net(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("cls", [FourierFT, WaveFT])
def test_entries_times_tokens_are_never_made(cls: Any) -> None:
    tokens, width = 64, 32
    net = nn.Sequential(nn.Linear(width, width))
    cls(targets="0", count=900).apply(net)
    with Sizes() as sizes:
        net(torch.randn(tokens, width, requires_grad=True)).sum().backward()
    assert max(math.prod(shape) for shape in sizes.shapes) <= 4 * tokens * (width + 2) < 900 * tokens / 4
