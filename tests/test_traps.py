"""Traps that other libraries fell into, and what happens here."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
import zoo
from harness import (
    adapter_parameters,
    differences,
    forward,
    moved,
    output,
    perturb,
    snapshot,
    tensors,
    train,
)
from safetensors.torch import load_file, save_file
from settings import adapted, make
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import (
    IA3,
    MAM,
    PEFT,
    REGISTRY,
    Adapter,
    BitFit,
    FullFineTuning,
    Houlsby,
    LinearProbe,
    LNTuning,
    LoRA,
    LoReFT,
    ParallelAdapter,
    PrefixTuning,
    PromptTuning,
    Site,
    load_adapter,
    save_adapter,
)
from lightning_peft.core import state
from lightning_peft.core.adapter import LabelError, NotMergeableError
from lightning_peft.core.attention import UnsupportedSiteError
from lightning_peft.core.files import AdapterFileError, read_tensors
from lightning_peft.core.merge import MergeError
from lightning_peft.core.method import materialize
from lightning_peft.core.sites import Sites, TargetError


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def names(net: nn.Module, *parts: str) -> list[str]:
    """Trained parameters whose names hold one of `parts`."""
    return [n for n in state.trainable(net) if any(p in n for p in parts)]


# ------------------------------------------------------------------ what is matched
def test_adapters_are_never_targets_of_a_later_method() -> None:
    """A module called `lora` in the base, an adapter called `mlp`, and patterns that would catch either."""
    net = zoo.build("mlp")
    LoRA(targets="mlp,lora", label="mlp").apply(net)
    sites = {p.site for p in state.get_applied(net).placements}
    assert sites == {"mlp", "lora"}
    BitFit(label="lora").apply(net)
    IA3(targets="*lora,*mlp", inputs="mlp").apply(net)
    assert {p.site for p in state.get_applied(net, "ia3").placements} == {"mlp", "lora"}
    assert all(p.site.count("adapters") == 0 for a in state.applied_to(net).values() for p in a.placements)
    heads = LoRA(targets="lora", heads="re:.*", label="c")
    before = set(state.saved(net))
    heads.apply(net)
    assert before <= set(state.saved(net))
    assert all(".adapters." not in f".{n}" for n in [s.attribute for s in state.get_applied(net, "c").selected])


@pytest.mark.parametrize(
    "targets", ["quary", "q,quary", "bert.encoder.layer.9.*", "q,*.nope", "re:.*nope", "uery", "attention.self.quer"]
)
def test_a_target_that_matches_nothing_or_only_partly(targets: str) -> None:
    net = zoo.build("bert")
    before = snapshot(net)
    with pytest.raises(TargetError, match="Roles known for this model"):
        LoRA(targets=targets).apply(net)
    assert differences(before, snapshot(net)) == []


@pytest.mark.parametrize("heads", ["clasifier", ["classifier", "nope"], "lm_head"])
def test_a_misspelt_head_is_an_error(heads: str | list[str]) -> None:
    net = zoo.build("bert")
    with pytest.raises(TargetError):
        LoRA(heads=heads).apply(net)
    assert state.applied_to(net) == {}


@pytest.mark.parametrize("model", ["gpt2", "llama", "t5", "bert_mlm", "opt", "bart"])
def test_auto_heads_do_not_catch_a_language_model_head(model: str) -> None:
    net = zoo.build(model)
    LoRA(rank=2).apply(net)
    assert all(".adapters." in n for n in state.trainable(net))
    assert "head" not in " ".join(state.trainable(net)).replace("adapters", "")


def test_a_head_pattern_is_no_substring() -> None:
    net = zoo.build("llama")
    with pytest.raises(TargetError):
        LoRA(heads="head").apply(net)
    LoRA(heads="lm_head").apply(net)
    assert names(net, "lm_head") == ["lm_head.weight"]


@pytest.mark.parametrize("options", [{"layers": "last:1"}, {"layers": [1], "create": False}])
def test_bitfit_in_some_layers(options: dict[str, Any]) -> None:
    net = zoo.build("bert")
    BitFit(heads=None, **options).apply(net)
    assert names(net, "layer.1.")
    assert names(net, "layer.0.", "embeddings", "pooler") == []


@pytest.mark.parametrize(
    ("options", "left_out"), [({"layers": "last:1"}, "layer.0."), ({"exclude": "embed"}, "word_embeddings")]
)
def test_full_fine_tuning_of_some_layers(options: dict[str, Any], left_out: str) -> None:
    net = zoo.build("bert")
    FullFineTuning(heads=None, **options).apply(net)
    assert names(net, "layer.1.")
    assert names(net, left_out) == []


def test_bitfit_without_queries() -> None:
    net = zoo.build("bert")
    BitFit(heads=None, exclude="q").apply(net)
    assert names(net, "key.bias")
    assert names(net, "query") == []


def test_ln_tuning_in_some_layers() -> None:
    net = zoo.build("bert")
    LNTuning(layers="last:1", heads=None).apply(net)
    assert len(names(net, "layer.1.")) == len(state.trainable(net)) == 4


@pytest.mark.parametrize("method", [LinearProbe, MAM])
def test_a_target_that_is_not_used_is_an_error(method: type[PEFT]) -> None:
    with pytest.raises((TargetError, ValueError)):
        method(targets="nonsense").apply(zoo.build("bert"))


def test_lora_without_targets_is_an_error() -> None:
    with pytest.raises(ValueError, match="targets"):
        LoRA(targets=None).apply(zoo.build("bert"))


@pytest.mark.parametrize(("model", "targets"), [("bert", "norm"), ("bert", "block"), ("bert", "attend")])
def test_low_rank_on_what_is_no_projection_is_an_error(model: str, targets: str) -> None:
    net = zoo.build(model)
    with pytest.raises((TargetError, TypeError), match="(?s)targets|projection|Linear"):
        LoRA(targets=targets).apply(net)
    assert state.applied_to(net) == {}


# ------------------------------------------------------------------ tied weights
def tied_gpt2() -> nn.Module:
    net = zoo.build("gpt2")
    assert net.lm_head.weight is net.transformer.wte.weight
    return net


@pytest.mark.parametrize("targets", ["lm_head", "q,lm_head"])
def test_merging_into_a_tied_weight_is_an_error(targets: str) -> None:
    net = tied_gpt2()
    lora = LoRA(targets=targets, rank=2)
    lora.apply(net)
    perturb(net)
    before, expected = snapshot(net), output(net, "gpt2")
    with pytest.raises(MergeError, match="tied"):
        lora.merge(net)
    assert differences(before, snapshot(net)) == []
    with torch.no_grad():
        net.lm_head.weight = nn.Parameter(net.lm_head.weight.clone(), requires_grad=False)
    lora.merge(net)
    close(output(net, "gpt2"), expected)
    lora.unmerge(net)
    assert torch.equal(output(net, "gpt2"), expected)


def test_merging_into_shared_storage_is_an_error() -> None:
    net = zoo.build("llama")
    first, second = (net.model.layers[i].self_attn for i in (0, 1))
    second.q_proj.weight = nn.Parameter(first.q_proj.weight.data)
    lora = LoRA(targets="q", rank=2)
    lora.apply(net)
    perturb(net)
    with pytest.raises(MergeError, match="tied"):
        lora.merge(net)


def test_targeting_a_tied_head_keeps_the_embedding() -> None:
    net = tied_gpt2()
    LoRA(targets="lm_head", rank=2).apply(net)
    before = tensors(net)
    train(net, "gpt2")
    assert net.lm_head.weight is net.transformer.wte.weight
    assert moved(before, tensors(net)) == set(state.trainable(net))


def test_full_fine_tuning_counts_a_tied_weight_once(tmp_path: Path) -> None:
    net = tied_gpt2()
    FullFineTuning().apply(net)
    assert state.describe(net)["trainable"] == sum(p.numel() for p in net.parameters())
    assert len([s for s in state.get_applied(net).selected if s.parameter is net.lm_head.weight]) == 1
    train(net, "gpt2", steps=1)
    save_adapter(net, tmp_path / "a")
    assert sum(n.endswith(("wte.weight", "lm_head.weight")) for n in read_tensors(tmp_path / "a")) == 1
    fresh = tied_gpt2()
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(output(fresh, "gpt2"), output(net, "gpt2"))
    assert fresh.lm_head.weight is fresh.transformer.wte.weight


def test_a_tied_head_to_train_is_an_error() -> None:
    with pytest.raises((TargetError, ValueError), match="tied"):
        LoRA(rank=2, heads="lm_head").apply(tied_gpt2())


# ------------------------------------------------------------------ layouts
def test_conv1d_is_transposed_also_where_it_is_square() -> None:
    net = zoo.build("gpt2")
    lora = LoRA(targets="o,up,down", rank=2, heads=None)
    lora.apply(net)
    a = net.transformer.h[0].attn.c_proj.adapters["lora"]
    assert a.a.shape == (2, 32)
    assert net.transformer.h[0].mlp.c_fc.adapters["lora"].b.shape == (zoo.GPT2["n_embd"] * 4, 2)
    perturb(net, 0.5)
    before = net.transformer.h[0].attn.c_proj.weight.clone()
    lora.merge(net)
    close(net.transformer.h[0].attn.c_proj.weight, before + 16 / 2 * (a.b @ a.a).T)


@pytest.mark.parametrize("model", ["llama", "qwen2", "qwen3", "gemma", "phi3", "mistral"])
def test_grouped_query_widths(model: str) -> None:
    net = zoo.build(model)
    LoRA(targets="q,k,v", rank=2).apply(net)
    width = {p.role: p.adapter.b.shape[0] for p in state.get_applied(net).placements}
    assert width["q"] == 2 * width["k"] == 2 * width["v"]
    perturb(net, 0.3)
    expected = output(net, model)
    net_merged = copy.deepcopy(net)
    state.get_applied(net_merged).method.merge(net_merged)
    close(output(net_merged, model), expected)


PACKED = ("gpt2", "gpt_neox", "bloom", "phi3", "modernbert", "timm_vit", "encoder", "gpt2_cross", "transformer")


@pytest.mark.parametrize("model", PACKED)
def test_slices_of_packed_projections_merge(model: str) -> None:
    net = zoo.build(model)
    lora = LoRA(targets="q,v,down,cross.k?", rank=2, heads=None)
    lora.apply(net)
    perturb(net, 0.3)
    before, expected = tensors(net), output(net, model)
    base = output(zoo.build(model), model)
    assert not torch.allclose(expected, base, atol=1e-4)
    lora.merge(net)
    close(output(net, model), expected)
    lora.unmerge(net)
    assert moved(before, tensors(net)) == set()
    lora.remove(net)
    close(output(net, model), base, 1e-6 if model in ("encoder", "transformer") else 0)


# ------------------------------------------------------------------ torch.nn
class Recurrent(nn.Module):
    """`nn.TransformerEncoder` with nested tensors, as it comes."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])


