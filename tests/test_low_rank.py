"""Methods that are products of thin factors: dense oracles from the equations, parity with peft, what is particular."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from harness import loss, output, perturb
from test_counts import fresh
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import (
    NOLA,
    DoRA,
    DVoRA,
    HiRA,
    LoHa,
    LoRA,
    LoRAFA,
    MultiLoRA,
    RandLoRA,
    TiedLoRA,
    VBLoRA,
    VeRA,
    load_adapter,
    materialize,
    quantise,
    save_adapter,
)
from lightning_peft.callback import PEFT
from lightning_peft.core import hashed, state
from lightning_peft.core.basis import Basis
from lightning_peft.core.fields import FieldError
from lightning_peft.core.files import AdapterFileError, read_tensors
from lightning_peft.core.hashed import key_of, uniform
from lightning_peft.core.merge import MergeError
from lightning_peft.core.sites import TargetError
from lightning_peft.methods.hira import Product as HadamardProduct

D_IN, D_MID, D_OUT = 12, 20, 8


class Two(nn.Module):
    """A Linear and a Conv1D, neither of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D_IN, D_MID), Conv1D(D_OUT, D_MID)
        nn.init.normal_(self.second.weight, std=0.3)
        nn.init.normal_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        return self.second(torch.tanh(self.first(x)))


def two(dtype: torch.dtype = torch.float64) -> Two:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Two().to(dtype)


def sample(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def adapters_of(net: nn.Module) -> dict[str, Any]:
    """name of the module -> its adapter"""
    return {p.site: p.adapter for applied in state.applied_to(net).values() for p in applied.placements}


Change = Callable[[Tensor, Any], Tensor]  # weight (d_out, d_in), tensors of the adapter by name -> the new weight


def check(method: PEFT, change: Change, scale: float = 0.3) -> None:
    """Outputs, gradients and merged weights against `change` of dense weights, in fp64 to 1e-10."""
    net, base = two(), two()
    method.apply(net)
    if method.info.identity:
        torch.testing.assert_close(net(sample(3, D_IN)), base(sample(3, D_IN)), atol=0, rtol=0)
    perturb(net, scale)
    leaves = {id(p): p.detach().clone().requires_grad_() for p in state.trainable(net).values()}
    weights = []
    for name, weight in (("first", base.first.weight), ("second", base.second.weight.T)):
        adapter = adapters_of(net)[name]
        own = dict(adapter.named_parameters(remove_duplicate=False)) | dict(adapter.named_buffers())
        values = {n.replace(".", "_"): leaves.get(id(t), t.detach().double()) for n, t in own.items()}
        weights.append(change(weight.detach(), SimpleNamespace(**values)))
    x, y = sample(2, 3, D_IN).requires_grad_(), sample(2, 3, D_IN).requires_grad_()
    got, goal = net(x), sample(2, 3, D_OUT, seed=8)
    expected = F.linear(torch.tanh(F.linear(y, weights[0], base.first.bias)), weights[1], base.second.bias)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)
    (got * goal).sum().backward()
    (expected * goal).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-10, rtol=1e-10)
    for name, p in state.trainable(net).items():
        mine = leaves[id(p)].grad
        assert mine is not None, name
        assert mine.abs().sum() > 0, name
        torch.testing.assert_close(p.grad, mine, atol=1e-10, rtol=1e-10, msg=f"{name}: {p.grad} {mine}")
    method.merge(net)
    torch.testing.assert_close(net.first.weight, weights[0], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(net.second.weight.T, weights[1], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(net(x), expected, atol=1e-10, rtol=1e-10)
    method.unmerge(net)
    assert torch.equal(net.second.weight, base.second.weight)


BOTH = {"targets": "first,second", "dtype": "float64"}


def kept(net: nn.Module, x: Tensor) -> list[Tensor]:
    """What autograd keeps of a forward pass, without the base's own parameters."""
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        net(x)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    return [t for t in found if t.untyped_storage().data_ptr() not in own]


# ------------------------------------------------------------------ parity with peft
def parity(
    config: Any, method: PEFT, names: Callable[[Any], dict[str, Tensor]], shared: Any = None, scale: float = 0.2
) -> None:
    """The same weights in peft's adapter and in ours: logits and gradients of a tiny Llama to 1e-6 (in fp32).

    names(layer): name of our tensor -> peft's parameter of the same elements. shared(peft model, our model): the rest.
    """
    peft = pytest.importorskip("peft", reason="the other side of the comparison")
    theirs, ours = peft.get_peft_model(zoo.build("llama"), config).eval(), zoo.build("llama")
    method.apply(ours)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator), alpha=scale)
        if shared is not None:
            shared(theirs, ours)
    pairs = []
    for site, adapter in adapters_of(ours).items():
        own = dict(adapter.named_parameters(remove_duplicate=False)) | dict(adapter.named_buffers())
        for name, value in names(theirs.base_model.model.get_submodule(site)).items():
            with torch.no_grad():
                own[name].copy_(value.reshape(own[name].shape))
            pairs.append((f"{site}.{name}", own[name], value))
    with torch.no_grad():
        close = {"atol": 1e-6, "rtol": 1e-5}
        torch.testing.assert_close(output(ours, "llama"), output(theirs, "llama"), **close)
        assert not torch.allclose(output(ours, "llama"), output(zoo.build("llama"), "llama"), atol=1e-3)
    loss(ours, "llama").backward()
    loss(theirs, "llama").backward()
    compared = 0
    for name, mine, value in pairs:
        if mine.requires_grad:
            assert value.grad is not None, name
            torch.testing.assert_close(
                mine.grad, value.grad.reshape(mine.shape), atol=1e-6, rtol=1e-4, msg=name.__add__
            )
            compared += 1
    assert compared >= len(adapters_of(ours))


QVD = ["q_proj", "v_proj", "down_proj"]
HERE = {"targets": "q,v,down"}


