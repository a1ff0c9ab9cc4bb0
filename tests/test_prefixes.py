"""Prompts inside attention: LLaMA-Adapter, prefix tuning, P-Tuning v2; and prompts of all kinds where texts are odd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from harness import forward, output, perturb
from settings import make
from test_counts import fresh
from test_generation import ready, text
from test_oracles import HEAD_DIM, compare, inputs, pair, rotate
from torch import Tensor, nn
from torch.func import functional_call

from lightning_peft import LlamaAdapter, LlamaAdapterV2, LoRA
from lightning_peft.core import state
from lightning_peft.core.adapter import adapters_of
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
    a.pow(2).mean().backward()
    b.pow(2).mean().backward()
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


def test_llama_adapter_v2_prompts_at_both_ends() -> None:
    net = zoo.build("t5")
    LlamaAdapterV2(length=2, prompts="last:1", early=1, norms=False).apply(net)
    prompted = {x.site for x in state.get_applied(net).placements if x.role == "attend"}
    assert prompted == {f"{s}.block.{i}.layer.0.SelfAttention" for s, i in
                        (("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 2))}  # fmt: skip
    assert not any(p.requires_grad for n, p in net.named_parameters() if "layer_norm" in n)
