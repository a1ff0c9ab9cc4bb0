"""Dense fp64 oracles, written from the papers' equations alone: outputs and gradients to 1e-9."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from harness import forward, perturb
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DynamicCache

from lightning_peft import (
    IA3,
    MAM,
    BitFit,
    Houlsby,
    LNTuning,
    LoRA,
    LoReFT,
    ParallelAdapter,
    PrefixTuning,
    PromptTuning,
)
from lightning_peft.callback import PEFT
from lightning_peft.core import state

Values = dict[str, Tensor]
HEADS, HIDDEN, KV_HEADS = zoo.HEADS, zoo.HIDDEN, 2
HEAD_DIM = HIDDEN // HEADS


def pair(model: str, method: PEFT) -> tuple[nn.Module, nn.Module, Values]:
    """The adapted model and its base in fp64, and copies of the trained values as leaves for the oracle."""
    base, net = zoo.build(model).double(), zoo.build(model).double()
    method.apply(net)
    perturb(net, scale=0.3)
    values = {n: p.detach().clone().requires_grad_() for n, p in state.trainable(net).items()}
    for p in base.parameters():
        p.requires_grad_(False)
    return net, base, values


def compare(net: nn.Module, got: Tensor, values: Values, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Outputs, then the gradients of one random linear function of them."""
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    goal = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=got.dtype)
    (got * goal).sum().backward()
    (expected * goal).sum().backward()
    parameters = dict(net.named_parameters())
    assert any(v.grad is not None and v.grad.abs().sum() > 0 for v in values.values())
    for name, value in values.items():
        assert parameters[name].grad is not None, name
        mine = torch.zeros_like(value) if value.grad is None else value.grad
        say = f"the gradient of {name}: "
        torch.testing.assert_close(parameters[name].grad, mine, atol=tolerance, rtol=tolerance, msg=say.__add__)


def inputs(model: str) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in zoo.inputs(model).items()}


def run(base: nn.Module, overrides: Values, model: str) -> Tensor:
    out = functional_call(base, overrides, kwargs=inputs(model))
    return out if isinstance(out, Tensor) else out.logits


# ------------------------------------------------------------------ where a projection's numbers lie in the base
def slot(base: nn.Module, place: str) -> tuple[str, str, slice, bool]:
    """Names of weight and bias, rows of the output features, whether the weight is stored (in, out)."""
    modules = dict(base.named_modules())
    if place in modules:
        return f"{place}.weight", f"{place}.bias", slice(None), type(modules[place]).__name__ == "Conv1D"
    parent, _, part = place.rpartition(".")
    if isinstance(modules[parent], nn.MultiheadAttention):
        rows = slice("qkvo".index(part) * HIDDEN, ("qkvo".index(part) + 1) * HIDDEN)
        packed = (f"{parent}.in_proj_weight", f"{parent}.in_proj_bias", rows, False)
        return (f"{parent}.out_proj.weight", f"{parent}.out_proj.bias", slice(None), False) if part == "o" else packed
    index = "qkv".index(part)  # GPT-2's c_attn
    return f"{parent}.weight", f"{parent}.bias", slice(index * HIDDEN, (index + 1) * HIDDEN), True


