"""PiSSA, OLoRA, orthogonal starts and LoftQ: what they start with, on plain and on quantised bases, and what files hold."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from boring import Boring, data, trainer
from harness import differences, output, perturb, snapshot
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_peft import LoftQ, LoRA, NF4Precision, OLoRA, PiSSA, load_adapter, quantise, save_adapter
from lightning_peft.callback import LifeCycleError
from lightning_peft.core import state
from lightning_peft.core.adapter import LabelError
from lightning_peft.core.fields import FieldError
from lightning_peft.core.init import Draw, leading
from lightning_peft.core.sites import TargetError
from lightning_peft.core.started import Started

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
STARTED = {"pissa": PiSSA, "olora": OLoRA}


def weight(rows: int = 40, columns: int = 64, seed: int = 0) -> Tensor:
    """In fp64, of numbers that fp32 holds."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()


class One(nn.Module):
    def __init__(self, kind: str = "linear", rows: int = 40, columns: int = 64) -> None:
        super().__init__()
        if kind == "linear":
            self.proj: Any = nn.Linear(columns, rows)
        else:
            from transformers.pytorch_utils import Conv1D

            self.proj = Conv1D(rows, columns)
        with torch.no_grad():
            w = weight(rows, columns)
            self.proj.weight.copy_(w if kind == "linear" else w.T)
            self.proj.bias.copy_(weight(1, rows, 1)[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def started(net: nn.Module, label: str) -> Started:
    return net.get_submodule(f"proj.adapters.{label}")  # type: ignore[return-value]


def dense(name: str, w: Tensor, rank: int, s: float) -> Tensor:
    """s B0 A0 by the papers"""
    if name == "pissa":
        u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
        return (u[:, :rank] * sigma[:rank]) @ vt[:rank]
    q, r = torch.linalg.qr(w)
    return s * q[:, :rank] @ r[:rank]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("name", STARTED)
def test_the_residual_form_of_the_papers(name: str, kind: str) -> None:
    net = One(kind).double()
    bias = net.proj.bias.clone()
    base = copy.deepcopy(net)
    method = STARTED[name](targets="proj", rank=3, alpha=7, heads=None, dtype="float64")
    method.apply(net)
    x = weight(5, 64, 2).requires_grad_()
    assert torch.equal(net(x), base(x))
    s, adapter = 7 / 3, started(net, name)
    torch.testing.assert_close(s * adapter.b0 @ adapter.a0, dense(name, weight(), 3, s), atol=1e-10, rtol=1e-10)
    perturb(net, 0.3)
    a, b = adapter.a, adapter.b
    residual = weight() - dense(name, weight(), 3, s)
    expected = F.linear(x, residual + s * b @ a, bias)
    found = net(x)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    g = weight(5, 40, 3)
    for one, two in zip(*(torch.autograd.grad(y, [x, a, b], g) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)
    method.merge(net)
    torch.testing.assert_close(net(x), expected, atol=1e-10, rtol=1e-10)
    method.remove(net)
    assert torch.equal(net.proj.weight, base.proj.weight)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", STARTED)
def test_a_file_holds_a_plain_lora_of_twice_the_rank(name: str, rslora: bool, tmp_path: Path) -> None:
    net = zoo.build("llama")
    method = STARTED[name](targets="q,down", rank=3, ranks={"down": 2}, alpha=5, alphas={"q": 6}, rslora=rslora)
    method.apply(net)
    perturb(net, 0.2)
    expected = output(net, "llama")
    save_adapter(net, tmp_path / "adapter")
    fresh = zoo.build("llama")
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert type(loaded) is LoRA
    assert (loaded.rank, loaded.ranks) == (6, {"down": 4})
    torch.testing.assert_close(output(fresh, "llama"), expected, atol=1e-5, rtol=1e-5)
    again = zoo.build("llama")
    STARTED[name](targets="q,down", rank=3, ranks={"down": 2}, alpha=5, alphas={"q": 6}, rslora=rslora).apply(again)
    again.load_state_dict(net.state_dict())
    assert torch.equal(output(again, "llama"), expected)


@pytest.mark.parametrize("name", STARTED)
def test_parity_with_peft(name: str) -> None:
    peft = pytest.importorskip("peft")
    net, theirs = One(), One()
    method = STARTED[name](targets="proj", rank=4, alpha=8, heads=None)
    method.apply(net)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["proj"], init_lora_weights=name)
    other = peft.get_peft_model(theirs, config)
    layer, adapter = other.base_model.model.proj, started(net, name)
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(adapter.b @ adapter.a, product, atol=2e-5, rtol=1e-4)
    with torch.no_grad():  # signs are free: take theirs, and the start that goes with it
        adapter.begin(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for p, q in ((adapter.a, layer.lora_A["default"].weight), (adapter.b, layer.lora_B["default"].weight)):
            noise = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4))
            p.add_(noise)
            q.add_(noise)
    x = weight(5, 64, 2).float()
    mine, peers = net(x), other(x)
    torch.testing.assert_close(mine, peers, atol=2e-5, rtol=1e-5)
    mine.square().mean().backward()
    peers.square().mean().backward()
    torch.testing.assert_close(adapter.a.grad, layer.lora_A["default"].weight.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(adapter.b.grad, layer.lora_B["default"].weight.grad, atol=1e-5, rtol=1e-5)


def test_peft_refuses_olora_on_conv1d_and_we_do_not() -> None:
    """peft does not transpose the weight of a Conv1D before its QR; a square one would be decomposed silently wrong."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["proj"], init_lora_weights="olora", fan_in_fan_out=True)
    with pytest.raises(RuntimeError):
        peft.get_peft_model(One("conv1d"), config)(weight(5, 64, 2).float())


def test_a_randomised_decomposition_comes_near_the_exact_one() -> None:
    u = torch.linalg.qr(weight(120, 120)).Q
    v = torch.linalg.qr(weight(90, 90, 1)).Q
    matrix = u[:, :90] * torch.logspace(1, -4, 90, dtype=torch.float64) @ v
    exact, near = leading(matrix, 6), leading(matrix, 6, 8, Draw(0, "x"))
    for one, two in zip(exact, near, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)
    again = leading(matrix, 6, 8, Draw(0, "x"))
    assert all(torch.equal(one, two) for one, two in zip(near, again, strict=True))
    net = One()
    PiSSA(targets="proj", rank=3, heads=None, iterations=8).apply(net)
    product = (1 / started(net, "pissa").scale) * dense("pissa", weight(), 3, 1.0).float()
    torch.testing.assert_close(started(net, "pissa").b0 @ started(net, "pissa").a0, product, atol=2e-2, rtol=2e-2)


def test_orthogonal_starts_at_a_product_of_zero() -> None:
    net, base = One(), One()
    LoRA(targets="proj", rank=6, heads=None, init="orthogonal").apply(net)
    adapter = net.get_submodule("proj.adapters.lora")
    a, b = adapter.a.double(), adapter.b.double()  # type: ignore[operator, union-attr]
    assert a.norm() > 0.1
    assert b.norm() > 0.1
    assert (b @ a).abs().max() < 1e-6
    x = weight(5, 64, 2).float()
    torch.testing.assert_close(net(x), base(x), atol=1e-5, rtol=1e-5)
    for fields in ({"rank": 3}, {"rank": 4, "ranks": {"q": 3}}):
        with pytest.raises(FieldError, match="must be even"):
            LoRA(init="orthogonal", **fields)


# ------------------------------------------------------------------ quantised bases
def error(net: One, label: str) -> float:
    """|W - Q - s B A|_F"""
    adapter = started(net, label)
    return float((weight() - net.proj.weight - adapter.scale * adapter.b @ adapter.a).detach().norm())


def plain_error() -> float:
    net = One()
    quantise(net, targets="proj")
    return float((weight() - net.proj.weight).norm())


def test_qpissa_quantises_the_residual() -> None:
    net = One()
    PiSSA(targets="proj", rank=8, heads=None).apply(net)
    quantise(net, targets="proj")
    adapter = started(net, "pissa")
    assert adapter.absorbed
    other = One()
    with torch.no_grad():
        other.proj.weight.sub_(adapter.scale * adapter.b0 @ adapter.a0)
    quantise(other, targets="proj")
    assert torch.equal(net.proj.weight, other.proj.weight)
    assert error(net, "pissa") < 0.95 * plain_error()
    x = weight(5, 64, 2).float()
    perturb(net, 0.2)
    expected = other(x) + adapter.scale * F.linear(F.linear(x, adapter.a), adapter.b)
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)


def test_pissa_over_a_base_that_is_quantised_already_is_exact() -> None:
    net, base = One(), One()
    quantise(net, targets="proj")
    quantise(base, targets="proj")
    PiSSA(targets="proj", rank=8, heads=None).apply(net)
    assert not started(net, "pissa").absorbed
    x = weight(5, 64, 2).float()
    assert torch.equal(net(x), base(x))


@pytest.mark.parametrize("alpha", [1.0, 8.0, 64.0])
def test_loftq_makes_up_for_the_codes_whatever_the_scale(alpha: float) -> None:
    errors = []
    for rank in (2, 8, 16):
        net = One()
        LoftQ(targets="proj", rank=rank, alpha=alpha, heads=None).apply(net)
        quantise(net, targets="proj")
        errors.append(error(net, "loftq"))
    assert errors[0] < plain_error()
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.75 * plain_error()


def test_loftq_with_one_iteration_is_the_svd_of_the_error() -> None:
    net, base = One(), One()
    LoftQ(targets="proj", rank=4, alpha=2, heads=None, iterations=1).apply(net)
    quantise(net, targets="proj")
    quantise(base, targets="proj")
    assert torch.equal(net.proj.weight, base.proj.weight)
    u, s, vt = torch.linalg.svd(weight() - base.proj.weight.double(), full_matrices=False)
    adapter = started(net, "loftq")
    found = (adapter.scale * adapter.b @ adapter.a).double()
    torch.testing.assert_close(found, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5, rtol=1e-4)


def test_loftq_keeps_the_best_of_its_iterates() -> None:
    errors = []
    for iterations in (1, 2, 3, 5, 8):
        net = One()
        LoftQ(targets="proj", rank=6, heads=None, iterations=iterations).apply(net)
        quantise(net, targets="proj", mode="fp4")
        errors.append(error(net, "loftq"))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_loftq_on_slices_of_a_packed_projection() -> None:
    net, base, plain = (zoo.build("gpt2") for _ in range(3))
    LoftQ(targets="q,v", rank=4, heads=None).apply(net)
    quantise(net)
    quantise(plain)
    whole, codes = (n.transformer.h[0].attn.c_attn.weight for n in (base, plain))
    made = net.transformer.h[0].attn.c_attn
    for index, part in ((0, "q"), (2, "v")):
        rows = slice(32 * index, 32 * (index + 1))
        adapter = made.get_submodule(f"{part}.adapters.loftq")
        rest = (whole - made.weight)[:, rows] - adapter.scale * (adapter.b @ adapter.a).T
        assert rest.norm() < 0.9 * (whole - codes)[:, rows].norm()


@pytest.mark.parametrize("method", [PiSSA, LoftQ])
def test_files_are_relative_to_the_base_before_it_was_quantised(method: type[LoRA], tmp_path: Path) -> None:
    net = One()
    method(targets="proj", rank=8, heads=None).apply(net)
    quantise(net, targets="proj")
    perturb(net, 0.2)
    save_adapter(net, tmp_path / "adapter")
    fresh = One()
    load_adapter(fresh, tmp_path / "adapter")
    adapter, loaded = started(net, method.info.name), started(fresh, method.info.name)
    moved = adapter.scale * (adapter.b @ adapter.a - adapter.b0 @ adapter.a0)
    torch.testing.assert_close(loaded.delta(weight().float()), moved, atol=1e-5, rtol=1e-5)
    x = weight(5, 64, 2).float()
    assert (fresh(x) - net(x)).norm() < 0.12 * net(x).norm()  # but for what the codes lack


@pytest.mark.parametrize("method", [PiSSA, LoftQ])
def test_what_the_base_was_quantised_around_stays_on_it(method: type[LoRA]) -> None:
    net = One()
    lora = method(targets="proj", rank=4, heads=None)
    lora.apply(net)
    quantise(net, targets="proj")
    before = snapshot(net)
    for call in (lora.remove, lambda model: lora.enabled(model, False)):
        with pytest.raises(LabelError, match="quantised around it"):
            call(net)
    assert differences(before, snapshot(net)) == []
    x = weight(5, 64, 2).float()
    expected = net(x)
    lora.unload(net, into="float32")
    torch.testing.assert_close(net(x), expected, atol=1e-4, rtol=1e-4)
    assert state.applied_to(net) == {}


# ------------------------------------------------------------------ in a Trainer
@pytest.mark.parametrize("method", [PiSSA, LoftQ])
def test_resuming_over_codes_is_exact(method: type[LoRA], tmp_path: Path) -> None:
    def run(ckpt: Path | None = None) -> Boring:
        module = Boring()
        keep = ModelCheckpoint(tmp_path / str(ckpt is None), "{step}", every_n_train_steps=2, save_top_k=-1)
        callbacks = [method(targets="q,v", rank=2), keep]
        fit = trainer(tmp_path, callbacks, max_steps=4, plugins=[NF4Precision(compute_dtype="float32")])
        fit.fit(module, data(), data(6), ckpt_path=ckpt, weights_only=None if ckpt is None else True)
        return module

    seed_everything(3)
    through = run()
    resumed = run(tmp_path / "True" / "step=2.ckpt")
    assert len(resumed.losses) == 2
    one, two = state.saved(through), state.saved(resumed)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(x.adapter.absorbed for x in state.get_applied(resumed).placements)


def test_loftq_without_codes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LifeCycleError, match="quantised around it"):
        trainer(tmp_path, [LoftQ(targets="q", rank=2)], max_steps=1).fit(Boring(), data(), data(6))


# ------------------------------------------------------------------ errors
def test_values_that_make_no_sense() -> None:
    for call in (
        lambda: PiSSA(alpha=0),
        lambda: OLoRA(alphas={"q": 0}),
        lambda: PiSSA(iterations=-1),
        lambda: LoftQ(iterations=0),
    ):
        with pytest.raises(FieldError):
            call()


def test_a_rank_above_the_weight_is_an_error_that_leaves_the_model_alone() -> None:
    net = One()
    before = snapshot(net)
    with pytest.raises(TargetError, match="rank=41"):
        PiSSA(targets="proj", rank=41, heads=None).apply(net)
    assert differences(before, snapshot(net)) == []


def test_second_derivatives_and_what_is_kept() -> None:
    net = One(rows=5, columns=7).double()
    PiSSA(targets="proj", rank=2, heads=None, dtype="float64").apply(net)
    perturb(net, 0.3)
    adapter = started(net, "pissa")

    def call(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        values = {"proj.adapters.pissa.a": a, "proj.adapters.pissa.b": b}
        return torch.func.functional_call(net, values, (x,))

    inputs = [t.detach().clone().requires_grad_() for t in (weight(3, 7, 2), adapter.a, adapter.b)]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    widths: set[int] = set()
    plain = {t.data_ptr() for t in (*net.parameters(), *net.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in plain:
            widths.add(tensor.shape[-1])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(weight(3, 7, 2))
    assert widths == {7, 2}  # x and A x