# ------------------------------------------------------------------ DoRA
def rows(weight: Tensor, detach: bool = True) -> Tensor:
    norm = weight.pow(2).sum(1).sqrt()
    return norm.detach() if detach else norm


@pytest.mark.parametrize("detach", [True, False])
def test_dora_is_a_magnitude_times_directions(detach: bool) -> None:
    def change(w: Tensor, v: Any) -> Tensor:
        moved = w + 4 / 3 * v.b @ v.a
        return (v.m / rows(moved, detach))[:, None] * moved

    check(DoRA(rank=3, alpha=4.0, detach_norm=detach, **BOTH), change)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_equals_peft(dropout: float) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=QVD, lora_dropout=dropout)

    def names(layer: Any) -> dict[str, Tensor]:
        own = layer.lora_A["default"], layer.lora_B["default"], layer.lora_magnitude_vector["default"]
        return {"a": own[0].weight, "b": own[1].weight, "m": own[2].weight}

    parity(config, DoRA(rank=3, alpha=5.0, dropout=dropout, **HERE), names)


def test_dora_with_dropout_scales_the_same_dropped_input_as_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["first"], lora_dropout=0.4)
    theirs, ours = peft.get_peft_model(two(torch.float32), config).train(), two(torch.float32)
    DoRA(rank=3, alpha=6.0, dropout=0.4, targets="first").apply(ours)
    ours.train()
    perturb(ours, 0.3)
    layer, mine = theirs.base_model.model.first, adapters_of(ours)["first"]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(mine.a)
        layer.lora_B["default"].weight.copy_(mine.b)
        layer.lora_magnitude_vector["default"].weight.copy_(mine.m)
    outs = []
    for net in (ours, theirs):
        torch.manual_seed(5)
        outs.append(net(sample(4, D_IN, dtype=torch.float32)))
    torch.testing.assert_close(outs[0], outs[1], atol=1e-6, rtol=1e-5)


