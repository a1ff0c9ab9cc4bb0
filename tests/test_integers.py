"""Trainable rows of embeddings, weights in groups of integers and what is merged into them, experts, LQ-LoRA."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
import zoo
from boring import Boring, data, trainer
from harness import differences, perturb, snapshot
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft import (
    LoftQ,
    LoRA,
    LQLoRA,
    NF4Precision,
    PiSSA,
    QALoRA,
    TrainableTokens,
    empty_weights,
    gptq,
    load_adapter,
    load_quantised,
    quantise,
    quantise_within,
    save_adapter,
    save_quantised,
)
from lightning_peft.budget import fisher
from lightning_peft.calibration import rounded
from lightning_peft.core import state
from lightning_peft.core.codes import Quantisation
from lightning_peft.core.experts import Factored
from lightning_peft.core.fields import FieldError
from lightning_peft.core.lq import Scheme, allocate, decompose
from lightning_peft.core.merge import MergeError
from lightning_peft.core.quant import QuantisationError, codebook, dequantise_integers
from lightning_peft.core.sites import TargetError
from lightning_peft.precision import footprint


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------ trainable rows
TOKENS = [13, 12, 4, 39]


def tied(name: str = "gemma") -> nn.Module:
    """A model whose head is its embedding, which multiplies what it embeds; some of `TOKENS` are in its inputs."""
    return zoo.build(name).double()


@pytest.mark.parametrize("name", ["gemma", "bert_mlm", "llama"])
def test_rows_are_those_of_the_embedding_and_of_the_tied_head(name: str) -> None:
    net, base = tied(name), tied(name)
    TrainableTokens(tokens=TOKENS, heads=None, dtype="float64").apply(net)
    perturb(net, 0.3)
    (rows,) = state.trainable(net).values()
    leaf = rows.detach().clone().requires_grad_()
    embedding = base.get_input_embeddings()
    before = embedding.weight.detach()
    dense = before.index_copy(0, torch.tensor(sorted(TOKENS)), leaf)
    key = next(n for n, m in base.named_modules() if m is embedding)
    values = {f"{key}.weight": dense}
    expected = torch.func.functional_call(base, values, kwargs=zoo.inputs(name), tie_weights=True).logits
    found = net(**zoo.inputs(name)).logits
    close(found, expected)
    g = draw(*found.shape)
    (one,), (two,) = torch.autograd.grad(found, [rows], g), torch.autograd.grad(expected, [leaf], g)
    close(one, two)
    assert rows.shape == (4, zoo.HIDDEN)
    assert state.describe(net)["trainable"] == 4 * zoo.HIDDEN


@pytest.mark.parametrize("name", ["gemma", "t5", "llama"])
def test_a_merge_keeps_the_tie(name: str) -> None:
    net = tied(name)
    before, old = snapshot(net), net.get_input_embeddings().weight.detach().clone()
    method = TrainableTokens(tokens=TOKENS, heads=None, dtype="float64")
    method.apply(net)
    perturb(net, 0.3)
    inputs = zoo.inputs(name)
    expected = net(**inputs).logits
    method.merge(net)
    weight = net.get_input_embeddings().weight
    assert (weight is net.lm_head.weight) is (name != "llama")
    assert [n for n in range(zoo.VOCAB) if not torch.equal(weight[n], old[n])] == sorted(TOKENS)
    close(net(**inputs).logits, expected)
    method.unmerge(net)
    assert torch.equal(net(**inputs).logits, expected)
    method.remove(net)
    assert differences(before, snapshot(net)) == []


@pytest.mark.parametrize("name", ["gemma", "llama", "bert_mlm"])
def test_rows_agree_with_peft(name: str) -> None:
    peft = pytest.importorskip("peft")
    net, theirs = zoo.build(name), zoo.build(name)
    TrainableTokens(tokens=TOKENS, heads=None).apply(net)
    other = peft.get_peft_model(theirs, peft.TrainableTokensConfig(token_indices=sorted(TOKENS)))
    values = {n: p for n, p in other.named_parameters() if p.requires_grad}
    perturb(net, 0.3)
    (mine,) = state.trainable(net).values()
    (peers,) = values.values()
    with torch.no_grad():
        peers.copy_(mine)
    one, two = net(**zoo.inputs(name)).logits, other(**zoo.inputs(name)).logits
    close(one, two, 1e-6)
    one.square().mean().backward()
    two.square().mean().backward()
    close(mine.grad, peers.grad, 1e-6)


def test_nothing_of_the_size_of_the_vocabulary_is_kept() -> None:
    """peft copies the whole weight in every forward, and its gradient has that size before rows are taken."""
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if (
                isinstance(out, Tensor)
                and out.untyped_storage().data_ptr() != embed.weight.untyped_storage().data_ptr()
            ):
                made.append(out.numel())
            return out

    embed = nn.Embedding(5000, 8)
    net = nn.Sequential(embed)
    TrainableTokens(targets="0", tokens=[7, 4999], heads=None).apply(net)
    index = torch.tensor([[7, 3, 4999, 7]])
    with Watch():
        net(index).square().sum().backward()
    assert max(made) < 100
    (rows,) = state.trainable(net).values()
    close(rows.grad, 2 * embed.weight.detach()[[7, 4999]] * torch.tensor([[2.0], [1.0]]), 1e-6)


def test_rows_of_a_file_are_right_on_a_vocabulary_made_longer_anew(tmp_path: Path) -> None:
    def longer(seed: int) -> nn.Module:
        net = zoo.build("gpt2")
        torch.manual_seed(seed)
        net.resize_token_embeddings(103, mean_resizing=False)
        return net

    with torch.random.fork_rng():
        net, fresh = longer(1), longer(2)
    TrainableTokens(tokens=[100, 101, 102], heads=None).apply(net)
    perturb(net, 0.3)
    save_adapter(net, tmp_path / "rows")
    load_adapter(fresh, tmp_path / "rows", check_base=False)
    inputs = {"input_ids": torch.tensor([[5, 101, 7, 102, 100]])}
    close(net(**inputs).logits, fresh(**inputs).logits, 1e-5)


def test_rows_of_an_untied_head_and_lora_beside_them() -> None:
    net, base = zoo.build("llama").double(), zoo.build("llama").double()
    TrainableTokens(targets="embed,lm_head", tokens=[12, 19], heads=None, dtype="float64").apply(net)
    LoRA(targets="embed", rank=2, heads=None, dtype="float64").apply(net)
    perturb(net, 0.3)
    rows = {n: p for n, p in state.trainable(net).items() if n.endswith("rows")}
    assert sorted(n.partition(".adapters")[0] for n in rows) == ["lm_head", "model.embed_tokens"]
    lora = net.model.embed_tokens.adapters["lora"]
    with torch.no_grad():
        for name, p in rows.items():
            base.get_submodule(name.partition(".adapters")[0]).weight[[12, 19]] = p
        base.model.embed_tokens.weight += lora.scale * (lora.b @ lora.a).T
    close(net(**zoo.inputs("llama")).logits, base(**zoo.inputs("llama")).logits)
    gemma, both = tied(), LoRA(targets="embed", heads=None)
    both.apply(gemma)
    with pytest.raises(MergeError, match="is tied"):
        both.merge(gemma)


def test_rows_and_lora_at_one_embedding_merge_in_one_order_alone() -> None:
    """Rows are laid over what the weight holds: with LoRA in the weight, they would take its change away."""
    first, second = LoRA(targets="embed", rank=2, heads=None), TrainableTokens(tokens=[12, 19], heads=None)
    for methods in ((first, second), (second, first)):
        net, inputs = zoo.build("llama").eval(), zoo.inputs("llama")
        for method in methods:
            method.apply(net)
        perturb(net, 0.3)
        expected = net(**inputs).logits
        with pytest.raises(MergeError, match="computes with the weight"):
            first.merge(net)
        close(net(**inputs).logits, expected, 1e-6)
        second.merge(net)
        close(net(**inputs).logits, expected, 1e-6)
        first.merge(net)
        close(net(**inputs).logits, expected, 1e-6)


def test_tokens_that_are_not_there() -> None:
    for tokens in ([1, 1], [-1]):
        with pytest.raises(FieldError, match="different ids"):
            TrainableTokens(tokens=tokens)
    with pytest.raises(TargetError, match="Name their ids"):
        TrainableTokens().apply(zoo.build("llama"))
    with pytest.raises(TargetError, match="not among its 100 rows"):
        TrainableTokens(tokens=[100]).apply(zoo.build("llama"))
    with pytest.raises(TargetError, match="padding token"):
        TrainableTokens(tokens=[0]).apply(zoo.build("llama"))
    with pytest.raises(TargetError, match="is neither"):
        TrainableTokens(tokens=[3], targets="q").apply(zoo.build("gpt2"))


# ------------------------------------------------------------------ groups of integers
class One(nn.Module):
    """One projection, 64 -> 40, of a weight that is known."""

    def __init__(self, kind: str = "linear") -> None:
        super().__init__()
        self.proj = nn.Linear(64, 40) if kind == "linear" else hf.pytorch_utils.Conv1D(40, 64)
        with torch.no_grad():
            self.proj.weight.copy_(draw(40, 64) if kind == "linear" else draw(40, 64).T)
            self.proj.bias.copy_(draw(40, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def integers(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero by min and max, as the paper's equation 1 has them, in fp32 as the library computes."""
    parts = weight.float().unflatten(1, (-1, group))
    low, high = parts.amin(2), parts.amax(2)
    scale = (high - low) / (2**bits - 1)
    return ((parts - low[..., None]) / scale[..., None]).round(), scale, low


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_layer_of_integers_is_scale_times_codes_plus_zero(kind: str, bits: int) -> None:
    net = One(kind)
    report = quantise(net, targets="proj", mode=f"int{bits}", blocksize=16)
    codes, scale, low = integers(draw(40, 64), bits, 16)
    dense = (codes * scale[..., None] + low[..., None]).flatten(1)
    found = net.proj.weight if kind == "linear" else net.proj.weight.T
    close(found, dense, 2e-6)
    assert report.bits_per_parameter == bits + 64 / 16
    x = draw(3, 5, 64).float().requires_grad_()
    y, expected = net(x), F.linear(x, dense, net.proj.bias)
    close(y, expected, 1e-4)
    g = draw(3, 5, 40).float()
    close(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(expected, x, g)[0], 1e-4)
    again = One(kind)
    quantise(again, targets="proj", mode=f"int{bits}", blocksize=16)
    again.load_state_dict({k: v + 0 if v.dtype == torch.float32 else v for k, v in net.state_dict().items()})
    assert torch.equal(again(x), y)
    twin = pickle.loads(pickle.dumps(net))
    assert torch.equal(twin(x), y)


