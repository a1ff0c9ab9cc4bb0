"""Methods that turn, reflect, scale or convolve: dense fp64 oracles from the equations, peft on the same tensors, traps."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_counts import fresh
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lightning_peft import BOFT, C3A, HRA, OFT, SSF, DeLoRA, GraLoRA, MiSS, RoAd, SHiRA
from lightning_peft.callback import PEFT
from lightning_peft.core import state
from lightning_peft.core.adapter import NotMergeableError
from lightning_peft.core.fields import FieldError
from lightning_peft.core.init import Draw
from lightning_peft.core.orthogonal import TurnInput, cayley, neumann, skew
from lightning_peft.core.projection import base_bias
from lightning_peft.core.sites import TargetError
from lightning_peft.methods.c3a import CircularProduct
from lightning_peft.methods.shira import positions
from lightning_peft.precision import quantise
from tests.zoo import build, inputs

D_IN, D_OUT = 12, 8
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
Values = dict[str, Tensor]
Oracle = Callable[[Values, Tensor, Tensor], tuple[Tensor, Tensor]]


def layer(kind: str, d_in: int = D_IN, d_out: int = D_OUT) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(d_in, d_out) if kind == "linear" else Conv1D(d_out, d_in)).double()


def put(method: PEFT, net: nn.Module, scale: float = 0.3) -> list[Any]:
    """Apply, and move all trained tensors away from their start; the adapters."""
    method.apply(net)
    generator = torch.Generator().manual_seed(1)
    adapters = [placement.adapter for placement in state.get_applied(net).placements]
    for p in itertools.chain.from_iterable(a.parameters() for a in adapters):
        p.data.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return adapters


def rows(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------ oracles: what becomes of W (d_out, d_in) and b
def antisymmetric(upper: Tensor, size: int) -> Tensor:
    out = torch.zeros(size, size, dtype=upper.dtype)
    for value, (i, j) in zip(upper, itertools.combinations(range(size), 2), strict=True):
        e = torch.zeros_like(out)
        e[i, j], e[j, i] = 1, -1
        out = out + value * e
    return out


def rotation(upper: Tensor, size: int) -> Tensor:
    q, eye = antisymmetric(upper, size), torch.eye(size, dtype=upper.dtype)
    return (eye + q) @ torch.linalg.inv(eye - q)


def oft(values: Values, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """In rows x R W^T: the weight W R^T."""
    return w @ torch.block_diag(*[rotation(q, 4) for q in values["q"]]).T, b


def oft_shared(values: Values, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return w @ torch.block_diag(*[rotation(values["q"][0], 4)] * 3).T, b


def oft_neumann(values: Values, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    qs = [antisymmetric(q, 4) for q in values["q"]]
    eye = torch.eye(4, dtype=w.dtype)
    return w @ torch.block_diag(*[eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q for q in qs]).T, b


def hra(values: Values, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for u in values["u"]:
        w = w @ (torch.eye(len(u), dtype=w.dtype) - 2 * torch.outer(u, u) / (u @ u))
    return w, b


def butterfly(index: int, width: int, size: int) -> Tensor:
    """The matrix that takes features to their places in the blocks of factor `index` (from 0)."""
    half, stride = size // 2, 2**index  # blocks of the first factor are neighbours
    chunks = list(range(width // half))
    if index:
        group = 2 * stride
        chunks = [g + k + side * stride for g in range(0, len(chunks), group) for k in range(stride) for side in (0, 1)]
    order = [c * half + t for c in chunks for t in range(half)]
    return torch.eye(width, dtype=torch.float64)[order].T  # x @ this = x[order]


def boft(values: Values, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    turn = torch.eye(w.shape[1], dtype=w.dtype)
    for i in reversed(range(len(values["q"]))):
        p = butterfly(i, w.shape[1], 2)
        turn = turn @ p @ torch.block_diag(*[rotation(q, 2) for q in values["q"][i]]) @ p.T
    return values["s"][:, None] * (w @ turn.T), b


def delora(values: Values, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    change = torch.zeros_like(w)
    for u, v in zip(values["a"], values["b"].T, strict=True):
        change = change + torch.outer(v / (v @ v).sqrt(), u / (u @ u).sqrt()) / len(values["a"])
    return w + values["strength"] * change * (w * w).sum(0).sqrt(), b


def miss(values: Values, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    rank, rows = values["b"].shape[1], len(values["b"])
    change = [[values["b"][o % rows, i % rank] for i in range(w.shape[1])] for o in range(len(w))]
    return w + torch.stack([torch.stack(row) for row in change]), b


def gralora(values: Values, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Scale 6 / (4 + 3), ranks of 2 in two times two blocks."""
    block = [[up[:, 2 * i : 2 * i + 2] @ values["down"][i, 2 * j : 2 * j + 2] for i in (0, 1)]
             for j, up in enumerate(values["up"])]  # fmt: skip
    return w + 6 / 7 * (torch.cat([torch.cat(row, 1) for row in block]) + values["b"] @ values["a"]), b