class Places(nn.Module):
    """An embedding, and convolutions with what convolutions can have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.conv = nn.Conv2d(1, 5, (3, 2), stride=(2, 1), padding=1)
        self.line = nn.Conv1d(5, 4, 3, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, time) -> (batch, 4, ...)
        return self.line(self.conv(self.embed(tokens)[:, None]).mean(3))


def places() -> tuple[Places, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Places().double(), torch.randint(1, 11, (2, 9))


def densely(net: Places, tokens: Tensor, change: Callable[[str, Tensor], Tensor]) -> Tensor:
    """The same with each weight, seen as (d_out, d_in), changed."""
    table = change("embed", net.embed.weight.T).T
    image = F.embedding(tokens, table)[:, None]
    kernel = change("conv", net.conv.weight.flatten(1)).view_as(net.conv.weight)
    image = F.conv2d(image, kernel, net.conv.bias, (2, 1), 1).mean(3)
    return F.conv1d(image, change("line", net.line.weight.flatten(1)).view_as(net.line.weight))


EVERYWHERE = {"targets": "embed,conv,line", "dtype": "float64"}


def test_dora_at_embeddings_and_convolutions() -> None:
    net, tokens = places()
    expected, method = net(tokens), DoRA(rank=2, alpha=3.0, **EVERYWHERE)
    method.apply(net)
    assert torch.equal(net(tokens), expected)
    perturb(net, 0.3)
    own = adapters_of(net)

    def change(name: str, w: Tensor) -> Tensor:
        moved = w + 1.5 * own[name].b @ own[name].a
        return (own[name].m / rows(moved))[:, None] * moved

    got = net(tokens)
    torch.testing.assert_close(got, densely(net, tokens, change), atol=1e-10, rtol=1e-10)
    method.merge(net)
    torch.testing.assert_close(net(tokens), got, atol=1e-10, rtol=1e-10)


def test_dora_keeps_its_places_in_a_zero_row() -> None:
    """A row of zeros has no direction: no NaN, the base at step 0, and it trains from the second step on."""
    net = two()
    with torch.no_grad():
        net.first.weight[4] = 0
    expected = net(sample(3, D_IN))
    DoRA(rank=2, **BOTH).apply(net)
    assert torch.equal(net(sample(3, D_IN)), expected)
    adapter, optimizer = (
        adapters_of(net)["first"],
        torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1),
    )
    for _ in range(3):
        optimizer.zero_grad()
        net(sample(3, D_IN)).pow(2).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in state.trainable(net).values())
        optimizer.step()
    assert adapter.m[4] != 0


def test_dora_keeps_nothing_as_large_as_a_weight() -> None:
    net = nn.Sequential(nn.Linear(64, 96))
    for detach in (True, False):
        method = DoRA(rank=2, targets="0", detach_norm=detach)
        method.apply(net)
        assert max(t.numel() for t in kept(net, sample(5, 64, dtype=torch.float32).requires_grad_())) <= 5 * 96
        method.remove(net)


def test_dora_norms_follow_a_base_that_changes() -> None:
    net = two().eval()
    DoRA(rank=2, **BOTH).apply(net)
    perturb(net, 0.3)
    first = adapters_of(net)["first"]
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            net(sample(3, D_IN))
            with torch.no_grad():
                net.first.weight.mul_(1.7)
            moved = net.first.weight + first.scale * first.b @ first.a
            torch.testing.assert_close(first.growth() + 1, first.m / rows(moved), atol=1e-12, rtol=1e-12)
    with torch.no_grad():  # kept in evaluation, and made again for another magnitude
        before = first.growth()
        assert first.growth() is before
        first.m.mul_(2)
        torch.testing.assert_close(first.growth(), 2 * before + 1)
    net.train()
    assert first.gain.value is not None
    net(sample(3, D_IN))
    assert first.gain.value is None


@pytest.mark.parametrize("reader", [DoRA(rank=2, targets="first"), HiRA(rank=2, targets="first")])
def test_nothing_is_merged_into_a_weight_that_another_method_reads(reader: PEFT) -> None:
    x = sample(3, D_IN, dtype=torch.float32)
    net, lora = two(torch.float32), LoRA(rank=2, targets="first")
    lora.apply(net)
    reader.apply(net)
    perturb(net, 0.3)
    with pytest.raises(MergeError, match="computes with the weight that merging 'lora' would change"):
        lora.merge(net)
    net = two(torch.float32)
    reader.apply(net)
    lora.apply(net)
    perturb(net, 0.3)
    expected = net(x)
    reader.merge(net)
    lora.merge(net)
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)


def test_dora_norms_are_computed_anew_where_nothing_tells_of_changes() -> None:
    net = two(torch.float32)
    DoRA(rank=2, targets="first").apply(net)
    perturb(net, 0.3)
    x = sample(3, D_IN, dtype=torch.float32)
    weights = {"first.weight": net.first.weight.detach() * 3}
    expected = torch.func.functional_call(net, weights, (x,))

    def along(weight: Tensor) -> Tensor:
        return torch.func.functional_call(net, {"first.weight": weight}, (x,)).sum()

    torch.func.grad(along)(weights["first.weight"])
    assert torch.equal(torch.func.functional_call(net, weights, (x,)), expected)


def test_dora_around_codes_starts_as_the_quantised_base() -> None:
    """QDoRA: quantising after the method gives magnitudes of the rounded weight, unless they have trained."""
    plain, net, trained = (nn.Sequential(nn.Linear(64, 64)) for _ in range(3))
    for other in (net, trained):
        other.load_state_dict(plain.state_dict())
        DoRA(rank=2, targets="0").apply(other)
    perturb(trained, 0.1)
    before = adapters_of(trained)["0"].m.clone()
    for module in (plain, net, trained):
        quantise(module, targets="0", mode="nf4")
    x = sample(3, 64, dtype=torch.float32)
    torch.testing.assert_close(net(x), plain(x), atol=0, rtol=0)
    torch.testing.assert_close(adapters_of(net)["0"].m, rows(plain[0].weight), atol=1e-6, rtol=1e-6)
    assert torch.equal(adapters_of(trained)["0"].m, before)


def test_dora_of_a_model_without_memory_waits_for_it() -> None:
    with torch.device("meta"):
        net = Two()
    DoRA(rank=2, targets="first,second").apply(net)
    net.to_empty(device="cpu")
    net.load_state_dict(two(torch.float32).state_dict(), strict=False)
    materialize(net)
    assert torch.equal(
        net(sample(3, D_IN, dtype=torch.float32)), two(torch.float32)(sample(3, D_IN, dtype=torch.float32))
    )


# ------------------------------------------------------------------ LoRA-FA
def test_lora_fa_is_a_product_with_a_frozen_factor() -> None:
    check(LoRAFA(rank=3, alpha=6.0, **BOTH), lambda w, v: w + 2 * v.b @ v.a)


def test_lora_fa_equals_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=QVD)
    own: Callable[[Any], dict[str, Tensor]] = lambda layer: {  # noqa: E731
        "a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight,
    }  # fmt: skip
    parity(config, LoRAFA(rank=3, alpha=6.0, **HERE), own)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("autocast", [False, True])
def test_lora_fa_keeps_nothing_as_wide_as_its_input(codes: bool, dropout: float, autocast: bool) -> None:
    """Of x (..., 64) only A x is kept; LoRA keeps x itself."""
    net = nn.Sequential(nn.Linear(64, 96)).train()
    x = sample(5, 64, dtype=torch.float32).requires_grad_()
    LoRAFA(rank=2, targets="0", dropout=dropout).apply(net)
    if codes:
        quantise(net, targets="0", mode="nf4")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = kept(net, x)
    assert not [t.shape for t in found if t.shape[-1] == 64 and t.shape[0] == 5]
    assert [t.shape for t in found if tuple(t.shape) == (5, 2)]


def test_lora_fa_drops_entries_of_the_product() -> None:
    net = two(torch.float32).train()
    LoRAFA(rank=3, alpha=3.0, dropout=0.5, targets="first").apply(net)
    perturb(net, 0.3)
    x, adapter = sample(4, D_IN, dtype=torch.float32), adapters_of(net)["first"]
    torch.manual_seed(2)
    got = net.first(x)
    torch.manual_seed(2)
    z = F.dropout(F.linear(x, adapter.a), 0.5)
    torch.testing.assert_close(got, two(torch.float32).first(x) + z @ adapter.b.T)


@pytest.mark.parametrize("projection", ["saved", "drawn"])
def test_lora_fa_files_hold_what_they_must(projection: Any, tmp_path: Path) -> None:
    net, x = two(torch.float32), sample(4, D_IN, dtype=torch.float32)
    LoRAFA(rank=3, projection=projection, targets="first,second", seed=5).apply(net)
    first, second = adapters_of(net).values()
    assert not torch.equal(first.factors()[0][:, :5], second.factors()[0][:, :5])
    perturb(net)
    held = state.saved(net)
    assert ("first.adapters.lora_fa.a" in held) == (projection == "saved")
    save_adapter(net, tmp_path / "a")
    torch.manual_seed(77)
    other = two(torch.float32)
    load_adapter(other, tmp_path / "a")
    assert torch.equal(other(x), net(x))
    if projection == "drawn":
        first.basis.mark.add_(1)
        save_adapter(net, tmp_path / "a")
        with pytest.raises(AdapterFileError, match="random basis of seed 5/0 begins with"):
            load_adapter(two(torch.float32), tmp_path / "a")


def test_lora_fa_at_an_embedding_is_an_error() -> None:
    net, _ = places()
    with pytest.raises(TargetError, match="mix at random"):
        LoRAFA(targets="embed").apply(net)


def test_lora_fa_at_convolutions() -> None:
    net, tokens = places()
    method = LoRAFA(rank=2, alpha=3.0, **{**EVERYWHERE, "targets": "conv,line"})
    method.apply(net)
    perturb(net, 0.3)
    own = adapters_of(net)

    def change(name: str, w: Tensor) -> Tensor:
        return w if name == "embed" else w + 1.5 * own[name].b @ own[name].a

    torch.testing.assert_close(net(tokens), densely(net, tokens, change), atol=1e-10, rtol=1e-10)
    own["conv"].dropout = own["line"].dropout = 0.5
    net.train()
    assert not torch.equal(net(tokens), net(tokens))


# ------------------------------------------------------------------ VeRA
def test_vera_scales_a_random_product() -> None:
    def change(w: Tensor, v: Any) -> Tensor:
        b, a = v.basis_b[: len(w)], v.basis_a[:, : w.shape[1]]
        return w + torch.diag(v.b) @ b @ torch.diag(v.d) @ a

    check(VeRA(rank=4, **BOTH), change)


def test_vera_draws_one_basis_for_the_widest_site() -> None:
    net = two()
    VeRA(rank=4, seed=3, **BOTH).apply(net)
    first, second = adapters_of(net).values()
    assert first.basis is second.basis
    assert first.basis.a.shape == (4, D_MID)
    assert first.basis.b.shape == (D_MID, 4)
    bounds = first.basis.a.abs().max(), first.basis.b.abs().max()
    assert 0.8 * math.sqrt(6 / D_MID) < bounds[0] <= math.sqrt(6 / D_MID)
    assert 0.8 * math.sqrt(6 / 4) < bounds[1] <= math.sqrt(6 / 4)
    assert torch.equal(first.d, torch.full((4,), 0.1).double())
    assert [n for n in state.saved(net) if "basis" in n] == ["first.adapters.vera.basis.mark"]


def test_vera_for_more_sites_to_come(tmp_path: Path) -> None:
    """Its numbers depend on the widest site; where the widths are given, a part of the sites has the same."""
    x, wide = sample(4, D_IN, dtype=torch.float32), {"widest_in": D_MID, "widest_out": D_MID}
    one, both, alone = two(torch.float32), two(torch.float32), two(torch.float32)
    VeRA(rank=4, targets="first", **wide).apply(one)
    VeRA(rank=4, targets="first,second").apply(both)
    VeRA(rank=4, targets="first").apply(alone)
    a, b, c = (adapters_of(net)["first"].basis.a for net in (one, both, alone))
    assert torch.equal(a, b)
    assert not torch.equal(b[:, :D_IN], c)
    perturb(alone)
    save_adapter(alone, tmp_path / "a")
    assert torch.equal(alone(x), (load_adapter(other := two(torch.float32), tmp_path / "a"), other(x))[1])
    with pytest.raises(FieldError, match="less than the widest site, 12 to 20"):
        VeRA(rank=4, targets="first", widest_out=19).apply(two())


def peft_bases(name: str) -> Callable[[Any, Any], None]:
    def fill(theirs: Any, ours: nn.Module) -> None:
        basis = next(m for m in ours.modules() if isinstance(m, Basis))
        basis.a.copy_(getattr(theirs.base_model, f"{name}_A")["default"])
        basis.b.copy_(getattr(theirs.base_model, f"{name}_B")["default"])

    return fill


def test_vera_equals_peft() -> None:
    peft = pytest.importorskip("peft")
    own: Callable[[Any], dict[str, Tensor]] = lambda layer: {  # noqa: E731
        "d": layer.vera_lambda_d["default"], "b": layer.vera_lambda_b["default"],
    }  # fmt: skip
    parity(peft.VeraConfig(r=6, target_modules=QVD), VeRA(rank=6, **HERE), own, peft_bases("vera"))


@pytest.mark.parametrize("method", [VeRA(rank=2, targets="0"), DVoRA(rank=2, targets="0")])
def test_vera_keeps_nothing_as_wide_as_its_input(method: PEFT) -> None:
    net = nn.Sequential(nn.Linear(64, 96))
    method.apply(net)
    found = kept(net, sample(5, 64, dtype=torch.float32).requires_grad_())
    assert not [t.shape for t in found if tuple(t.shape) == (5, 64)]


# ------------------------------------------------------------------ DVoRA
def test_dvora_is_dora_of_veras_product() -> None:
    def change(w: Tensor, v: Any) -> Tensor:
        b, a = v.basis_b[: len(w)], v.basis_a[:, : w.shape[1]]
        moved = w + torch.diag(v.b) @ b @ torch.diag(v.d) @ a
        return (v.m / rows(moved))[:, None] * moved

    check(DVoRA(rank=4, **BOTH), change)


# ------------------------------------------------------------------ LoHa
def test_loha_is_a_hadamard_product() -> None:
    check(LoHa(rank=3, alpha=6.0, **BOTH), lambda w, v: w + 2 * (v.b1 @ v.a1) * (v.b2 @ v.a2))


def test_loha_has_the_square_of_its_rank() -> None:
    net = nn.Sequential(nn.Linear(40, 30))
    LoHa(rank=3, targets="0", dtype="float64").apply(net)
    perturb(net)
    assert torch.linalg.matrix_rank(adapters_of(net)["0"].delta(torch.zeros(30, 40).double())) == 9


def test_loha_keeps_nothing_as_large_as_a_weight() -> None:
    net = nn.Sequential(nn.Linear(64, 96))
    LoHa(rank=2, targets="0").apply(net)
    assert max(t.numel() for t in kept(net, sample(5, 64, dtype=torch.float32).requires_grad_())) <= 4 * 96


def test_loha_equals_peft() -> None:
    peft = pytest.importorskip("peft")

    def names(layer: Any) -> dict[str, Tensor]:
        theirs = {"b1": layer.hada_w1_a, "a1": layer.hada_w1_b, "b2": layer.hada_w2_a, "a2": layer.hada_w2_b}
        return {name: held["default"] for name, held in theirs.items()}

    parity(peft.LoHaConfig(r=3, alpha=6, target_modules=QVD), LoHa(rank=3, alpha=6.0, **HERE), names)


@pytest.mark.parametrize(
    "method", [LoHa(rank=2, alpha=3.0, **EVERYWHERE), NOLA(rank=2, alpha=3.0, coefficients=9, **EVERYWHERE)]
)
def test_loha_and_nola_at_embeddings_and_convolutions(method: PEFT) -> None:
    net, tokens = places()
    expected = net(tokens)
    method.apply(net)
    assert torch.equal(net(tokens), expected)
    perturb(net, 0.3)
    got, own = net(tokens), adapters_of(net)
    change: Callable[[str, Tensor], Tensor] = lambda name, w: w + own[name].delta(torch.zeros_like(w))  # noqa: E731
    torch.testing.assert_close(got, densely(net, tokens, change), atol=1e-10, rtol=1e-10)


# ------------------------------------------------------------------ MultiLoRA
def test_multilora_is_a_sum_of_products_with_gains() -> None:
    def change(w: Tensor, v: Any) -> Tensor:
        a, b = v.a.view(3, 2, -1), v.b.view(len(w), 3, 2)
        return w + sum(2 * torch.diag(v.g[n]) @ b[:, n] @ a[n] for n in range(3))

    check(MultiLoRA(rank=2, modules=3, alpha=4.0, **BOTH), change)


def test_multilora_starts_with_gradients_for_its_gains_alone() -> None:
    net = two()
    MultiLoRA(rank=2, **BOTH).apply(net)
    first = adapters_of(net)["first"]
    net(sample(3, D_IN)).pow(2).sum().backward()
    assert first.g.grad.abs().sum() > 0
    assert first.a.grad.abs().sum() == first.b.grad.abs().sum() == 0
    assert 0.6 < first.b.abs().max() <= 2**-0.5  # Kaiming-uniform of each B_n (d_out, 2)


# ------------------------------------------------------------------ Tied-LoRA
def tied(**more: Any) -> tuple[Any, dict[str, Any]]:
    net = zoo.build("llama")
    TiedLoRA(rank=3, **more).apply(net)
    return net, {site.removeprefix("model.layers."): a for site, a in adapters_of(net).items()}


@pytest.mark.parametrize("flags", [{}, {"train_u": False, "train_v": False}, {"tied": False}, {"train_a": False}])
def test_tied_lora_is_a_product_with_vectors(flags: dict[str, bool]) -> None:
    def change(w: Tensor, v: Any) -> Tensor:
        return w + torch.diag(v.v_tensor) @ v.b_tensor @ torch.diag(v.u_tensor) @ v.a_tensor

    check(TiedLoRA(rank=3, **flags, **BOTH), change)


def test_tied_lora_with_a_frozen_random_b_starts_its_v_at_zero() -> None:
    def change(w: Tensor, v: Any) -> Tensor:
        return w + torch.diag(v.v_tensor) @ v.b_tensor @ torch.diag(v.u_tensor) @ v.a_tensor

    check(TiedLoRA(rank=3, train_a=False, train_b=False, **BOTH), change)
    with pytest.raises(FieldError, match="Train one of the two"):
        TiedLoRA(train_b=False, train_v=False)


def test_tied_lora_shares_what_the_paper_shares() -> None:
    net, own = tied()
    q, k, v = (own[f"0.self_attn.{name}_proj"] for name in "qkv")
    later = own["1.self_attn.q_proj"]
    assert q.a is k.a is v.a is later.a
    assert q.u is k.u is v.u
    assert q.b is later.b
    assert len({id(part) for part in (q.b, k.b, v.b)}) == len({id(part) for part in (q.v, k.v, v.v, later.v)}) - 1 == 3
    assert later.u is not q.u
    assert len(state.saved(net)) == len(state.trainable(net)) == 1 + 3 + 2 + 6
    packed = zoo.build("gpt2")
    TiedLoRA(rank=3).apply(packed)
    slices = list(state.get_applied(packed).placements)
    assert len({id(p.adapter.a) for p in slices}) == 1
    assert len({id(p.adapter.u) for p in slices}) == 2


def test_tied_lora_is_untied_on_request() -> None:
    _, own = tied(tied=False)
    q, k, later = (own[f"{name}_proj"] for name in ("0.self_attn.q", "0.self_attn.k", "1.self_attn.q"))
    assert q.a is k.a
    assert q.a is not later.a
    assert q.b is not later.b
    assert not torch.equal(q.a.tensor, later.a.tensor)


class Attention(nn.Module):
    """Projections whose names no table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.to_query, self.to_value = nn.Linear(8, 8), nn.Linear(8, 8)


