"""Methods made of several, and several methods at once: UniPELT, S4, SPAFIT, MAM, lists of methods."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from harness import output, perturb
from torch import Tensor, nn

from lightning_peft import UniPELT, load_adapter, save_adapter
from lightning_peft.core import state
from lightning_peft.core.attention import scaled_dot_product
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import TargetError
from lightning_peft.methods.unipelt import GatedPrefix

SMALL: dict[str, Any] = {"length": 3, "rank": 3, "bottleneck": 6, "heads": None}


def ready(method: Any, model: str, **more: Any) -> nn.Module:
    """An adapted model in fp64 whose adapters say something."""
    net = zoo.build(model).double()
    method.apply(net)
    perturb(net, scale=0.3)
    return net


# ------------------------------------------------------------------ UniPELT
def states(net: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    call = {"tokens": ids, "mask": mask} if isinstance(net, zoo.Encoder) else {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        out = net(**call, **({"decoder_input_ids": ids[:, :3]} if hasattr(net, "lm_head") else {}))
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("model", ["bert", "encoder", "t5"])
def test_unipelt_gives_a_text_what_it_gives_alone_unless_asked_for_the_leak(model: str) -> None:
    ids, mask = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]]), torch.ones(2, 6, dtype=torch.long)
    mask[1, 3:] = 0
    difference = {}
    for padding in (True, False):
        net = ready(UniPELT(**SMALL, mask_padding=padding), model)
        together, alone = states(net, ids, mask)[1], states(net, ids[1:, :3], mask[1:, :3])[0]
        difference[padding] = float((together - alone).abs().max())
    assert difference[True] < 1e-5  # T5's norms are in fp32
    assert difference[False] > 30 * difference[True]


def test_a_gate_a_query_is_attention_with_a_prefix_a_query() -> None:
    prefix = GatedPrefix(3, 2, 4).gated(8, SimpleNamespace(per_token=True, masks=None)).cast_(torch.float64)  # type: ignore[arg-type]
    assert isinstance(prefix, GatedPrefix)
    prefix.reset(Draw(0, "prefix"))
    x, g = torch.randn(2, 5, 8).double(), torch.rand(2, 5, 1).double()
    query, key, value = (torch.randn(2, 2, n, 4).double().requires_grad_() for n in (5, 7, 7))
    prefix.read(x)
    assert prefix.value is not None
    torch.testing.assert_close(prefix.value, torch.sigmoid(x @ prefix.gate.weight.T + prefix.gate.bias))
    prefix.value = g
    found, _ = prefix(scaled_dot_product, query, key, value, None)
    wanted = torch.empty(2, 5, 2, 4).double()
    for b in range(2):
        for t in range(5):
            for h in range(2):
                keys, values = (
                    torch.cat([g[b, t] * p[:, h], x[b, h]]) for p, x in zip(prefix.kv, (key, value), strict=True)
                )
                wanted[b, t, h] = (keys @ query[b, h, t] / 2).softmax(0) @ values
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    again, _ = prefix_again(prefix, g, query, key, value)
    torch.testing.assert_close(again, wanted, atol=1e-12, rtol=1e-12)


def prefix_again(prefix: GatedPrefix, g: Tensor, *qkv: Tensor) -> Any:
    """Through a base that is told the scale, as transformers does."""

    def base(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float) -> Any:
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling).transpose(1, 2), None

    prefix.value = g
    return prefix(base, *qkv, None, scaling=0.5)


def test_gates_are_a_number_a_text_in_encoders_and_a_number_a_token_where_attention_is_causal() -> None:
    def per_token(model: str, **more: Any) -> set[tuple[str, bool]]:
        net = UniPELT(**SMALL, **more).apply(zoo.build(model))
        return {(m.place.__class__.__name__, m.per_token) for m in net.modules() if hasattr(m, "per_token")}

    assert per_token("llama") == {("LlamaDecoderLayer", True)}
    assert per_token("llama", gate="sequence") == {("LlamaDecoderLayer", False)}
    assert per_token("bert") == {("BertLayer", False)}
    assert per_token("t5") == {("T5Block", False), ("T5Block", True)}
    assert per_token("vit", gate="token") == {("ViTLayer", True)}


def test_a_sequence_gate_in_a_decoder_listens_to_the_decoders_own_mask() -> None:
    net = ready(UniPELT(**SMALL, gate="sequence"), "t5")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]] * 2)
    hidden = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    call = {"input_ids": ids, "decoder_input_ids": torch.tensor([[0, 3, 4, 5]] * 2)}
    with torch.no_grad():
        full = net(**call, decoder_attention_mask=hidden).logits
        short = net(input_ids=ids[1:], decoder_input_ids=call["decoder_input_ids"][1:, :2]).logits
    torch.testing.assert_close(full[1:, :2], short, atol=1e-5, rtol=1e-5)


def test_the_prefix_of_unipelt_may_come_out_of_an_mlp_and_files_hold_what_comes_out(tmp_path: Path) -> None:
    net = UniPELT(**SMALL, prefix_bottleneck=5).apply(zoo.build("bert"))
    perturb(net, scale=0.3)
    save_adapter(net, tmp_path / "a")
    fresh = zoo.build("bert")
    assert load_adapter(fresh, tmp_path / "a").prefix_bottleneck == 0  # type: ignore[attr-defined]
    torch.testing.assert_close(output(fresh, "bert"), output(net, "bert"), atol=1e-5, rtol=1e-5)
    assert state.describe(fresh)["bytes"] < state.describe(net)["bytes"]


def test_unipelt_where_a_layer_is_not_known_whole() -> None:
    with pytest.raises(TargetError, match="needs the queries' projection and the block"):
        UniPELT(exclude="*.layers.0", heads=None).apply(zoo.build("llama"))
