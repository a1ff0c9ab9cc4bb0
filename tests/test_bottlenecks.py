"""Bottleneck adapters: the papers' equations by hooks on the base in fp64, places, counts, and what each is for."""

from __future__ import annotations

import copy
import pickle
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import boring
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
import zoo
from harness import differences, forward, loss, output, perturb, snapshot, train
from hydra.utils import instantiate as build
from omegaconf import OmegaConf
from test_counts import fresh
from test_gradient_checkpointing import check_exact
from test_oracles import bottleneck, compare, inputs, pair
from torch import Tensor, nn

from lightning_peft import (
    AdapterDrop,
    AdapterFusion,
    AdaptFormer,
    Bapna,
    Houlsby,
    InputAdapter,
    Invertible,
    LoRA,
    OutputAdapter,
    ParallelAdapter,
    Pfeiffer,
)
from lightning_peft.callback import PEFT
from lightning_peft.core import state
from lightning_peft.core.adapter import NotMergeableError
from lightning_peft.core.fields import FieldError
from lightning_peft.core.files import AdapterFileError, load_adapter, save_adapter
from lightning_peft.core.merge import MergeError
from lightning_peft.core.sites import TargetError, roles, sites
from lightning_peft.core.stream import closing_norm, edit_input, edit_output, final_norm, norms_before
from lightning_peft.methods.parallel import Tap
from lightning_peft.schema import schema

Values = dict[str, Tensor]
Edit = Callable[[nn.Module, Any, Any], Any]  # module, arguments, what it gave -> what it gives


def hooked(base: nn.Module, model: str, edits: dict[str, Edit]) -> Tensor:
    """The base's output with what these modules give replaced."""
    handles = [base.get_submodule(name).register_forward_hook(edit) for name, edit in edits.items()]
    try:
        return forward(base, model, **inputs(model))
    finally:
        for handle in handles:
            handle.remove()


def first(change: Callable[[Tensor], Tensor], out: Any) -> Any:
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


def places(net: nn.Module) -> set[str]:
    """Where the adapters with parameters are."""
    names = {id(m): name for name, m in net.named_modules()}
    found = [
        x for a in state.applied_to(net).values() for x in a.placements if any(True for _ in x.adapter.parameters())
    ]
    return {names[id(x.place)] for x in found}


def prefixes(values: Values, label: str) -> set[str]:
    return {name.split(f".adapters.{label}.")[0] for name in values}


# ------------------------------------------------------------------ where the residual stream is seen
POST = {
    "bert": "bert.encoder.layer.{}.output.LayerNorm",
    "bert_mlm": "bert.encoder.layer.{}.output.LayerNorm",
    "roberta": "roberta.encoder.layer.{}.output.LayerNorm",
    "electra": "electra.encoder.layer.{}.output.LayerNorm",
    "deberta": "deberta.encoder.layer.{}.output.LayerNorm",
    "distilbert": "distilbert.transformer.layer.{}.output_layer_norm",
    "albert": "albert.encoder.albert_layer_groups.{}.albert_layers.0.full_layer_layer_norm",
    "bart": "model.encoder.layers.{}.final_layer_norm",
    "bart_cls": "model.encoder.layers.{}.final_layer_norm",
    "encoder": "encoder.layers.{}.norm2",
    "transformer": "transformer.encoder.layers.{}.norm2",
}


@pytest.mark.parametrize("model", sorted(set(zoo.ZOO) - {"mlp"}))
def test_the_norm_that_closes_a_block_is_the_one_whose_output_it_returns(model: str) -> None:
    """Measured: in every family the tensor that the block returns is, or is not, what its closing norm gave."""
    net, last = zoo.build(model), {}
    found = sites(net, "block")
    norms = {block.name: closing_norm(found, block) for block in found}
    for site in roles(net)["norm"]:
        site.module.register_forward_hook(lambda _, __, out, name=site.name: last.__setitem__(name, out))
    returned: dict[str, str | None] = {}

    def note(_: nn.Module, __: Any, out: Any, name: str) -> None:
        y = out[0] if isinstance(out, tuple) else out
        returned[name] = next((n for n, value in last.items() if value is y), None)

    for block in found:
        block.module.register_forward_hook(partial(note, name=block.name))
    if model == "encoder" or model == "transformer":
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        forward(net, model) if model != "clip" else net(**zoo.inputs(model))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert returned == {name: norm and norm.name for name, norm in norms.items()}
    assert (model in POST) == any(norms.values())
    if model in POST:
        assert {POST[model].format(i) for i in range(2)} <= {n.name for n in norms.values() if n}


FINAL = {
    "gpt2": "transformer.ln_f",
    "llama": "model.norm",
    "t5": "encoder.final_layer_norm",
    "vit": "vit.layernorm",
    "opt": "model.decoder.final_layer_norm",
    "bloom": "transformer.ln_f",
    "clip": "text_model.final_layer_norm",
    "whisper": "model.encoder.layer_norm",
    "timm_vit": "norm",
    "modernbert": "model.final_norm",
    "bert_mlm": None,
    "bart": None,
    "encoder": None,
    "transformer": "transformer.encoder.norm",
}


@pytest.mark.parametrize(("model", "name"), FINAL.items())
def test_the_norm_after_the_last_block(model: str, name: str | None) -> None:
    found = sites(zoo.build(model), "block")
    norm = final_norm(found, found[0])
    assert (norm and norm.name) == name