@pytest.mark.parametrize(("tied", "count"), [(True, 8 * 2 + 2 * 8 * 2), (False, 2 * (8 * 2 + 2 * 8 * 2))])
def test_tied_lora_tells_layers_apart_where_no_blocks_are_known(tied: bool, count: int) -> None:
    net = nn.Module()
    net.first, net.second = Attention(), Attention()
    given = {"q": "*.to_query", "v": "*.to_value"}
    TiedLoRA(targets="q,v", roles=given, rank=2, tied=tied, heads=None).apply(net)
    vectors = 2 * 2 + 4 * 8  # u a layer, v a site
    assert sum(p.numel() for p in state.trainable(net).values()) == count + vectors


def test_tied_lora_of_one_shape_class_each(tmp_path: Path) -> None:
    """All linear layers: one pair for each role and shape; frozen ones come back from files."""
    net, own = tied(targets="all-linear", train_a=False)
    assert own["0.mlp.up_proj"].a is own["1.mlp.up_proj"].a
    assert own["0.mlp.up_proj"].a is not own["0.mlp.down_proj"].a
    perturb(net)
    save_adapter(net, tmp_path / "a")
    other = zoo.build("llama")
    load_adapter(other, tmp_path / "a")
    assert torch.equal(output(other, "llama"), output(net, "llama"))


