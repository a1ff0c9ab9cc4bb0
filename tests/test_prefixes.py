"""Prompts inside attention: LLaMA-Adapter, prefix tuning, P-Tuning v2; and prompts of all kinds where texts are odd."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import boring
import pytest
import torch
import transformers as hf
import zoo
from harness import differences, forward, loss, output, perturb, snapshot, train
from lightning.pytorch.callbacks import ModelCheckpoint
from settings import adapted, make
from test_counts import fresh
from test_generation import fresh as generator
from test_generation import generate, ready, text
from test_oracles import HEAD_DIM, compare, inputs, pair, rotate
from torch import Tensor, nn
from torch.func import functional_call

from lightning_peft import (
    LlamaAdapter,
    LlamaAdapterV2,
    LoRA,
    PrefixTuning,
    PTuningV2,
    load_adapter,
    materialize,
    save_adapter,
)
from lightning_peft.core import state
from lightning_peft.core.adapter import adapters_of
from lightning_peft.core.fields import FieldError
from lightning_peft.core.files import read_tensors
from lightning_peft.core.sites import TargetError

# ------------------------------------------------------------------ LLaMA-Adapter
ATTENTION = {
    "bert": "bert.encoder.layer.{}.attention.self",
    "gpt2": "transformer.h.{}.attn",
    "llama": "model.layers.{}.self_attn",
    "encoder": "encoder.layers.{}.self_attn",
}


def projections(m: Any, model: str) -> list[tuple[Tensor, Tensor | float]]:
    """W (d_out, d_in) and b of q, k, v."""
    if model == "gpt2":
        return list(zip(m.c_attn.weight.T.chunk(3), m.c_attn.bias.chunk(3), strict=True))
    if model == "encoder":
        return list(zip(m.in_proj_weight.chunk(3), m.in_proj_bias.chunk(3), strict=True))
    names = ("query", "key", "value") if model == "bert" else ("q_proj", "k_proj", "v_proj")
    return [(at.weight, 0.0 if at.bias is None else at.bias) for at in (getattr(m, n) for n in names)]


def second_softmax(m: Any, model: str, x: Tensor, prompt: Tensor, gate: Tensor) -> Tensor:
    """gate softmax(q K_p^T / sqrt(d_h)) V_p before the output projection; (batch, time, heads * d_h)."""
    (wq, bq), (wk, bk), (wv, bv) = projections(m, model)
    q, k, v = x @ wq.T + bq, prompt @ wk.T + bk, prompt @ wv.T + bv
    if model == "llama":
        q = rotate(q, 10000.0)  # the queries are turned, the keys of the prompt are not
    q, k, v = (y.unflatten(-1, (-1, HEAD_DIM)) for y in (q, k, v))
    heads = []
    for h in range(q.shape[-2]):
        of = h // (q.shape[-2] // k.shape[-2])
        weights = (q[..., h, :] @ k[:, of].T / math.sqrt(HEAD_DIM)).softmax(-1)
        heads.append(gate[min(h, len(gate) - 1)] * (weights @ v[:, of]))
    return torch.cat(heads, -1)


def beside(model: str, at: str, base: nn.Module, prompt: Tensor, gate: Tensor) -> Callable[..., Any]:
    """A hook on the attention module that adds W_o of the second softmax to what it returns."""
    m: Any = base.get_submodule(at)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        more = second_softmax(m, model, x, prompt, gate)
        if model != "bert":  # whose output projection lies outside
            weight = {"gpt2": "c_proj", "llama": "o_proj", "encoder": "out_proj"}[model]
            weight = getattr(m, weight).weight
            more = more @ (weight if model == "gpt2" else weight.T)
        return (out[0] + more, *out[1:])

    return hook


@pytest.mark.parametrize("model", list(ATTENTION))
@pytest.mark.parametrize("variant", ["paper", "peft"])
def test_llama_adapter(model: str, variant: str) -> None:
    """Packed slices, grouped queries, biases: W_o once, and the biases of W_k and W_v on the prompt."""
    more: dict[str, Any] = {} if variant == "paper" else {"gate": "layer", "tanh": False}
    net, base, values = pair(model, LlamaAdapter(length=5, dtype="float64", heads=None, **more))
    assert len(values) == 4
    for i in range(2):
        at = ATTENTION[model].format(i)
        prompt, gate = (values[f"{at}.attend.adapters.llama_adapter.{n}"] for n in ("prompt", "gate"))
        assert gate.shape == ((4,) if variant == "paper" else (1,))
        gate = torch.tanh(gate) if variant == "paper" else gate
        base.get_submodule(at).register_forward_hook(beside(model, at, base, prompt, gate), with_kwargs=True)
    for p in base.parameters():
        p.requires_grad_(model == "encoder")  # or torch's fused layer goes past the hooks
    compare(net, forward(net, model), values, forward(base, model), tolerance=1e-10)


def test_llama_adapter_in_t5_has_no_scale() -> None:
    """T5 attends without 1 / sqrt(d_h), and its bias on positions is none of the prompt's."""
    net, base, values = pair("t5", LlamaAdapter(length=2, exclude="encoder*", dtype="float64"))
    for i in range(3):
        at: Any = base.get_submodule(f"decoder.block.{i}.layer.0.SelfAttention")
        prompt, gate = (values[f"decoder.block.{i}.layer.0.SelfAttention.attend.adapters.llama_adapter.{n}"]
                        for n in ("prompt", "gate"))  # fmt: skip

        def hook(m: Any, args: Any, kwargs: Any, out: Any, prompt: Tensor = prompt, gate: Tensor = gate) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            q, k, v = (y.unflatten(-1, (4, -1)) for y in (m.q(x), m.k(prompt), m.v(prompt)))
            weights = torch.einsum("bthd,khd->bhtk", q, k).softmax(-1)
            more = torch.einsum("bhtk,khd->bthd", weights, v) * torch.tanh(gate)[:, None]
            return (out[0] + m.o(more.flatten(2)), *out[1:])

        at.register_forward_hook(hook, with_kwargs=True)
    compare(net, forward(net, "t5"), values, forward(base, "t5"), tolerance=1e-10)