def road(values: Values, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two groups of four: pairs (0, 2), (1, 3), (4, 6), (5, 7)."""
    alpha, theta = (values[n].expand(2, 2, 2, 2) for n in ("alpha", "theta"))  # group, cosine or sine, half, place
    turn = torch.zeros(8, 8, dtype=w.dtype)
    for group, place in itertools.product((0, 1), (0, 1)):
        i, j = 4 * group + place, 4 * group + 2 + place
        for row, column, trig, half in ((i, i, 0, 0), (i, j, 1, 0), (j, i, 1, 1), (j, j, 0, 1)):
            entry = (torch.sin if trig else torch.cos)(theta[group, trig, half, place]) * alpha[
                group, trig, half, place
            ]
            sign = -1 if (row, column) == (i, j) else 1
            turn = turn.index_put((torch.tensor(row), torch.tensor(column)), sign * entry)
    return turn @ w, turn @ b


def ssf(values: Values, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    gamma = torch.diag(values["gamma"])
    return gamma @ w, gamma @ b + values.get("beta", 0)


def c3a(values: Values, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    kernel = values["w"]
    change = [[kernel[o // 4, i // 4, (i - o) % 4] / D_IN for i in range(D_IN)] for o in range(D_OUT)]
    return w + torch.stack([torch.stack(row) for row in change]), b


def shira(values: Values, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    starts, columns = values["starts"].tolist(), values["columns"].tolist()
    for o in range(len(w)):
        for k in range(starts[o], starts[o + 1]):
            one = torch.zeros_like(w)
            one[o, columns[k]] = 1
            w = w + values["v"][k] * one
    return w, b


ORACLES: dict[str, tuple[PEFT, Oracle]] = {
    "delora": (DeLoRA(targets="0", rank=3, strength=2.0, dtype="float64"), delora),
    "miss": (MiSS(targets="0", rank=4, dtype="float64"), miss),
    "miss-remainder": (MiSS(targets="0", rank=5, dtype="float64"), miss),
    "miss-rows": (MiSS(targets="0", rank=4, rows=2, dtype="float64"), miss),
    "gralora": (GraLoRA(targets="0", rank=4, alpha=6.0, hybrid=3, dtype="float64"), gralora),
    "road-1": (RoAd(targets="0", group_size=4, dtype="float64"), road),
    "road-2": (RoAd(targets="0", group_size=4, variant=2, dtype="float64"), road),
    "road-4": (RoAd(targets="0", group_size=4, variant=4, dtype="float64"), road),
    "ssf": (SSF(targets="0", dtype="float64"), ssf),
    "ssf-scale": (SSF(targets="0", shift=False, dtype="float64"), ssf),
    "c3a": (C3A(targets="0", block_size=4, dtype="float64"), c3a),
    "shira": (SHiRA(targets="0", rank=2, dtype="float64"), shira),
    "oft": (OFT(targets="0", block_size=4, dtype="float64"), oft),
    "oft-shared": (OFT(targets="0", block_size=4, shared=True, dtype="float64"), oft_shared),
    "oft-neumann": (OFT(targets="0", block_size=4, neumann=True, dtype="float64"), oft_neumann),
    "hra": (HRA(targets="0", rank=6, dtype="float64"), hra),
    "boft": (BOFT(targets="0", block_size=2, factors=2, dtype="float64"), boft),
}


@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
@pytest.mark.parametrize("name", ORACLES)
def test_forward_gradients_and_merge(name: str, kind: str) -> None:
    method, oracle = ORACLES[name]
    net = layer(kind)
    weight, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    w = weight if kind == "linear" else weight.T
    [adapter] = put(method, net)
    values = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}
    values |= dict(adapter.named_buffers())
    x = rows(2, 5, D_IN).requires_grad_()
    z = x.detach().clone().requires_grad_()
    y = net(x)
    new_w, new_b = oracle(values, w, bias)
    expected = F.linear(z, new_w, new_b)
    torch.testing.assert_close(y, expected, **CLOSE)
    goal = rows(*y.shape, seed=3)
    (y * goal).sum().backward()
    (expected * goal).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, **CLOSE)
    for n, p in adapter.named_parameters():
        torch.testing.assert_close(p.grad, values[n].grad, **CLOSE)
    method.merge(net)
    merged = net[0].weight if kind == "linear" else net[0].weight.T
    torch.testing.assert_close(merged, new_w, **CLOSE)
    torch.testing.assert_close(net[0].bias, new_b, **CLOSE)
    torch.testing.assert_close(net(x), y, **CLOSE)


# ------------------------------------------------------------------ peft
peft = pytest.importorskip("peft")
Peers = dict[str, Tensor]  # peft's tensors, made of ours


def upper_of(square: Tensor) -> Tensor:
    i, j = torch.triu_indices(square.shape[-1], square.shape[-1], 1)
    return square[..., i, j]


def skewed(q: Tensor, size: int) -> Tensor:
    return torch.stack([antisymmetric(one, size) for one in q.flatten(0, -2)]).unflatten(0, q.shape[:-1])


def shira_peers(adapter: Any) -> Peers:
    """The places too, which peft keeps as an attribute."""
    rows = torch.arange(adapter.d_out).repeat_interleave(adapter.starts.diff())
    return {"shira_weight": adapter.v, "shira_indices": torch.stack([rows, adapter.columns]).int()}


TURNS = ["self_attn.q_proj", "mlp.down_proj", "self_attn.k_proj"]
PARITY: dict[str, tuple[PEFT, Callable[[], Any], Callable[[Any], Peers]]] = {
    "oft-neumann": (
        OFT(block_size=8, neumann=True),
        lambda: peft.OFTConfig(oft_block_size=8),
        lambda a: {"oft_R": a.q},
    ),
    "oft-shared": (
        OFT(block_size=8, neumann=True, shared=True),
        lambda: peft.OFTConfig(oft_block_size=8, block_share=True),
        lambda a: {"oft_R": a.q},
    ),
    # peft's exact branch gives the transpose of what its series approximates: of the same tensor, the inverse
    "oft-exact": (
        OFT(block_size=8),
        lambda: peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False),
        lambda a: {"oft_R": -a.q},
    ),
    "hra": (HRA(rank=4), lambda: peft.HRAConfig(r=4), lambda a: {"hra_u": a.u.T}),
    "delora": (
        DeLoRA(rank=4, strength=3.0),
        lambda: peft.DeloraConfig(r=4, delora_lambda=3),
        lambda a: {"delora_A": a.a, "delora_B": a.b, "delora_lambda": a.strength},
    ),
    "miss": (MiSS(rank=8), lambda: peft.MissConfig(r=8), lambda a: {"miss_block": a.b.T}),
    "miss-remainder": (MiSS(rank=7), lambda: peft.MissConfig(r=7), lambda a: {"miss_block": a.b.T}),
    "miss-rows": (
        MiSS(rank=8, rows=4),
        lambda: peft.MissConfig(r=8, mini_r=4, init_weights="mini"),
        lambda a: {"miss_block": a.b.T},
    ),
    "gralora": (
        GraLoRA(rank=8, alpha=12.0, blocks=4, hybrid=2),
        lambda: peft.GraloraConfig(r=8, alpha=12, gralora_k=4, hybrid_r=2),
        lambda a: {"gralora_A": a.down.mT, "gralora_B": a.up.mT, "gralora_A_general": a.a, "gralora_B_general": a.b},
    ),
    **{
        f"road-{variant}": (
            RoAd(group_size=8, variant=variant),
            lambda variant=variant: peft.RoadConfig(group_size=8, variant=f"road_{variant}"),
            lambda a: {"road_theta": a.theta.flatten(), "road_alpha": a.alpha.flatten()},
        )
        for variant in (1, 2, 4)
    },
    "c3a": (C3A(block_size=8), lambda: peft.C3AConfig(block_size=8), lambda a: {"c3a_kernel": a.w}),
    "shira": (SHiRA(rank=3), lambda: peft.ShiraConfig(r=3), shira_peers),
    # peft keeps square blocks, of which it uses the skew part, in the transposed branch
    "boft": (
        BOFT(block_size=4, factors=1),
        lambda: peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1),
        lambda a: {"boft_R": -skewed(a.q, 4), "boft_s": a.s[:, None]},
    ),
}


def peer_tensor(module: Any, name: str) -> nn.Parameter:
    found = module.get_parameter(f"{name}.default") if f"{name}.default" in dict(module.named_parameters()) else None
    return module.get_parameter(f"{name}.default.weight") if found is None else found


def same_as_peft(method: PEFT, config: Any, peers: Callable[[Any], Peers], tolerance: float = 1e-10) -> nn.Module:
    """Equal logits, equal gradients of every tensor through the map to peft's, equal merged weights."""
    ours, theirs = build("llama").double(), build("llama").double()
    base = ours.state_dict().keys()
    method = copy.deepcopy(method)
    method.targets, method.dtype, method.heads = [f"*.{t}" for t in TURNS], "float64", None
    put(method, ours, 3.0 if method.info.name == "c3a" else 0.1)
    config.target_modules = TURNS
    theirs = peft.get_peft_model(theirs, config).double().eval()
    found = [
        (p.adapter, theirs.get_submodule(f"base_model.model.{p.site}")) for p in state.get_applied(ours).placements
    ]
    assert len(found) == 6
    for adapter, module in found:
        for name, value in peers(adapter).items():
            if value.is_floating_point():
                peer_tensor(module, name).data.copy_(value.detach())
            else:
                getattr(module, name)["default"] = value
    logits = [model(**inputs("llama")).logits for model in (ours, theirs)]
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(*logits, **close)
    assert not torch.allclose(logits[0], build("llama").double()(**inputs("llama")).logits, atol=1e-3)
    for out in logits:
        out.pow(2).sum().backward()
    for adapter, module in (
        found if method.info.name != "c3a" else []
    ):  # peft's gradient of the input is wrong: see below
        mapped = {name: value for name, value in peers(adapter).items() if value.is_floating_point()}
        outputs, grads = list(mapped.values()), [peer_tensor(module, name).grad for name in mapped]
        expected = torch.autograd.grad(outputs, list(adapter.parameters()), grads)
        for (name, mine), grad in zip(adapter.named_parameters(), expected, strict=True):
            torch.testing.assert_close(mine.grad, grad, **close, msg=f"the gradient of {name}: {{}}".format)
    plain, merged = method.unload(ours).state_dict(), theirs.merge_and_unload().state_dict()
    for key in base:
        torch.testing.assert_close(plain[key], merged[key], **close)
    return theirs


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension")
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", PARITY)
def test_parity_with_peft(name: str) -> None:
    method, config, peers = PARITY[name]
    same_as_peft(method, config(), peers, 1e-5 if name == "c3a" else 1e-10)  # which peft computes in fp32


# ------------------------------------------------------------------ counts
COUNTS = [
    ("roberta-base", OFT(targets="q,v", block_size=32, heads=None), 24 * 24 * 496),
    ("llama-7b", OFT(targets="all-linear", block_size=32, heads=None), 32 * (6 * 4096 + 11008) * 31 // 2),
    ("llama-7b", OFT(targets="all-linear", shared=True, heads=None), 224 * 496),
    ("roberta-base", HRA(rank=8, heads=None), 24 * 8 * 768),
    ("roberta-base", DeLoRA(rank=8, heads=None), 24 * (8 * 2 * 768 + 1)),
    ("llama-7b", MiSS(rank=64, targets="up", heads=None), 32 * 64 * 11008),
    ("roberta-base", MiSS(rank=64, rows=32, heads=None), 24 * 64 * 32),
    ("roberta-base", GraLoRA(rank=8, heads=None), 294_912),  # LoRA's of the rank
    ("roberta-base", GraLoRA(rank=8, hybrid=4, heads=None), 294_912 * 3 // 2),
    *[("roberta-base", RoAd(variant=v, heads=None), 24 * v * 768) for v in (1, 2, 4)],
    ("roberta-base", SSF(targets="q,v", heads=None), 24 * 2 * 768),
    ("roberta-base", C3A(block_size=256, heads=None), 24 * 768 * 768 // 256),
    ("roberta-base", SHiRA(rank=8, heads=None), 294_912),
    ("roberta-base", BOFT(block_size=4, factors=2, heads=None), 24 * (2 * 768 * 3 // 2 + 768)),
]


@pytest.mark.parametrize(("model", "method", "count"), COUNTS, ids=[f"{m.info.name}-{n}" for _, m, n in COUNTS])
def test_counts(model: str, method: PEFT, count: int) -> None:
    assert state.describe(method.apply(fresh(model)))["trainable"] == count


# ------------------------------------------------------------------ OFT
def test_cayley_is_orthogonal_and_its_series_comes_near() -> None:
    q = skew(0.1 * rows(3, 6), 4)
    exact = cayley(q) + torch.eye(4, dtype=q.dtype)
    torch.testing.assert_close(exact @ exact.mT, torch.eye(4, dtype=q.dtype).expand(3, 4, 4), **CLOSE)
    errors = [float((neumann(q, terms) - cayley(q)).norm()) for terms in (2, 3, 5, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 * errors[0]
    torch.testing.assert_close(cayley(-q) + torch.eye(4, dtype=q.dtype), exact.mT, **CLOSE)  # the inverse


def test_oft_keeps_the_lengths_and_angles_of_weights() -> None:
    net = layer("linear")
    before = net[0].weight.detach().clone()
    method = OFT(targets="0", block_size=6, dtype="float64")
    put(method, net)
    method.merge(net)
    assert not torch.allclose(net[0].weight, before, atol=1e-2)
    torch.testing.assert_close(net[0].weight @ net[0].weight.T, before @ before.T, **CLOSE)


def test_peft_exact_oft_is_the_inverse_of_its_series() -> None:
    """A file of one of peft's branches means the inverse rotation under the other; both of ours mean the same."""
    module = peft.tuners.oft.layer.OFTRotationModule(1, 6, 4, 4)
    q = 0.01 * rows(1, 6)
    series, exact = (module._cayley_batch(q, 4, use_cayley_neumann=n) for n in (True, False))
    torch.testing.assert_close(series.mT, exact, atol=1e-6, rtol=0)
    assert (series - exact).abs().max() > 1e-2
    eye = torch.eye(4, dtype=q.dtype)
    torch.testing.assert_close(eye + neumann(skew(q, 4), 5), series, **CLOSE)
    torch.testing.assert_close(eye + cayley(skew(q, 4)), series, atol=1e-6, rtol=0)


def test_a_small_rotation_survives_bf16() -> None:
    """x + x (R - I): the change keeps its digits, where R itself would round to the identity."""
    net = layer("linear").bfloat16()
    [adapter] = put(OFT(targets="0", block_size=4), net, 1e-4)
    assert torch.equal((torch.eye(4) + cayley(skew(adapter.q, 4))).diagonal(dim1=-2, dim2=-1).bfloat16().unique(),
                       torch.ones(1).bfloat16())  # fmt: skip
    x = torch.zeros(1, D_IN, dtype=torch.bfloat16)
    x[0, 0] = 1
    turned = adapter.turn(x)[0, 1:4].float()
    torch.testing.assert_close(turned, 2 * adapter.q[0, :3].detach(), rtol=1e-2, atol=1e-7)


# ------------------------------------------------------------------ HRA
def test_hra_is_the_chain_of_reflections_and_starts_at_the_identity_to_the_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        net = layer("linear").to(dtype)
        x = rows(5, D_IN).to(dtype)
        expected = net(x)
        HRA(targets="0", rank=10).apply(net)
        assert torch.equal(net(x), expected)
    u = state.get_applied(net).placements[0].adapter.u
    assert torch.equal(u[::2], u[1::2])


def test_hra_penalty_is_that_of_unit_vectors() -> None:
    net = layer("linear")
    [adapter] = put(HRA(targets="0", rank=4, orthogonality=0.5, dtype="float64"), net)
    u = F.normalize(adapter.u.detach(), dim=1)
    expected = 0.5 * sum((u[i] @ u[j] - int(i == j)) ** 2 for i in range(4) for j in range(4))
    torch.testing.assert_close(adapter.penalty(), expected, **CLOSE)
    assert put(HRA(targets="0", rank=4), layer("linear"))[0].penalty() is None


def test_peft_orthogonalises_equal_vectors() -> None:
    """apply_GS on the symmetric start divides what is left of the second of two equal vectors, rounding, by its length."""
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(16, 16)), peft.HRAConfig(r=2, apply_GS=True, target_modules=["0"])
    )
    turn = theirs.base_model.model[0].get_delta_weight("default")
    assert not torch.allclose(turn, torch.eye(16), atol=0.1)  # noise or NaN, and no identity
    with pytest.raises(FieldError, match="odd number of reflections"):
        HRA(rank=3)


def test_hra_keeps_no_square_matrix() -> None:
    """What autograd keeps for a call grows with the rank, not with d_in^2."""
    net, d = nn.Sequential(nn.Linear(256, 256)), 256
    put(HRA(targets="0", rank=4), net)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        net(torch.randn(2, d))
    assert [n for n in sizes if n >= d * d] == [d * d] * sum(n == d * d for n in sizes)  # the frozen weight, for dL/dx
    assert sum(n == d * d for n in sizes) <= 1


# ------------------------------------------------------------------ BOFT
def test_boft_factors_reach_across_blocks() -> None:
    """One factor mixes 4 features, two mix 8 (features 0-3 with 4-7 through halves), three mix 16."""
    for factors, reach in ((1, 4), (2, 8), (3, 16)):
        net = layer("linear", 32, 32)
        [adapter] = put(BOFT(targets="0", block_size=4, factors=factors, dtype="float64"), net)
        turn = adapter.turn(torch.eye(32, dtype=torch.float64))
        torch.testing.assert_close(turn @ turn.T, torch.eye(32, dtype=torch.float64), **CLOSE)
        assert turn[0].nonzero().flatten().tolist() == list(range(reach))


def test_boft_matches_peft_with_more_than_one_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its CUDA extension peft silently makes m one; with a stand-in for the extension it is what ours is."""

    class Stacked:
        @staticmethod
        def apply(blocks: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*one) for one in blocks])

    monkeypatch.setattr(peft.tuners.boft.layer, "_FBD_CUDA", object())
    monkeypatch.setattr(peft.tuners.boft.layer, "FastBlockDiag", Stacked)
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3)
    peers = PARITY["boft"][2]
    theirs = same_as_peft(BOFT(block_size=4, factors=3), config, peers)
    assert theirs is not None


def test_peft_boft_without_its_extension_has_one_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: None)
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(16, 16)), config)
    assert len(theirs.base_model.model[0].boft_R["default"]) == 1
    [adapter] = put(BOFT(targets="0", block_size=4, factors=3), nn.Sequential(nn.Linear(16, 16)))
    assert len(adapter.q) == 3


@pytest.mark.parametrize("model", ["gpt2", "encoder", "llama"])
def test_the_bias_of_a_place(model: str) -> None:
    """That of a slice, of a part of attention, of none: what the projection gives for zero."""
    net = build(model)
    BOFT(targets="q,v,o", heads=None).apply(net)
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    for placement in state.get_applied(net).placements:
        bias, owner = base_bias(placement.place), net.get_submodule(placement.site)
        if model == "llama":
            assert bias is None
            continue
        packed = owner.bias if model == "gpt2" else owner.in_proj_bias
        index = "qkv".find(str(placement.role))
        expected = packed.unflatten(0, (3, -1))[index] if index >= 0 and len(packed) == 96 else None
        expected = (owner.bias if model == "gpt2" else owner.out_proj.bias) if expected is None else expected
        assert torch.equal(bias, expected)


# ------------------------------------------------------------------ DeLoRA
def test_delora_is_bounded_by_its_strength() -> None:
    """|change_j| <= lambda |W_j| by column, whatever A and B hold."""
    net = layer("linear")
    before = net[0].weight.detach().clone()
    method = DeLoRA(targets="0", rank=5, strength=0.25, dtype="float64")
    [adapter] = put(method, net, 0.0)
    adapter.a.data, adapter.b.data = 100 * rows(5, D_IN), 50 * rows(D_OUT, 5)
    method.merge(net)
    change = (net[0].weight - before).norm(dim=0) / before.norm(dim=0)
    assert 0 < change.max() < 0.25


def test_delora_remembers_the_lengths_it_was_trained_with() -> None:
    """A weight that is put into codes before training is measured anew, after training it is not."""
    for trained in (False, True):
        net = layer("linear", 64, 64).float()
        [adapter] = put(DeLoRA(targets="0", rank=2), net, 0.1 if trained else 0.0)
        before, first = adapter.norms.clone(), net[0].weight.norm(dim=0)
        torch.testing.assert_close(before, first.detach())
        quantise(net, targets="0")
        expected = before if trained else net[0].weight.norm(dim=0)
        assert torch.equal(adapter.norms, expected)
        assert not torch.equal(net[0].weight.norm(dim=0), before)


# ------------------------------------------------------------------ MiSS, GraLoRA
@pytest.mark.parametrize("method", [MiSS(targets="0", rank=4, dropout=0.5), GraLoRA(targets="0", rank=4, dropout=0.5)])
def test_dropout_acts_on_the_input_in_training(method: PEFT) -> None:
    net = layer("linear").float()
    [adapter] = put(method, net)
    x = rows(3, D_IN).float()
    torch.manual_seed(4)
    y = net.train()(x)
    torch.manual_seed(4)
    mask = F.dropout(torch.ones(3, D_IN), 0.5)
    weight = net[0].weight
    plain = F.linear(x, weight, net[0].bias)
    torch.testing.assert_close(y, plain + F.linear(x * mask, adapter.delta(weight)))
    torch.testing.assert_close(net.eval()(x), plain + F.linear(x, adapter.delta(weight)))


def test_miss_is_a_low_rank_product_with_a_fixed_factor() -> None:
    [adapter] = put(MiSS(targets="0", rank=3, dtype="float64"), layer("linear"))
    assert torch.linalg.matrix_rank(adapter.delta(torch.zeros(D_OUT, D_IN, dtype=torch.float64))) == 3


def test_gralora_has_a_higher_rank_than_lora_of_its_size() -> None:
    net = layer("linear", 32, 32)
    [adapter] = put(GraLoRA(targets="0", rank=4, blocks=4, dtype="float64"), net)
    assert torch.linalg.matrix_rank(adapter.delta(net[0].weight)) == 16


# ------------------------------------------------------------------ SSF
def test_ssf_without_a_bias_to_fold_into() -> None:
    x = torch.randn(2, 4)
    for shift in (True, False):
        net = nn.Sequential(nn.Linear(4, 3, bias=False))
        method = SSF(targets="0", shift=shift)
        put(method, net)
        if shift:
            with pytest.raises(NotMergeableError, match=r"SSF\(shift=False\)"):
                method.merge(net)
            continue
        y = net(x)
        method.merge(net)
        torch.testing.assert_close(net(x), y)


# ------------------------------------------------------------------ C3A
@pytest.mark.parametrize("size", [1, 3, 4])
def test_circular_products_of_even_and_odd_length_and_their_gradients(size: int) -> None:
    net = layer("linear", 12, 24)
    [adapter] = put(C3A(targets="0", block_size=size, dtype="float64"), net)
    x = rows(4, 12).requires_grad_()
    torch.testing.assert_close(net(x), F.linear(x, net[0].weight + adapter.delta(net[0].weight), net[0].bias), **CLOSE)
    assert torch.autograd.gradcheck(lambda x, _: net(x), (x, adapter.w))


def test_peft_c3a_gives_its_input_another_gradient() -> None:
    """y_k = sum_j w[j - k] x_j makes dL/dx_j = sum_k w[j - k] g_k; peft's function gives w[j + k], and all below gets it."""
    x, w, g = rows(1, 4).requires_grad_(), rows(1, 1, 4, seed=3).requires_grad_(), rows(1, 4, seed=4)
    y = peft.tuners.c3a.utils.BlockCircularConvolution.apply(x, w)
    z = CircularProduct.apply(x[:, None], w)[:, 0]
    torch.testing.assert_close(z, y, **CLOSE)
    (theirs, theirs_w), (ours, ours_w) = (torch.autograd.grad(out, (x, w), g) for out in (y, z))
    torch.testing.assert_close(ours_w, theirs_w, **CLOSE)
    kernel = w[0, 0].detach()
    for j in range(4):
        assert float(ours[0, j]) == pytest.approx(float(sum(kernel[(j - k) % 4] * g[0, k] for k in range(4))))
        assert float(theirs[0, j]) == pytest.approx(float(sum(kernel[(j + k) % 4] * g[0, k] for k in range(4))))
    assert (ours - theirs).abs().max() > 0.1


def test_c3a_keeps_no_spectrum() -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    put(C3A(targets="0", block_size=16), net)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        net(torch.randn(4096, 64))
    assert kept
    assert not any(t.is_complex() for t in kept)
    assert sum(t.numel() for t in kept if t.numel() > 64 * 64) == 4096 * 64


DEVIATIONS = [("xavier", (2 / 80) ** 0.5), ("kaiming", 48**-0.5 / 3**0.5), ("gaussian", 1.0)]


@pytest.mark.parametrize(("init", "deviation"), DEVIATIONS)
def test_c3a_kernels_as_peft_draws_them(init: Any, deviation: float) -> None:
    net = nn.Sequential(nn.Linear(48, 32))
    C3A(targets="0", block_size=4, init=init).apply(net)
    assert state.get_applied(net).placements[0].adapter.w.std().item() == pytest.approx(deviation, rel=0.2)
    name = {"xavier": "xavier_uniform", "kaiming": "kaiming_uniform"}.get(init, init)
    config = peft.C3AConfig(block_size=4, init_weights=name, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(48, 32)), config).base_model.model[0]
    assert theirs.c3a_kernel["default"].std().item() == pytest.approx(deviation, rel=0.2)


# ------------------------------------------------------------------ SHiRA
def test_shira_places_are_distinct_and_of_the_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        net = nn.Sequential(nn.Linear(60, 40))
        SHiRA(targets="0", rank=3, seed=seed).apply(net)
        adapter = state.get_applied(net).placements[0].adapter
        adapter.v.data.fill_(1.0)
        found.append(adapter.delta(torch.zeros(40, 60)))
        assert found[-1].unique().tolist() == [0, 1]
        assert int(found[-1].sum()) == 300
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("count", [200, 900])
def test_samples_without_replacement_are_even(count: int) -> None:
    """By rejection where the sample is small, by a permutation where it is not; every half gets half."""
    drawn = [positions(Draw(seed, "x"), 1000, count) for seed in range(20)]
    assert all(len(set(one.tolist())) == count for one in drawn)
    whole = torch.cat(drawn)
    assert whole.min() >= 0 and whole.max() < 1000  # noqa: PT018
    assert float((whole < 500).double().mean()) == pytest.approx(0.5, abs=0.03)


def test_shira_needs_no_matrix_of_the_size_of_the_weight() -> None:
    """Neither kept for the backward pass nor made in it."""
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor))
            return out

    [adapter] = put(SHiRA(targets="0", rank=1), nn.Sequential(nn.Linear(200, 150)))
    x = torch.randn(3, 200, requires_grad=True)
    with Watch():
        adapter(lambda x: x[:, :150], x).sum().backward()
    assert x.grad is not None
    assert adapter.v.grad is not None
    assert max(sizes) < 150 * 200 / 10


# ------------------------------------------------------------------ values and places that cannot be
FIELDS = [
    (lambda: OFT(block_size=1), "no rotation"),
    (lambda: OFT(terms=1), "2 or more"),
    (lambda: OFT(block_size=0), "above 0"),
    (lambda: BOFT(block_size=1), "no rotation"),
    (lambda: BOFT(block_size=3), "two halves"),
    (lambda: HRA(orthogonality=-1.0), "0 or more"),
    (lambda: MiSS(rows=0), "above 0"),
    (lambda: GraLoRA(rank=7), "Choose a multiple of 2"),
    (lambda: RoAd(group_size=3), "Choose an even size"),
    (lambda: RoAd(variant=3), "one of 1, 2, 4"),
    (lambda: DeLoRA(strength=-1.0), "0 or more"),
    (lambda: C3A(init="ones"), "'zeros', 'xavier'"),
    (lambda: SHiRA(rank=0), "above 0"),
]


@pytest.mark.parametrize(("build_it", "said"), FIELDS)
def test_fields(build_it: Callable[[], Any], said: str) -> None:
    with pytest.raises(FieldError, match=said):
        build_it()


PLACES = [
    (OFT(targets="0", block_size=5), r"block_size\)=5 does not divide the 12 features.*such as 4"),
    (BOFT(targets="0", block_size=4, factors=3), "=16 does not divide the 12 features"),
    (MiSS(targets="0", rank=13), "more than the 12 input features"),
    (MiSS(targets="0", rank=4, rows=3), r"rows\)=3 does not divide the 8 features"),
    (GraLoRA(targets="0", rank=6, blocks=3), "=3 does not divide the 8 features"),
    (RoAd(targets="0", group_size=6), "=6 does not divide the 8 features"),
    (C3A(targets="0", block_size=6), "=6 does not divide the 8 features"),
    (SHiRA(targets="0", rank=5), "100 values.*whose weight has 96. Choose at most 4"),
]


@pytest.mark.parametrize(("method", "said"), PLACES)
def test_places(method: PEFT, said: str) -> None:
    with pytest.raises(TargetError, match=said):
        method.apply(layer("linear"))


def test_a_turn_has_to_be_given() -> None:
    with pytest.raises(NotImplementedError, match="no turn"):
        TurnInput().turn(rows(2))


def test_reflections_and_series_stay_in_fp32_under_autocast() -> None:
    net = nn.Module()
    net.p = nn.Linear(64, 64)
    method = HRA(targets="p")
    method.apply(net)
    adapter: Any = net.get_submodule("p.adapters.hra")
    nn.init.normal_(adapter.u)
    q = skew(0.05 * torch.randn(2, 496), 32)
    expected = *adapter.factors(), neumann(q, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = *adapter.factors(), neumann(q, 5)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
