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

from lightning_peft import IA3, MAM, DoRA, Houlsby, LoRA, ParallelAdapter, PrefixTuning, PromptTuning
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


def compare(name: str, case: str, method: Any, names: Callable[[str, Placement], Map]) -> None:
    """Their tensors into our adapters, their states and gradients out; every tensor of theirs is used."""
    model = base(name)
    method.apply(model)
    applied, found = state.get_applied(model), {}
    theirs = {k.removeprefix(f"{name}/{case}/"): v for k, v in golden().items() if k.startswith(f"{name}/{case}/")}
    used: set[str] = set()
    for placement in applied.placements:
        own = dict(placement.adapter.named_parameters())
        table = names(name, placement)
        assert set(table) == set(own), (placement.site, set(own))
        for key, (their, turn) in table.items():
            used.add(their)
            own[key].data = turn(theirs[f"tensor/{their}"]).clone()
            found[f"{placement.site}/{placement.role}/{key}"] = own[key], their, turn
    trained = {k.removeprefix("tensor/") for k in theirs if k.startswith("tensor/")}
    assert {k for k in trained if ".parametrizations." not in k} == used
    states = model(**{k: golden()[f"batch/{k}"] for k in ("input_ids", "attention_mask")}).last_hidden_state
    wanted = theirs["states"]
    virtual = wanted.shape[1] - states.shape[1]  # prompts, which we take out again
    close = {"atol": 2e-6, "rtol": 2e-6} if name == "llama" else {"atol": 1e-9, "rtol": 1e-9}  # its norm is in fp32
    torch.testing.assert_close(states, wanted[:, virtual:], **close)
    if virtual:
        return
    (states * noise(case, states.shape)).sum().backward()
    for parameter, their, turn in found.values():
        if f"grad/{their}" in theirs:
            torch.testing.assert_close(parameter.grad, turn(theirs[f"grad/{their}"]), **close)


def bottleneck(name: str, placement: Placement) -> Map:
    """adapter_down.0 and adapter_up are ours, name by name."""
    if not list(placement.adapter.parameters()):
        return {}
    place = f"{BLOCKS[name]}.{block(placement)}.{AFTER[name][placement.role or 'down']}.a"
    return {
        "down": (f"{place}.adapter_down.0.weight", same),
        "down_bias": (f"{place}.adapter_down.0.bias", same),
        "up": (f"{place}.adapter_up.weight", same),
        "up_bias": (f"{place}.adapter_up.bias", same),
    }


ALL = pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])


@ALL
def test_houlsby_is_double_seq_bn(name: str) -> None:
    compare(name, "double_seq_bn", Houlsby(bottleneck=4, activation="silu"), bottleneck)


def test_the_parallel_adapter_is_par_bn() -> None:
    compare("bert", "par_bn", ParallelAdapter(bottleneck=4, scale=4.0), bottleneck)


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
    return {"tokens": ("prompt_tuning.prompt_tunings.a.prompt_embedding.weight", same)}


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