@pytest.mark.parametrize("norm", ["per head", "whole"])
def test_llama_adapter_normalises_its_keys_where_the_layer_does(norm: str) -> None:
    common = {**zoo.TEXT, "num_key_value_heads": 2, "head_dim": 8}
    net: Any = {
        "per head": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**common)),
        "whole": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**common)),
    }[norm]().eval()
    LlamaAdapter(length=3, heads=None).apply(net)
    perturb(net, scale=0.5)
    at = net.model.layers[0].self_attn
    torch.nn.init.normal_(at.k_norm.weight)
    adapter: Any = adapters_of(at.attend)[0]
    query = torch.randn(1, 4, 2, 8)
    k, v = adapter.prompt @ at.k_proj.weight.T, adapter.prompt @ at.v_proj.weight.T
    k = at.k_norm(k).unflatten(-1, (2, 8)) if norm == "whole" else at.k_norm(k.unflatten(-1, (2, 8)))
    k, v = (x.repeat_interleave(2, 1) for x in (k, v.unflatten(-1, (2, 8))))
    weights = (torch.einsum("bhtd,khd->bhtk", query, k) / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(adapter.seen(query, None), torch.einsum("bhtk,khd->bhtd", weights, v))


def test_llama_adapter_agrees_with_pefts_adaption_prompt() -> None:
    """peft has one gate a layer, without tanh: the variant gate="layer", tanh=False."""
    peft = pytest.importorskip("peft")
    net, theirs = zoo.build("llama"), zoo.build("llama")
    LlamaAdapter(length=4, layers="last:1", gate="layer", tanh=False).apply(net)
    perturb(net, scale=0.5)
    theirs = peft.get_peft_model(
        theirs, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1)
    )
    mine = {n.rpartition(".")[2]: p for n, p in net.named_parameters() if p.requires_grad}
    other = {n.rpartition(".")[2]: p for n, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        other["adaption_prompt"].copy_(mine["prompt"])
        other["adaption_gate"].copy_(mine["gate"])
    call = inputs("llama")
    a, b = net(**call).logits, theirs(**call).logits
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    a.pow(2).sum().backward()
    b.pow(2).sum().backward()
    torch.testing.assert_close(mine["prompt"].grad, other["adaption_prompt"].grad[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mine["gate"].grad, other["adaption_gate"].grad, atol=1e-6, rtol=1e-6)


def test_below_the_first_adapted_layer_nothing_is_kept_for_the_backward_pass() -> None:
    net = zoo.build("llama")
    LlamaAdapter(length=3, layers="last:1").apply(net)
    seen = {}
    for i, block in enumerate(net.model.layers):
        block.register_forward_hook(lambda _, __, out, i=i: seen.update({i: out.requires_grad}))
    forward(net, "llama")
    assert seen == {0: False, 1: True}


def test_llama_adapter_leaves_the_cache_alone() -> None:
    net, ids = ready("llama_adapter", "llama"), text(5)
    cache = hf.DynamicCache(config=net.config)
    net(ids, past_key_values=cache)
    assert cache.get_seq_length() == 5
    assert all(layer.keys.shape == (1, 2, 5, HEAD_DIM) for layer in cache.layers)


def test_llama_adapter_counts() -> None:
    """7B: K L_a d + L_a H."""
    net = LlamaAdapter(length=10, layers="last:30", heads=None).apply(fresh("llama-7b"))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 1_228_800 + 960
    net = LlamaAdapterV2(prompts="last:30", heads=None).apply(fresh("llama-7b"))
    linear = 32 * 2 * (4 * 4096 + 2 * 11008 + 4096)
    assert state.describe(net)["trainable"] == linear + 266_240 + 1_228_800 + 960


def test_llama_adapter_needs_key_and_value_projections() -> None:
    config = hf.DeepseekV3Config(
        **{**zoo.TEXT, "first_k_dense_replace": 2}, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=8, n_routed_experts=4, num_key_value_heads=4,
    )  # fmt: skip
    net = hf.DeepseekV3ForCausalLM(config)
    with pytest.raises(TargetError, match="are not known as two projections"):
        LlamaAdapter(roles={"attend": "*.self_attn"}).apply(net)


@pytest.mark.parametrize("name", ["llama_adapter", "prefix_tuning"])
def test_a_place_that_is_no_attention(name: str) -> None:
    with pytest.raises(TargetError, match="inside attention, and 'model.layers.0.self_attn.q_proj'"):
        make(name, "llama", targets="q").apply(zoo.build("llama"))


def test_llama_adapter_reads_the_keys_through_another_method() -> None:
    """LoRA on k and v changes what the prompt is, as it does for the text."""
    net = zoo.build("llama")
    LoRA(targets="k,v", rank=2).apply(net)
    LlamaAdapter(length=3).apply(net)
    perturb(net, scale=0.5)
    before = output(net, "llama")
    LoRA(targets="k,v", rank=2).merge(net, "lora")
    torch.testing.assert_close(output(net, "llama"), before, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ LLaMA-Adapter v2
def test_llama_adapter_v2() -> None:
    """s (W x + b) at each linear layer, biases of W_k and W_v on the prompt as well; prompts in the top layer."""
    net, base, values = pair("llama", LlamaAdapterV2(length=5, prompts="last:1", dtype="float64", heads=None))
    own = {n: v for n, v in values.items() if ".adapters." not in n}
    assert set(own) == {n for n, _ in base.named_parameters() if "norm" in n}
    label = "adapters.llama_adapter_v2_llama_adapter_v2"
    for n, m in base.named_modules():
        if f"{n}.{label}.scale" in values:
            s, b = values[f"{n}.{label}.scale"], values[f"{n}.{label}.bias"]
            m.register_forward_hook(lambda _, __, y, s=s, b=b: s * (y + b))
    prompts = [n for n in values if n.endswith("prompt")]
    assert prompts == [f"model.layers.1.self_attn.attend.{label}.prompt"]
    prompt, gate = values[prompts[0]], values[prompts[0].replace("prompt", "gate")]
    at: Any = base.model.layers[1].self_attn

    def add(_: nn.Module, args: Any) -> Any:
        x = seen["x"]
        q = rotate(at.q_proj(x), 10000.0).unflatten(-1, (-1, HEAD_DIM))
        k, v = (p(prompt).unflatten(-1, (-1, HEAD_DIM)).repeat_interleave(2, 1) for p in (at.k_proj, at.v_proj))
        weights = (torch.einsum("bthd,khd->bhtk", q, k) / math.sqrt(HEAD_DIM)).softmax(-1)
        return args[0] + (torch.einsum("bhtk,khd->bthd", weights, v) * torch.tanh(gate)[:, None]).flatten(2)

    seen: dict[str, Tensor] = {}
    at.register_forward_pre_hook(lambda _, __, kw: seen.update(x=kw["hidden_states"]), with_kwargs=True)
    at.o_proj.register_forward_pre_hook(add)
    expected = functional_call(base, own, kwargs=inputs("llama")).logits
    compare(net, forward(net, "llama"), values, expected, tolerance=1e-10)


def test_llama_adapter_v2_leaves_a_teacher_alone() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = zoo.build("llama"), zoo.build("llama").requires_grad_(False)

    net = LlamaAdapterV2(length=2, layers="last:1", norms=False).apply(Pair())
    found = state.get_applied(net).placements
    assert {x.site.partition(".")[0] for x in found} == {"student"}
    assert [x.site for x in found if x.role == "attend"] == ["student.model.layers.1.self_attn"]


def test_llama_adapter_v2_prompts_at_both_ends() -> None:
    net = zoo.build("t5")
    LlamaAdapterV2(length=2, prompts="last:1", early=1, norms=False).apply(net)
    prompted = {x.site for x in state.get_applied(net).placements if x.role == "attend"}
    assert prompted == {f"{s}.block.{i}.layer.0.SelfAttention" for s, i in
                        (("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 2))}  # fmt: skip
    assert not any(p.requires_grad for n, p in net.named_parameters() if "layer_norm" in n)


# ------------------------------------------------------------------ prefix tuning
TEXT_IDS = [5, 17, 9, 40]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_prefix_from_a_real_text_with_shifted_positions_is_that_text(model: str) -> None:
    """What a causal model says behind the text: keys and values of every layer, and the positions after it."""
    base, net, ids = zoo.build(model), zoo.build(model), text(6, batch=2)
    PrefixTuning(length=4, init="text", text=TEXT_IDS, shift_positions=True).apply(net)
    whole = torch.cat([torch.tensor([TEXT_IDS]).expand(2, -1), ids], 1)
    expected = base(whole).logits[:, 4:]
    torch.testing.assert_close(net(ids).logits, expected, atol=1e-5, rtol=1e-5)
    fed = base.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=4, do_sample=False)
    got = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert torch.equal(got[:, 6:], fed[:, 10:])


def test_a_real_text_in_an_encoder_decoder_and_in_a_training_module() -> None:
    """Three kinds: of the encoder, of the decoder, and of its look at the encoder, whose keys are of the text, too."""
    net = zoo.build("t5").train()
    before = [m.training for m in net.modules()]
    PrefixTuning(length=4, init="text", text=TEXT_IDS).apply(net)
    assert [m.training for m in zoo.build("t5").train().modules()] == before
    assert all(m.training for m in net.modules())
    base, ids = zoo.build("t5"), torch.tensor([TEXT_IDS])
    cache = base(input_ids=ids, decoder_input_ids=ids, use_cache=True).past_key_values
    kept = {"decoder": cache.self_attention_cache, "cross": cache.cross_attention_cache}
    kinds = []
    for x in state.get_applied(net).placements:
        kind = "cross" if x.role == "cross.attend" else x.site.partition(".")[0]
        kinds.append(kind)
        if kind in kept:
            layer = kept[kind].layers[kinds.count(kind) - 1]
            torch.testing.assert_close(x.adapter.kv.transpose(1, 2), torch.cat([layer.keys, layer.values]))
    assert [kinds.count(kind) for kind in ("encoder", "decoder", "cross")] == [2, 3, 3]
    trunk = zoo.build("t5")
    PrefixTuning(length=4, bottleneck=5).apply(trunk)
    assert len([n for n, _ in trunk.named_parameters() if n.endswith("trunk.embedding")]) == 3


def test_a_file_of_a_prefix_from_text_does_not_run_the_text_again(tmp_path: Path) -> None:
    net = zoo.build("llama")
    PrefixTuning(length=4, init="text", text=TEXT_IDS).apply(net)
    train(net, "llama", steps=1)
    save_adapter(net, tmp_path / "a")
    other = zoo.build("llama")
    assert load_adapter(other, tmp_path / "a").init == "normal"
    assert torch.equal(output(other, "llama"), output(net, "llama"))


@pytest.mark.parametrize("fields", [{"init": "text"}, {"text": TEXT_IDS}, {"init": "text", "text": TEXT_IDS},
                                    {"init": "text", "text": TEXT_IDS, "length": 4, "bottleneck": 3}])  # fmt: skip
def test_a_text_as_long_as_the_prefix_and_no_mlp(fields: dict[str, Any]) -> None:
    with pytest.raises(FieldError, match="as many ids as the prefix is long, and no MLP"):
        PrefixTuning(**fields)


def test_where_no_text_goes_in() -> None:
    method = PrefixTuning(length=4, init="text", text=TEXT_IDS)
    with pytest.raises(TargetError, match="nothing around .* takes `input_ids`"):
        method.apply(zoo.build("vit"))
    with pytest.raises(TargetError, match="a text in Idle does not pass Attend"):
        method.apply(Idle())
    net = zoo.build("llama")
    before = snapshot(net)
    with pytest.raises(TargetError, match="the token id 100 is not among the 100 rows"):
        PrefixTuning(length=2, init="text", text=[7, 100]).apply(net)
    assert not differences(before, snapshot(net))


class Idle(nn.Module):
    """Takes ids, and leaves one of its two models out."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = zoo.build("llama"), zoo.build("gpt2")

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.used(input_ids).logits


def test_a_text_survives_copies_and_a_model_without_memory() -> None:
    method = partial(PrefixTuning, length=4, init="text", text=TEXT_IDS, heads=None)
    net, base = zoo.build("llama"), zoo.build("llama")
    method().apply(net)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(output(twin, "llama"), output(net, "llama"))
        assert all(x.adapter.text.model is twin for x in state.get_applied(twin).placements)
    with torch.device("meta"):
        late = zoo.build("llama")
    method().apply(late)
    late.to_empty(device="cpu")
    own = dict((*late.named_parameters(), *late.named_buffers()))
    for name, values in (*base.named_parameters(), *base.named_buffers()):
        own[name].detach().copy_(values)
    materialize(late)
    assert torch.equal(output(late, "llama"), output(net, "llama"))


def test_a_text_that_no_longer_fits_behind_its_prefix() -> None:
    """GPT-2 learned 64 positions, BERT too; RoBERTa's table has two rows more."""
    for model in ("gpt2", "bert"):
        net = zoo.build(model)
        PrefixTuning(length=4, shift_positions=True).apply(net)
        net(input_ids=text(60))
        with pytest.raises(ValueError, match="61 tokens behind a prefix of 4 need more than the 64 positions"):
            net(input_ids=text(61))


@pytest.mark.parametrize("model", ["t5", "vit", "encoder"])
def test_positions_that_cannot_be_shifted(model: str) -> None:
    with pytest.raises(TargetError, match="shift_positions=True counts the text"):
        PrefixTuning(length=2, shift_positions=True).apply(zoo.build(model))


def peft_prefix(model: str, **more: Any) -> Any:
    peft = pytest.importorskip("peft")
    kind = {"bert": "SEQ_CLS"}.get(model, "CAUSAL_LM")
    net = zoo.build(model)
    theirs = peft.get_peft_model(net, peft.PrefixTuningConfig(task_type=kind, num_virtual_tokens=3, **more))
    return theirs.eval()


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("padding", ["right", "none"])
def test_prefix_tuning_agrees_with_peft(model: str, padding: str) -> None:
    """The flat tensor of peft is (length, (layer, key or value, head, head_dim)); it counts the text behind it."""
    theirs, net = peft_prefix(model), zoo.build(model)
    PrefixTuning(length=3, shift_positions=True, heads=None).apply(net)
    perturb(net, scale=0.3)
    mine = [x.adapter.kv for x in state.get_applied(net).placements if x.role == "attend"]
    flat = theirs.prompt_encoder.default.embedding.weight
    with torch.no_grad():
        flat.copy_(torch.stack(mine).permute(2, 0, 1, 3, 4).flatten(1))  # (layer, 2, length, heads, head_dim)
    call = inputs(model)
    if padding == "none":
        call["attention_mask"] = torch.ones_like(call["attention_mask"])
    a, b = net(**call).logits, theirs(**call).logits
    real = call["attention_mask"].bool()
    if a.dim() == 3:
        a, b = a[real], b[real]
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    a.pow(2).sum().backward()
    b.pow(2).sum().backward()
    gradient = torch.stack([p.grad for p in mine]).permute(2, 0, 1, 3, 4).flatten(1)
    assert flat.grad.abs().max() > 0
    assert (gradient - flat.grad).abs().max() <= 1e-5 * flat.grad.abs().max()


def test_the_same_without_a_shift_where_peft_is_told_the_positions() -> None:
    """peft adds the length to position_ids; given ones that are lower by it, it does not shift."""
    theirs, net = peft_prefix("llama"), zoo.build("llama")
    PrefixTuning(length=3, heads=None).apply(net)
    mine = [x.adapter.kv for x in state.get_applied(net).placements]
    with torch.no_grad():
        theirs.prompt_encoder.default.embedding.weight.copy_(torch.stack(mine).permute(2, 0, 1, 3, 4).flatten(1))
    ids = text(6)
    positions = torch.arange(6)[None]
    expected = theirs(ids, attention_mask=torch.ones_like(ids), position_ids=positions - 3).logits
    torch.testing.assert_close(net(ids).logits, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_the_mlp_resumes_in_mid_training(tmp_path: Path) -> None:
    """A checkpoint holds E and the MLP; a file of the adapter holds the prefixes that they stand for."""
    method = {"length": 3, "bottleneck": 5, "dropout": 0.2}
    straight, resumed, data = boring.Boring(), boring.Boring(), (boring.data(18), boring.data(6, shuffle=False))
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    torch.manual_seed(1)
    boring.trainer(tmp_path, [PrefixTuning(**method), save]).fit(straight, *data)
    torch.manual_seed(99)  # another process has other random numbers
    later = boring.trainer(tmp_path, [PrefixTuning(**method)])
    later.fit(resumed, *data, ckpt_path=str(tmp_path / "step=3.ckpt"))
    assert boring.largest_difference(boring.tensors(straight), boring.tensors(resumed)) == 0
    assert straight.losses[3:] == resumed.losses
    assert any("trunk" in name for name in boring.tensors(resumed))


# ------------------------------------------------------------------ P-Tuning v2
def test_p_tuning_v2_is_prefix_tuning_with_its_head(tmp_path: Path) -> None:
    net, other = zoo.build("bert"), zoo.build("bert")
    PTuningV2(length=3, projection=True, bottleneck=5, label="a").apply(net)
    PrefixTuning(length=3, bottleneck=5, label="a", seed=0).apply(other)
    assert set(state.trainable(net)) == set(state.trainable(other)) >= {"classifier.weight", "classifier.bias"}
    with torch.no_grad():
        for mine, theirs in zip(state.trainable(net).values(), state.trainable(other).values(), strict=True):
            theirs.copy_(mine)
    assert torch.equal(output(net, "bert"), output(other, "bert"))
    save_adapter(net, tmp_path / "a")
    kept = read_tensors(tmp_path / "a")
    assert [name.rpartition("/")[2] for name in kept if ".attend" in name] == ["kv", "kv"]
    loaded = load_adapter(zoo.build("bert"), tmp_path / "a")
    assert isinstance(loaded, PTuningV2)
    assert not loaded.projection


def test_p_tuning_v2_counts() -> None:
    """RoBERTa-large, l = 128: 2 L l d; through the MLP E, W, b and for all layers U, c."""
    flat = PTuningV2(length=128, heads=None).apply(fresh("roberta-large"))
    assert state.describe(flat)["trainable"] == 6_291_456
    net = PTuningV2(length=128, projection=True, heads=None).apply(fresh("roberta-large"))
    assert state.describe(net)["trainable"] == 128 * 1024 + 1024 * 512 + 512 + 24 * 2 * 1024 * 513


# ------------------------------------------------------------------ odd texts, for all of them
METHODS = ("prefix_tuning", "p_tuning_v2", "llama_adapter", "llama_adapter_v2", "prompt_tuning")
INSIDE = METHODS[:-1]


CASES = [
    *((name, model) for name in ("llama_adapter", "shifted") for model in ("llama", "gpt2")),
    ("llama_adapter", "t5"),
]


@pytest.mark.parametrize(("name", "model"), CASES)
def test_generation(name: str, model: str) -> None:
    """With a cache as without, in a padded batch as alone, with beams."""
    more = {"targets": "attend,cross.attend"} if model == "t5" else {}
    net = ready("prefix_tuning", model, shift_positions=True) if name == "shifted" else ready(name, model, **more)
    rows = [text(6, seed=1), text(3, seed=2)]
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, row.shape[1]) if model == "t5" else slice(6 - row.shape[1], 6)
        ids[i, where], mask[i, where] = row[0], 1
    tokens, logits = generate(net, ids, attention_mask=mask)
    uncached, uncached_logits = generate(net, ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(logits, uncached_logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(tokens, uncached)
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i : i + 1], generate(net, row)[1], atol=1e-4, rtol=1e-4)
    common: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "attention_mask": mask}
    assert torch.equal(net.generate(ids, **common), net.generate(ids, use_cache=False, **common))
    assert not torch.allclose(generate(generator(model), rows[0])[1], logits[:1], atol=1e-3), "the adapters say nothing"


@pytest.mark.parametrize("name", ["llama_adapter", "llama_adapter_v2", "p_tuning_v2", "shifted"])
def test_a_static_cache(name: str) -> None:
    net = ready("prefix_tuning", "llama", shift_positions=True) if name == "shifted" else ready(name, "llama")
    _, logits = generate(net, text())
    static = generate(net, text(), cache_implementation="static", disable_compile=True)[1]
    torch.testing.assert_close(static, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("name", METHODS)
def test_padding_on_either_side_changes_nothing(name: str, model: str) -> None:
    """A row with padding gives its tokens what it gives them alone, the positions being told where it is on the left."""
    net, _ = adapted(name, model)
    perturb(net, scale=0.3)
    row = text(4, seed=3)
    alone = net(input_ids=row)
    pad = torch.zeros(1, 2, dtype=torch.long)
    right = {"input_ids": torch.cat([row, pad], 1), "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}
    compared = [net(**right).logits if model == "bert" else net(**right).logits[:, :4]]
    if model != "bert":  # its class token would be the padding
        left = {"input_ids": torch.cat([pad, row], 1), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}
        compared.append(net(**left, position_ids=torch.tensor([[0, 0, 0, 1, 2, 3]])).logits[:, 2:])
    for got in compared:
        torch.testing.assert_close(got, alone.logits, atol=1e-5, rtol=1e-5)


PACKED = torch.cat([torch.arange(4), torch.arange(3)])[None]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("name", [*INSIDE, "shifted"])
def test_two_texts_packed_into_one_row_both_see_the_prefix(name: str, model: str) -> None:
    net, _ = adapted("prefix_tuning", model, shift_positions=True) if name == "shifted" else adapted(name, model)
    perturb(net, scale=0.3)
    one, two = text(4, seed=1), text(3, seed=2)
    packed = net(input_ids=torch.cat([one, two], 1), position_ids=PACKED, use_cache=False).logits
    alone = torch.cat([net(input_ids=one).logits, net(input_ids=two).logits], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_what_edits_the_ends_of_a_prompt_refuses_packed_rows() -> None:
    net, _ = adapted("loreft", "llama")
    with pytest.raises(ValueError, match="several texts are packed into one"):
        net(input_ids=text(7), position_ids=PACKED, use_cache=False)


@pytest.mark.parametrize("name", [*METHODS, "shifted", "text"])
def test_checkpointing_in_bf16(name: str) -> None:
    more = {"shifted": {"shift_positions": True}, "text": {"init": "text", "text": [3, 4, 5]}}.get(name, {})
    net = zoo.build("llama").bfloat16()
    make("prefix_tuning" if more else name, "llama", **more).apply(net)
    perturb(net, scale=0.1)
    gradients = []
    for on in (False, True):
        if on:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        net.train().zero_grad()
        loss(net, "llama").backward()
        gradients.append([p.grad.clone() for p in state.trainable(net).values()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        assert torch.isfinite(a).all()


def test_torchs_attention_with_a_hint_and_no_mask() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    PrefixTuning(length=2, targets="attend", heads=None).apply(net := nn.Sequential(layer))
    with pytest.raises(ValueError, match="is_causal=True is a hint about attn_mask, and there is none"):
        net[0](torch.zeros(1, 3, 32), is_causal=True)
