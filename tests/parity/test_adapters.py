"""Parity with the `adapters` library, from what it computed on tiny models (golden/adapters.safetensors, written by
make_adapters.py): the same tensors on the same base give the same states and the same gradients.

Where it departs from the papers, a test states the difference.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    MAM,
    AdapterFusion,
    Compacter,
    CompacterPP,
    DiReFT,
    DoRA,
    Houlsby,
    Invertible,
    LoRA,
    LoReFT,
    NoReFT,
    ParallelAdapter,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
    UniPELT,
)
from lightning_peft.core import state
from lightning_peft.core.state import Placement

WIDTHS = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
TEXT = {**WIDTHS, "vocab_size": 20, "max_position_embeddings": 16}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 16, "n_inner": 24, "vocab_size": 20}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**TEXT, **QUIET), add_pooling_layer=False),
    "gpt2": lambda: hf.GPT2Model(hf.GPT2Config(**GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**TEXT, num_key_value_heads=2)),
}
BLOCKS = {"bert": "encoder.layer", "gpt2": "h", "llama": "layers"}
AFTER = {  # where `adapters` keeps the bottlenecks after attention and after the feed-forward layer
    "bert": {"o": "attention.output.adapters", "down": "output.adapters"},
    "gpt2": {"o": "attention_adapters.adapters", "down": "output_adapters.adapters"},
    "llama": {"o": "attention_adapters.adapters", "down": "output_adapters.adapters"},
}
Map = dict[str, tuple[str, Callable[[Tensor], Tensor]]]  # our tensor -> their key, and how theirs becomes ours


@functools.cache
def golden() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "golden" / "adapters.safetensors")


def same(x: Tensor) -> Tensor:
    return x


def noise(name: str, shape: Any) -> Tensor:
    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def base(name: str) -> nn.Module:
    model = MODELS[name]().eval()
    model.load_state_dict(
        {k.removeprefix(f"base/{name}/"): v for k, v in golden().items() if k.startswith(f"base/{name}/")}
    )
    return model.double()


def block(placement: Placement) -> int:
    return next(int(part) for part in placement.site.split(".") if part.isdigit())


def compare(name: str, case: str, methods: Any, names: Callable[[str, Placement], Map], unused: str = "none") -> None:
    """Their tensors into our adapters, their states and gradients out; every tensor of theirs is used."""
    model = base(name)
    for method in methods if isinstance(methods, tuple) else (methods,):
        method.apply(model)
    placements, found = [x for applied in state.all_applied(model) for x in applied.placements], {}
    theirs = {k.removeprefix(f"{name}/{case}/"): v for k, v in golden().items() if k.startswith(f"{name}/{case}/")}
    used: set[str] = set()
    for placement in placements:
        own = dict(placement.adapter.named_parameters())
        table = names(name, placement)
        assert set(table) == set(own), (placement.site, set(own))
        for key, (their, turn) in table.items():
            used.add(their)
            own[key].data = turn(theirs[f"tensor/{their}"]).clone()
            found[f"{placement.site}/{placement.role}/{key}"] = own[key], their, turn
    trained = {k.removeprefix("tensor/") for k in theirs if k.startswith("tensor/")}
    assert {k for k in trained if ".parametrizations." not in k and not k.endswith(unused)} == used
    given = ("input_ids",) if "reft" in case else ("input_ids", "attention_mask")
    states = model(**{k: golden()[f"batch/{k}"] for k in given}).last_hidden_state
    wanted = theirs["states"]
    virtual = wanted.shape[1] - states.shape[1]  # prompts, which we take out again
    loose = name == "llama" or case.startswith("loreft")  # its norm is in fp32; R was made in fp32
    close = dict.fromkeys(("atol", "rtol"), 2e-6 if loose else 1e-9)
    torch.testing.assert_close(states, wanted[:, virtual:], **close)
    if virtual:
        return
    (states * noise(case, states.shape)).sum().backward()
    for parameter, their, turn in found.values():
        if f"grad/{their}" in theirs:
            torch.testing.assert_close(parameter.grad, turn(theirs[f"grad/{their}"]), **close)


BOTTLENECK = {
    "down": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}


def bottleneck(name: str, placement: Placement) -> Map:
    """adapter_down.0 and adapter_up are ours, name by name."""
    if not list(placement.adapter.parameters()):
        return {}
    place = f"{BLOCKS[name]}.{block(placement)}.{AFTER[name]['o' if placement.role == 'o' else 'down']}.a"
    return {ours: (f"{place}.{theirs}", same) for ours, theirs in BOTTLENECK.items()}


ALL = pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])


@ALL
def test_houlsby_is_double_seq_bn(name: str) -> None:
    compare(name, "double_seq_bn", Houlsby(bottleneck=4, activation="silu"), bottleneck)


def test_the_parallel_adapter_is_par_bn() -> None:
    compare("bert", "par_bn", ParallelAdapter(bottleneck=4, scale=4.0), bottleneck)


@ALL
def test_pfeiffer_is_seq_bn(name: str) -> None:
    compare(name, "seq_bn", Pfeiffer(bottleneck=4), bottleneck)


def test_the_invertible_adapter_is_theirs_where_no_positions_come_between() -> None:
    """They put it behind the positions (and the norm) of BERT and GPT-2; the paper on the token embedding."""

    def names(name: str, placement: Placement) -> Map:
        if placement.role != "embed":
            return bottleneck(name, placement)
        table: Map = {}
        for half in "fg":
            for ours, theirs in (
                ("down", "0.weight"),
                ("down_bias", "0.bias"),
                ("up", "2.weight"),
                ("up_bias", "2.bias"),
            ):
                table[f"coupling.{half}.{ours}"] = f"invertible_adapters.a.{half.upper()}.{theirs}", same
        return table

    compare("llama", "seq_bn_inv", (Invertible(reduction=2), Pfeiffer(bottleneck=4)), names)


@ALL
def test_fusion_is_theirs(name: str) -> None:
    """A bias on K adds the same to all scores: theirs has one, ours none."""
    member = {"method": "pfeiffer", "config": {"bottleneck": 4}}

    def names(name: str, placement: Placement) -> Map:
        place = f"{BLOCKS[name]}.{block(placement)}.{AFTER[name]['down']}"
        for index, label in enumerate("ab"):
            for ours, theirs in BOTTLENECK.items():
                held = golden()[f"{name}/fusion/frozen/{place}.{label}.{theirs}"]
                placement.adapter.get_buffer(f"experts.{index}.{ours}").data = held
        place = f"{place.removesuffix('.adapters')}.adapter_fusion_layer.a,b"
        return {
            "query": (f"{place}.query.weight", same),
            "query_bias": (f"{place}.query.bias", same),
            "key": (f"{place}.key.weight", same),
            "value": (f"{place}.value.weight", same),
        }

    compare(name, "fusion", AdapterFusion(members=[member, member]), names, unused=".key.bias")


@ALL
def test_the_parallel_adapter_on_the_residual_stream_is_par_bn(name: str) -> None:
    compare(name, "par_bn", ParallelAdapter(bottleneck=4, scale=4.0, input="residual"), bottleneck)


def hypercomplex(name: str, placement: Placement) -> Map:
    place = f"{BLOCKS[name]}.{block(placement)}.{AFTER[name][placement.role or '']}.a"
    table: Map = {"down.rules.a": ("shared_parameters.a.phm_rule", same)}
    for ours, theirs in ("down", "adapter_down.0"), ("up", "adapter_up"):
        for one, two in ("left", "W_left"), ("right", "W_right"), ("bias", "b"):
            table[f"{ours}.{one}"] = f"{place}.{theirs}.{two}", same
    return table


@ALL
def test_compacter_is_theirs(name: str) -> None:
    compare(name, "compacter", Compacter(bottleneck=8, n=4, activation="gelu"), hypercomplex)


@ALL
def test_their_compacter_pp_sits_where_pfeiffers_adapter_does(name: str) -> None:
    """The authors' and ours keep the place of Compacter after the feed-forward layer, without the norm before it."""
    with pytest.raises(AssertionError, match="not close"):
        compare(name, "compacter_pp", CompacterPP(bottleneck=8, n=4, activation="gelu"), hypercomplex)