def test_a_base_of_integers_is_written_and_read(tmp_path: Path) -> None:
    net = zoo.build("llama")
    quantise(net, mode="int3", blocksize=8)
    save_quantised(net, tmp_path / "base")
    with empty_weights():
        fresh = zoo.ZOO["llama"]()
    load_quantised(fresh.eval(), tmp_path / "base")
    assert torch.equal(fresh(**zoo.inputs("llama")).logits, net(**zoo.inputs("llama")).logits)
    other = zoo.build("llama")
    quantise(other, mode="int3", blocksize=16)
    with pytest.raises(RuntimeError, match="the file holds int3"):
        other.load_state_dict(net.state_dict())
    broken = net.state_dict()
    del broken["model.layers.0.mlp.up_proj.weight.zero"]
    with pytest.raises(RuntimeError, match="is damaged"):
        net.load_state_dict(broken)


# ------------------------------------------------------------------ QA-LoRA
def qalora(net: nn.Module) -> Any:
    return net.get_submodule("proj.adapters.qalora")


@pytest.mark.parametrize("pool", ["sum", "mean"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_qalora_pools_its_input(kind: str, pool: str) -> None:
    net = One(kind).double()
    method = QALoRA(targets="proj", rank=3, alpha=6, group=16, pool=pool, dtype="float64", heads=None)
    method.apply(net)
    perturb(net, 0.3)
    a, b = (p.detach().clone().requires_grad_() for p in (qalora(net).a, qalora(net).b))
    assert a.shape == (3, 4)
    x = draw(2, 5, 64, seed=3).requires_grad_()
    p = F.avg_pool1d(x, 16) * (16 if pool == "sum" else 1)
    expected = F.linear(x, *(t.float().double() for t in (draw(40, 64), draw(40, seed=1)))) + 2.0 * p @ a.T @ b.T
    found = net(x)
    close(found, expected)
    g = draw(2, 5, 40, seed=4)
    ours = torch.autograd.grad(found, [x, qalora(net).a, qalora(net).b], g)
    for one, two in zip(ours, torch.autograd.grad(expected, [x, a, b], g), strict=True):
        close(one, two)
    method.merge(net)
    close(net(x), expected)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(("bits", "pool", "size"), [(4, "sum", 16), (3, "mean", 16), (2, "sum", 8)])
def test_qalora_merges_into_the_zeros(kind: str, bits: int, pool: str, size: int) -> None:
    """beta' = beta + s B A (convention F), z' = z - s B A / alpha (convention Z): codes and scales are the same ones."""
    net = One(kind)
    quantise(net, targets="proj", mode=f"int{bits}", blocksize=size)
    method = QALoRA(targets="proj", rank=3, group=16, pool=pool, heads=None)
    method.apply(net)
    perturb(net, 0.2)
    x = draw(7, 64, seed=3).float()
    expected, packed, state_before = net(x), net.proj.packed, {k: v.clone() for k, v in net.state_dict().items()}
    scale, zero = net.proj.absmax, net.proj.offset.clone()
    change = (qalora(net).scale * qalora(net).b @ qalora(net).a).detach().repeat_interleave(16 // size, 1)
    report = method.merge(net)
    assert (report.rounding, report.dtypes, report.places) == (0.0, (f"int{bits}",), 1)
    assert net.proj.packed is packed
    assert net.proj.absmax is scale
    close(net.proj.offset, zero + change, 1e-6)
    codes = integers(draw(40, 64), bits, size)[0]
    points = -net.proj.offset / scale
    close(points, -zero / scale - change / scale, 1e-4)
    by_points = (scale[..., None] * (codes - points[..., None])).flatten(1)
    close(net(x), F.linear(x, by_points, net.proj.bias), 1e-4)
    close(net(x), expected, 1e-4)
    method.unmerge(net)
    assert all(torch.equal(v, state_before[k]) for k, v in net.state_dict().items())
    assert torch.equal(net(x), expected)
    method.unload(net)
    assert net.proj.quantisation.mode == f"int{bits}"
    close(net(x), expected, 1e-4)


def test_qalora_on_slices_and_beside_another_method() -> None:
    net = zoo.build("gpt2")
    quantise(net, mode="int4", blocksize=8)
    first, second = (QALoRA(targets=t, rank=2, group=8, label=t, heads=None) for t in ("q", "v"))
    first.apply(net)
    second.apply(net)
    perturb(net, 0.1)
    expected = net(**zoo.inputs("gpt2")).logits
    zeros = net.transformer.h[0].attn.c_attn.offset.clone()
    first.merge(net)
    second.merge(net)
    close(net(**zoo.inputs("gpt2")).logits, expected, 1e-4)
    moved = (net.transformer.h[0].attn.c_attn.offset != zeros).all(1)
    assert moved[:32].all()
    assert not moved[32:64].any()
    assert moved[64:].all()
    with pytest.raises(MergeError, match="unmerge 'v' first"):
        first.unmerge(net)
    second.unmerge(net)
    first.unmerge(net)
    assert torch.equal(net(**zoo.inputs("gpt2")).logits, expected)


def test_what_zeros_cannot_take() -> None:
    for base, group in (({"mode": "nf4"}, 16), ({"mode": "int4", "blocksize": 32}, 16)):
        net = One()
        quantise(net, targets="proj", **base)
        method = QALoRA(targets="proj", group=group, heads=None)
        method.apply(net)
        with pytest.raises(MergeError, match="quantised anew"):
            method.merge(net)
        assert method.merge(net, into="float32").dtypes == ("float32",)
    net = One()
    quantise(net, targets="proj", mode="int4", blocksize=16)
    method = QALoRA(targets="proj", group=16, heads=None)
    method.apply(net)
    with torch.no_grad():
        qalora(net).b.fill_(float("inf"))
    with pytest.raises(MergeError, match="not finite"):
        method.merge(net)
    assert net(draw(2, 64).float()).isnan().any()
    with pytest.raises(TargetError, match="does not divide the 64 inputs"):
        QALoRA(targets="proj", group=48).apply(One())
    for fields in ({"group": 0}, {"rank": 0}, {"alpha": -1.0}, {"dropout": 1.5}):
        with pytest.raises(FieldError):
            QALoRA(**fields)


def test_peft_scales_the_mean_by_the_number_of_groups() -> None:
    """Its variant has mean * (d_in / g) where the sum is mean * g: its output is the paper's times (d_in / g) / g."""
    variants = pytest.importorskip("peft.tuners.lora.variants")
    net, x = One(), draw(2, 5, 64, seed=3).float()
    QALoRA(targets="proj", rank=3, alpha=6, group=16, heads=None).apply(net)
    perturb(net, 0.3)
    ours = qalora(net)

    class Layer(nn.Module):
        in_features = 64
        lora_A = {"default": nn.Linear(4, 3, bias=False)}
        lora_B = {"default": nn.Linear(3, 40, bias=False)}
        lora_dropout = {"default": nn.Identity()}
        scaling, qalora_group_size = {"default": 2.0}, {"default": 16}

    layer = Layer()
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(ours.a)
        layer.lora_B["default"].weight.copy_(ours.b)
    base = F.linear(x, net.proj.weight, net.proj.bias)
    theirs = variants.QALoraLinearVariant.forward(layer, "default", x, torch.zeros(2, 5, 40))
    groups = 64 // 16
    close((net(x) - base) * groups / 16, theirs, 1e-5)
    with pytest.raises(NotImplementedError):
        variants.QALoraLinearVariant.get_delta_weight(layer, "default")


@pytest.mark.parametrize(("size", "count"), [("7b", 89_309_184), ("13b", 139_878_400)])
def test_qalora_counts(size: str, count: int) -> None:
    """Table of the paper: 89M and 140M for LLaMA-7B and 13B."""
    wide = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    with torch.device("meta"):
        net = hf.LlamaForCausalLM(hf.LlamaConfig(**({} if size == "7b" else wide)))
    QALoRA(heads=None).apply(net)
    assert state.describe(net)["trainable"] == count


# ------------------------------------------------------------------ GPTQ
def removal(weight: Tensor, hessian: Tensor, bits: int, group: int, damping: float) -> Tensor:
    """The slow form: quantise an input, spread its error by the inverse of what is left of H, remove it from H."""
    w, h, out = weight.clone(), hessian.clone(), torch.empty_like(weight)
    h += damping * h.diagonal().mean() * torch.eye(len(h))
    for i in range(w.shape[1]):
        if i % group == 0:
            low, high = w[:, i : i + group].aminmax(dim=1)
            scale = (high - low) / (2**bits - 1)
        inverse = torch.linalg.inv(h[i:, i:])
        out[:, i] = ((w[:, i] - low) / scale).round().clamp(0, 2**bits - 1) * scale + low
        w[:, i:] -= ((w[:, i] - out[:, i]) / inverse[0, 0])[:, None] * inverse[0]
    return out


def test_gptq_is_the_removal_of_one_input_after_the_other() -> None:
    weight, x = draw(12, 32), draw(200, 32, seed=1) @ draw(32, 32, seed=2)
    hessian = x.T @ x
    found = rounded(weight, hessian, 3, 8, 0.01)
    dense = dequantise_integers(found, torch.float64)
    close(dense, removal(weight, hessian, 3, 8, 0.01), 1e-3)
    codes, scale, low = integers(weight, 3, 8)
    nearest = (codes * scale[..., None] + low[..., None]).flatten(1).double()
    lost = [float(((weight - q) @ x.T).norm()) for q in (dense, nearest)]
    assert lost[0] < 0.85 * lost[1]
    hessian[:, 3] = hessian[3] = 0  # an input that is always zero
    assert dequantise_integers(rounded(weight, hessian, 3, 8), torch.float32).isfinite().all()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gptq_quantises_a_model_better_than_rounding(name: str) -> None:
    base, net, plain = (zoo.build(name) for _ in range(3))
    batches = [zoo.inputs(name, 8, 32)]
    report = gptq(net, batches, mode="int2", blocksize=8)
    quantise(plain, mode="int2", blocksize=8)
    assert str(report).startswith("int2: ")
    assert not net.training
    want = base(**batches[0]).logits
    errors = [float((m(**batches[0]).logits - want).detach().norm()) for m in (net, plain)]
    assert errors[0] < 0.8 * errors[1]
    QALoRA(targets="q,down", group=8, rank=2).apply(net)
    perturb(net, 0.1)
    expected = net(**batches[0]).logits
    state.get_applied(net).method.merge(net)
    close(net(**batches[0]).logits, expected, 1e-4)


def test_what_gptq_refuses() -> None:
    net, x = One(), draw(5, 64).float()
    for batches, options, message in (
        ([x], {"act_order": True}, "no run of inputs"),
        ([x], {"mode": "nf4"}, "expected int4"),
        ([], {}, "0 batches"),
        ([x], {"blocksize": 48}, "does not divide the 64 inputs"),
    ):
        with pytest.raises(QuantisationError, match=message):
            gptq(net, batches, targets="proj", **options)
    LoftQ(targets="proj", heads=None).apply(net)
    with pytest.raises(QuantisationError, match="use `quantise`"):
        gptq(net, [x], targets="proj")
    two = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    two.forward = lambda x: two["a"](input=x)  # type: ignore[method-assign, assignment]
    before = snapshot(two)
    with pytest.raises(QuantisationError, match="No batch reaches"):
        gptq(two, [draw(3, 8).float()], targets="a,b", blocksize=8)
    with pytest.raises(QuantisationError, match="'a'.* is not finite"):
        gptq(two, [torch.full((3, 8), float("nan"))], targets="a", blocksize=8)
    assert differences(before, snapshot(two)) == []  # "a" would have been quantised before "b"
    assert gptq(two, [draw(3, 8).float()], targets="a", blocksize=8).layers == 1
    with pytest.raises(QuantisationError, match="expected the inputs"):
        quantise(One(), targets="proj", mode="int4", blocksize=0)


# ------------------------------------------------------------------ experts
STACKS = "*.experts.gate_up_proj,*.experts.down_proj"
MOE = {**zoo.TEXT, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


def mixture(kind: str = "mixtral", how: str = "eager") -> nn.Module:
    """(experts, d_out, d_in) in Mixtral, (experts, d_in, d_out) in gpt-oss."""
    config = hf.MixtralConfig(**MOE) if kind == "mixtral" else hf.GptOssConfig(**MOE, head_dim=8)
    config._experts_implementation = how
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = (hf.MixtralForCausalLM if kind == "mixtral" else hf.GptOssForCausalLM)(config).eval()
        for p in net.parameters():
            nn.init.normal_(p, std=0.15)
    return net


def text() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_have_factors_of_their_own(kind: str, how: str) -> None:
    net, base = (mixture(kind, how).to(torch.float32 if how == "grouped_mm" else torch.float64) for _ in range(2))
    before = snapshot(net)
    method = LoRA(targets=None, experts=STACKS, rank=3, alpha=6, heads=None, dtype="base")
    method.apply(net)
    plain = base(**text()).logits
    assert torch.equal(net(**text()).logits, plain)
    perturb(net, 0.1)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in state.trainable(net).items()}
    dense = {}
    for name, weight in base.named_parameters():
        module, _, stack = name.rpartition(".")
        place = f"{module}.each_{stack}.adapters.lora"
        if f"{place}.a" in leaves:
            change = 2 * torch.einsum("eor,eri->eoi", leaves[f"{place}.b"], leaves[f"{place}.a"])
            dense[name] = weight.detach() + (change.transpose(1, 2) if kind == "gpt_oss" else change)
    assert len(dense) == 4
    expected, found = torch.func.functional_call(base, dense, kwargs=text()).logits, net(**text()).logits
    tolerance = 1e-4 if how == "grouped_mm" else 1e-10
    assert (expected - plain).abs().max() > 1e-2
    close(found, expected, tolerance)
    g = draw(*found.shape).to(found.dtype)
    mine = torch.autograd.grad(found, list(state.trainable(net).values()), g)
    for one, two in zip(mine, torch.autograd.grad(expected, list(leaves.values()), g), strict=True):
        close(one, two, tolerance)
    report = method.merge(net)
    assert (report.places, report.rounding) == (4, 0.0)
    close(net(**text()).logits, expected, tolerance)
    method.unmerge(net)
    assert torch.equal(net(**text()).logits, found)
    method.remove(net)
    assert differences(before, snapshot(net)) == []


def test_no_product_of_factors_is_kept_for_the_backward() -> None:
    net = mixture()
    LoRA(targets=None, experts=STACKS, rank=2, heads=None).apply(net)
    perturb(net, 0.1)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    whole = {tuple(p.shape) for name, p in net.named_parameters() if p.dim() == 3 and "adapters" not in name}
    dense = whole | {shape[1:] for shape in whole}
    dense |= {shape[:-2] + shape[:-3:-1] for shape in dense}
    kept: list[tuple[int, ...]] = []

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        net(**text()).logits.sum().backward()
    assert kept
    assert not dense & set(kept)


def test_experts_agree_with_peft() -> None:
    peft = pytest.importorskip("peft")
    net, theirs = mixture(), mixture()
    LoRA(targets=None, experts=STACKS, rank=3, alpha=6, heads=None).apply(net)
    perturb(net, 0.1)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=names)
    other = peft.get_peft_model(theirs, config)
    wrappers = {
        f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{m.parameter_name}": m
        for name, m in other.named_modules()
        if type(m).__name__ == "ParamWrapper"
    }
    pairs = []
    for name, p in state.trainable(net).items():
        place, _, tensor = name.replace(".each_", ".").partition(".adapters.lora.")
        pairs.append((p, tensor, wrappers[place]))
    assert len(pairs) == 8
    with torch.no_grad():
        for p, tensor, wrapper in pairs:
            if tensor == "a":  # (experts * rank, d_in)
                wrapper.lora_A["default"].weight.copy_(p.flatten(0, 1))
            else:  # (d_out, rank * experts), the expert running fastest
                wrapper.lora_B["default"].weight.copy_(p.permute(1, 2, 0).flatten(1))
    one, two = net(**text()).logits, other(**text()).logits
    close(one, two, 1e-6)
    one.square().mean().backward()
    two.square().mean().backward()
    for p, tensor, wrapper in pairs:
        if tensor == "a":
            close(p.grad.flatten(0, 1), wrapper.lora_A["default"].weight.grad, 1e-6)
        else:
            close(p.grad.permute(1, 2, 0).flatten(1), wrapper.lora_B["default"].weight.grad, 1e-6)


def test_experts_beside_other_methods_and_in_files(tmp_path: Path) -> None:
    net, one = mixture(), LoRA(targets="q", experts="*.experts.*", rank=2, ranks={"*.experts": 3}, heads=None)
    two = LoRA(targets=None, experts="*.experts.down_proj", layers=1, rank=4, label="second", heads=None)
    one.apply(net)
    save_adapter(net, tmp_path / "start")
    two.apply(net)
    perturb(net, 0.1)
    expected = net(**text()).logits
    assert torch.equal(copy.deepcopy(net)(**text()).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(net))(**text()).logits, expected)
    shapes = {n: tuple(p.shape) for n, p in state.trainable(net).items()}
    assert shapes["model.layers.1.mlp.experts.each_down_proj.adapters.second.a"] == (4, 4, 64)
    assert shapes["model.layers.1.mlp.experts.each_down_proj.adapters.lora.b"] == (4, 32, 3)
    assert shapes["model.layers.0.self_attn.q_proj.adapters.lora.a"] == (2, 32)
    two.merge(net)
    one.merge(net)
    close(net(**text()).logits, expected, 1e-5)
    one.unmerge(net)
    two.unmerge(net)
    two.remove(net)
    save_adapter(net, tmp_path / "lora")
    fresh = mixture()
    load_adapter(fresh, tmp_path / "lora")
    assert torch.equal(fresh(**text()).logits, net(**text()).logits)


def test_a_weight_in_factors_is_the_sum_wherever_it_is_used() -> None:
    w, u, v, x = draw(4, 6, 8), draw(4, 6, 2, seed=1), draw(4, 2, 8, seed=2), draw(4, 5, 8, seed=3)
    weight, dense = Factored(w, u, v, 0.5), w + 0.5 * u @ v
    assert (weight.shape, weight.dtype, weight.dim(), len(weight)) == (w.shape, w.dtype, 3, 4)
    assert type(weight[1]) is type(weight.mT) is Factored
    ids = torch.tensor([2, 0, 2])
    uses = (
        lambda t: t * 2,
        lambda t: t[1, 2],
        lambda t: t[1][3],
        lambda t: t.transpose(0, 1),
        lambda t: t.sum((1, 2)),
        lambda t: torch.cat([t, t]),
        lambda t: t[ids][1:] @ draw(8, seed=4),
        lambda t: x @ t.mT,
        lambda t: torch.bmm(x, t.transpose(1, 2)),
        lambda t: t.__rmatmul__(draw(4, 3, 6, seed=5)),
        lambda t: t.bmm(x.mT),
        lambda t: F.linear(x[0], t[0], draw(6, seed=6)),
        lambda t: F.linear(t[0], t[0]),
        lambda t: t[0] @ t[1].mT,
        lambda t: F.linear(x[0], Factored(t[0], u[0], v[0], 2.0)),
        lambda t: Factored(t, u, v, 2.0).mean(),
    )
    for number, use in enumerate(uses):
        torch.testing.assert_close(use(weight), use(dense), msg=lambda text, n=number: f"use {n}: {text}")
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(TypeError, match="passed by"):
        torch.add(weight, 1)


def test_experts_that_are_not_there() -> None:
    for experts, message in (
        ("*.experts.nope", "Known there: gate_up_proj, down_proj"),
        ("gate_up_proj", "expected globs"),
        ("*.nope.gate_up_proj", "No module matches"),
    ):
        with pytest.raises(TargetError, match=message):
            LoRA(targets=None, experts=experts).apply(mixture())
    for method, fields in ((LoRA, {"dropout": 0.1}), (LoRA, {"init": "orthogonal"}), (PiSSA, {})):
        with pytest.raises(FieldError, match="take plain LoRA"):
            method(experts=STACKS, **fields)
    with pytest.raises(TargetError, match="no place to act"):
        LoRA(targets=None).apply(mixture())


# ------------------------------------------------------------------ LQ-LoRA
SMALL = Scheme(3, 4, "float32", 16, 16)


def test_the_codes_of_lqlora() -> None:
    """Scales: the least taken off, unsigned, the largest of a block exact; weights divided by what comes back."""
    assert Scheme(4, 8, "float32", 64, 256).per_parameter == pytest.approx(4.127, abs=1e-3)
    assert Scheme(3, 8, "float32", 64, 256).per_parameter == pytest.approx(3.127, abs=1e-3)
    weight = draw(32, 64).float()
    found, book = SMALL(weight), codebook("nf3")
    blocks = weight.view(-1, 16)
    scales = blocks.abs().amax(1)
    expected = []
    for n, block in enumerate(blocks):
        group = scales[n // 16 * 16 : n // 16 * 16 + 16] - scales.min()
        scale = ((scales[n] - scales.min()) / group.max() * 15).round() / 15 * group.max() + scales.min()
        nearest = ((block / scale)[:, None] - book).abs().argmin(1)
        expected.append(book[nearest] * scale)
    close(found, torch.stack(expected).view_as(weight), 1e-5)
    assert torch.equal(Scheme(2, 2, "bfloat16", 16, 16)(torch.zeros(16, 16)), torch.zeros(16, 16))
    with pytest.raises(QuantisationError, match="no multiple"):
        SMALL(draw(3, 5))
    with pytest.raises(QuantisationError, match="expected 2, 3, 4 or 8"):
        Scheme(5)


def test_the_decomposition_keeps_the_best_iterate() -> None:
    weight = draw(48, 64).float()
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    one = decompose(weight, 4, SMALL, iterations=1)
    close(one.left @ one.right, (u[:, :4] * s[:4]) @ vt[:4], 1e-4)
    close(one.quantised, SMALL(weight - one.left @ one.right), 1e-6)
    errors = [decompose(weight, 4, SMALL, iterations=n).error for n in (1, 2, 3, 5, 100)]
    assert errors == sorted(errors, reverse=True)
    best = decompose(weight, 4, SMALL)
    assert best.error == pytest.approx(float((weight - best.quantised - best.left @ best.right).norm()), rel=1e-5)
    assert best.error < float((weight - SMALL(weight)).norm())


def test_fisher_information_weights_the_decomposition() -> None:
    weight = draw(48, 64).float()
    f = draw(48, 1, seed=1).float().exp() ** 3 * draw(1, 64, seed=2).float().exp() ** 3
    plain, aware = decompose(weight, 4, SMALL), decompose(weight, 4, SMALL, f)
    lost = [float((f.sqrt() * (weight - x.quantised - x.left @ x.right)).norm()) for x in (aware, plain)]
    assert aware.error == pytest.approx(lost[0], rel=1e-5)
    assert lost[0] < 0.8 * lost[1]
    one = decompose(weight, 4, SMALL, f, iterations=1)  # F of rank one: the surrogate is exact
    u, s, vt = torch.linalg.svd(f.sqrt() * weight, full_matrices=False)
    product = f.sqrt() * (one.left @ one.right)
    assert (product - (u[:, :4] * s[:4]) @ vt[:4]).norm() < 1e-3 * product.norm()
    f[3], f[:, 5] = 0, 0  # the authors' code divides by zero there
    for x in (decompose(weight, 4, SMALL, f), decompose(weight, 4, SMALL, torch.zeros_like(f))):
        assert torch.isfinite(x.left @ x.right + x.quantised).all()


def test_bits_are_given_out_exactly() -> None:
    pytest.importorskip("scipy")
    errors, bits, sizes = draw(4, 3).abs().tolist(), [[2.5, 3.5, 8.0]] * 4, [10, 20, 30, 40]
    errors[1][0] = float("inf")
    for budget in (3.0, 4.0, 5.5, 8.0):
        every = []
        for pick in itertools.product(range(3), repeat=4):
            if sum(sizes[m] * bits[m][c] for m, c in enumerate(pick)) <= budget * 100:
                every.append((sum(errors[m][c] for m, c in enumerate(pick)), list(pick)))
        assert allocate(errors, bits, sizes, budget) == min(every)[1]
    with pytest.raises(QuantisationError, match=r"at least 2\.700"):
        allocate(errors, bits, sizes, 2.6)


GRID = [Quantisation("int2", 16), Quantisation("int3", 16), Quantisation("int4", 16), Quantisation("nf4", 32)]


def left_over(net: nn.Module, base: nn.Module) -> float:
    """Sum of |W - Q - s B A|^2"""
    total = 0.0
    for x in state.get_applied(net).placements:
        columns = vars(x.place).get("columns")
        owner, before = vars(x.place).get("owner", x.place), base.get_submodule(x.site).weight.detach()
        gap = before - owner.weight.detach()
        gap = gap if columns is None else columns.take(gap.T, 0)
        total += float((gap - x.adapter.scale * x.adapter.b @ x.adapter.a).detach().square().sum())
    return total


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_budget_is_met_and_no_worse_than_one_configuration_for_all(name: str) -> None:
    pytest.importorskip("scipy")
    targets, base = ("all-linear", zoo.build(name)) if name == "llama" else ("q,v", zoo.build(name))
    with torch.no_grad():
        for number, p in enumerate(base.parameters()):
            p.mul_(1 + number % 5)  # weights that are worth more than others
    found = {}
    for budget in (None, 6.5, 7.2, 8.5):
        net = copy.deepcopy(base)
        LQLoRA(targets=targets, rank=2, iterations=4, heads=None).apply(net)
        if budget is None:
            quantise(net, GRID[1], targets=targets if name == "llama" else "*.c_attn")
        else:
            configurations = quantise_within(net, budget, configurations=GRID)
            assert set(configurations.values()) <= set(GRID)
        sizes = footprint(net)
        mean = 8 * (sizes["codes"] + sizes["constants"]) / sizes["parameters"]
        assert budget is None or mean <= budget
        found[budget or round(mean, 3)] = left_over(net, base)
    assert found[7.0] >= found[7.2]
    assert found[6.5] >= found[7.2] >= found[8.5]
    assert found[6.5] > found[8.5]
    net(**zoo.inputs(name)).logits.sum().backward()


def test_fisher_information_of_a_model_is_taken_and_used() -> None:
    pytest.importorskip("scipy")

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        return net(batch).square().mean()

    nets, batches = [One("conv1d"), One("conv1d")], [draw(1, 64, seed=n).float() * torch.arange(64) for n in range(6)]
    for net in nets:
        LQLoRA(targets="proj", rank=4, heads=None).apply(net)
    (f,) = fisher(nets[0], batches, loss).values()
    expected = torch.zeros(64, 40)
    for batch in batches:
        leaf = nets[0].proj.weight.detach().clone().requires_grad_()
        y = batch @ leaf + nets[0].proj.bias
        expected += torch.autograd.grad(y.square().mean(), leaf)[0].square() / 6
    torch.testing.assert_close(f, expected.T, rtol=1e-4, atol=1e-4)
    assert not nets[0].proj.weight.requires_grad
    quantise_within(nets[0], 8, configurations=GRID[1:2], fisher={id(nets[0].proj): f})
    quantise_within(nets[1], 8, configurations=GRID[1:2])
    lost = []
    for net in nets:
        adapter = net.get_submodule("proj.adapters.lqlora")
        gap = draw(40, 64).float() - net.proj.weight.T - adapter.scale * adapter.b @ adapter.a
        lost.append(float((f.sqrt() * gap).detach().norm()))
    assert lost[0] < 0.95 * lost[1]


def test_fisher_information_that_says_nothing() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    two = nn.ModuleDict({"a": One(), "b": One()})
    two.forward = lambda x: two["a"](x)  # type: ignore[method-assign, assignment]
    LQLoRA(targets="*proj", rank=2, heads=None).apply(two)
    with pytest.raises(QuantisationError, match=r"No batch gives \['b.proj'\]"):
        fisher(two, [draw(3, 64).float()], loss)
    with pytest.raises(QuantisationError, match="no batches"):
        fisher(two, [], loss)
    assert not any(m.proj.weight.requires_grad for m in two.values())  # type: ignore[union-attr]
    net = One()
    LQLoRA(targets="proj", rank=2, heads=None).apply(net)
    other = copy.deepcopy(net)
    with pytest.raises(QuantisationError, match="says nothing of .'proj'.*not on a copy"):
        quantise_within(net, 4.0, fisher=fisher(other, [draw(3, 64).float()], loss))


def test_what_a_budget_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    net = One()
    LoRA(targets="proj", heads=None).apply(net)
    with pytest.raises(QuantisationError, match="are for LQLoRA"):
        quantise_within(net, 4.0)
    tied_net = zoo.build("gemma")
    LQLoRA(targets="lm_head", heads=None).apply(tied_net)
    with pytest.raises(QuantisationError, match="(?s)cannot be quantised|to quantise"):
        quantise_within(tied_net, 4.0)
    net = One()
    LQLoRA(targets="proj", heads=None).apply(net)
    before = snapshot(net)
    with pytest.raises(QuantisationError, match="cannot be met"):
        quantise_within(net, 1.0, configurations=[*GRID, Quantisation("int2", 48)])
    assert differences(before, snapshot(net)) == []
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        quantise_within(net, 4.0, configurations=GRID)


@pytest.mark.filterwarnings(
    "ignore:.*shuffling enabled",
    "ignore:The dirpath has changed",
    "ignore:You're resuming from a checkpoint that ended before",
)
def test_qalora_in_a_trainer_over_integers(tmp_path: Path) -> None:
    def run(ckpt: Path | None = None) -> Boring:
        module, plugin = Boring(), NF4Precision(mode="int4", blocksize=8, compute_dtype="float32")
        keep = ModelCheckpoint(tmp_path / str(ckpt is None), "{step}", every_n_train_steps=2, save_top_k=-1)
        callbacks = [QALoRA(targets="q,v", rank=2, group=8), keep]
        fit = trainer(tmp_path, callbacks, max_steps=4, plugins=[plugin])
        fit.fit(module, data(), data(6), ckpt_path=ckpt, weights_only=None if ckpt is None else True)
        return module

    seed_everything(3)
    through = run()
    one, two = state.saved(through), state.saved(run(tmp_path / "True" / "step=2.ckpt"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    applied = state.get_applied(through)
    assert applied.method.merge(through).dtypes == ("int4",)