# ------------------------------------------------------------------ NOLA
def hashes(key: tuple[int, int], numbers: range) -> list[float]:
    """The stream in Python's integers, as written in its docstring's words: mixing a 32-bit word three times."""
    out = []
    for n in numbers:
        word = (n & 0xFFFFFFFF) ^ key[0] ^ (n >> 32)
        for more in (key[1], 0):
            word = ((word ^ (word >> 16)) * 0x45D9F3B) % 2**32 ^ more
        word = ((word ^ (word >> 16)) * 0x45D9F3B) % 2**32
        out.append(((word ^ (word >> 16)) >> 8) / 2**23 - 1)
    return out


def test_hashed_numbers_are_a_function_of_key_and_index() -> None:
    key = key_of(3, "a")
    assert uniform(key, 0, 300).tolist() == hashes(key, range(300))
    start = 2**33 + 5
    assert uniform(key, start, 9).tolist() == hashes(key, range(start, start + 9))
    assert torch.equal(uniform(key, 100, 50), uniform(key, 0, 200)[100:150])


def test_hashed_numbers_are_uniform_and_independent() -> None:
    n = 200_000
    one, two_ = uniform(key_of(0, "a"), 0, n).double(), uniform(key_of(0, "b"), 0, n).double()
    assert -1 <= one.min() < -0.9999
    assert 0.9999 < one.max() < 1
    assert abs(one.mean()) < 4 / math.sqrt(3 * n)
    assert abs(one.pow(2).mean() - 1 / 3) < 4 * math.sqrt(4 / 45 / n)
    for other in (two_, *(one.roll(lag) for lag in (1, 2, 64, 4096))):
        assert abs((one * other).mean()) < 4.5 / 3 / math.sqrt(n)
    counts = torch.histc(one, 64, -1, 1)
    assert (counts - n / 64).pow(2).sum() / (n / 64) < 63 + 5 * math.sqrt(126)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("chunk", [1, 2**20])