def recurrent() -> tuple[Recurrent, Tensor, Tensor]:
    torch.manual_seed(0)
    net, x = Recurrent().eval(), torch.randn(3, 6, 32)
    return net, x, torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]]).bool()


@pytest.mark.parametrize("method", [
    LoRA(targets="q,v", rank=2), LoRA(targets="o", rank=2), LoRA(targets="up,down", rank=2), LoRA(targets="*.out_proj", rank=2),
    IA3(), Houlsby(bottleneck=2), ParallelAdapter(bottleneck=2), PrefixTuning(length=2), LoReFT(rank=2, first=1, last=1),
], ids=lambda m: f"{m.info.name}-{m.targets}")  # fmt: skip
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fused_path_of_torchs_encoder_is_left(method: PEFT, padded: bool) -> None:
    """In eval mode without gradients torch skips the children of its encoder layers; adapters in them must run."""
    net, x, padding = recurrent()
    mask = padding if padded else None
    with torch.no_grad():
        base = net(x, mask)
    before = snapshot(net)
    method.apply(net)
    perturb(net, 0.3, adapters_only=True)
    with torch.no_grad():
        fast = net(x, mask)
    slow = net(x, mask)  # gradients: never the fused path
    close(fast, slow.detach(), 1e-6)
    assert not torch.allclose(fast, base, atol=1e-4)
    method.remove(net)
    assert differences(before, snapshot(net)) == []
    with torch.no_grad():
        assert torch.equal(net(x, mask), base)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fused_path_stays_left_when_one_of_two_methods_goes() -> None:
    net, x, padding = recurrent()
    lora, ia3 = LoRA(rank=2, heads=None), IA3(heads=None)
    before = snapshot(net)
    lora.apply(net)
    ia3.apply(net)
    perturb(net, 0.3)
    lora.remove(net)
    with torch.no_grad():
        fast = net(x, padding)
    close(fast, net(x, padding).detach(), 1e-6)
    ia3.remove(net)
    assert differences(before, snapshot(net)) == []


@pytest.mark.parametrize("length", [2])
def test_prompt_tuning_of_torchs_encoder_with_masks(length: int) -> None:
    """Rows of a given mask see the tokens; the tokens see each other only."""
    torch.manual_seed(0)
    net = nn.Module()
    net.embed = nn.Embedding(9, 32)
    net.encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0), 2, enable_nested_tensor=False
    )
    net.eval()
    base = copy.deepcopy(net)
    PromptTuning(length=length).apply(net)
    tokens = state.get_applied(net).placements[0].adapter.tokens
    x = net.embed(torch.randint(0, 9, (5, 3)))  # (time, batch, width)
    longer = torch.cat([tokens[:, None].expand(-1, 3, -1), x])
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for mask in (future, torch.zeros(5, 5).masked_fill(future, -math.inf)):
        wide = torch.ones(5 + length, 5 + length, dtype=torch.bool)
        wide[:length, :length], wide[length:, :length] = False, False
        wide[length:, length:] = future
        close(net.encoder(x, mask), base.encoder(longer, wide)[length:], 1e-6)
    close(net.encoder(x), base.encoder(longer)[length:], 1e-6)