def reft(name: str, placement: Placement) -> Map:
    if placement.role == "model":
        return {}
    place, table = f"{BLOCKS[name]}.{block(placement)}.reft_layer.refts.a.units", {}
    kinds = {"w": "learned_source.weight", "b": "learned_source.bias", "r": "projection.weight"}
    kinds |= {"w1": "learned_source.weight", "w2": "projection.weight"}
    for key, _ in placement.adapter.named_parameters():
        edit, _, kind = key.partition(".")
        table[key] = f"{place}.{int(edit == 'edit_last')}.{kinds[kind]}", same
    return table


@ALL
@pytest.mark.parametrize("case", ["loreft", "loreft_tied", "noreft", "direft"])
def test_reft_is_theirs_in_rows_without_padding(name: str, case: str) -> None:
    cls = {"loreft": LoReFT, "loreft_tied": LoReFT, "noreft": NoReFT, "direft": DiReFT}[case]
    compare(name, case, cls(rank=3, first=2, last=1, tied=case == "loreft_tied"), reft)


def kv_flat(heads: int, layer: int) -> Callable[[Tensor], Tensor]:
    """Their flat axis is (length, layer, key or value, head, head_dim)."""
    return lambda flat: flat.view(3, 2, 2, heads, 4)[:, layer].transpose(0, 1)


PREFIXES = {
    "bert": "encoder.layer.0.attention.self.prefix_tuning.pool.prefix_tunings.a.self_prefix",
    "gpt2": "h.0.attn.prefix_tuning.pool.prefix_tunings.a.self_prefix",
    "llama": "layers.0.self_attn.prefix_tuning.pool.prefix_tunings.a.self_prefix",
}
KV_HEADS = {"bert": 4, "gpt2": 4, "llama": 2}