def test_nola_is_a_sum_of_random_matrices(offset: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashed, "CHUNK", chunk)
    shapes, index = [(D_MID, D_IN), (D_OUT, D_MID)], iter(range(2))

    def change(w: Tensor, v: Any) -> Tensor:
        place = next(index)
        d_out, d_in = shapes[place]
        keys = [key_of(f"4/{place}", f"hashed/{name}") for name in ("alpha", "beta")]
        down = torch.tensor(hashes(keys[0], range(6 * 3 * d_in))).double().view(6, 3, d_in)
        up = torch.tensor(hashes(keys[1], range(5 * 3 * d_out))).double().view(5, d_out, 3)
        a = torch.einsum("j,jri->ri", v.alpha, down[:5]) / 5**0.5
        a = a + down[5] / d_in**0.5 if offset else a
        return w + 4 / 3 * torch.einsum("j,jor->or", v.beta, up) / 5**0.5 @ a

    check(NOLA(rank=3, alpha=4.0, coefficients=5, frozen_offset=offset, seed=4, **BOTH), change)


def test_nola_begins_with_an_a_of_loras_variance() -> None:
    for offset in (False, True):
        net = nn.Sequential(nn.Linear(400, 10))
        NOLA(targets="0", coefficients=200, frozen_offset=offset).apply(net)
        a, b = adapters_of(net)["0"].factors()
        assert b.abs().sum() == 0
        assert a.std().item() == pytest.approx(math.sqrt(1 / 3 / 400), rel=0.1)


def test_nola_keeps_no_basis() -> None:
    net = nn.Sequential(nn.Linear(64, 96))
    NOLA(rank=4, coefficients=50, targets="0").apply(net)
    x = sample(5, 64, dtype=torch.float32).requires_grad_()
    assert max(t.numel() for t in kept(net, x)) <= 4 * 96
    assert sum(b.numel() for b in net.buffers()) == 16
    net.eval()
    with torch.no_grad():  # made once for generation, and again when alpha moved
        adapter = adapters_of(net)["0"]
        a = adapter.factors()[0]
        assert adapter.factors()[0] is a
        adapter.alpha.add_(1)
        assert adapter.factors()[0] is not a
    net(x)
    assert adapter.made[0].value is None