FAMILIES: dict[str, tuple[str | None, str | None]] = {  # the closing norm and the final one, seen in a run
    "MBart": (None, "layer_norm"),
    "Marian": ("final_layer_norm", None),
    "BigBirdPegasus": (None, None),
    "RobertaPreLayerNorm": (None, "LayerNorm"),
    "XLNet": ("ff.layer_norm", None),
    "Wav2Vec2": ("final_layer_norm", None),
    "Olmo2": (None, "norm"),
    "Dinov2": (None, "layernorm"),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_other_families(family: str) -> None:
    config = getattr(hf, f"{family}Config")()
    for name in {"num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer"} & config.to_dict().keys():
        setattr(config, name, 2)
    with torch.device("meta"):
        net = getattr(hf, f"{family}Model")(config)
    found = sites(net, "block")
    closing, final = closing_norm(found, found[0]), final_norm(found, found[0])
    assert (closing and closing.name.removeprefix(f"{found[0].name}.")) == FAMILIES[family][0]
    assert (final and final.name.rpartition(".")[2]) == FAMILIES[family][1]


@pytest.mark.parametrize("before", [True, False])
def test_models_of_one_name_and_two_orders(before: bool) -> None:
    """OPT and torch.nn say in their configuration where the norm goes; no name tells."""
    options: dict[str, Any] = {"hidden_size": 8, "ffn_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    opt = hf.OPTModel(hf.OPTConfig(**options, do_layer_norm_before=before, vocab_size=9, word_embed_proj_dim=8))
    layer = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, norm_first=before), 1, enable_nested_tensor=False
    )
    for net in (opt, layer):
        found = sites(net, "block")
        assert (closing_norm(found, found[0]) is None) == before


def test_arguments_and_outputs_of_blocks() -> None:
    one = torch.ones(1)
    assert edit_input(lambda x: x + 1, (one, "mask"), {"a": 1}) == ((2 * one, "mask"), {"a": 1})
    assert edit_input(lambda x: x + 1, (), {"mask": 0, "hidden_states": one}) == ((), {"mask": 0, "hidden_states": 2})
    assert edit_input(lambda x: x + 1, (), {"src": one, "mask": 0}) == ((), {"src": 2 * one, "mask": 0})
    out = hf.modeling_outputs.BaseModelOutput(last_hidden_state=one, hidden_states=(one,))
    edited = edit_output(lambda x: x + 1, out)
    assert type(edited) is type(out)
    assert (edited.last_hidden_state, edited.hidden_states) == (2 * one, (one,))
    assert edit_output(lambda x: x + 1, [one, 5]) == [2 * one, 5]


# ------------------------------------------------------------------ Houlsby's variants
VARIANTS = {"o": ["o"], "down": ["down"], "o,cross.o,down": ["o", "cross.o", "down"]}


@pytest.mark.parametrize("targets", list(VARIANTS))
def test_houlsby_after_attention_cross_attention_or_the_feed_forward_layer(targets: str) -> None:
    net, base, values = pair("t5", Houlsby(targets=targets, bottleneck=5, dtype="float64", heads=None))
    expected = {site.name for role in VARIANTS[targets] for site in roles(base)[role]}
    assert len(expected) == {"o": 5, "down": 5, "o,cross.o,down": 13}[targets]
    assert prefixes(values, "houlsby") == expected

    def edit(place: str) -> Edit:
        return lambda _, __, h: h + bottleneck(values, f"{place}.adapters.houlsby", h, F.gelu)

    compare(net, forward(net, "t5"), values, hooked(base, "t5", {name: edit(name) for name in expected}))


# ------------------------------------------------------------------ Pfeiffer
@pytest.mark.parametrize("model", ["bert", "bart", "encoder", "gpt2", "llama", "t5", "vit", "gemma2"])
def test_pfeiffer(model: str) -> None:
    """LN(s + D(LN(s))), s the sum that the norm reads; s + D(s) on what a pre-norm block returns."""
    net, base, values = pair(model, Pfeiffer(bottleneck=5, dtype="float64", heads=None))

    def edit(place: str) -> Edit:
        def post(norm: nn.Module, args: Any, u: Tensor) -> Tensor:
            s = args[0] + bottleneck(values, f"{place}.adapters.pfeiffer", u, F.relu)
            return F.layer_norm(s, s.shape[-1:], norm.weight, norm.bias, norm.eps)

        def pre(_: nn.Module, __: Any, out: Any) -> Any:
            return first(lambda s: s + bottleneck(values, f"{place}.adapters.pfeiffer", s, F.relu), out)

        return post if model in POST else pre

    found = prefixes(values, "pfeiffer")
    assert len(found) == len(sites(base, "block"))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        compare(net, forward(net, model), values, hooked(base, model, {name: edit(name) for name in found}))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_pfeiffer_under_a_chunked_feed_forward_layer() -> None:
    whole, chunked = (zoo.build("bert") for _ in range(2))
    for layer in chunked.bert.encoder.layer:
        layer.chunk_size_feed_forward = 1
    for net in (whole, chunked):
        Pfeiffer(bottleneck=4).apply(net)
        perturb(net)
    torch.testing.assert_close(output(chunked, "bert"), output(whole, "bert"))


