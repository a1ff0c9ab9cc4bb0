"""Trainable counts against figures that papers report, or that follow from their formulas, at full size on meta.

A row is (model, method, count). Heads are left out (`heads=None`) unless a row says otherwise, as the papers do.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lightning_peft import (
    IA3,
    MAM,
    SPAFIT,
    BitFit,
    CrossAttention,
    Houlsby,
    LinearProbe,
    LNTuning,
    LoRA,
    LoReFT,
    ParallelAdapter,
    PrefixTuning,
    PromptTuning,
    TopLayers,
    UniPELT,
)
from lightning_peft.core import state
from tests.zoo import LARGE, META, ROBERTA, meta

T5_XL = {"vocab_size": 32128, "num_layers": 24, "d_kv": 64, "feed_forward_proj": "gated-gelu"}
LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA_3_8B = {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
DEBERTA_XXL = {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24, "intermediate_size": 6144}


def _from(model: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, model)(getattr(hf, config)(**fields))


MORE: dict[str, Callable[[], nn.Module]] = {
    "bert-base-no-pooler": lambda: hf.BertModel(hf.BertConfig(), add_pooling_layer=False),
    "bert-large-no-pooler": lambda: hf.BertModel(hf.BertConfig(**LARGE), add_pooling_layer=False),
    "roberta-base-classifier": _from("RobertaForSequenceClassification", "RobertaConfig", **ROBERTA, num_labels=2),
    "deberta-xxl": _from("DebertaV2Model", "DebertaV2Config", **DEBERTA_XXL),
    "gpt2-large": _from("GPT2LMHeadModel", "GPT2Config", n_embd=1280, n_head=20, n_layer=36),
    "gpt3": _from("GPT2LMHeadModel", "GPT2Config", n_embd=12288, n_head=96, n_layer=96),
    "bart-large": _from("BartForConditionalGeneration", "BartConfig"),
    "t5-xl": _from("T5ForConditionalGeneration", "T5Config", **T5_XL, d_model=2048, d_ff=5120, num_heads=32),
    "t5-xxl": _from("T5ForConditionalGeneration", "T5Config", **T5_XL, d_model=4096, d_ff=10240, num_heads=64),
    "llama-13b": _from("LlamaForCausalLM", "LlamaConfig", **LLAMA_13B),
    "llama-70b": _from("LlamaForCausalLM", "LlamaConfig", **LLAMA_70B, num_key_value_heads=8),
    "llama-3-8b": _from("LlamaForCausalLM", "LlamaConfig", **LLAMA_3_8B),
}

TOTALS = {
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "roberta-base": 124_645_632,
    "gpt2-medium": 354_823_168,
    "t5-base": 222_903_552,
    "vit-b": 86_389_248,
    "llama-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
}

Row = tuple[str, Any, int]
ADAPTERS: list[Row] = [
    # LoRA, section 4.2 and tables 2-4; the all-linear rows are those of QLoRA and NOLA, q,k,v,up,down that of DoRA
    ("roberta-base", LoRA(rank=8, heads=None), 294_912),
    ("roberta-large", LoRA(rank=8, heads=None), 786_432),
    ("deberta-xxl", LoRA(rank=16, heads=None), 4_718_592),
    ("gpt2-medium", LoRA(rank=4, heads=None), 393_216),  # q and v are slices of c_attn
    ("gpt2-large", LoRA(rank=4, heads=None), 737_280),
    ("gpt3", LoRA(rank=1, heads=None), 4_718_592),
    ("gpt3", LoRA(rank=4, heads=None), 18_874_368),
    ("gpt3", LoRA(rank=8, heads=None), 37_748_736),
    ("llama-7b", LoRA(targets="all-linear", rank=1, heads=None), 2_498_560),
    ("llama-13b", LoRA(targets="all-linear", rank=1, heads=None), 3_911_680),
    ("llama-70b", LoRA(targets="all-linear", rank=1, heads=None), 12_943_360),
    ("llama-7b", LoRA(targets="all-linear", rank=64, heads=None), 159_907_840),
    ("llama-13b", LoRA(targets="all-linear", rank=64, heads=None), 250_347_520),
    ("llama-7b", LoRA(targets="q,k,v,up,down", rank=32, heads=None), 56_098_816),
    ("llama-7b", LoRA(targets="attention", rank=8, heads=None), 8_388_608),
    # Houlsby: L * 2 (2md + m + d)
    ("bert-base", Houlsby(bottleneck=64, heads=None), 2_379_264),
    ("bert-base", Houlsby(bottleneck=48, heads=None), 1_789_056),
    ("bert-large", Houlsby(bottleneck=64, heads=None), 6_343_680),
    # parallel adapter and MAM: L (2md + m + d), and 2 l d more for each of the three kinds of attention
    ("bart-large", ParallelAdapter(bottleneck=512, heads=None), 25_202_688),
    ("bart-large", MAM(length=30, bottleneck=512, heads=None), 27_414_528),
    ("roberta-base", MAM(length=16, bottleneck=16, scale=2.0, heads=None), 599_232),
    ("bert-base", UniPELT(heads=None), 1_410_672),  # LoRA 294,912, prefix 184,320, adapter 894,528, gates 12 4 769
    # (IA)^3: 2 d_kv for each attention, d_ff for each feed-forward layer
    ("bert-base", IA3(heads=None), 55_296),
    ("t5-base", IA3(heads=None), 129_024),
    ("t5-xl", IA3(heads=None), 540_672),
    ("t5-xxl", IA3(heads=None), 1_081_344),
    ("llama-7b", IA3(heads=None), 614_400),
    # prompts: l d
    ("t5-base", PromptTuning(length=100, heads=None), 76_800),
    ("t5-xxl", PromptTuning(length=100, heads=None), 409_600),
    ("t5-xxl", PromptTuning(length=5, heads=None), 20_480),
    # prefixes: L 2 l d_kv
    ("bert-base", PrefixTuning(length=10, heads=None), 184_320),
    ("gpt2-medium", PrefixTuning(length=5, heads=None), 245_760),
    ("gpt2-medium", PrefixTuning(length=5, bottleneck=512, heads=None), 25_744_896),
    ("gpt2-large", PrefixTuning(length=20, heads=None), 1_843_200),
    ("roberta-large", PrefixTuning(length=128, heads=None), 6_291_456),
    ("llama-7b", PrefixTuning(length=30, heads=None), 7_864_320),
    ("llama-3-8b", PrefixTuning(length=30, heads=None), 1_966_080),  # 8 key/value heads of 128
    # LoReFT: L (2 r d + r)
    ("roberta-base", LoReFT(rank=1, heads=None), 18_444),
    ("roberta-large", LoReFT(rank=1, heads=None), 49_176),
    ("llama-7b", LoReFT(rank=8, heads=None), 2_097_408),
    ("llama-13b", LoReFT(rank=8, heads=None), 3_277_120),
]
IN_PLACE: list[Row] = [
    ("roberta-base-classifier", LoRA(rank=8), 887_042),  # with the head: 768^2 + 768 + 2 * 768 + 2
    ("bert-base", BitFit(heads=None), 102_912),
    ("bert-base-no-pooler", BitFit(heads=None), 102_144),
    ("bert-base", BitFit(targets="attention,ffn", heads=None), 82_944),  # no norms, no pooler
    ("bert-base", BitFit(targets="q,up", heads=None), 46_080),
    ("bert-large", BitFit(heads=None), 272_384),
    ("bert-large-no-pooler", BitFit(heads=None), 271_360),
    ("bert-large", BitFit(targets="q,up", heads=None), 122_880),
    ("gpt2", BitFit(heads=None), 102_144),
    ("gpt2", BitFit(targets="q,up", heads=None), 46_080),  # q: a third of the packed bias
    ("vit-b", BitFit(heads=None), 103_680),  # with those of the patch convolution and the pooler
    ("bert-base", LNTuning(heads=None), 38_400),
    ("bert-large", LNTuning(heads=None), 100_352),
    ("gpt2", LNTuning(heads=None), 38_400),
    ("vit-b", LNTuning(heads=None), 38_400),
    ("t5-base", LNTuning(heads=None), 47_616),  # gains only
    ("llama-7b", LNTuning(heads=None), 266_240),
    ("bert-large", Houlsby(bottleneck=64, norms=True, heads=None), 6_444_032),
    ("bart-large", CrossAttention(heads=None), 50_405_376),  # 12 (4 (d^2 + d) + 2d)
    ("t5-base", CrossAttention(heads=None), 12 * (4 * 768**2 + 768)),
    # biases of blocks 5 to 24, 7d + d_ff each, and LoRA in blocks 10 to 24
    ("bert-large", SPAFIT(frozen=4, biased=9, heads=None), 20 * 11_264 + 15 * 2 * 8 * 2048),
    ("roberta-base-classifier", LinearProbe(), 768**2 + 768 + 2 * 768 + 2),
    ("bert-base", TopLayers(k=2, heads=None), 2 * 7_087_872),
    ("gpt2", TopLayers(k=3, heads=None), 3 * 7_087_872 + 2 * 768),  # with the norm after the last block
]


@cache
def _base(name: str) -> nn.Module:
    if name in META:
        return meta(name)
    with torch.device("meta"):
        return MORE[name]()


def fresh(name: str) -> nn.Module:
    """A new model on the meta device; copying one is quicker than building it."""
    return copy.deepcopy(_base(name))


def ids(rows: list[Row]) -> list[str]:
    return [f"{model}-{method.info.name}-{count}" for model, method, count in rows]


@pytest.mark.parametrize(("name", "total"), TOTALS.items(), ids=list(TOTALS))
def test_total(name: str, total: int) -> None:
    assert sum(p.numel() for p in fresh(name).parameters()) == total


@pytest.mark.parametrize(("name", "method", "count"), ADAPTERS, ids=ids(ADAPTERS))
def test_adapters(name: str, method: Any, count: int) -> None:
    model = method.apply(fresh(name))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert state.describe(model)["trainable"] == count


@pytest.mark.parametrize(("name", "method", "count"), IN_PLACE, ids=ids(IN_PLACE))
def test_trained_in_place(name: str, method: Any, count: int) -> None:
    assert state.describe(method.apply(fresh(name)))["trainable"] == count  # of a packed parameter, the masked entries