def changed(weight: Tensor, rows: slice, transposed: bool, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight with `change` made to its rows, seen as (out, in)."""
    dense = weight.T if transposed else weight
    out = dense.clone()
    out[rows] = change(dense[rows])
    return out.T if transposed else out


Change = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]


def dense(base: nn.Module, values: Values, tensor: str, change: Change) -> Values:
    """Overrides for the base: `change(place, weight (out, in), bias)` at each place that has an adapter with `tensor`."""
    parameters = dict(base.named_parameters())
    overrides: Values = {n: v for n, v in values.items() if n in parameters}
    for key in values:
        place, found, name = key.partition(".adapters.")
        if not found or not name.endswith(f".{tensor}"):
            continue
        weight_name, bias_name, rows, transposed = slot(base, place)
        weight = overrides.get(weight_name, parameters[weight_name])
        bias = overrides.get(bias_name, parameters.get(bias_name))
        old = (weight.T if transposed else weight)[rows], torch.zeros(0) if bias is None else bias[rows]
        new_weight, new_bias = change(place, *old)
        overrides[weight_name] = changed(weight, rows, transposed, lambda _, new=new_weight: new)
        if bias is not None:
            overrides[bias_name] = changed(bias[:, None], rows, False, lambda _, new=new_bias: new[:, None])[:, 0]
    return overrides


# ------------------------------------------------------------------ LoRA
ROLE = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "query": "q", "key": "k", "value": "v"}


@pytest.mark.parametrize("model", ["bert", "gpt2", "llama", "t5", "encoder", "vit"])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora(model: str, rslora: bool) -> None:
    """y = (W + alpha / rank B A) x, sqrt(rank) for rsLoRA, with ranks and alphas of their own for some roles."""
    down = "linear2" if model == "encoder" else "down"
    method = LoRA(
        targets=f"q,k,v,o,{down}",
        rank=3,
        alpha=5.0,
        ranks={"v": 2, "q": 4},
        alphas={"q": 7.0},
        rslora=rslora,
        dtype="float64",
    )
    net, base, values = pair(model, method)
    ranks, alphas = {"q": 4, "v": 2}, {"q": 7.0}

    def change(place: str, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        a, b = values[f"{place}.adapters.lora.a"], values[f"{place}.adapters.lora.b"]
        leaf = place.rpartition(".")[2]
        role = ROLE.get(leaf, leaf)
        rank = ranks.get(role, 3)
        assert a.shape == (rank, weight.shape[1])
        assert b.shape == (weight.shape[0], rank)
        scale = alphas.get(role, 5.0) / (math.sqrt(rank) if rslora else rank)
        return weight + scale * b @ a, bias

    compare(net, forward(net, model), values, run(base, dense(base, values, "a", change), model))


@pytest.mark.parametrize("model", ["bert", "gpt2", "encoder"])
def test_lora_bias_and_the_biases_of_the_base(model: str) -> None:
    """y = (W + s B A) x + b + s c, with b trained as well."""
    net, base, values = pair(model, LoRA(rank=2, alpha=6.0, lora_bias=True, bias="adapted", dtype="float64"))
    adapted = [n for n in values if n.endswith("bias") and ".adapters." not in n and "classifier" not in n]
    assert len(adapted) == (4 if model == "bert" else 2)

    def change(place: str, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = (values[f"{place}.adapters.lora.{name}"] for name in "abc")
        return weight + 3.0 * b @ a, bias + 3.0 * c

    got, expected = forward(net, model), run(base, dense(base, values, "a", change), model)
    if model == "bert":
        compare(net, got, values, expected)
        return
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
    selected = {s.attribute: s for s in state.get_applied(net).selected if not s.head}
    (mask,) = {tuple(s.mask.tolist()) for s in selected.values()}
    assert mask == (True,) * HIDDEN + (False,) * HIDDEN + (True,) * HIDDEN  # q and v of the packed bias, not k


def test_lora_dropout_acts_on_the_adapters_input() -> None:
    """y = W x + s B A (x * m / (1 - p)), m drawn once a call; none in eval mode."""
    net = nn.Sequential(nn.Linear(6, 5)).double()
    LoRA(targets="0", rank=2, alpha=3.0, dropout=0.4, dtype="float64").apply(net)
    perturb(net, scale=0.5)
    adapter = state.get_applied(net).placements[0].adapter
    x = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net.train()
    torch.manual_seed(11)
    y = net(x)
    torch.manual_seed(11)
    mask = F.dropout(torch.ones_like(x), 0.4)
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.6}
    plain = F.linear(x, net[0].weight, net[0].bias)
    torch.testing.assert_close(y, plain + 1.5 * (x * mask) @ adapter.a.T @ adapter.b.T, atol=1e-12, rtol=1e-12)
    net.eval()
    torch.testing.assert_close(net(x), plain + 1.5 * x @ adapter.a.T @ adapter.b.T, atol=1e-12, rtol=1e-12)


# ------------------------------------------------------------------ (IA)^3
@pytest.mark.parametrize("model", ["bert", "gpt2", "llama", "t5", "encoder", "vit"])
def test_ia3(model: str) -> None:
    """k and v: rows of W and entries of b times l; down: columns of W times l, b as it is."""
    net, base, values = pair(model, IA3(dtype="float64"))
    downs = 0

    def change(place: str, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal downs
        l = values[f"{place}.adapters.ia3.l"]
        is_down = any(
            word in place for word in ("output.dense", "mlp.c_proj", "down_proj", ".wo", "linear2", "mlp.fc2")
        )
        downs += is_down
        if is_down:
            assert l.shape == weight.shape[1:]
            return weight * l, bias
        return weight * l[:, None], bias * l if len(bias) else bias

    expected = run(base, dense(base, values, "l", change), model)
    assert downs == (5 if model == "t5" else 2)
    widths = {n: v.shape[0] for n, v in values.items() if n.endswith("ia3.l")}
    if model == "llama":  # two key/value heads of four
        assert sorted(widths.values()) == sorted([KV_HEADS * HEAD_DIM] * 4 + [zoo.INNER] * 2)
    assert len(widths) == (2 * (2 + 2 * 3) + 5 if model == "t5" else 6)
    compare(net, forward(net, model), values, expected)


# ------------------------------------------------------------------ biases and norms
@pytest.mark.parametrize("model", ["bert", "gpt2", "llama", "t5", "encoder", "vit", "mlp"])
def test_bitfit(model: str) -> None:
    """y = W x + b: every b trains, and a projection without one gets one."""
    net, base, values = pair(model, BitFit(dtype="float64", heads=None))
    own = {n for n, _ in base.named_parameters() if n.endswith("bias")}
    assert {n for n in values if ".adapters." not in n} == own
    made = {n.partition(".adapters.")[0] for n in values if ".adapters." in n}
    assert len(made) == {"llama": 14, "t5": 2 * 6 + 3 * 10, "mlp": 1}.get(model, 0)
    for place in made:
        linear = base.get_submodule(place)
        assert linear.bias is None
        linear.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=torch.float64))
    overrides = {f"{n.partition('.adapters.')[0]}.bias" if ".adapters." in n else n: v for n, v in values.items()}
    compare(net, forward(net, model), values, run(base, overrides, model))


@pytest.mark.parametrize("model", ["bert", "gpt2", "llama", "t5", "encoder", "vit"])
def test_ln_tuning(model: str) -> None:
    """y = g (x - mean) / std + b: g and b of every norm train, and nothing else."""
    net, base, values = pair(model, LNTuning(heads=None))
    norms = {n for n, m in base.named_modules() if "norm" in type(m).__name__.lower()}
    assert set(values) == {n for n, _ in base.named_parameters() if n.rpartition(".")[0] in norms}
    compare(net, forward(net, model), values, run(base, values, model))


# ------------------------------------------------------------------ bottlenecks, by hand
def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, visible: Tensor, kv_heads: int | None = None, scale: float | None = None,
              bias: Tensor | float = 0.0) -> Tensor:  # fmt: skip
    """softmax(q k^T scale + bias) v over the visible keys; q (B, t, H d), k and v (B, s, Hkv d), visible (B, 1, t, s)."""
    kv_heads = kv_heads or heads
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = (x.unflatten(-1, (kv_heads, -1)).transpose(1, 2).repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def linear(m: Any, x: Tensor) -> Tensor:
    return x @ m.weight.T + (0 if m.bias is None else m.bias)


def norm(m: Any, x: Tensor) -> Tensor:
    if getattr(m, "bias", None) is None:
        return m(x)  # transformers computes RMS norms in fp32, whatever it is given
    x = x - x.mean(-1, keepdim=True)
    return m.weight * x / (x.pow(2).mean(-1, keepdim=True) + m.eps).sqrt() + m.bias


def bottleneck(values: Values, place: str, u: Tensor, phi: Callable[[Tensor], Tensor]) -> Tensor:
    """W_up phi(W_dn u + b_dn) + b_up"""
    down, down_bias, up, up_bias = (values[f"{place}.{name}"] for name in ("down", "down_bias", "up", "up_bias"))
    return phi(u @ down.T + down_bias) @ up.T + up_bias


Edit = Callable[[str, Tensor], Tensor]  # (place, what the projection gave) -> the same with an adapter


def bert_by_hand(base: Any, call: dict[str, Tensor], after: Edit | None = None, beside: Edit | None = None,
                 prefixes: Values | None = None) -> Tensor:  # fmt: skip
    """a = LN1(x + A(o)), y = LN2(a + A(f) + s D(a)): post-norm blocks, then the classifier on the pooled first token."""
    after, beside = after or (lambda place, h: h), beside or (lambda place, u: 0 * u)
    x = base.bert.embeddings(call["input_ids"])
    visible = call["attention_mask"].bool()[:, None, None]
    for i, block in enumerate(base.bert.encoder.layer):
        at, here = block.attention.self, f"bert.encoder.layer.{i}"
        k, v, seen = with_prefix(
            prefixes, f"{here}.attention.self.attend", linear(at.key, x), linear(at.value, x), visible
        )
        o = linear(block.attention.output.dense, attention(linear(at.query, x), k, v, HEADS, seen))
        a = norm(block.attention.output.LayerNorm, x + after(f"{here}.attention.output.dense", o))
        f = linear(block.output.dense, F.gelu(linear(block.intermediate.dense, a)))
        x = norm(block.output.LayerNorm, a + after(f"{here}.output.dense", f) + beside(f"{here}.output.dense", a))
    return linear(base.classifier, torch.tanh(linear(base.bert.pooler.dense, x[:, 0])))


def with_prefix(
    prefixes: Values | None, place: str, k: Tensor, v: Tensor, visible: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[P_K; k], [P_V; v], and the prefix visible to every query; P (2, length, kv_heads, head_dim)."""
    if prefixes is None:
        return k, v, visible
    kv = prefixes[place].flatten(2)
    pk, pv = (p.expand(len(k), -1, -1) for p in kv)
    seen = torch.ones(*visible.shape[:-1], kv.shape[1], dtype=torch.bool)
    return torch.cat([pk, k], 1), torch.cat([pv, v], 1), torch.cat([seen, visible], -1)


def rotate(x: Tensor, theta: float, start: int = 0) -> Tensor:  # (batch, time, heads * HEAD_DIM)
    """Rotary positions: the halves of each head turned by position * theta^(-2i/d)."""
    x = x.unflatten(-1, (-1, HEAD_DIM))
    angle = torch.arange(start, start + x.shape[1])[:, None] * (
        1.0 / theta ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    )
    sin, cos = (
        f(angle.repeat(1, 2)).double()[:, None] for f in (torch.sin, torch.cos)
    )  # in fp32, as transformers does
    half = torch.cat([-x[..., HEAD_DIM // 2 :], x[..., : HEAD_DIM // 2]], -1)
    return (x * cos + half * sin).flatten(-2)


def llama_by_hand(base: Any, call: dict[str, Tensor], after: Edit | None = None, beside: Edit | None = None,
                  prefixes: Values | None = None) -> Tensor:  # fmt: skip
    """a = x + A(o), y = a + A(f) + s D(LN a): pre-norm blocks, two key/value heads, rotary positions, causal."""
    after, beside = after or (lambda place, h: h), beside or (lambda place, u: 0 * u)
    x = base.model.embed_tokens.weight[call["input_ids"]]
    time, theta = x.shape[1], base.config.rope_parameters["rope_theta"]
    visible = torch.ones(time, time, dtype=torch.bool).tril() & call["attention_mask"].bool()[:, None, None]
    for i, block in enumerate(base.model.layers):
        at, u, here = block.self_attn, norm(block.input_layernorm, x), f"model.layers.{i}"
        q, k = (rotate(linear(p, u), theta) for p in (at.q_proj, at.k_proj))
        k, v, seen = with_prefix(prefixes, f"{here}.self_attn.attend", k, linear(at.v_proj, u), visible)
        a = x + after(f"{here}.self_attn.o_proj", linear(at.o_proj, attention(q, k, v, HEADS, seen, KV_HEADS)))
        u = norm(block.post_attention_layernorm, a)
        f = linear(block.mlp.down_proj, F.silu(linear(block.mlp.gate_proj, u)) * linear(block.mlp.up_proj, u))
        x = a + after(f"{here}.mlp.down_proj", f) + beside(f"{here}.mlp.down_proj", u)
    return linear(base.lm_head, norm(base.model.norm, x))


def encoder_by_hand(base: Any, call: dict[str, Tensor], after: Edit | None = None, beside: Edit | None = None,
                    prefixes: Values | None = None) -> Tensor:  # fmt: skip
    """`nn.TransformerEncoderLayer`, post-norm, ReLU; averaged over the real tokens."""
    after, beside = after or (lambda place, h: h), beside or (lambda place, u: 0 * u)
    x, real = base.embed.weight[call["tokens"]], call["mask"]
    for i, block in enumerate(base.encoder.layers):
        at, here = block.self_attn, f"encoder.layers.{i}"
        q, k, v = (x @ at.in_proj_weight.T + at.in_proj_bias).chunk(3, -1)
        k, v, seen = with_prefix(prefixes, f"{here}.self_attn.attend", k, v, real.bool()[:, None, None])
        o = linear(at.out_proj, attention(q, k, v, HEADS, seen))
        a = norm(block.norm1, x + after(f"{here}.self_attn.o", o))
        f = linear(block.linear2, F.relu(linear(block.linear1, a)))
        x = norm(block.norm2, a + after(f"{here}.linear2", f) + beside(f"{here}.linear2", a))
    return linear(base.classifier, (x * real[..., None]).sum(1) / real.sum(1, keepdim=True))


BY_HAND: dict[str, Callable[..., Tensor]] = {"bert": bert_by_hand, "llama": llama_by_hand, "encoder": encoder_by_hand}


@pytest.mark.parametrize("model", list(BY_HAND))
def test_the_models_by_hand_are_the_models(model: str) -> None:
    base = zoo.build(model).double()
    torch.testing.assert_close(BY_HAND[model](base, inputs(model)), forward(base, model), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("model", list(BY_HAND))
def test_houlsby(model: str) -> None:
    """h + D(h) on what `o` and `down` give, before residual and norm."""
    net, base, values = pair(model, Houlsby(bottleneck=5, dtype="float64", heads=None))
    expected = BY_HAND[model](
        base, inputs(model), lambda place, h: h + bottleneck(values, f"{place}.adapters.houlsby", h, F.gelu)
    )
    assert len(values) == 4 * 4
    compare(net, forward(net, model), values, expected)


@pytest.mark.parametrize("model", list(BY_HAND))
@pytest.mark.parametrize("scale", [4.0, None])
def test_parallel_adapter(model: str, scale: float | None) -> None:
    """f + s D(u), u what the feed-forward layer reads: `a` in post-norm blocks, its norm in pre-norm ones."""
    net, base, values = pair(model, ParallelAdapter(bottleneck=5, scale=scale, dtype="float64", heads=None))

    def beside(place: str, u: Tensor) -> Tensor:
        gain = values[f"{place}.adapters.parallel.gain"] if scale is None else scale
        return gain * bottleneck(values, f"{place}.adapters.parallel", u, F.relu)

    compare(net, forward(net, model), values, BY_HAND[model](base, inputs(model), beside=beside))


# ------------------------------------------------------------------ prefixes
def prefixes_of(values: Values, label: str = "prefix_tuning") -> Values:
    return {n.removesuffix(f".adapters.{label}.kv"): v for n, v in values.items() if n.endswith(f".{label}.kv")}


@pytest.mark.parametrize("model", list(BY_HAND))
@pytest.mark.parametrize("masked", [True, False])
def test_prefix_tuning(model: str, masked: bool) -> None:
    net, base, values = pair(model, PrefixTuning(length=3, dtype="float64", heads=None))
    call = inputs(model)
    key = "mask" if model == "encoder" else "attention_mask"
    if not masked:
        call[key] = torch.ones_like(call[key])
    expected = BY_HAND[model](base, call, prefixes=prefixes_of(values))
    if not masked and model != "encoder":
        del call[key]  # transformers leaves the causal mask out then
    out = net(**call)
    compare(net, out if isinstance(out, Tensor) else out.logits, values, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_prefix_tuning_after_a_cache(implementation: str, cut: int) -> None:
    """The second part of a text, behind the cache of the first, sees the prefix once and itself causally."""
    base, net = zoo.build("llama").double(), zoo.build("llama").double()
    net.set_attn_implementation(implementation)
    PrefixTuning(length=3, dtype="float64").apply(net)
    prefixes = prefixes_of(state.trainable(net))
    ids = inputs("llama")["input_ids"]
    expected = llama_by_hand(base, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, prefixes=prefixes)
    cache = DynamicCache(config=net.config)
    first = net(ids[:, :cut], past_key_values=cache).logits
    assert cache.get_seq_length() == cut
    second = net(ids[:, cut:], past_key_values=cache).logits
    tolerance = 1e-9 if implementation == "sdpa" else 1e-6  # the eager one takes its softmax in fp32
    torch.testing.assert_close(torch.cat([first, second], 1), expected, atol=tolerance, rtol=tolerance)


def test_prefix_tuning_through_its_mlp() -> None:
    """[P_K; P_V] = U tanh(W E + b) + c, one W and E for all layers."""
    net, base, values = pair("bert", PrefixTuning(length=3, bottleneck=5, dtype="float64", heads=None))
    trunk = {n.rpartition(".")[2]: v for n, v in values.items() if ".trunk." in n}
    assert len([n for n in values if ".trunk." in n]) == 3
    z = torch.tanh(trunk["embedding"] @ trunk["weight"].T + trunk["bias"])
    prefixes = {}
    for i in range(2):
        place = f"bert.encoder.layer.{i}.attention.self.attend"
        u, c = (values[f"{place}.adapters.prefix_tuning.{n}"] for n in ("weight", "bias"))
        prefixes[place] = (z @ u.T + c).view(3, 2, HEADS, HEAD_DIM).transpose(0, 1)
    compare(net, forward(net, "bert"), values, bert_by_hand(base, inputs("bert"), prefixes=prefixes))


@pytest.mark.parametrize("masked", [True, False])
def test_prefix_tuning_in_t5(masked: bool) -> None:
    """Three kinds of attention: no scale, relative positions of the text only (zero for the prefix), no mask on it."""
    net, base, values = pair("t5", PrefixTuning(length=3, dtype="float64", heads=None))
    call, prefixes = inputs("t5"), prefixes_of(values)
    if not masked:
        call["attention_mask"] = torch.ones_like(call["attention_mask"])
    expected = t5_by_hand(base, call, prefixes)
    if not masked:
        del call["attention_mask"]
    assert len(prefixes) == 2 + 3 + 3
    compare(net, net(**call).logits, values, expected)


def t5_by_hand(base: Any, call: dict[str, Tensor], prefixes: Values | None = None) -> Tensor:
    def attend(m: Any, place: str, x: Tensor, source: Tensor, visible: Tensor, bias: Tensor | float) -> Tensor:
        k, v, seen = with_prefix(prefixes, f"{place}.attend", linear(m.k, source), linear(m.v, source), visible)
        wide = F.pad(bias, (k.shape[1] - source.shape[1], 0)) if isinstance(bias, Tensor) else bias
        return linear(m.o, attention(linear(m.q, x), k, v, HEADS, seen, scale=1.0, bias=wide))

    def feed_forward(layer: Any, x: Tensor) -> Tensor:
        f = layer.DenseReluDense
        return x + linear(f.wo, F.relu(linear(f.wi, norm(layer.layer_norm, x))))

    x, real = base.shared.weight[call["input_ids"]], call["attention_mask"].bool()[:, None, None]
    bias = base.encoder.block[0].layer[0].SelfAttention.compute_bias(x.shape[1], x.shape[1])
    for i, block in enumerate(base.encoder.block):
        u = norm(block.layer[0].layer_norm, x)
        x = x + attend(block.layer[0].SelfAttention, f"encoder.block.{i}.layer.0.SelfAttention", u, u, real, bias)
        x = feed_forward(block.layer[1], x)
    memory, y = norm(base.encoder.final_layer_norm, x), base.shared.weight[call["decoder_input_ids"]]
    time = y.shape[1]
    causal = torch.ones(time, time, dtype=torch.bool).tril()[None, None].expand(len(y), -1, -1, -1)
    bias = base.decoder.block[0].layer[0].SelfAttention.compute_bias(time, time)
    for i, block in enumerate(base.decoder.block):
        here = f"decoder.block.{i}.layer"
        u = norm(block.layer[0].layer_norm, y)
        y = y + attend(block.layer[0].SelfAttention, f"{here}.0.SelfAttention", u, u, causal, bias)
        u, seen = norm(block.layer[1].layer_norm, y), real.expand(-1, -1, time, -1)
        y = y + attend(block.layer[1].EncDecAttention, f"{here}.1.EncDecAttention", u, memory, seen, 0.0)
        y = feed_forward(block.layer[2], y)
    y = norm(base.decoder.final_layer_norm, y)
    return linear(base.lm_head, y * (HIDDEN**-0.5 if base.config.tie_word_embeddings else 1.0))


def test_t5_by_hand_is_t5() -> None:
    base = zoo.build("t5").double()
    torch.testing.assert_close(t5_by_hand(base, inputs("t5")), forward(base, "t5"), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("model", list(BY_HAND))
def test_mam(model: str) -> None:
    """Prefixes in attention and a scaled parallel adapter beside the feed-forward layer."""
    net, base, values = pair(model, MAM(length=3, bottleneck=5, scale=2.0, dtype="float64", heads=None))
    expected = BY_HAND[model](
        base,
        inputs(model),
        beside=lambda place, u: 2.0 * bottleneck(values, f"{place}.adapters.mam_parallel", u, F.relu),
        prefixes=prefixes_of(values, "mam_prefix_tuning"),
    )
    compare(net, forward(net, model), values, expected)


# ------------------------------------------------------------------ nn.MultiheadAttention, all its arguments
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "per head"])
@pytest.mark.parametrize("padded", [True, False])
def test_multihead_attention_written_out_is_the_fused_one(batch_first: bool, mask: str, padded: bool) -> None:
    """With adapters that change nothing yet, every option gives what torch gives, weights included."""
    torch.manual_seed(0)
    one = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=6, vdim=5).double().eval()
    torch.nn.init.normal_(one.in_proj_bias)
    net = nn.ModuleDict({"attention": one})
    q, k, v = (torch.randn(3, t, d, dtype=torch.float64) for t, d in ((4, 8), (5, 6), (5, 5)))
    hidden = torch.ones(4, 5, dtype=torch.bool).triu(2)
    attn_mask = {
        "none": None,
        "bool": hidden,
        "float": torch.zeros(4, 5, dtype=torch.float64).masked_fill(hidden, -math.inf),
        "per head": torch.randn(6, 4, 5, dtype=torch.float64),
    }[mask]
    padding = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool() if padded else None
    if padding is not None and attn_mask is not None and attn_mask.is_floating_point():
        padding = torch.zeros(3, 5, dtype=torch.float64).masked_fill(padding, -math.inf)
    args = [x if batch_first else x.transpose(0, 1) for x in (q, k, v)]
    calls = [{"need_weights": w, "average_attn_weights": a} for w, a in ((True, True), (True, False), (False, True))]
    expected = [one(*args, key_padding_mask=padding, attn_mask=attn_mask, **call) for call in calls]
    LoRA(targets="q,k,v,o", rank=2, heads=None, dtype="float64").apply(net)
    for call, (out, weights) in zip(calls, expected, strict=True):
        got, got_weights = one(*args, key_padding_mask=padding, attn_mask=attn_mask, **call)
        torch.testing.assert_close(got, out, atol=1e-12, rtol=1e-12)
        assert (got_weights is None) == (weights is None)
        if weights is not None:
            torch.testing.assert_close(got_weights, weights, atol=1e-12, rtol=1e-12)


def test_multihead_attention_without_a_batch() -> None:
    torch.manual_seed(0)
    one = nn.MultiheadAttention(8, 2).double().eval()
    x = torch.randn(4, 8, dtype=torch.float64)
    expected, weights = one(x, x, x, key_padding_mask=torch.tensor([0, 0, 0, 1]).bool())
    LoRA(targets="q,v", dtype="float64").apply(nn.ModuleDict({"attention": one}))
    out, got = one(x, x, x, key_padding_mask=torch.tensor([0, 0, 0, 1]).bool())
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got, weights, atol=1e-12, rtol=1e-12)


# ------------------------------------------------------------------ prompt tuning
def prompt_of(values: Values) -> Tensor:
    (tokens,) = values.values()
    return tokens


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("masked", [True, False])
def test_prompt_tuning_of_a_decoder(model: str, masked: bool) -> None:
    """x' = [P; Emb(x)], the mask one longer a token, logits of the text."""
    net, base, values = pair(model, PromptTuning(length=3, dtype="float64", heads=None))
    call = inputs(model)
    if not masked:
        del call["attention_mask"]
    embeds = base.get_input_embeddings()(call["input_ids"])
    longer = {"inputs_embeds": torch.cat([prompt_of(values).expand(2, -1, -1), embeds], 1)}
    if masked:
        longer["attention_mask"] = torch.cat([torch.ones(2, 3, dtype=torch.long), call["attention_mask"]], 1)
    labels = call["input_ids"].clone()
    expected = base(**longer, labels=torch.cat([torch.full((2, 3), -100), labels], 1))
    out = net(**call, labels=labels)
    assert out.logits.shape == (2, 7, zoo.VOCAB)
    first = F.cross_entropy(expected.logits[:, 2], labels[:, 0], reduction="sum")  # the last prompt token predicts it
    count = labels.numel()
    torch.testing.assert_close(out.loss * (count - 2), (expected.loss * count - first).float(), atol=1e-4, rtol=1e-5)
    compare(net, out.logits, values, expected.logits[:, 3:])


def test_prompt_tuning_of_an_encoder_pools_the_text() -> None:
    net, base, values = pair("bert", PromptTuning(length=3, dtype="float64", heads=None))
    call = inputs("bert")
    words = base.bert.embeddings.word_embeddings.weight[call["input_ids"]]
    embeds = torch.cat([prompt_of(values).expand(2, -1, -1), words], 1)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), call["attention_mask"]], 1)
    hidden = base.bert(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[:, 3:]
    expected = linear(base.classifier, torch.tanh(linear(base.bert.pooler.dense, hidden[:, 0])))
    compare(net, forward(net, "bert"), values, expected)


def test_prompt_tuning_of_an_encoder_decoder() -> None:
    """P is in the encoder; the decoder attends to it."""
    net, base, values = pair("t5", PromptTuning(length=3, dtype="float64", heads=None))
    call = inputs("t5")
    embeds = torch.cat([prompt_of(values).expand(2, -1, -1), base.shared.weight[call.pop("input_ids")]], 1)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), call.pop("attention_mask")], 1)
    expected = base(inputs_embeds=embeds, attention_mask=mask, **call).logits
    compare(net, forward(net, "t5"), values, expected)