def test_pfeiffer_where_the_user_names_the_norms() -> None:
    net = zoo.build("mixer")
    Pfeiffer(bottleneck=4, targets="*.mid", heads=None).apply(net)
    assert places(net) == {"steps.0.mid", "steps.1.mid"}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Pfeiffer(targets="o"), r"Pfeiffer acts at the end of blocks, and '.*' \(Linear\) is none"),
        (Bapna(targets="o"), r"Bapna acts on what blocks return, and '.*' \(Linear\) is none"),
    ],
)
def test_places_that_are_none(method: PEFT, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        method.apply(zoo.build("bert"))


# ------------------------------------------------------------------ Bapna
@pytest.mark.parametrize("model", ["bert", "gpt2", "t5", "encoder"])
def test_bapna(model: str) -> None:
    net, base, values = pair(model, Bapna(bottleneck=5, dtype="float64", heads=None))

    def edit(place: str) -> Edit:
        def change(y: Tensor) -> Tensor:
            here = f"{place}.adapters.bapna"
            u = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            return y + bottleneck(values, here, u * values[f"{here}.gain"] + values[f"{here}.shift"], F.relu)

        return lambda _, __, out: first(change, out)

    found = prefixes(values, "bapna")
    assert found == {site.name for site in sites(base, "block")}
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        compare(net, forward(net, model), values, hooked(base, model, {name: edit(name) for name in found}))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# ------------------------------------------------------------------ counts
def count(model: str, method: PEFT) -> int:
    return state.describe(method.apply(fresh(model)))["trainable"]


@pytest.mark.parametrize(
    ("model", "method", "expected"),
    [
        ("bert-base", Pfeiffer(bottleneck=48, heads=None), 894_528),
        ("t5-base", Pfeiffer(bottleneck=24, heads=None), 903_744),
        # AdapterL in the LoRA paper: L (2md + m + d), and 2d of the new norm
        ("gpt2-medium", Bapna(bottleneck=6, heads=None), 368_784),
        ("gpt2-medium", Bapna(bottleneck=224, heads=None), 11_089_152),
        ("gpt2-large", Bapna(bottleneck=8, heads=None), 875_808),
        ("gpt2-large", Bapna(bottleneck=248, heads=None), 23_002_848),
        ("gpt2-medium", Houlsby(targets="down", bottleneck=6, heads=None), 368_784 - 24 * 2 * 1024),
        ("gpt3", Houlsby(bottleneck=1, heads=None), 7_078_080),
    ],
)
def test_counts(model: str, method: PEFT, expected: int) -> None:
    assert count(model, method) == expected


# ------------------------------------------------------------------ parallel adapters
FFN = {  # the feed-forward layer, its norm and its last projection, by block
    "gpt2": ("transformer.h.{}.mlp", "transformer.h.{}.ln_2", "transformer.h.{}.mlp.c_proj"),
    "llama": ("model.layers.{}.mlp", "model.layers.{}.post_attention_layernorm", "model.layers.{}.mlp.down_proj"),
    "gemma2": ("model.layers.{}.mlp", "model.layers.{}.pre_feedforward_layernorm", "model.layers.{}.mlp.down_proj"),
    "gptj": ("transformer.h.{}.mlp", "transformer.h.{}.ln_1", "transformer.h.{}.mlp.fc_out"),
    "vit": ("vit.layers.{}.mlp", "vit.layers.{}.layernorm_after", "vit.layers.{}.mlp.fc2"),
    "phi3": ("model.layers.{}.mlp", "model.layers.{}.post_attention_layernorm", "model.layers.{}.mlp.down_proj"),
    "timm_vit": ("blocks.{}.mlp", "blocks.{}.norm2", "blocks.{}.mlp.fc2"),
}


def beside(
    base: nn.Module, layer: str, read: str, change: Callable[[Tensor], Tensor], out: str = ""
) -> dict[str, Edit]:
    """Edits that add `change` of what the module `read` is given to what `layer` gives."""
    seen: list[Tensor] = []
    base.get_submodule(read).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    return {out or layer: lambda _, __, given: first(lambda y: y + change(seen.pop()), given)}


@pytest.mark.parametrize("model", list(FFN))
@pytest.mark.parametrize("read", ["normed", "residual"])
def test_parallel_to_the_feed_forward_layer(model: str, read: str) -> None:
    """f + s D(u): u what the layer reads, or what the norm before it reads."""
    method = ParallelAdapter(bottleneck=5, scale=2.0, input=read, dtype="float64", heads=None)  # type: ignore[arg-type]
    net, base, values = pair(model, method)
    edits: dict[str, Edit] = {}
    for i in range(2):
        layer, norm, down = (name.format(i) for name in FFN[model])
        change = partial(bottleneck, values, f"{down}.adapters.parallel", phi=F.relu)
        edits |= beside(base, layer, layer if read == "normed" else norm, lambda u, change=change: 2.0 * change(u))
    assert len(values) == 8
    compare(net, forward(net, model), values, hooked(base, model, edits))


ATTENTION = {  # attention, its block, its last projection
    "bert": ("bert.encoder.layer.{}.attention.self", "bert.encoder.layer.{}", "bert.encoder.layer.{}.attention.output.dense"),
    "gpt2": ("transformer.h.{}.attn", "transformer.h.{}", "transformer.h.{}.attn.c_proj"),
    "llama": ("model.layers.{}.self_attn", "model.layers.{}", "model.layers.{}.self_attn.o_proj"),
    "encoder": ("encoder.layers.{}.self_attn", "encoder.layers.{}", "encoder.layers.{}.self_attn.o"),
}  # fmt: skip


@pytest.mark.parametrize("model", list(ATTENTION))
@pytest.mark.parametrize("read", ["normed", "residual"])
@pytest.mark.parametrize("scale", [0.5, None])
def test_parallel_to_attention(model: str, read: str, scale: float | None) -> None:
    """o + s D(u): u what attention reads, or the block's input; one and the same in post-norm models."""
    method = ParallelAdapter(targets="o", bottleneck=5, scale=scale, input=read, dtype="float64", heads=None)  # type: ignore[arg-type]
    net, base, values = pair(model, method)
    edits: dict[str, Edit] = {}
    for i in range(2):
        layer, block, o = (name.format(i) for name in ATTENTION[model])
        here = f"{o}.adapters.parallel"

        def change(u: Tensor, here: str = here) -> Tensor:
            return (scale or values[f"{here}.gain"]) * bottleneck(values, here, u, F.relu)

        out = o if model == "bert" else layer
        edits |= beside(base, layer, block if read == "residual" else layer, change, out)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        compare(net, forward(net, model), values, hooked(base, model, edits))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_parallel_to_cross_attention_reads_what_the_queries_are_made_of() -> None:
    net, base, values = pair("t5", ParallelAdapter(targets="cross.o", bottleneck=5, dtype="float64", heads=None))
    edits: dict[str, Edit] = {}
    for i in range(3):
        layer = f"decoder.block.{i}.layer.1.EncDecAttention"
        change = partial(bottleneck, values, f"{layer}.o.adapters.parallel", phi=F.relu)
        edits |= beside(base, layer, layer, lambda u, change=change: 4.0 * change(u))
    compare(net, forward(net, "t5"), values, hooked(base, "t5", edits))


@pytest.mark.parametrize(("model", "targets"), [("llama", "o,down"), ("bert", "o")])
def test_the_residual_stream_through_compilation_copies_and_checkpoints(model: str, targets: str) -> None:
    net = zoo.build(model)
    ParallelAdapter(targets=targets, bottleneck=4, input="residual", heads=None).apply(net)
    perturb(net)
    expected = output(net, model)
    if model == "llama":
        torch._dynamo.reset()
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        torch.testing.assert_close(output(compiled, model), expected, atol=1e-6, rtol=1e-6)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    perturb(net)
    assert torch.equal(output(twin, model), expected)
    check_exact(twin, partial(loss, model=model))


@pytest.mark.parametrize("model", ["llama", "bert", "gpt2", "t5", "vit"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_the_residual_stream_is_noted_again_in_blocks_that_transformers_checkpoints(
    model: str, reentrant: bool
) -> None:
    """Transformers runs a block's own forward again, without what is around it."""
    gradients = []
    for on in (False, True):
        net: Any = zoo.build(model).train()
        ParallelAdapter(targets="o,down", bottleneck=4, input="residual", heads=None).apply(net)
        perturb(net)
        if on:
            net.gradient_checkpointing_enable({"use_reentrant": reentrant})
            net.enable_input_require_grads()
        loss(net, model).backward()
        gradients.append({name: p.grad for name, p in state.trainable(net).items()})
    assert all(g is not None and g.any() for g in gradients[0].values())
    for name, g in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], g, atol=1e-6, rtol=1e-4)


def test_the_residual_stream_where_norms_are_of_what_the_layers_give() -> None:
    """OLMo 2: h + norm(f(h)), so that the feed-forward layer reads the stream, and the norm before it does not."""
    with torch.random.fork_rng(devices=[]):
        net = hf.Olmo2ForCausalLM(hf.Olmo2Config(**{**zoo.TEXT, "num_hidden_layers": 1})).eval()
    ParallelAdapter(bottleneck=4, input="residual").apply(net)
    perturb(net)
    taps = [x.site for x in state.get_applied(net).placements if isinstance(x.adapter, Tap)]
    assert taps == ["model.layers.0.mlp.up_proj"]
    found = sites(zoo.build("llama"), "block")
    names = [site.name.rpartition(".")[2] for site in norms_before(found, found[0])]
    assert names == ["input_layernorm", "post_attention_layernorm"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("mlp", {"targets": "mlp"}, "needs the feed-forward layer around"),
        ("t5", {"targets": "cross.o", "input": "residual"}, "it is after cross-attention"),
        ("mlp", {"targets": "o", "roles": {"o": "mlp"}}, "needs the attention layer around"),
        ("mlp", {"roles": {"up": "mlp", "down": "lora"}, "input": "residual"}, "it is in no known block"),
    ],
)
def test_parallel_where_it_cannot_be(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        ParallelAdapter(**options).apply(zoo.build(model))


# ------------------------------------------------------------------ AdaptFormer
def test_adaptformer() -> None:
    """x + MLP(LN x) + 0.1 W_up relu(W_dn LN x), as the paper has it; 64 wide on ViT-B."""
    net, base, values = pair("vit", AdaptFormer(bottleneck=5, dtype="float64", heads=None))
    edits: dict[str, Edit] = {}
    for i in range(2):
        layer, _, down = (name.format(i) for name in FFN["vit"])
        change = partial(bottleneck, values, f"{down}.adapters.adaptformer", phi=F.relu)
        edits |= beside(base, layer, layer, lambda u, change=change: 0.1 * change(u))
    compare(net, forward(net, "vit"), values, hooked(base, "vit", edits))
    assert count("vit-b", AdaptFormer(heads=None)) == 12 * (2 * 64 * 768 + 64 + 768)


# ------------------------------------------------------------------ the ends of a model
ENDS = {  # the first block, and what gives the last hidden states
    "bert": ({"bert.encoder.layer.0"}, {"bert.encoder.layer.1"}),
    "gpt2": ({"transformer.h.0"}, {"transformer.ln_f"}),
    "llama": ({"model.layers.0"}, {"model.norm"}),
    "t5": ({"encoder.block.0", "decoder.block.0"}, {"decoder.final_layer_norm"}),
    "bart": ({"model.encoder.layers.0", "model.decoder.layers.0"}, {"model.decoder.layers.2"}),
    "vit": ({"vit.layers.0"}, {"vit.layernorm"}),
    "encoder": ({"encoder.layers.0"}, {"encoder.layers.1"}),
}


@pytest.mark.parametrize("model", list(ENDS))
def test_input_adapter(model: str) -> None:
    """e + D(e) on what the first block reads."""
    net, base, values = pair(model, InputAdapter(bottleneck=5, dtype="float64", heads=None))
    assert prefixes(values, "input_adapter") == places(net) == ENDS[model][0]

    def edit(_: nn.Module, args: Any, kwargs: Any, place: str) -> Any:
        def change(e: Tensor) -> Tensor:
            return e + bottleneck(values, f"{place}.adapters.input_adapter", e, F.gelu)

        return ((change(args[0]), *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": change(kwargs["hidden_states"])})  # fmt: skip

    for place in ENDS[model][0]:
        base.get_submodule(place).register_forward_pre_hook(partial(edit, place=place), with_kwargs=True)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        compare(net, forward(net, model), values, hooked(base, model, {}))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("model", list(ENDS))
def test_output_adapter(model: str) -> None:
    """z + D(z) on what the last norm gives, or the last block."""
    net, base, values = pair(model, OutputAdapter(bottleneck=5, dtype="float64", heads=None))
    assert prefixes(values, "output_adapter") == places(net) == ENDS[model][1]

    def edit(place: str) -> Edit:
        here = f"{place}.adapters.output_adapter"
        return lambda _, __, out: first(lambda z: z + bottleneck(values, here, z, F.gelu), out)

    torch.backends.mha.set_fastpath_enabled(False)
    try:
        compare(net, forward(net, model), values, hooked(base, model, {p: edit(p) for p in ENDS[model][1]}))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def saved_before(net: nn.Module, model: str) -> int:
    """How many tensors autograd has kept when the output adapter comes to its own product."""
    adapter = state.applied_to(net)["output_adapter"].placements[-1].adapter
    product, saved, before = adapter.bottleneck, [], []  # type: ignore[attr-defined]
    vars(adapter)["bottleneck"] = lambda z: before.append(len(saved)) or product(z)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        loss(net.train(), model).backward()
    assert len(before) == 1
    assert saved
    return before[0]


@pytest.mark.parametrize("model", list(ENDS))
def test_an_output_adapter_keeps_nothing_of_the_backbone(model: str) -> None:
    net = OutputAdapter(bottleneck=4).apply(zoo.build(model))
    assert saved_before(net, model) == 0
    other = OutputAdapter(bottleneck=4).apply(zoo.build(model))
    LoRA(rank=2, layers=0, heads=None).apply(other)
    assert saved_before(other, model) > 0


def test_a_linear_output_adapter_is_a_change_of_the_head() -> None:
    """W (z + s U (D z + c_d) + s c_u) + b, merged into W (d_out != d_in) and b; the gradients of the oracle."""
    options: dict[str, Any] = {"targets": "head", "activation": "identity", "bottleneck": 3, "dtype": "float64"}
    method = OutputAdapter(**options, heads=None)
    net, base, values = pair("bert", method)
    w, b = base.classifier.weight, base.classifier.bias
    down, down_bias, up, up_bias = (
        values[f"classifier.adapters.output_adapter.{name}"] for name in ("down", "down_bias", "up", "up_bias")
    )
    dense = {"classifier.weight": w + w @ up @ down, "classifier.bias": b + w @ (up @ down_bias + up_bias)}
    assert w.shape == (zoo.CLASSES, zoo.HIDDEN)
    expected = torch.func.functional_call(base, dense, kwargs=inputs("bert")).logits
    compare(net, forward(net, "bert"), values, expected)
    method.merge(net)
    for name, weight in dense.items():
        torch.testing.assert_close(net.get_parameter(name), weight, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("bert", {"targets": "head"}, NotMergeableError, "only a linear adapter"),
        ("llama", {"targets": "lm_head", "activation": "identity"}, NotMergeableError, "without a bias"),
        ("gpt2", {"targets": "lm_head", "activation": "identity"}, MergeError, "is tied"),
    ],
)
def test_heads_that_take_no_adapter_in(model: str, options: dict[str, Any], error: Any, message: str) -> None:
    net, method = zoo.build(model), OutputAdapter(**options)
    method.apply(net)
    with pytest.raises(error, match=message):
        method.merge(net)


@pytest.mark.parametrize("cls", [InputAdapter, OutputAdapter])
def test_blocks_that_run_again_are_no_ends(cls: Any) -> None:
    with pytest.raises(TargetError, match="runs the same blocks several times"):
        cls().apply(zoo.build("albert"))
    net = cls(targets="embed" if cls is InputAdapter else "head", bottleneck=4).apply(zoo.build("albert"))
    assert places(net) == {"albert.embeddings.word_embeddings" if cls is InputAdapter else "classifier"}


# ------------------------------------------------------------------ invertible adapters
def coupled(values: Values, place: str, e: Tensor, phi: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
    e1, e2 = e[..., : e.shape[-1] // 2], e[..., e.shape[-1] // 2 :]
    here = f"{place}.adapters.invertible.coupling"
    o1 = e1 + bottleneck(values, f"{here}.f", e2, phi)
    return torch.cat([o1, e2 + bottleneck(values, f"{here}.g", o1, phi)], -1)


def uncoupled(values: Values, place: str, o: Tensor) -> Tensor:
    o1, o2 = o[..., : o.shape[-1] // 2], o[..., o.shape[-1] // 2 :]
    here = f"{place}.adapters.invertible.coupling"
    e2 = o2 - bottleneck(values, f"{here}.g", o1, F.relu)
    return torch.cat([o1 - bottleneck(values, f"{here}.f", e2, F.relu), e2], -1)


TIED = {  # tables of embeddings, and the projections tied to them
    "gpt2": (["transformer.wte"], ["lm_head"]),
    "t5": (["encoder.embed_tokens", "decoder.embed_tokens"], ["lm_head"]),
    "bert_mlm": (["bert.embeddings.word_embeddings"], ["cls.predictions.decoder"]),
    "llama": (["model.embed_tokens"], []),
    "vit": (["vit.embeddings.patch_embeddings"], []),
}


@pytest.mark.parametrize("model", list(TIED))
def test_invertible(model: str) -> None:
    """o1 = F(e2) + e1, o2 = G(o1) + e2 on embeddings; its inverse before what is tied to them; one set of weights."""
    net, base, values = pair(model, Invertible(dtype="float64", heads=None))
    tables, heads = TIED[model]
    assert places(net) == {*tables, *heads}
    assert len(values) == 8
    assert prefixes(values, "invertible") == {tables[0]}
    half, middle = zoo.HIDDEN // 2, zoo.HIDDEN // 4
    assert sum(v.numel() for v in values.values()) == 2 * (2 * half * middle + middle + half)
    for name in heads:
        base.get_submodule(name).register_forward_pre_hook(lambda _, args: uncoupled(values, tables[0], args[0]))
    edits: dict[str, Edit] = {name: lambda _, __, e: coupled(values, tables[0], e) for name in tables}
    compare(net, forward(net, model), values, hooked(base, model, edits))


def test_the_inverse_is_exact() -> None:
    net = Invertible(activation="tanh").apply(zoo.build("gpt2"))
    perturb(net, scale=0.5)
    coupling = state.get_applied(net).placements[0].adapter.coupling.double()
    x = torch.randn(3, 5, zoo.HIDDEN, dtype=torch.float64)
    assert not torch.allclose(coupling(x), x, atol=0.1)
    torch.testing.assert_close(coupling.inverse(coupling(x)), x, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(coupling(coupling.inverse(x)), x, atol=1e-13, rtol=1e-13)


def test_the_inverse_at_a_head_that_is_not_tied() -> None:
    net = Invertible(inverse="lm_head").apply(zoo.build("llama"))
    assert places(net) == {"model.embed_tokens", "lm_head"}
    assert places(Invertible(inverse=None).apply(zoo.build("gpt2"))) == {"transformer.wte"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 17}, "do not fall into two halves that can be reduced so far"),
        ({"inverse": "*.0.mlp.down_proj"}, "reads 64 features, the embeddings have 32"),
    ],
)
def test_couplings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        Invertible(**options).apply(zoo.build("llama"))


def test_nested_adapters_take_the_dtype_that_is_asked_for() -> None:
    net = Invertible(dtype="float64").apply(zoo.build("gpt2"))
    assert {p.dtype for p in state.trainable(net).values()} == {torch.float64}


# ------------------------------------------------------------------ AdapterDrop
def dropped(base: nn.Module, values: Values, model: str, n: int) -> Tensor:
    """Pfeiffer's adapters in blocks n and above."""
    edits: dict[str, Edit] = {}
    for place in prefixes(values, "adapterdrop"):
        if int(re.findall(r"\d+", place)[0]) < n:
            continue

        def post(norm: nn.Module, args: Any, u: Tensor, here: str = f"{place}.adapters.adapterdrop") -> Tensor:
            s = args[0] + bottleneck(values, here, u, F.relu)
            return F.layer_norm(s, s.shape[-1:], norm.weight, norm.bias, norm.eps)

        def pre(_: nn.Module, __: Any, out: Any, here: str = f"{place}.adapters.adapterdrop") -> Any:
            return first(lambda s: s + bottleneck(values, here, s, F.relu), out)

        edits[place] = post if model in POST else pre
    return hooked(base, model, edits)


@pytest.mark.parametrize("model", ["bert", "llama", "t5"])
def test_adapterdrop_at_any_depth(model: str) -> None:
    """The first n blocks of each stack are the base's: in eval as asked, in training as drawn, with their gradients."""
    method = AdapterDrop(n=1, bottleneck=5, dtype="float64", heads=None)
    net, base, values = pair(model, method)
    for n in (1, 0, 2, 1):
        method.keep_from(net, n)
        torch.testing.assert_close(forward(net, model), dropped(base, values, model, n), atol=1e-10, rtol=1e-10)
    net.train()
    assert {method.draw(net, step) for step in range(20)} == {0, 1}
    step = next(step for step in range(20) if method.draw(net, step) == 1)
    assert method.draw(net, step) == 1
    for name in values:
        values[name].requires_grad_(re.findall(r"\d+", name)[0] != "0")
    expected = dropped(base, values, model, 1)
    trained = {name: value for name, value in values.items() if value.requires_grad}
    compare(net, forward(net, model), trained, expected, 1e-10)
    left_out = [p for name, p in net.named_parameters() if name in values and name not in trained]
    assert left_out
    assert all(p.grad is None for p in left_out)


def test_adapterdrop_under_checkpointing_recomputes_what_it_computed() -> None:
    method = AdapterDrop(n=1, bottleneck=4, heads=None)
    net = method.apply(zoo.build("llama"))
    perturb(net)
    for step in range(4):
        method.draw(net, step)
        check_exact(net, partial(loss, model="llama"))


def test_adapterdrop_draws_once_a_batch_and_the_same_after_a_resume(tmp_path: Path) -> None:
    def run(epochs: int, ckpt: Path | None = None) -> tuple[list[int], boring.Boring]:
        method, module = AdapterDrop(n=1, bottleneck=4, seed=3), boring.Boring()
        draw, drawn = method.draw, []
        vars(method)["draw"] = lambda *args: drawn.append(draw(*args))
        trainer = boring.trainer(tmp_path, [method], max_epochs=epochs)
        trainer.fit(module, boring.data(), boring.data(6, shuffle=False), ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return drawn, module

    drawn, module = run(2)
    assert len(drawn) == len(module.losses) == 16
    assert set(drawn) == {0, 1}
    assert drawn[:8] != drawn[8:]
    assert run(1)[0] == drawn[:8]
    assert run(2, tmp_path / "1.ckpt")[0] == drawn[8:]


def test_adapterdrop_with_a_fixed_number_and_after_projections() -> None:
    net = AdapterDrop(n=1, train="fixed", targets="o,down", bottleneck=4, heads=None).apply(zoo.build("gpt2"))
    assert places(net) == {"transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"}
    assert count("bert-base", AdapterDrop(n=5, train="fixed", heads=None)) == 894_528 // 12 * 7
    assert count("bert-base", AdapterDrop(n=5, heads=None)) == 894_528


@pytest.mark.parametrize(
    ("options", "n", "error", "message"),
    [
        ({"n": 2}, None, TargetError, "leaves nothing of 2 blocks"),
        ({"n": -1}, None, FieldError, "0 or more"),
        ({"n": 0}, 3, FieldError, r"keep_from\(n=3\): expected 0 to 2"),
        ({"n": 1, "train": "fixed"}, 0, FieldError, r"keep_from\(n=0\): expected 1 to 2"),
    ],
)
def test_depths_that_cannot_be(options: dict[str, Any], n: int | None, error: Any, message: str) -> None:
    def use() -> None:
        method = AdapterDrop(**options)
        method.keep_from(method.apply(zoo.build("llama")), n)  # type: ignore[arg-type]

    with pytest.raises(error, match=message):
        use()


@pytest.mark.parametrize("cls", [Pfeiffer, Bapna, InputAdapter, OutputAdapter, AdapterDrop])
def test_widths_that_make_no_sense(cls: Any) -> None:
    with pytest.raises(FieldError, match="bottleneck=0.*above 0"):
        cls(bottleneck=0)
    if cls is Pfeiffer:
        with pytest.raises(FieldError, match="reduction=0.*above 0"):
            Invertible(reduction=0)


# ------------------------------------------------------------------ AdapterFusion
def sources(directory: Path, model: str, method: Callable[..., PEFT]) -> tuple[list[str], list[dict[str, Tensor]]]:
    """Two adapters, trained apart and saved; their tensors."""
    paths, tensors = [], []
    for seed, width in ((1, 4), (2, 3)):
        net = zoo.build(model).double()
        method(bottleneck=width, dtype="float64", label="task").apply(net)
        perturb(net, scale=0.3, seed=seed)
        paths.append(str(save_adapter(net, directory / str(seed))))
        tensors.append(dict(state.trainable(net)))
    return paths, tensors


def fused(values: Values, own: list[dict[str, Tensor]], place: str, u: Tensor) -> Tensor:
    """sum_n softmax_n((Q u + b) . K z_n) V z_n, z_n = D_n(u), as the paper writes it."""
    here = f"{place}.adapters.adapter_fusion"
    z = [bottleneck(one, f"{place}.adapters.task", u, F.relu) for one in own]
    scores = [
        ((u @ values[f"{here}.query"].T + values[f"{here}.query_bias"]) * (one @ values[f"{here}.key"].T)).sum(-1)
        for one in z
    ]
    weights = torch.stack(scores).softmax(0)
    return sum((w[..., None] * (one @ values[f"{here}.value"].T) for w, one in zip(weights, z, strict=True)), 0 * u)


@pytest.mark.parametrize(("model", "kind"), [("bert", Pfeiffer), ("llama", Pfeiffer), ("gpt2", Houlsby)])
def test_adapter_fusion(model: str, kind: Any, tmp_path: Path) -> None:
    paths, own = sources(tmp_path, model, partial(kind, activation="relu"))
    method = AdapterFusion(sources=paths, dtype="float64", heads=None)
    net, base, values = pair(model, method)
    found = prefixes(values, "adapter_fusion")
    assert len(found) == (4 if kind is Houlsby else 2)
    assert len(values) == 4 * len(found)

    def edit(place: str) -> Edit:
        def post(norm: nn.Module, args: Any, u: Tensor) -> Tensor:
            s = args[0] + fused(values, own, place, u)
            return F.layer_norm(s, s.shape[-1:], norm.weight, norm.bias, norm.eps)

        return post if model == "bert" else lambda _, __, out: first(lambda u: u + fused(values, own, place, u), out)

    compare(net, forward(net, model), values, hooked(base, model, {place: edit(place) for place in found}), 1e-10)


def test_a_fusion_is_whole_in_its_file_and_trains_nothing_of_its_sources(tmp_path: Path) -> None:
    paths, own = sources(tmp_path, "bert", Pfeiffer)
    net = zoo.build("bert").double()
    output(net, "bert")
    before = snapshot(net)
    method = AdapterFusion(sources=paths, heads=None, dtype="float64")
    method.apply(net)
    train(net, "bert", steps=2)
    expert = state.get_applied(net).placements[0].adapter.experts[1]
    name = "bert.encoder.layer.0.output.LayerNorm.adapters.task.up"
    assert torch.equal(expert.up, own[1][name])
    assert not any("experts" in name for name in state.trainable(net))
    save_adapter(net, tmp_path / "fusion")
    for path in paths:
        shutil.rmtree(path)
    fresh = zoo.build("bert").double()
    loaded = load_adapter(fresh, tmp_path / "fusion")
    assert loaded.config()["sources"] == []
    assert torch.equal(output(fresh, "bert"), output(net, "bert"))
    method.remove(net)
    assert differences(before, snapshot(net)) == []


def test_a_fusion_of_one_starts_as_that_one_and_is_pulled_towards_the_identity(tmp_path: Path) -> None:
    net = Pfeiffer(bottleneck=4).apply(zoo.build("bert"))
    perturb(net, scale=0.2)
    save_adapter(net, tmp_path / "one")
    fusion = AdapterFusion(sources=[str(tmp_path / "one")], heads=None).apply(zoo.build("bert"))
    fusion.classifier.load_state_dict(net.classifier.state_dict())  # a source's head is not taken over
    torch.testing.assert_close(output(fusion, "bert"), output(net, "bert"), atol=1e-4, rtol=1e-4)
    adapter = state.get_applied(fusion).placements[0].adapter
    value = adapter.value.detach()
    assert torch.equal(value, torch.full_like(value, 1e-6).fill_diagonal_(1.0))
    with torch.no_grad():
        adapter.value[0, 1] += 3.0
    torch.testing.assert_close(adapter.penalty(), torch.tensor(0.09), atol=1e-6, rtol=1e-6)
    adapter.regularisation = 0.0
    assert adapter.penalty() is None


def test_a_fusion_in_a_trainer(tmp_path: Path) -> None:
    paths, own = sources(tmp_path, "bert", Pfeiffer)
    module = boring.Boring()
    boring.trainer(tmp_path, [AdapterFusion(sources=paths, regularisation=1.0)]).fit(
        module, boring.data(), boring.data(6, shuffle=False)
    )
    adapter = state.get_applied(module).placements[0].adapter
    name = "bert.encoder.layer.0.output.LayerNorm.adapters.task.down"
    assert torch.equal(adapter.experts[0].down, own[0][name].float())
    assert not torch.equal(adapter.value, torch.full_like(adapter.value, 1e-6).fill_diagonal_(1.0))


TWO = [{"method": "pfeiffer", "config": {"bottleneck": 4}}, {"method": "pfeiffer", "config": {"layers": "last:1"}}]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "nothing to fuse"),
        ([{"method": "lora", "config": {}}], "cannot fuse 'lora'"),
        ([{"method": "parallel", "config": {}}], "cannot fuse 'parallel'"),
        ([{"method": "houlsby", "config": {"norms": True}}], r"more than bottlenecks \(houlsby, ln_tuning\)"),
        ([{"method": "mam", "config": {}}], "cannot fuse 'mam'"),
        ([{"method": "bitfit", "config": {}}], "cannot fuse 'bitfit'"),
        (TWO, "at the same places of the same kind; '.*layer.0.output.LayerNorm' is one"),
        (TWO[::-1], "at the same places of the same kind; '.*layer.0.output.LayerNorm' is one"),
    ],
)
def test_what_cannot_be_fused(members: list[dict[str, Any]], message: str) -> None:
    net = zoo.build("bert")
    before = snapshot(net)
    with pytest.raises(TargetError, match=message):
        AdapterFusion(members=members).apply(net)
    assert differences(before, snapshot(net)) == []


def test_sources_that_do_not_fit(tmp_path: Path) -> None:
    paths, _ = sources(tmp_path, "bert", Pfeiffer)
    net = zoo.build("bert")
    nn.init.normal_(net.bert.encoder.layer[0].output.dense.weight)
    before = snapshot(net)
    with pytest.raises(AdapterFileError, match="trained on another base"):
        AdapterFusion(sources=paths).apply(net)
    assert differences(before, snapshot(net)) == []
    with pytest.raises(TargetError, match="give it memory and weights first"):
        AdapterFusion(sources=paths).apply(zoo.build("bert").to("meta"))
    with pytest.raises(FieldError, match="takes `sources` or `members`"):
        AdapterFusion(sources=paths, members=TWO)
    with pytest.raises(FieldError, match=r"expected 'method' \(a registered name\) and 'config'"):
        AdapterFusion(members=[{"method": "nope", "config": {}}])
    with pytest.raises(FieldError, match="0 or more"):
        AdapterFusion(regularisation=-1.0)


def test_fusion_from_a_configuration() -> None:
    """A list of mappings goes through Hydra's schema and back."""
    method = build(OmegaConf.merge(schema(AdapterFusion), {"members": TWO}))
    assert method.config() == AdapterFusion(members=TWO).config()
    assert count("bert-base", AdapterFusion(members=TWO[:1], heads=None)) == 12 * (3 * 768**2 + 768)


# ------------------------------------------------------------------ generation
GENERATING = [
    Pfeiffer(bottleneck=4),
    Bapna(bottleneck=4),
    ParallelAdapter(bottleneck=4, targets="o,down", input="residual"),
    InputAdapter(bottleneck=4),
    OutputAdapter(bottleneck=4),
    Invertible(inverse="lm_head"),
    AdapterDrop(bottleneck=4, n=1),
    AdapterFusion(members=[{"method": "pfeiffer", "config": {"bottleneck": 4, "init": "bert"}}] * 2),
]


@pytest.mark.parametrize("method", GENERATING, ids=lambda m: m.info.name)
def test_generation_with_and_without_cache_padded_and_alone(method: PEFT) -> None:
    net = method.apply(zoo.build("llama"))
    perturb(net, scale=0.3)
    generator = torch.Generator().manual_seed(0)
    for name, buffer in net.named_buffers():
        if ".experts." in name:  # which nothing trains
            buffer.add_(torch.randn(buffer.shape, generator=generator), alpha=0.3)
    row = torch.randint(3, zoo.VOCAB, (1, 5), generator=generator)
    padded = torch.cat([F.pad(row, (2, 0)), torch.randint(3, zoo.VOCAB, (1, 7), generator=generator)])
    mask = torch.ones_like(padded)
    mask[0, :2] = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = net.generate(padded, attention_mask=mask, **options)
    assert torch.equal(cached, net.generate(padded, attention_mask=mask, use_cache=False, **options))
    alone = net.generate(row, attention_mask=torch.ones_like(row), **options)
    assert torch.equal(cached[0, 7:], alone[0, 5:])
    plain = zoo.build("llama").generate(padded, attention_mask=mask, **options)
    assert not torch.equal(cached, plain)