# ------------------------------------------------------------------ transformers
@pytest.mark.parametrize("model", ["bert", "gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize("name", ["loreft", "houlsby", "prefix_tuning", "lora"])
def test_captured_hidden_states_are_the_edited_ones(name: str, model: str) -> None:
    base, (net, _) = zoo.build(model), adapted(name, model)
    output(net, model)  # transformers installs its hooks at the first call
    perturb(net, 0.5)
    key = "encoder_hidden_states" if model == "t5" else "hidden_states"
    with torch.no_grad():
        states, plain = (m(**zoo.inputs(model), output_hidden_states=True)[key] for m in (net, base))
    assert torch.equal(states[0], plain[0])
    for a, b in zip(states[1:], plain[1:], strict=True):
        assert a.shape == b.shape
        assert not torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("model", ["bert", "gpt2", "llama", "vit"])
def test_captured_hidden_states_have_no_virtual_tokens(model: str) -> None:
    """A vision transformer's have them between its first and its last block, as the docstring of PromptTuning says."""
    net, method = adapted("prompt_tuning", model)
    with torch.no_grad():
        states = net(**zoo.inputs(model), output_hidden_states=True).hidden_states
    between = {states[0].shape[1] + method.length} if model == "vit" else set()
    assert {h.shape[1] for h in states} == {states[0].shape[1]} | between


CLOSED = {"deberta", "bloom", "gpt_neo", "gptj"}  # compute attention in code of their own
MASKLESS = {"mlp", "mixer", "timm_vit", "encoder", "transformer", "vit", "whisper"}
ATTENDED = [m for m in zoo.ZOO if m not in CLOSED | MASKLESS]
EAGER_ONLY = {"gemma2"}


@pytest.mark.parametrize("model", sorted(CLOSED))
def test_attention_that_cannot_be_opened_says_so(model: str) -> None:
    net = zoo.build(model)
    before = snapshot(net)
    with pytest.raises(UnsupportedSiteError, match="cannot be opened"):
        PrefixTuning().apply(net)
    assert differences(before, snapshot(net)) == []


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model", ATTENDED)
def test_a_mask_that_is_left_out_is_the_mask_of_ones(model: str, implementation: str) -> None:
    """transformers leaves a purely causal mask out, and passes none to encoders; with prefixes it has to be written."""
    if model in EAGER_ONLY and implementation == "sdpa":
        pytest.skip("transformers has no sdpa for it")
    net = zoo.build(model)
    net.set_attn_implementation(implementation)
    PrefixTuning(length=3, heads=None).apply(net)
    call = zoo.inputs(model)
    with_mask = {**call, "attention_mask": torch.ones_like(call["attention_mask"])}
    call.pop("attention_mask")
    if model == "bart_cls":
        with_mask["input_ids"], call["input_ids"] = (torch.full((2, 7), 5).index_fill(1, torch.tensor([6]), 2),) * 2
    with torch.no_grad():
        a, b = (net(**kwargs, return_dict=True) for kwargs in (with_mask, call))
    pick = (lambda o: o.logits_per_image) if model == "clip" else (lambda o: o.logits)
    close(pick(a), pick(b))


@pytest.mark.parametrize("model", ["bert", "gpt2", "llama", "t5", "vit", "opt", "bart", "whisper", "qwen3", "phi3"])
def test_eager_and_sdpa_agree_with_a_prefix(model: str) -> None:
    outputs = []
    for implementation in ("sdpa", "eager"):
        net = zoo.build(model)
        net.set_attn_implementation(implementation)
        make("prefix_tuning", "bert", heads=None).apply(net)
        outputs.append(output(net, model))
    close(*outputs)


@pytest.mark.parametrize("model", ["gpt2", "llama", "mistral", "gemma2", "opt", "gpt_neox"])
def test_a_causal_model_with_a_prefix_does_not_see_the_future(model: str) -> None:
    net = zoo.build(model)
    PrefixTuning(length=3, heads=None).apply(net)
    ids = zoo.inputs(model)["input_ids"][:1]
    with torch.no_grad():
        whole, part = net(input_ids=ids).logits, net(input_ids=ids[:, :4]).logits
    close(whole[:, :4], part)


def test_prefixes_under_a_sliding_window_are_always_visible() -> None:
    """The window hides old text, never the prefix."""
    config = hf.MistralConfig(**{**zoo.TEXT, "num_key_value_heads": 2, "sliding_window": 3})
    torch.manual_seed(0)
    net = hf.MistralForCausalLM(config).eval()
    PrefixTuning(length=2).apply(net)
    ids = torch.randint(3, 90, (1, 9))
    with torch.no_grad():
        before = net(input_ids=ids).logits[:, -1]
        adapter = state.get_applied(net).placements[0].adapter
        adapter.kv.add_(1.0)
        after = net(input_ids=ids).logits[:, -1]
    assert not torch.allclose(before, after, atol=1e-4)


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_padding_changes_nothing(model: str) -> None:
    """Right padding behind a text, with every method that looks at masks."""
    for name in ("prefix_tuning", "prompt_tuning", "loreft", "mam"):
        net, _ = adapted(name, model)
        perturb(net, 0.5)
        call = zoo.inputs(model)
        alone = {k: v[1:, :5] for k, v in call.items()}
        with torch.no_grad():
            padded, single = net(**call).logits, net(**alone).logits
        close(padded[1:] if model == "bert" else padded[1:, :5], single)


def test_loreft_in_an_encoder_decoder_does_not_look_at_labels() -> None:
    net, _ = adapted("loreft", "t5")
    perturb(net, 0.3)
    call = zoo.inputs("t5")
    del call["decoder_input_ids"]
    labels = call["input_ids"].clone()
    with torch.no_grad():
        trained = net(**call, labels=labels).logits
        served = net(**call, decoder_input_ids=net._shift_right(labels)).logits
    close(trained, served)


def test_loreft_in_an_encoder_does_not_look_at_labels() -> None:
    net, _ = adapted("loreft", "bert_mlm")
    call = zoo.inputs("bert_mlm")
    with torch.no_grad():
        close(net(**call, labels=call["input_ids"]).logits, net(**call).logits)


class Checkpointed(nn.Module):
    """Blocks that are called through a checkpoint, adapters and all, as plain PyTorch code does."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = partial(nn.TransformerEncoderLayer, 32, 4, 64, dropout=0.0, batch_first=True)
        self.layers = nn.ModuleList(layer() for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = attention_mask == 0
        for layer in self.layers:
            if self.reentrant is None:
                x = layer(x, src_key_padding_mask=hidden)
            else:
                call = partial(layer, src_key_padding_mask=hidden)
                x = checkpoint(call, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_loreft_inside_of_a_checkpoint_edits_the_same_positions(reentrant: bool) -> None:
    x = torch.randn(2, 6, 32, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]])
    gradients = []
    for how in (None, reentrant):
        net = Checkpointed(how)
        LoReFT(rank=2, first=1, last=1, heads=None).apply(net)
        net(x, mask).pow(3).sum().backward()
        gradients.append([p.grad for p in state.trainable(net).values()])
    for a, b in zip(*gradients, strict=True):
        close(b, a, 1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", ["adapter", "checkpointing"])
def test_loreft_under_checkpointing_edits_the_same_positions(reentrant: bool, first: str) -> None:
    """Blocks are run again after the model is done, when the padding mask and the labels are no longer at hand."""
    gradients = []
    for checkpointed in (False, True):
        net, method = zoo.build("llama"), LoReFT(rank=2, first=1, last=1, heads=None)
        if first == "adapter":
            method.apply(net)
        if checkpointed:
            net.gradient_checkpointing_enable({"use_reentrant": reentrant})
            net.enable_input_require_grads()
        if first != "adapter":
            method.apply(net)
        net.train()
        call = zoo.inputs("llama")
        labels = call["input_ids"].clone()
        labels[0, :3], labels[1, :4] = -100, -100
        call["attention_mask"][0, 0] = 0
        (
            net(**call, labels=labels).loss + net(**{k: v.flip(0) for k, v in call.items()}, labels=labels).loss
        ).backward()
        gradients.append({n: p.grad for n, p in state.trainable(net).items()})
    for n, expected in gradients[0].items():
        close(gradients[1][n], expected, 1e-6)


# ------------------------------------------------------------------ dtypes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_can_be_adapted(dtype: torch.dtype) -> None:
    net = zoo.build("llama").to(dtype)
    LoRA(rank=2).apply(net)
    assert {p.dtype for p in adapter_parameters(net)} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_base_is_still_the_same_base(dtype: torch.dtype, tmp_path: Path) -> None:
    net, _ = adapted("lora", "bert")
    save_adapter(net, tmp_path / "a")
    load_adapter(zoo.build("bert").to(dtype), tmp_path / "a")


def test_dtype_base_follows_a_later_cast() -> None:
    net, _ = adapted("lora", "bert", dtype="base")
    net.bfloat16()
    assert {p.dtype for p in adapter_parameters(net)} == {torch.bfloat16}


def test_autocast_copies_no_activation_to_fp32() -> None:
    """What an adapted projection returns under autocast has the dtype that the projection returns."""
    seen: dict[str, set[torch.dtype]] = {}
    for name in ("lora", "houlsby", "ia3", "parallel", "bitfit"):
        net, _ = adapted(name, "llama")
        for m in net.modules():
            if isinstance(m, nn.Linear) and m is not net.lm_head:
                m.register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name, set()).add(out.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            output(net, "llama")
    assert all(dtypes == {torch.bfloat16} for dtypes in seen.values()), seen


def test_loreft_keeps_its_rotation_orthonormal_in_any_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        net = zoo.build("llama").to(dtype)
        LoReFT(rank=4).apply(net)
        train(net, "llama", steps=3, lr=0.1)
        rotation = state.get_applied(net).placements[-1].adapter.edit.rotation()
        close(rotation @ rotation.T, torch.eye(4))


# ------------------------------------------------------------------ merging
def test_merging_in_any_order_computes_the_same() -> None:
    """y = l * (W x + B A x): folding l alone gives (l W) x + B A x. Either the same output, or an error."""
    net = zoo.build("llama")
    lora, ia3 = LoRA(targets="k,down", rank=2), IA3()
    lora.apply(net)
    ia3.apply(net)
    perturb(net, 0.3)
    expected = output(net, "llama")
    try:
        ia3.merge(net)
    except MergeError:
        return
    close(output(net, "llama"), expected)


def test_merging_from_the_inside_out() -> None:
    net = zoo.build("llama")
    lora, ia3 = LoRA(targets="k,down", rank=2), IA3()
    lora.apply(net)
    ia3.apply(net)
    perturb(net, 0.3)
    before, expected = tensors(net), output(net, "llama")
    lora.merge(net)
    close(output(net, "llama"), expected)
    ia3.merge(net)
    close(output(net, "llama"), expected)
    with pytest.raises(MergeError, match="unmerge 'ia3' first"):
        lora.unmerge(net)
    with pytest.raises(MergeError, match="unmerge 'ia3' first"):
        lora.remove(net)
    ia3.unmerge(net)
    lora.unmerge(net)
    assert moved(before, tensors(net)) == set()


def test_unmerging_a_whole_under_a_slice_is_an_error() -> None:
    net = zoo.build("gpt2")
    whole, part = LoRA(targets="*.c_attn", rank=2, label="whole"), LoRA(targets="q", rank=2, label="part")
    whole.apply(net)
    part.apply(net)
    perturb(net, 0.3)
    before = tensors(net)
    whole.merge(net)
    part.merge(net)
    with pytest.raises(MergeError, match="unmerge 'part' first"):
        whole.unmerge(net)
    part.unmerge(net)
    whole.unmerge(net)
    assert moved(before, tensors(net)) == set()


def test_unmerging_keeps_what_others_trained() -> None:
    net = zoo.build("bert")
    lora, bitfit = LoRA(rank=2, heads=None), BitFit(heads=None)
    lora.apply(net)
    bitfit.apply(net)
    perturb(net)
    lora.merge(net)
    perturb(net)
    bias = net.bert.encoder.layer[0].attention.self.query.bias.clone()
    lora.unmerge(net)
    assert torch.equal(net.bert.encoder.layer[0].attention.self.query.bias, bias)


def test_unload_is_permanent() -> None:
    net = zoo.build("llama")
    first, second = LoRA(rank=2, label="first"), LoRA(rank=2, label="second")
    first.apply(net)
    second.apply(net)
    perturb(net, 0.3)
    with first.enabled(net, False):
        expected = output(net, "llama")
    first.merge(net)
    second.merge(net)
    second.unload(net)
    try:
        first.remove(net)
    except MergeError:
        return
    close(output(net, "llama"), expected)


def test_switching_a_merged_method_off_is_an_error_or_works() -> None:
    net, lora = adapted("lora", "llama")
    perturb(net, 0.3)
    lora.merge(net)
    try:
        lora.enabled(net, False)
    except MergeError:
        return
    close(output(net, "llama"), output(zoo.build("llama"), "llama"))


def test_merging_a_bias_that_is_not_finite_is_an_error() -> None:
    net = zoo.build("bert")
    lora = LoRA(rank=2, lora_bias=True, heads=None)
    lora.apply(net)
    state.get_applied(net).placements[0].adapter.c.data.fill_(math.nan)
    before = tensors(net)
    with pytest.raises(MergeError, match="not finite"):
        lora.merge(net)
    assert moved(before, tensors(net)) == set()


def test_merging_nan_is_an_error_that_changes_nothing() -> None:
    net, lora = adapted("lora", "bert")
    state.get_applied(net).placements[-1].adapter.b.data.fill_(math.inf)
    before = snapshot(net)
    with pytest.raises(MergeError, match="not finite"):
        lora.merge(net)
    assert differences(before, snapshot(net)) == []


def test_training_while_merged_does_not_reach_the_base() -> None:
    net, lora = adapted("lora", "llama")
    perturb(net)
    lora.merge(net)
    assert not any(".adapters." not in n for n in state.trainable(net))
    assert state.active(net) == []
    lora.unmerge(net)
    assert state.active(net) == ["lora"]


def test_rounding_of_a_merge_is_measured() -> None:
    net = zoo.build("llama").bfloat16()
    lora = LoRA(rank=2)
    lora.apply(net)
    perturb(net, 0.3)
    report = lora.merge(net)
    assert (report.label, report.places, report.dtypes) == ("lora", 4, ("bfloat16",))
    assert 1e-4 < report.rounding < 1e-2


# ------------------------------------------------------------------ masks
@pytest.fixture
def toys() -> Iterator[None]:
    """Methods of a test must not stay in the registry."""
    known = set(REGISTRY)
    yield
    for name in set(REGISTRY) - known:
        del REGISTRY[name]


def checkerboard(p: Tensor) -> Tensor:
    return (torch.arange(p.numel()) % 2 == 0).view(p.shape)


@pytest.fixture
def masked(toys: None) -> type[PEFT]:
    class Masked(PEFT, name="toy_masked", family="selective", mergeable=True):
        """every second entry of the weights of queries"""

        targets: str | list[str] | None = "q"

        def select(self, name: str, parameter: nn.Parameter) -> bool | Tensor:
            return checkerboard(parameter) if name.endswith("weight") else False

    return Masked


def test_entries_outside_of_a_mask_never_move(masked: type[PEFT], tmp_path: Path) -> None:
    net = zoo.build("bert")
    method = masked(heads=None)
    method.apply(net)
    before = tensors(net)
    train(net, "bert", steps=3)
    after = tensors(net)
    assert moved(before, after) == set(state.trainable(net))
    for n in state.trainable(net):
        mask = checkerboard(before[n])
        assert torch.equal(after[n][~mask], before[n][~mask])
        assert (after[n][mask] != before[n][mask]).all()
    assert state.describe(net)["trainable"] == sum(p.numel() // 2 for p in state.trainable(net).values())
    save_adapter(net, tmp_path / "a")
    fresh = zoo.build("bert")
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(output(fresh, "bert"), output(net, "bert"))
    method.remove(net)
    assert moved(before, tensors(net)) == set()


def test_gradients_outside_of_a_mask_are_zero(masked: type[PEFT]) -> None:
    net = zoo.build("bert")
    masked(heads=None).apply(net)
    for gradients in train(net, "bert", steps=2):
        for gradient in gradients.values():
            assert (gradient[~checkerboard(gradient)] == 0).all()


@pytest.mark.parametrize("mask", [torch.ones(3, dtype=torch.bool), torch.ones(32, 32)])
def test_a_mask_of_another_shape_or_type_is_an_error(toys: None, mask: Tensor) -> None:
    class Wrong(PEFT, name="toy_wrong", family="selective"):
        """a mask that does not fit"""

        targets: str | list[str] | None = "q"

        def select(self, name: str, parameter: nn.Parameter) -> bool | Tensor:
            return mask

    net = zoo.build("bert")
    before = snapshot(net)
    with pytest.raises(ValueError, match="gave a mask of"):
        Wrong().apply(net)
    assert differences(before, snapshot(net)) == []


def test_masks_of_two_methods_add_up() -> None:
    net = zoo.build("gpt2")
    BitFit(targets="q", label="a").apply(net)
    BitFit(targets="v", label="b").apply(net)
    bias = net.transformer.h[0].attn.c_attn.bias
    before = bias.clone()
    train(net, "gpt2")
    assert (bias != before).tolist() == [True] * 32 + [False] * 32 + [True] * 32


def test_a_mask_does_not_cut_down_another_method() -> None:
    net = zoo.build("gpt2")
    BitFit(label="a").apply(net)
    BitFit(targets="v", label="b").apply(net)
    bias = net.transformer.h[0].attn.c_attn.bias
    before = bias.clone()
    train(net, "gpt2")
    assert (bias != before).all()


def test_a_later_mask_keeps_what_an_earlier_method_trained() -> None:
    net = zoo.build("gpt2")
    BitFit(targets="q", label="a").apply(net)
    train(net, "gpt2")
    bias = net.transformer.h[0].attn.c_attn.bias
    trained = bias.clone()
    BitFit(targets="v", label="b").apply(net)
    state.restore_unselected(net)
    assert torch.equal(bias, trained)


def test_biases_of_one_slice() -> None:
    for model, path in (
        ("gpt2", "transformer.h.0.attn.c_attn.bias"),
        ("encoder", "encoder.layers.0.self_attn.in_proj_bias"),
    ):
        net = zoo.build(model)
        BitFit(targets="q,v", heads=None).apply(net)
        bias = net.get_parameter(path)
        before = bias.detach().clone()
        train(net, model)
        assert (bias != before).tolist() == [True] * 32 + [False] * 32 + [True] * 32


# ------------------------------------------------------------------ the three sets
@pytest.mark.parametrize("name", ["bitfit", "full", "ln_tuning", "linear_probe", "lora"])
def test_switched_off_after_training_is_the_base(name: str) -> None:
    net, method = adapted(name, "bert")
    perturb(net, 0.3)
    with method.enabled(net, False):
        close(output(net, "bert"), output(zoo.build("bert"), "bert"), 0)


def test_switching_touches_neither_gradients_nor_files() -> None:
    net, method = adapted("lora", "bert")
    flags, kept = [p.requires_grad for p in net.parameters()], set(state.saved(net))
    method.enabled(net, False)
    assert (state.active(net), set(state.saved(net))) == ([], kept)
    assert [p.requires_grad for p in net.parameters()] == flags


def test_switching_survives_an_exception() -> None:
    net, method = adapted("lora", "bert")
    with pytest.raises(KeyError), method.enabled(net, False):
        raise KeyError
    assert state.active(net) == ["lora"]


class Towers(nn.Module):
    """Two models in one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = zoo.build("bert"), zoo.build("bert")


def test_methods_on_two_parts_are_seen_from_the_whole() -> None:
    net = Towers()
    LoRA(rank=2, heads=None, label="one").apply(net.a)
    LoRA(rank=2, heads=None, label="two").apply(net.b)
    assert set(state.applied_to(net)) == {"one", "two"}
    assert len(state.trainable(net)) == 16
    IA3(targets="a.*.key", inputs="down?", heads=None).apply(net)
    assert all(p.requires_grad for n, p in net.named_parameters() if ".one." in n or ".two." in n)


def test_a_method_on_a_part_does_not_freeze_that_of_the_whole() -> None:
    net = Towers()
    LoRA(rank=2, heads=None, targets="a.*.query").apply(net)
    IA3(heads=None).apply(net.a)
    assert all(p.requires_grad for n, p in net.named_parameters() if ".lora." in n)


def test_frozen_before_is_frozen_again() -> None:
    net = zoo.build("bert")
    net.bert.pooler.dense.weight.requires_grad_(False)
    net.classifier.bias.requires_grad_(False)
    before = snapshot(net)
    lora, ia3 = LoRA(rank=2), IA3()
    lora.apply(net)
    assert net.classifier.bias.requires_grad
    ia3.apply(net)
    lora.remove(net)
    ia3.remove(net)
    assert differences(before, snapshot(net)) == []


def test_a_removed_adapter_is_freed() -> None:
    net = zoo.build("mlp")
    LoRA(targets="mlp", label="stays").apply(net)
    goes = LoRA(targets="lora", label="goes")
    goes.apply(net)
    adapter = weakref.ref(state.get_applied(net, "goes").placements[0].adapter)
    goes.remove(net)
    gc.collect()
    assert adapter() is None


def batch_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def test_changed_buffers_are_saved_and_loaded(tmp_path: Path) -> None:
    net = batch_norm()
    LoRA(targets="0", rank=2).apply(net)
    assert not any("running" in n for n in state.saved(net))
    net.train()(torch.randn(8, 4))
    assert {n for n in state.saved(net) if n.startswith("1.")} == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }
    save_adapter(net.eval(), tmp_path / "a")
    fresh = batch_norm().eval()
    load_adapter(fresh, tmp_path / "a")
    x = torch.randn(3, 4)
    assert torch.equal(fresh(x), net(x))


def test_remove_restores_buffers() -> None:
    net = batch_norm()
    before, lora = tensors(net), LoRA(targets="0", rank=2)
    lora.apply(net)
    net.train()(torch.randn(8, 4))
    lora.remove(net)
    assert moved(before, tensors(net)) == set()


# ------------------------------------------------------------------ files
def test_saving_into_a_directory_with_other_files_loses_none(tmp_path: Path) -> None:
    net, _ = adapted("lora", "mlp")
    (tmp_path / "precious.txt").write_text("years of work")
    with contextlib.suppress(AdapterFileError):
        save_adapter(net, tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "years of work"


def test_saving_again_replaces_the_earlier_one(tmp_path: Path) -> None:
    net, _ = adapted("lora", "mlp")
    for _ in range(2):
        perturb(net)
        save_adapter(net, tmp_path / "a")
    fresh = zoo.build("mlp")
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(output(fresh, "mlp"), output(net, "mlp"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_adapter_directory_is_as_readable_as_any(tmp_path: Path) -> None:
    net, _ = adapted("lora", "mlp")
    (tmp_path / "plain").mkdir()
    assert save_adapter(net, tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_neither_saved_nor_loaded(value: float, tmp_path: Path) -> None:
    net, _ = adapted("lora", "mlp")
    save_adapter(net, tmp_path / "a")
    good = read_tensors(tmp_path / "a")
    next(iter(state.trainable(net).values())).data.fill_(value)
    with pytest.raises(AdapterFileError, match="NaN or infinity"):
        save_adapter(net, tmp_path / "a")
    assert {k: v.tolist() for k, v in read_tensors(tmp_path / "a").items()} == {k: v.tolist() for k, v in good.items()}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    save_file({k: v.fill_(value) for k, v in good.items()}, tmp_path / "a" / "adapter.safetensors")
    fresh = zoo.build("mlp")
    before = snapshot(fresh)
    with pytest.raises(AdapterFileError, match="NaN or infinity"):
        load_adapter(fresh, tmp_path / "a")
    assert differences(before, snapshot(fresh)) == []


class Scaled(Adapter):
    """y = g base(x), with a tensor of no size beside it."""

    def __init__(self, gain: nn.Parameter) -> None:
        super().__init__()
        self.gain, self.empty = gain, nn.Parameter(torch.empty(0, 3))

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:
        return self.gain * base(x)


@pytest.fixture
def shared(toys: None) -> type[PEFT]:
    class Shared(PEFT, name="toy_shared", family="additive"):
        """y = g W x, one g for all"""

        targets: str | list[str] | None = "q"

        def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
            gain = nn.Parameter(torch.ones(1))
            yield from ((site, Scaled(gain)) for site in sites)

    return Shared


def test_shared_and_empty_tensors_survive_a_file(shared: type[PEFT], tmp_path: Path) -> None:
    net = zoo.build("bert")
    shared(heads=None).apply(net)
    perturb(net, 1.0)
    assert len([n for n in state.saved(net) if n.endswith("gain")]) == 1
    save_adapter(net, tmp_path / "a")
    fresh = zoo.build("bert")
    load_adapter(fresh, tmp_path / "a", trainable=True)
    assert torch.equal(output(fresh, "bert"), output(net, "bert"))
    assert len({id(p.adapter.gain) for p in state.get_applied(fresh).placements}) == 1
    train(fresh, "bert", steps=1)
    assert torch.equal(output(copy.deepcopy(fresh), "bert"), output(fresh, "bert"))


def test_a_shared_tensor_is_written_once(shared: type[PEFT], tmp_path: Path) -> None:
    net = zoo.build("bert")
    shared(heads=None).apply(net)
    save_adapter(net, tmp_path / "a")
    assert len([n for n in read_tensors(tmp_path / "a") if n.endswith("gain")]) == 1


def test_a_prefix_through_an_mlp_is_saved_as_what_it_stands_for(tmp_path: Path) -> None:
    net = zoo.build("llama")
    PrefixTuning(length=3, bottleneck=5, dropout=0.5).apply(net)
    train(net, "llama", steps=1)
    save_adapter(net.train(), tmp_path / "a")
    net.eval()
    assert {n.rpartition("/")[2] for n in read_tensors(tmp_path / "a")} == {"kv"}
    fresh = zoo.build("llama")
    assert load_adapter(fresh, tmp_path / "a").bottleneck == 0
    close(output(fresh, "llama"), output(net, "llama"), 1e-6)


def bert_body() -> nn.Module:
    torch.manual_seed(0)
    return hf.BertModel(hf.BertConfig(**zoo.TEXT)).eval()


class Inside(nn.Module):
    """A model as the attribute of another."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


@pytest.mark.parametrize("outward", [True, False])
def test_files_of_an_adapter_around_the_root_bridge_a_prefix(outward: bool, tmp_path: Path) -> None:
    source, target = (bert_body(), Inside(bert_body())) if outward else (Inside(bert_body()), bert_body())
    PromptTuning(length=3).apply(source)
    save_adapter(source, tmp_path / "a")
    load_adapter(target, tmp_path / "a")


def test_the_fingerprint_does_not_depend_on_names() -> None:
    marks = []
    for net in (zoo.build("bert"), Inside(zoo.build("bert"))):
        LinearProbe().apply(net)
        marks.append(state.get_applied(net).fingerprint)
    assert marks[0] == marks[1]


def test_a_file_with_a_strange_key_is_an_error(tmp_path: Path) -> None:
    net, _ = adapted("lora", "mlp")
    file = save_adapter(net, tmp_path / "a") / "adapter.safetensors"
    content = load_file(file)
    content["strange"] = content.pop(next(iter(content)))
    save_file(content, file)
    with pytest.raises(AdapterFileError, match="does not fit"):
        load_adapter(zoo.build("mlp"), tmp_path / "a")


def test_a_config_whose_method_is_no_name_is_an_error(tmp_path: Path) -> None:
    net, _ = adapted("lora", "mlp")
    file = save_adapter(net, tmp_path / "a") / "adapter.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "method": ["lora"]}))
    with pytest.raises(AdapterFileError, match="lora"):
        load_adapter(zoo.build("mlp"), tmp_path / "a")


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    net = zoo.build("mlp")
    FullFineTuning(keep_base=False).apply(net)
    save_adapter(net, tmp_path / "a")
    other = zoo.build("mlp")
    other.mlp.weight.data.add_(1.0)
    before = snapshot(other)
    with pytest.raises(AdapterFileError, match="another base"):
        load_adapter(other, tmp_path / "a")
    assert differences(before, snapshot(other)) == []


# ------------------------------------------------------------------ memory
def test_prompt_tuning_keeps_no_copy_of_the_embeddings() -> None:
    net = zoo.build("bert")
    PromptTuning(length=3).apply(net)
    net.bfloat16()
    (placement,) = state.get_applied(net).placements
    table = vars(placement.adapter.prompt).get("table")
    assert table is net.bert.embeddings.word_embeddings


def test_vocabulary_tokens_are_rows_of_the_table_and_no_view() -> None:
    net = zoo.build("llama")
    PromptTuning(length=5, init="vocabulary", vocabulary=20).apply(net)
    tokens, table = state.get_applied(net).placements[0].adapter.tokens, net.model.embed_tokens.weight
    rows = [(table == t).all(1).nonzero().item() for t in tokens]
    assert len(set(rows)) == 5
    assert max(rows) < 20
    train(net, "llama", steps=1)
    assert torch.equal(table, zoo.build("llama").model.embed_tokens.weight)


def test_meta_adapters_are_drawn_again_as_they_would_have_been() -> None:
    for name in ("lora", "mam", "loreft", "prefix_tuning", "houlsby"):
        real, _ = adapted(name, "llama")
        with torch.device("meta"):
            net = zoo.ZOO["llama"]()
        make(name, "llama").apply(net)
        assert all(p.is_meta for p in net.parameters())
        net.to_empty(device="cpu")
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(0.25)
        materialize(net)
        expected = dict(real.named_parameters())
        assert all(torch.equal(p, expected[n]) for n, p in state.trainable(net).items())


# ------------------------------------------------------------------ dropout, forwards of others, forms of call
def test_dropout_of_adapters_acts_in_training_only() -> None:
    for method in (LoRA(dropout=0.5), PrefixTuning(dropout=0.5), LoReFT(dropout=0.5)):
        net = zoo.build("llama")
        method.apply(net)
        perturb(net, 0.3)
        assert torch.equal(output(net, "llama"), output(net, "llama"))
        net.train()
        assert not torch.equal(output(net, "llama"), output(net, "llama"))
        net.eval()
        with method.enabled(net, False):
            net.train()
            assert torch.equal(output(net, "llama"), output(net, "llama"))


def test_adapters_take_the_mode_of_the_model() -> None:
    for mode in (True, False):
        net = zoo.build("gpt2").train(mode)
        make("lora", "gpt2").apply(net)
        assert all(m.training is mode for m in net.modules())


def test_a_forward_that_another_library_put_there_runs_innermost_and_comes_back() -> None:
    net = zoo.build("llama")
    layer = net.model.layers[0].self_attn.q_proj
    calls = []

    def theirs(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return F.linear(x, layer.weight)

    layer.forward = theirs
    lora = LoRA(rank=2)
    lora.apply(net)
    perturb(net, 0.3)
    output(net, "llama")
    assert len(calls) == 1
    lora.remove(net)
    assert layer.forward is theirs


def test_a_forward_that_another_library_puts_around_ours_stays() -> None:
    net = zoo.build("llama")
    layer = net.model.layers[0].self_attn.q_proj
    lora = LoRA(rank=2)
    lora.apply(net)
    inner = layer.forward
    layer.forward = lambda x: inner(x) + 1
    expected = output(net, "llama")
    lora.remove(net)
    assert torch.equal(output(net, "llama"), expected)
    lora.apply(net)
    assert torch.equal(output(net, "llama"), expected)


def test_hooks_on_modules_still_run() -> None:
    net, seen = zoo.build("gpt2"), []
    net.transformer.h[0].attn.c_attn.register_forward_hook(lambda _, args, out: seen.append(out.shape[-1]))
    make("lora", "gpt2").apply(net)
    output(net, "gpt2")
    assert seen == [96]


def test_chunked_feed_forward() -> None:
    """BERT may run its feed-forward layer on pieces of the text: each meets its own input."""
    for name in ("parallel", "houlsby", "lora", "mam"):
        outputs = []
        for chunk in (0, 1):
            net = hf.BertForSequenceClassification(
                hf.BertConfig(**zoo.TEXT, **zoo.QUIET, **zoo.CLASSIFY, chunk_size_feed_forward=chunk)
            ).eval()
            net.load_state_dict(zoo.build("bert").state_dict())
            make(name, "bert").apply(net)
            perturb(net, 0.3)
            outputs.append(output(net, "bert"))
        close(*outputs, 1e-6)


def test_shared_layers_of_albert_meet_their_adapters_at_each_depth() -> None:
    for name in ("parallel", "lora", "loreft", "prefix_tuning", "houlsby"):
        net = zoo.build("albert")
        method = make(name, "bert")
        method.apply(net)
        perturb(net, 0.3)
        out = forward(net, "albert")
        out.sum().backward()
        assert all(p.grad is not None for p in state.trainable(net).values())
        if method.info.mergeable:
            method.merge(net)
            close(output(net, "albert"), out.detach())


def test_positional_and_keyword_calls_agree() -> None:
    for name in ("prompt_tuning", "loreft", "prefix_tuning"):
        net, _ = adapted(name, "bert")
        call = zoo.inputs("bert")
        with torch.no_grad():
            assert torch.equal(net(call["input_ids"], call["attention_mask"]).logits, net(**call).logits)


def test_tuples_instead_of_outputs() -> None:
    for model in ("bert", "llama", "gpt2"):
        for name in ("prompt_tuning", "loreft", "mam"):
            net, _ = adapted(name, model)
            with torch.no_grad():
                assert torch.equal(net(**zoo.inputs(model), return_dict=False)[0], net(**zoo.inputs(model)).logits)
    net = bert_body()
    PromptTuning(length=3).apply(net)
    call = zoo.inputs("bert")
    with torch.no_grad():
        hidden, pooled = net(**call, return_dict=False)[:2]
        out = net(**call)
    assert torch.equal(hidden, out.last_hidden_state)
    assert torch.equal(pooled, out.pooler_output)


def test_token_types_and_positions_are_widened() -> None:
    net, _ = adapted("prompt_tuning", "bert")
    call = zoo.inputs("bert")
    types, positions = torch.zeros_like(call["input_ids"]), torch.arange(7).expand(2, -1)
    with torch.no_grad():
        assert torch.equal(net(**call, token_type_ids=types).logits, net(**call).logits)
        assert torch.equal(net(**call, position_ids=positions).logits, net(**call).logits)
        assert not torch.equal(net(**call, token_type_ids=types + 1).logits, net(**call).logits)


def test_roberta_counts_positions_over_real_tokens() -> None:
    """Positions start behind the padding index and skip padding; the virtual tokens come first."""
    net = zoo.build("roberta")
    base = copy.deepcopy(net)
    PromptTuning(length=3, heads=None).apply(net)
    tokens = state.get_applied(net).placements[0].adapter.tokens
    call = zoo.inputs("roberta")
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), call["attention_mask"]], 1)
    padding = base.config.pad_token_id
    embeds = torch.cat([tokens.expand(2, -1, -1), base.get_input_embeddings()(call["input_ids"])], 1)
    real = torch.cat([torch.ones(2, 3, dtype=torch.long), (call["input_ids"] != padding).long()], 1)
    with torch.no_grad():
        hidden = base.roberta(
            inputs_embeds=embeds, attention_mask=mask, position_ids=real.cumsum(1) * real + padding
        ).last_hidden_state[:, 3:]
        expected = base.classifier(hidden)
    close(output(net, "roberta"), expected)


# ------------------------------------------------------------------ labels
def test_labels_of_parts_do_not_collide(tmp_path: Path) -> None:
    net = zoo.build("bert")
    output(net, "bert")
    before = snapshot(net)
    make("mam", "bert").apply(net)
    with_mam = snapshot(net)
    with pytest.raises(LabelError, match="is taken"):
        make("houlsby", "bert", label="mam_parallel").apply(net)
    assert differences(with_mam, snapshot(net)) == []
    LoRA(rank=2, label="mam_parallel", heads=None).apply(net)
    save_adapter(net, tmp_path / "a", "mam")
    state.get_applied(net, "mam").method.remove(net)
    load_adapter(net, tmp_path / "a")
    for label in ("mam", "mam_parallel"):
        state.get_applied(net, label).method.remove(net, label)
    assert differences(before, snapshot(net)) == []


def test_a_packed_projection_with_an_attribute_like_a_slice() -> None:
    net = zoo.build("gpt2")
    net.transformer.h[1].attn.c_attn.q = "theirs"
    before = snapshot(net)
    with pytest.raises((LabelError, TargetError)):
        make("lora", "gpt2").apply(net)
    assert differences(before, snapshot(net)) == []


def test_an_error_half_way_leaves_the_model_as_it_was() -> None:
    """The second layer has an attribute where adapters are kept."""
    for name, where in (("lora", "self_attn.q_proj"), ("mam", "mlp.down_proj"), ("houlsby", "self_attn.o_proj")):
        net = zoo.build("llama")
        output(net, "llama")
        net.model.layers[1].get_submodule(where).adapters = "theirs"
        before = snapshot(net)
        with pytest.raises(LabelError, match="attribute `adapters` of its own"):
            make(name, "llama").apply(net)
        assert differences(before, snapshot(net)) == []
    net = zoo.build("llama")
    net.model.layers[1].self_attn.attend = "theirs"
    before = snapshot(net)
    with pytest.raises(LabelError, match="`attend` of its own"):
        make("prefix_tuning", "llama").apply(net)
    assert differences(before, snapshot(net)) == []


# ------------------------------------------------------------------ numbers that make no sense
@pytest.mark.parametrize("fields", [{"alpha": math.nan}, {"alpha": math.inf}, {"alphas": {"q": -1.0}}])
def test_a_scale_that_makes_no_sense_is_an_error(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="alpha"):
        LoRA(**fields)


def test_what_cannot_be_merged_is_always_the_same_error() -> None:
    net = zoo.build("llama")
    lora = LoRA(rank=2, lora_bias=True)
    lora.apply(net)
    with pytest.raises(NotMergeableError):
        lora.merge(net)


def test_a_second_adapter_does_not_overwrite_the_head_of_the_first(tmp_path: Path) -> None:
    other, _ = adapted("lora", "bert", label="other")
    perturb(other, 0.3)
    save_adapter(other, tmp_path / "other")
    net, _ = adapted("lora", "bert", label="first", seed=3)
    perturb(net, 0.3, seed=9)
    expected = output(net, "bert")
    try:
        method = load_adapter(net, tmp_path / "other")
    except AdapterFileError:
        return
    with method.enabled(net, False):
        close(output(net, "bert"), expected)


@pytest.mark.parametrize("model", ["opt", "gptj", "gpt_neox", "bloom", "gemma", "phi3", "mistral", "qwen3", "gpt_neo"])
def test_virtual_tokens_in_other_decoders(model: str) -> None:
    """The same as ready-made embeddings with a longer mask, positions counted on."""
    base, net = zoo.build(model), zoo.build(model)
    PromptTuning(length=3).apply(net)
    tokens = state.get_applied(net).placements[0].adapter.tokens
    call = zoo.inputs(model)
    embeds = torch.cat([tokens.expand(2, -1, -1), base.get_input_embeddings()(call["input_ids"])], 1)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), call["attention_mask"]], 1)
    with torch.no_grad():
        expected = base(inputs_embeds=embeds, attention_mask=mask).logits[:, 3:]
    close(output(net, model), expected)


def test_gaussian_starts_have_one_over_rank_as_their_deviation() -> None:
    net = nn.Sequential(nn.Linear(4000, 8))
    LoRA(targets="0", rank=4, init="gaussian").apply(net)
    a = state.get_applied(net).placements[0].adapter.a
    assert abs(a.std().item() - 0.25) < 0.01
    kaiming = nn.Sequential(nn.Linear(4000, 8))
    LoRA(targets="0", rank=4).apply(kaiming)
    a = state.get_applied(kaiming).placements[0].adapter.a
    assert 0.95 < a.abs().max().item() * 4000**0.5 <= 1.0


def test_every_bias_trains_beside_lora_and_comes_back() -> None:
    net = zoo.build("bert")
    output(net, "bert")
    before = snapshot(net)
    lora = LoRA(rank=2, bias="all", heads=None)
    lora.apply(net)
    assert {n for n, _ in net.named_parameters() if n.endswith("bias")} <= set(state.trainable(net))
    train(net, "bert")
    lora.remove(net)
    assert differences(before, snapshot(net)) == []


def test_what_a_checkpoint_keeps_does_not_depend_on_a_switch() -> None:
    net, method = adapted("bitfit", "bert")
    perturb(net, 0.3)
    expected = {n: t.clone() for n, t in state.saved(net).items()}
    with method.enabled(net, False):
        kept = {n: t.clone() for n, t in state.saved(net).items()}
    assert moved(expected, kept) == set()


def test_one_label_on_two_parts_is_not_mistaken_for_one() -> None:
    net = Towers()
    LoRA(rank=2, heads=None).apply(net.a)
    LoRA(rank=2, heads=None).apply(net.b)
    try:
        LoRA().remove(net)
    except LabelError:
        return
    assert not any(".adapters." in n for n, _ in net.named_parameters())