def test_prompt_tuning_of_a_vision_transformer() -> None:
    """[x_cls; P; x] into the first block, and out again after the last."""
    net, base, values = pair("vit", PromptTuning(length=3, dtype="float64", heads=None))
    x = base.vit.embeddings(inputs("vit")["pixel_values"])
    x = torch.cat([x[:, :1], prompt_of(values).expand(2, -1, -1), x[:, 1:]], 1)
    layers = base.vit.layers if hasattr(base.vit, "layers") else base.vit.encoder.layer
    for layer in layers:
        x = layer(x)
    expected = linear(base.classifier, norm(base.vit.layernorm, torch.cat([x[:, :1], x[:, 4:]], 1))[:, 0])
    compare(net, forward(net, "vit"), values, expected)


def test_prompt_tuning_around_torchs_encoder() -> None:
    net, base, values = pair("encoder", PromptTuning(length=3, dtype="float64", heads=None))
    call = inputs("encoder")
    x = torch.cat([prompt_of(values).expand(2, -1, -1), base.embed(call["tokens"])], 1)
    hidden = torch.cat([torch.zeros(2, 3, dtype=torch.bool), call["mask"] == 0], 1)
    y = base.encoder(x, src_key_padding_mask=hidden)[:, 3:]
    mask = call["mask"]
    expected = linear(base.classifier, (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    compare(net, forward(net, "encoder"), values, expected)


# ------------------------------------------------------------------ LoReFT
BLOCKS = {"bert": "bert.encoder.layer", "llama": "model.layers", "gpt2": "transformer.h", "encoder": "encoder.layers"}


def gram_schmidt(r: Tensor) -> Tensor:
    """Orthonormal rows with the span and the directions of the rows of r: what a QR decomposition gives, signs fixed."""
    rows: list[Tensor] = []
    for row in r:
        for done in rows:
            row = row - (row @ done) * done  # noqa: PLW2901
        rows.append(row / row.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("model", list(BLOCKS))
@pytest.mark.parametrize("tied", [True, False])
def test_loreft(model: str, tied: bool) -> None:
    """h + R^T (W h + b - R h) on block outputs at the first 2 and last 3 real tokens, at most half of them each."""
    method = LoReFT(rank=3, first=2, last=3, tied=tied, dtype="float64", heads=None)
    net, base, values = pair(model, method)
    call = inputs(model)
    mask = call["mask" if model == "encoder" else "attention_mask"]
    assert mask.sum(1).tolist() == [7, 5]
    first, last = torch.zeros(2, 7, dtype=torch.float64), torch.zeros(2, 7, dtype=torch.float64)
    first[:, :2] = 1
    last[0, 4:7], last[1, 3:5] = 1, 1  # of seven tokens three, of five two

    def edit(block: str, h: Tensor, name: str) -> Tensor:
        r, w, b = (values[f"{block}.adapters.loreft.{name}.{n}"] for n in "rwb")
        r = gram_schmidt(r)
        torch.testing.assert_close(r @ r.T, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)
        return (h @ w.T + b - h @ r.T) @ r

    def hook(block: str) -> Callable[..., Any]:
        def edited(_: nn.Module, __: Any, out: Any) -> Any:
            h = out[0] if isinstance(out, tuple) else out
            at_last = edit(block, h, "edit" if tied else "edit_last")
            h = h + first[..., None] * edit(block, h, "edit") + last[..., None] * at_last
            return (h, *out[1:]) if isinstance(out, tuple) else h

        return edited

    for i in range(2):
        base.get_submodule(f"{BLOCKS[model]}.{i}").register_forward_hook(hook(f"{BLOCKS[model]}.{i}"))
    compare(net, forward(net, model), values, forward(base, model), tolerance=1e-11)


def test_loreft_edits_the_prompt_before_the_first_label() -> None:
    net, base, values = pair("llama", LoReFT(rank=2, first=1, last=1, dtype="float64", heads=None))
    call = inputs("llama")
    labels = call["input_ids"].clone()
    labels[0, :4], labels[1, :3] = -100, -100
    where = torch.zeros(2, 7, 1, dtype=torch.float64)
    where[0, [0, 3]], where[1, [0, 2]] = 1, 1

    def hook(block: str) -> Callable[..., Any]:
        r, w, b = (values[f"{block}.adapters.loreft.edit.{n}"] for n in "rwb")
        return lambda _, __, h: h + where * ((h @ w.T + b - h @ gram_schmidt(r).T) @ gram_schmidt(r))

    for i in range(2):
        base.model.layers[i].register_forward_hook(hook(f"model.layers.{i}"))
    compare(net, net(**call, labels=labels).logits, values, forward(base, "llama"))


def test_loreft_identity_starts_at_the_base() -> None:
    base, net = zoo.build("llama").double(), zoo.build("llama").double()
    LoReFT(rank=3, identity=True, dtype="float64").apply(net)
    torch.testing.assert_close(forward(net, "llama"), forward(base, "llama"), atol=1e-6, rtol=1e-6)
