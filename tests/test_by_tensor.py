"""Which tensors of the base a method trains: biases, norms, cross-attention, layers, blocks, nodes."""

from __future__ import annotations

import pytest
import torch
import zoo
from harness import loss, output, tensors, train
from torch import nn

from lightning_peft import BitFit, CrossAttention, LNTuning, TopLayers
from lightning_peft.core import state
from lightning_peft.core.fields import FieldError
from lightning_peft.core.sites import TargetError


def trained(net: nn.Module) -> set[str]:
    return set(state.trainable(net))


def changed(net: nn.Module, model: str) -> set[str]:
    """What three steps of AdamW move, by name."""
    before = tensors(net)
    train(net, model)
    return {name for name, tensor in tensors(net).items() if not torch.equal(tensor, before[name])}


# ------------------------------------------------------------------ BitFit, LN-Tuning
def test_bitfit_moves_every_bias_and_nothing_else() -> None:
    net = BitFit(heads=None).apply(zoo.build("bert"))  # type: ignore[assignment]
    named = {name for name, _ in net.named_parameters() if name.endswith("bias")}
    assert trained(net) == named
    keys = {name for name in named if ".key." in name}  # softmax does not see them: rounding alone moves them
    assert named - keys <= changed(net, "bert") <= named


def test_the_small_bitfit_trains_biases_of_queries_and_of_the_first_feed_forward_projection() -> None:
    net = BitFit(targets="q,up", heads=None).apply(zoo.build("gpt2"))
    before = net.transformer.h[0].attn.c_attn.bias.detach().clone()  # type: ignore[union-attr, index]
    train(net, "gpt2")
    bias = net.transformer.h[0].attn.c_attn.bias  # type: ignore[union-attr, index]
    assert not (bias[:32] == before[:32]).any()
    assert torch.equal(bias[32:], before[32:])
    assert {name.rpartition("h.")[2][2:] for name in trained(net)} == {"attn.c_attn.bias", "mlp.c_fc.bias"}


def test_without_biases_bitfit_makes_them_or_says_that_there_is_nothing() -> None:
    net = BitFit().apply(zoo.build("llama"))
    shapes = {
        name.rpartition(".adapters.")[0].rpartition(".")[2]: p.numel() for name, p in state.trainable(net).items()
    }
    assert shapes == {
        "q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32, "gate_proj": 64, "up_proj": 64, "down_proj": 32
    }  # fmt: skip
    with pytest.raises(ValueError, match="finds nothing to train"):
        BitFit(create=False).apply(zoo.build("llama"))


def test_norms_of_queries_and_keys_train_on_request() -> None:
    few, all_of_them = (LNTuning(targets=t).apply(zoo.build("qwen3")) for t in ("norm", "norm,norm.qk"))
    more = trained(all_of_them) - trained(few)
    assert {name.split(".")[-2] for name in more} == {"q_norm", "k_norm"}
    assert state.describe(few)["trainable"] == 5 * 32
    assert state.describe(all_of_them)["trainable"] == 5 * 32 + 2 * 2 * 16
    assert more <= changed(all_of_them, "qwen3")


# ------------------------------------------------------------------ cross-attention
CROSS = {
    "bart": ("decoder.layers.{}.encoder_attn.", "decoder.layers.{}.encoder_attn_layer_norm."),
    "t5": ("decoder.block.{}.layer.1.EncDecAttention.", "decoder.block.{}.layer.1.layer_norm."),
    "whisper": ("decoder.layers.{}.encoder_attn.", "decoder.layers.{}.encoder_attn_layer_norm."),
    "transformer": ("decoder.layers.{}.multihead_attn.", "decoder.layers.{}.norm2."),
    "gpt2_cross": ("h.{}.crossattention.", "h.{}.ln_cross_attn."),
}


@pytest.mark.parametrize("model", CROSS)
def test_the_attention_to_the_encoder_trains_whole_with_its_norm(model: str) -> None:
    net = zoo.build(model)
    wanted = {
        name
        for name, _ in net.named_parameters()
        if any(part.format(i) in name for part in CROSS[model] for i in range(3))
    }
    CrossAttention(heads=None).apply(net)
    assert trained(net) == wanted
    assert not list(state.masked(net))  # packed projections as a whole, without a mask
    assert changed(net, model) == wanted


def test_the_embeddings_of_the_new_side() -> None:
    def more(model: str, side: str) -> set[str]:
        found = [trained(CrossAttention(embeddings=e, heads=None).apply(zoo.build(model))) for e in (side, "none")]
        return {name.removeprefix("model.") for name in found[0] - found[1]}

    norm = "layernorm_embedding"
    for side in ("encoder", "decoder"):
        ends = {f"{side}.{norm}.weight", f"{side}.{norm}.bias", f"{side}.embed_positions.weight"}
        assert more("bart", side) == {"shared.weight", *ends}  # one table for both sides and the output
    assert more("t5", "encoder") == {"shared.weight"}
    untied = zoo.build("t5")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())  # type: ignore[union-attr]
    assert {"lm_head.weight", "shared.weight"} < trained(CrossAttention(embeddings="decoder").apply(untied))


def test_cross_attention_where_there_is_none() -> None:
    with pytest.raises(TargetError, match=r"BertForSequenceClassification has no cross-attention.*Roles known here"):
        CrossAttention().apply(zoo.build("bert"))
    with pytest.raises(TargetError, match="no embeddings are found"):
        CrossAttention(embeddings="encoder").apply(zoo.build("transformer"))
    nameless = zoo.build("bart")
    for layer in nameless.model.decoder.layers:  # type: ignore[union-attr]
        layer.encoder_attn_layer_norm = nn.Identity()
    with pytest.raises(TargetError, match="norm of the cross-attention .* is not recognised"):
        CrossAttention().apply(nameless)


# ------------------------------------------------------------------ the top
def test_top_layers_train_the_last_blocks_their_norm_and_the_head_and_no_gradient_goes_lower() -> None:
    net = TopLayers(k=1).apply(zoo.build("vit"))
    wanted = {n for n, _ in net.named_parameters() if n.startswith(("vit.layers.1.", "vit.layernorm.", "classifier."))}
    assert trained(net) == wanted
    below = []
    net.vit.layers[0].register_forward_hook(lambda *io: below.append(io[2]))  # type: ignore[union-attr, index]
    loss(net, "vit").backward()
    assert not below[0].requires_grad
    assert changed(net, "vit") == wanted


def test_top_layers_of_an_encoder_decoder_are_those_of_the_decoder() -> None:
    net = TopLayers(k=2).apply(zoo.build("t5"))
    assert {".".join(n.split(".")[:3]) for n in trained(net)} == {
        "decoder.block.1",
        "decoder.block.2",
        "decoder.final_layer_norm.weight",
    }
    assert output(net, "t5").shape[-1] == zoo.VOCAB


def test_more_top_layers_than_there_are() -> None:
    with pytest.raises(TargetError, match=r"k=3.*here are 2 blocks"):
        TopLayers(k=3).apply(zoo.build("bert"))
    with pytest.raises(FieldError, match="k=0"):
        TopLayers(k=0)