@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (4, 0.2)])
def test_nola_in_files_of_few_bits(bits: Any, error: float, tmp_path: Path) -> None:
    sizes = {}
    nets = {}
    for kept_bits in (32, bits):
        net = two(torch.float32)
        NOLA(coefficients=512, rank=2, bits=kept_bits, targets="first,second").apply(net)
        perturb(net, 0.3)
        save_adapter(net, tmp_path / str(kept_bits))
        sizes[kept_bits] = sum(t.nbytes for t in read_tensors(tmp_path / str(kept_bits)).values())
        nets[kept_bits] = net
    assert sizes[32] == 4 * 512 * 4 + 2 * 64
    assert sizes[bits] == 4 * (512 * bits // 8 + 512 // 64 * 4) + 2 * 64
    x, other = sample(6, D_IN, dtype=torch.float32), two(torch.float32)
    method = load_adapter(other, tmp_path / str(bits))
    exact, base = nets[32](x), two(torch.float32)(x)
    assert 0 < (other(x) - exact).norm() < error * (exact - base).norm()
    assert state.trainable(other) == {}
    save_adapter(other, tmp_path / "again")
    third = two(torch.float32)
    load_adapter(third, tmp_path / "again")
    assert torch.equal(third(x), other(x))
    method.merge(other)
    torch.testing.assert_close(other(x), third(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(FieldError, match="codes have 8 or 4 bits"):
        NOLA(coded=True)


def test_nola_files_of_another_basis_are_refused(tmp_path: Path) -> None:
    net = two(torch.float32)
    NOLA(coefficients=4, targets="first").apply(net)
    adapters_of(net)["first"].basis.mark.add_(0.5)
    save_adapter(net, tmp_path / "a")
    with pytest.raises(AdapterFileError, match="random basis of seed 0/0 begins with"):
        load_adapter(two(torch.float32), tmp_path / "a")


# ------------------------------------------------------------------ HiRA
def test_hira_multiplies_the_weight() -> None:
    check(HiRA(rank=3, **BOTH), lambda w, v: w * (1 + v.b @ v.a))


def test_hira_equals_peft() -> None:
    peft = pytest.importorskip("peft")
    own: Callable[[Any], dict[str, Tensor]] = lambda layer: {  # noqa: E731
        "a": layer.hira_A["default"], "b": layer.hira_B["default"],
    }  # fmt: skip
    parity(peft.HiraConfig(r=3, target_modules=QVD), HiRA(rank=3, **HERE), own)


def test_hira_at_embeddings_and_convolutions() -> None:
    net, tokens = places()
    method = HiRA(rank=2, **EVERYWHERE)
    method.apply(net)
    perturb(net, 0.3)
    got, own = net(tokens), adapters_of(net)
    expected = densely(net, tokens, lambda name, w: w * (1 + own[name].b @ own[name].a))
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)
    parameters = [own[name].b for name in ("embed", "conv", "line")]
    pairs = zip(*(torch.autograd.grad(out.pow(2).sum(), parameters) for out in (got, expected)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)
    method.merge(net)
    torch.testing.assert_close(net(tokens), got, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("codes", [False, True])
def test_hira_keeps_nothing_as_large_as_a_weight(codes: bool) -> None:
    net = nn.Sequential(nn.Linear(64, 96))
    HiRA(rank=2, targets="0").apply(net)
    if codes:
        quantise(net, targets="0", mode="nf4")
    perturb(net, 0.3)
    x = sample(5, 64, dtype=torch.float32).requires_grad_()
    assert max(t.numel() for t in kept(net, x)) <= 5 * 96
    adapter, weight = adapters_of(net)["0"], net[0].weight.detach()
    leaves = [adapter.a, adapter.b, x]
    expected = F.linear(x, weight * (1 + adapter.b @ adapter.a), net[0].bias)
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    both = [torch.autograd.grad(out.pow(2).sum(), leaves, retain_graph=True) for out in (net(x), expected)]
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_hira_has_second_derivatives() -> None:
    x, a, b, w = (sample(*s, seed=i).requires_grad_(i < 3) for i, s in enumerate([(2, 4), (2, 4), (3, 2), (3, 4)]))
    assert torch.autograd.gradgradcheck(HadamardProduct.apply, (x, a, b, w))


# ------------------------------------------------------------------ VB-LoRA
def mixed(logits: Tensor, bank: Tensor, top: int) -> Tensor:
    """Every logit that is not among the largest at minus infinity."""
    least = logits.sort(-1, descending=True).values[..., top - 1 : top]
    return logits.masked_fill(logits < least, -torch.inf).softmax(-1) @ bank


def test_vb_lora_mixes_vectors_of_a_bank() -> None:
    def change(w: Tensor, v: Any) -> Tensor:
        a = torch.stack([torch.cat(list(row)) for row in mixed(v.a, v.bank_vectors, 2)])
        pieces = mixed(v.b, v.bank_vectors, 2)  # (d_out / length, rank, length)
        b = torch.stack([torch.cat([piece[r] for piece in pieces]) for r in range(3)], dim=1)
        return w + b @ a

    check(VBLoRA(rank=3, vectors=7, length=4, **BOTH), change)


def test_vb_lora_equals_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.VBLoRAConfig(r=3, num_vectors=9, vector_length=8, topk=2, target_modules=QVD)

    def names(layer: Any) -> dict[str, Tensor]:
        own = {"a": layer.vblora_logits_A, "b": layer.vblora_logits_B, "bank.vectors": layer.vblora_vector_bank}
        return {name: held["default"] for name, held in own.items()}

    parity(config, VBLoRA(rank=3, vectors=9, length=8, **HERE), names, scale=0.5)


def test_vb_lora_has_one_bank() -> None:
    net = zoo.build("llama")
    VBLoRA(rank=2, vectors=6, length=8).apply(net)
    banks = {id(a.bank.vectors) for a in adapters_of(net).values()}
    assert len(banks) == 1
    assert len([n for n in state.saved(net) if "vectors" in n]) == 1
    assert next(iter(adapters_of(net).values())).bank.vectors.abs().max() <= 0.02
    with pytest.raises(TargetError, match="32 to 32 wide, which pieces of length=6 do not"):
        VBLoRA(length=6).apply(zoo.build("llama"))
    with pytest.raises(FieldError, match="fewer vectors"):
        VBLoRA(vectors=1)


# ------------------------------------------------------------------ RandLoRA
def test_randlora_is_a_sum_of_scaled_random_products() -> None:
    def change(w: Tensor, v: Any) -> Tensor:
        smaller, larger, wide = min(w.shape), max(w.shape), w.shape[0] > w.shape[1]
        terms = [
            v.basis_b[:larger, n] @ torch.diag(v.l[n]) @ v.basis_a[:, :smaller] @ torch.diag(v.g[n])
            for n in range(math.ceil(smaller / 5))
        ]
        return w + 2 * (sum(terms) if wide else sum(terms).T)

    check(RandLoRA(rank=5, alpha=10.0, **BOTH), change)


def test_randlora_gives_full_rank() -> None:
    net = nn.Sequential(nn.Linear(24, 30))
    RandLoRA(rank=5, targets="0", dtype="float64").apply(net)
    first = adapters_of(net)["0"]
    assert torch.equal(first.g, torch.full_like(first.g, torch.tensor(1 / 24).item()))
    assert first.basis.a.std() == pytest.approx(1, rel=0.1)
    perturb(net)
    assert torch.linalg.matrix_rank(first.delta(torch.zeros(30, 24).double())) == 24


def test_randlora_equals_peft_but_for_the_order_of_the_basis() -> None:
    """peft lays B out basis by basis and A rank by rank before it multiplies them, so that diag(l_n) meets columns of
    other bases than B_n. B is random: it is ours with its columns in another
    order, which changes no property; the same numbers give another update."""
    peft = pytest.importorskip("peft")
    config = peft.RandLoraConfig(r=5, randlora_alpha=10, target_modules=["q_proj"])

    def names(layer: Any) -> dict[str, Tensor]:
        return {"g": layer.randlora_gamma["default"], "l": layer.randlora_lambda["default"].T}

    def fill(theirs: Any, ours: nn.Module, reordered: bool = True) -> None:
        basis = next(m for m in ours.modules() if isinstance(m, Basis))
        a, b = theirs.base_model.randlora_A["default"], theirs.base_model.randlora_B["default"]  # (d, bases, rank)
        basis.a.copy_(a[:, 0])
        basis.b.copy_(b.flatten(1).unflatten(1, b.shape[:0:-1]).transpose(1, 2) if reordered else b)

    for reordered in (True, False):
        method = RandLoRA(rank=5, alpha=10.0, targets="q")
        with contextlib.nullcontext() if reordered else pytest.raises(AssertionError, match="not close"):
            parity_with_views(config, method, names, functools.partial(fill, reordered=reordered))


def parity_with_views(config: Any, method: PEFT, names: Any, shared: Any) -> None:
    """`parity` of the outputs, where tensors of the two are not laid out alike."""
    peft = pytest.importorskip("peft")
    theirs, ours = peft.get_peft_model(zoo.build("llama"), config).eval(), zoo.build("llama")
    method.apply(ours)
    perturb(ours, 0.2)
    with torch.no_grad():
        shared(theirs, ours)
        for site, adapter in adapters_of(ours).items():
            for name, value in names(theirs.base_model.model.get_submodule(site)).items():
                value.copy_(getattr(adapter, name))
    torch.testing.assert_close(output(ours, "llama"), output(theirs, "llama"), atol=1e-6, rtol=1e-5)
    loss(ours, "llama").backward()
    loss(theirs, "llama").backward()
    for site, adapter in adapters_of(ours).items():
        layer = theirs.base_model.model.get_submodule(site)
        torch.testing.assert_close(adapter.l.grad, layer.randlora_lambda["default"].grad.T, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(adapter.g.grad, layer.randlora_gamma["default"].grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_randlora_keeps_one_tensor_of_the_smaller_width_squared(shape: tuple[int, int]) -> None:
    net = nn.Sequential(nn.Linear(*shape))
    RandLoRA(rank=8, targets="0").apply(net)
    held = kept(net, sample(5, shape[0], dtype=torch.float32).requires_grad_())
    own = {b.untyped_storage().data_ptr() for b in net.buffers()}
    assert len([t for t in held if t.numel() >= 64 * 64 and t.untyped_storage().data_ptr() not in own]) <= 1


# ------------------------------------------------------------------ counts: section 1.2 of the sheet
ALL = {"targets": "all-linear", "heads": None}
COUNTS: list[tuple[str, PEFT, int]] = [
    ("llama-7b", DoRA(targets="q,k,v,up,down", rank=32, heads=None), 56_975_360),
    ("llama-7b", DoRA(targets="q,k,v,up,down", rank=16, heads=None), 28_925_952),
    ("roberta-base", LoRAFA(rank=8, heads=None), 147_456),
    ("roberta-base", VeRA(rank=1024, heads=None), 43_008),
    ("roberta-large", VeRA(rank=256, heads=None), 61_440),
    ("gpt2-medium", VeRA(rank=1024, heads=None), 98_304),
    ("gpt2-large", VeRA(rank=1024, heads=None), 165_888),
    ("llama-7b", VeRA(rank=1024, **ALL), 1_589_248),
    ("llama-13b", VeRA(rank=1024, **ALL), 2_416_640),
    ("roberta-base", DVoRA(rank=1024, heads=None), 43_008 + 24 * 768),
    ("llama-7b", LoHa(rank=4, heads=None), 2 * 4 * (4096 + 4096) * 64),
    ("llama-7b", MultiLoRA(rank=8, **ALL), 3 * (19_988_480 + 32 * (4 * 4096 + 2 * 11008 + 4096))),
    ("llama-7b", TiedLoRA(train_u=False, train_v=False, heads=None), 131_072),
    ("llama-7b", TiedLoRA(heads=None), 524_544),
    ("llama-7b", NOLA(coefficients=128, **ALL), 57_344),
    ("llama-13b", NOLA(coefficients=256, **ALL), 143_360),
    ("llama-70b", NOLA(coefficients=512, **ALL), 573_440),
    ("gpt2-large", NOLA(coefficients=1000, heads=None), 144_000),
    ("gpt2-large", NOLA(coefficients=250, heads=None), 36_000),
    ("llama-7b", HiRA(rank=32, heads=None), 64 * 32 * (4096 + 4096)),
    ("roberta-base", VBLoRA(vectors=90, heads=None), 90 * 256 + 24 * 90 * 4 * 6),
    ("llama-7b", RandLoRA(heads=None), 64 * 128 * (32 + 4096)),
]


@pytest.mark.parametrize(("name", "method", "count"), COUNTS, ids=[f"{n}-{m.info.name}-{c}" for n, m, c in COUNTS])
def test_counts(name: str, method: PEFT, count: int) -> None:
    assert state.describe(method.apply(fresh(name)))["trainable"] == count