def prefix(name: str, placement: Placement) -> Map:
    return {"kv": (f"{PREFIXES[name]}.control_trans", kv_flat(KV_HEADS[name], block(placement)))}


@ALL
def test_prefixes_are_theirs(name: str) -> None:
    compare(name, "prefix", PrefixTuning(length=3), prefix)


def test_mam_is_theirs() -> None:
    def names(name: str, placement: Placement) -> Map:
        return (prefix if placement.role == "attend" else bottleneck)(name, placement)

    compare("bert", "mam", MAM(length=3, bottleneck=4, scale=4.0), names)


def test_prompts_of_adapters_come_behind_the_positions_of_bert() -> None:
    """They put P behind positions and norm, where it gets neither; here, as in peft, tokens of P are tokens."""
    with pytest.raises(AssertionError, match="not close"):
        compare("bert", "prompt", PromptTuning(length=3), prompt)


def prompt(_: str, __: Placement) -> Map:
    return {"prompt.tokens": ("prompt_tuning.prompt_tunings.a.prompt_embedding.weight", same)}


LORAS = {
    "bert": {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "up": "intermediate.dense",
    },
    "llama": {"q": "self_attn.q_proj", "v": "self_attn.v_proj"},
}


def lora(name: str, placement: Placement) -> Map:
    place = f"{BLOCKS[name]}.{block(placement)}.{LORAS[name][placement.role or '']}.loras.a"
    table: Map = {"a": (f"{place}.lora_A", same), "b": (f"{place}.lora_B", same)}
    if any(key == "m" for key, _ in placement.adapter.named_parameters()):
        table["m"] = f"{place}.m.weight", lambda m: m.view(-1)
    return table


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_lora_is_theirs(name: str) -> None:
    compare(name, "lora", LoRA(rank=3, alpha=6, targets="q,v"), lora)


def test_dora_is_theirs_without_a_bias_at_scale_one() -> None:
    """They leave alpha / r out of the norm, scale the bias with the magnitude, and do not detach the norm."""
    compare("llama", "dora", DoRA(rank=3, alpha=3, targets="q,v", detach_norm=False), lora)


def test_ia3_is_theirs_up_to_the_side_of_the_activation_that_is_scaled() -> None:
    """They scale the feed-forward layer's first projection, before the activation; the paper scales after it."""

    def names(name: str, placement: Placement) -> Map:
        return {
            "l": (f"{BLOCKS[name]}.{block(placement)}.{LORAS[name][placement.role or '']}.loras.a.lora_B", torch.ravel)
        }

    compare("bert", "ia3", IA3(targets="k,v,up", inputs="down?"), names)


def unipelt(name: str, placement: Placement) -> Map:
    """A gate a part; GPT-2's packed queries and values one after the other in one LoRA."""
    own = [key for key, _ in placement.adapter.named_parameters()]
    if not own:
        return {}
    role, layer = placement.role or "", f"{BLOCKS[name]}.{block(placement)}"
    if role == "attend":
        gate = PREFIXES[name].replace(f"{BLOCKS[name]}.0", layer).partition(".pool")[0] + ".prefix_gates.a"
        return {**prefix(name, placement), **gates(gate, same)}
    if role in ("q", "v"):
        place = f"{layer}.attn.c_attn" if name == "gpt2" else f"{layer}.{LORAS[name][role]}"
        half = rows("qv".index(role)) if name == "gpt2" else same
        table: Map = {"a": (f"{place}.loras.a.lora_A", half), "b": (f"{place}.loras.a.lora_B", half)}
        return {**table, **gates(f"{place}.loras.a.gate", half)}
    place = f"{layer}.{AFTER[name]['down']}.a"
    table = {f"{key}{bias}": (f"{place}.adapter_{their}.{'bias' if bias else 'weight'}", same)
             for key, their in (("down", "down.0"), ("up", "up")) for bias in ("", "_bias")}  # fmt: skip
    table |= gates(f"{place}.gate", same)
    return {f"after.{key}": value for key, value in table.items()} if own[0].startswith("after.") else table


def rows(index: int) -> Callable[[Tensor], Tensor]:
    return lambda packed: packed.chunk(2)[index]


def gates(place: str, turn: Callable[[Tensor], Tensor]) -> Map:
    return {"gate.weight": (f"{place}.weight", turn), "gate.bias": (f"{place}.bias", turn)}


UNIPELT: dict[str, Any] = {"length": 3, "rank": 3, "bottleneck": 4}


@ALL
def test_unipelt_is_theirs_with_padding_in_the_mean(name: str) -> None:
    compare(name, "unipelt", UniPELT(**UNIPELT, gate="sequence", mask_padding=False), unipelt)


def test_their_unipelt_depends_on_padding() -> None:
    with pytest.raises(AssertionError, match="not close"):
        compare("bert", "unipelt", UniPELT(**UNIPELT), unipelt)
