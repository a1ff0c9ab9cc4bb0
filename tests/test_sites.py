"""What `core.sites` finds in every family, how it selects, and how it refuses."""

import re
import time

import pytest
import torch
from torch import nn

from lightning_peft.core import architectures
from lightning_peft.core.sites import Columns, Facts, Site, Sites, TargetError, find, roles, sites
from tests.zoo import HEADS, HIDDEN, INNER, META, ZOO, build, inputs, meta

BLOCK = {"q": 2, "k": 2, "v": 2, "o": 2, "attend": 2, "up": 2, "down": 2, "block": 2, "norm": 5}
GATED = {**BLOCK, "gate": 2}
TWO_STACKS = {
    **dict.fromkeys(("q", "k", "v", "o", "attend", "up", "down", "block"), 5),
    **{f"cross.{role}": 3 for role in ("q", "k", "v", "o", "attend")},
    "norm": 15,
}
COUNTS = {
    "bert": {**BLOCK, "embed": 1, "head": 1},
    "bert_mlm": {**BLOCK, "norm": 6, "embed": 1},
    "roberta": {**BLOCK, "embed": 1, "head": 1},
    "electra": {**BLOCK, "embed": 1, "head": 1},
    "distilbert": {**BLOCK, "embed": 1, "head": 2},
    "albert": {**BLOCK, "embed": 1, "head": 1},
    "deberta": {**BLOCK, "embed": 1, "head": 1},
    "modernbert": {**GATED, "norm": 6, "embed": 1, "head": 1},
    "gpt2": {**BLOCK, "embed": 1},
    "gpt2_cross": {**BLOCK, **{f"cross.{r}": 2 for r in ("q", "k", "v", "o", "attend")}, "norm": 7, "embed": 1},
    "gpt_neo": {**BLOCK, "embed": 1},
    "gptj": {**BLOCK, "norm": 3, "embed": 1},
    "gpt_neox": {**BLOCK, "embed": 1},
    "bloom": {**BLOCK, "norm": 6, "embed": 1},
    "llama": {**GATED, "embed": 1},
    "llama_cls": {**GATED, "embed": 1, "head": 1},
    "mistral": {**GATED, "embed": 1},
    "qwen2": {**GATED, "embed": 1},
    "qwen3": {**GATED, "norm.qk": 4, "embed": 1},
    "gemma": {**GATED, "embed": 1},
    "gemma2": {**GATED, "norm": 9, "embed": 1},
    "phi3": {**GATED, "embed": 1},
    "opt": {**BLOCK, "embed": 1},
    "bart": {**TWO_STACKS, "embed": 2},
    "bart_cls": {**TWO_STACKS, "embed": 2, "head": 1},
    "whisper": {**TWO_STACKS, "embed": 1},
    "t5": {**TWO_STACKS, "embed": 2},
    "t5_gated": {**TWO_STACKS, "gate": 5, "embed": 2},
    "vit": {**BLOCK, "embed": 1, "head": 1},
    "clip": {**dict.fromkeys(BLOCK, 5), "norm": 13, "embed": 2},
    "timm_vit": {**BLOCK, "embed": 1, "head": 1},
    "encoder": {**BLOCK, "norm": 4, "embed": 1, "head": 1},
    "transformer": {**TWO_STACKS, "embed": 1},
    "mlp": {},
    "mixer": {"o": 2, "attend": 2, "up": 2, "down": 2, "block": 2, "norm": 4},
}
NOT_PROJECTIONS = r".*(pooler|classifier|lm_head|score|head|predictions|projection|proj_out|generator|embed).*|.*last"
UNNAMED = r".*(pos_key_proj|pos_query_proj|mix\.(ask|find|tell))"  # DeBERTa's relative positions, and the nameless
PROJECTIONS = [f"{cross}{role}" for cross in ("", "cross.") for role in ("q", "k", "v", "o")] + ["up", "gate", "down"]


def names(found: list[Site]) -> list[str]:
    return [site.name for site in found]


def is_projection(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or architectures.is_conv1d(module)


@pytest.mark.parametrize("name", ZOO)
def test_every_family_has_its_roles(name: str) -> None:
    assert {role: len(found) for role, found in roles(build(name)).items()} == COUNTS[name]


@pytest.mark.parametrize("name", [n for n in ZOO if n != "mlp"])
def test_every_projection_has_one_role_and_nothing_else_has_any(name: str) -> None:
    model = build(name)
    known: dict[int, list[Site]] = {}
    for site in (site for role in PROJECTIONS for site in roles(model).get(role, [])):
        known.setdefault(id(site.module), []).append(site)
    for path, module in model.named_modules():
        if not is_projection(module) or path.endswith("self_attn.out_proj") and name in ("encoder", "transformer"):
            continue
        here = known.get(id(module), [])
        if re.fullmatch(f"{NOT_PROJECTIONS}|{UNNAMED}", path) or path.endswith("multihead_attn.out_proj"):
            assert not here, path
        else:
            assert len(here) == 1 or sum(site.out_features for site in here) == _out(module), path
            assert len({site.role for site in here}) == len(here) > 0, path


def _out(module: nn.Module) -> int:
    return (architectures.features(module) or (0, 0))[1]


@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("mlp", "mixer")])
def test_slices_cut_a_packed_projection_into_parts(name: str) -> None:
    packed: dict[int, list[Site]] = {}
    known_roles = roles(build(name))
    for site in (s for role in PROJECTIONS for s in known_roles.get(role, []) if s.columns):
        packed.setdefault(id(site.module), []).append(site)
    for group in packed.values():
        every = torch.arange(_out(group[0].module))
        parts = torch.cat([site.columns.take(every) for site in group if site.columns])
        assert torch.equal(parts.sort().values, every)


FACTS = {
    "bert": Facts(32, 4, 4, 8, False),
    "deberta": Facts(32, 4, 4, 8, False),
    "modernbert": Facts(32, 4, 4, 8, False),
    "gpt2": Facts(32, 4, 4, 8, True),
    "bloom": Facts(32, 4, 4, 8, True),
    "gpt_neox": Facts(32, 4, 4, 8, True),
    "llama": Facts(32, 4, 2, 8, True),
    "qwen3": Facts(32, 4, 2, 16, True),
    "phi3": Facts(32, 4, 2, 8, True),
    "t5": Facts(32, 4, 4, 12, False),
    "vit": Facts(32, 4, 4, 8, False),
    "timm_vit": Facts(32, 4, 4, 8, False),
    "encoder": Facts(32, 4, 4, 8, None),
    "mixer": Facts(32, 4, 4, 8, None),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_the_first_stack(name: str) -> None:
    known = roles(build(name))
    assert {
        site.facts for role in ("attend", "block", "o", "up") for site in known[role] if site.stack != "decoder"
    } == {FACTS[name]}


def test_facts_differ_between_stacks_and_towers() -> None:
    whisper, clip = roles(build("whisper")), roles(build("clip"))
    assert [s.facts.heads for s in whisper["attend"]] == [4, 4, 2, 2, 2]
    assert [s.facts.head_dim for s in whisper["cross.attend"]] == [16, 16, 16]
    assert [s.facts.causal for s in whisper["block"]] == [False, False, True, True, True]
    assert {s.facts.causal for role in ("q", "o", "attend") for s in whisper[f"cross.{role}"]} == {False}
    assert {s.stack: s.facts.causal for s in clip["q"]} == {"text_model.encoder": True, "vision_model.encoder": False}


def test_what_is_outside_of_the_blocks_has_the_facts_of_its_stack() -> None:
    t5 = roles(build("t5"))
    assert [(s.name, s.stack, s.facts.causal) for s in t5["embed"]] == [
        ("encoder.embed_tokens", "encoder", False),
        ("decoder.embed_tokens", "decoder", True),
    ]
    assert roles(build("electra"))["embed"][0].facts.hidden == HIDDEN
    assert roles(build("encoder"))["embed"][0].facts.hidden == HIDDEN
    (head,) = find(build("mlp"), "out").values()
    assert isinstance(head, nn.Linear)


def test_a_configuration_is_enough_for_the_facts() -> None:
    model = nn.Module()
    model.config = type("Config", (), {"n_embd": 24, "n_head": 3, "num_heads": [1, 2]})()
    model.wte = nn.Embedding(5, 24)
    (site,) = sites(model, "embed")
    assert site.facts == Facts(hidden=24, heads=3)


PLACES = {
    "bert": ("bert.encoder.layer.0", 2, "encoder"),
    "distilbert": ("distilbert.transformer.layer.0", 2, ""),
    "albert": ("albert.encoder.albert_layer_groups.0.albert_layers.0", 2, "encoder"),
    "gpt2": ("transformer.h.0", 2, ""),
    "llama": ("model.layers.0", 2, ""),
    "opt": ("model.decoder.layers.0", 2, "decoder"),
    "t5": ("encoder.block.0", 2, "encoder"),
    "vit": ("vit.layers.0", 2, ""),
    "clip": ("text_model.encoder.layers.0", 2, "text_model.encoder"),
    "timm_vit": ("blocks.0", 2, ""),
    "encoder": ("encoder.layers.0", 2, "encoder"),
    "mixer": ("steps.0", 2, ""),
}


@pytest.mark.parametrize("name", PLACES)
def test_block_layer_and_stack(name: str) -> None:
    first = roles(build(name))["up"][0]
    assert (first.block, first.layers, first.stack) == PLACES[name]
    assert first.layer == 0


def test_stacks_count_by_themselves() -> None:
    known = roles(build("transformer"))
    assert [(s.stack, s.layer, s.layers) for s in known["block"]] == [
        *(("encoder", i, 2) for i in range(2)),
        *(("decoder", i, 3) for i in range(3)),
    ]
    assert {s.stack for s in roles(build("clip"))["embed"]} == {"text_model", "vision_model"}


def test_towers_within_one_another_and_side_by_side() -> None:
    model = build("vit").vit
    model.inner = build("vit").vit
    assert {s.stack for s in roles(model)["q"]} == {"", "inner"}
    assert {s.stack for s in roles(nn.ModuleDict({"net": build("clip")}))["q"]} == {
        "text_model.encoder",
        "vision_model.encoder",
    }
    pair = nn.Module()
    pair.one, pair.two = build("timm_vit").blocks, build("timm_vit").blocks
    assert [(s.stack, s.layer) for s in roles(pair)["block"]] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]


def test_shared_blocks_are_one_site_each() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.ModuleDict({"layers": nn.ModuleList([layer, layer])})
    assert len(roles(model)["q"]) == 1


def test_a_layer_outside_of_a_list_is_a_block() -> None:
    model = nn.ModuleDict({"a": nn.TransformerEncoderLayer(8, 2, 16), "b": nn.TransformerDecoderLayer(8, 2, 16)})
    assert [(s.block, s.layer, s.layers) for s in roles(model)["block"]] == [("a", 0, 2), ("b", 1, 2)]
    assert names(roles(model)["cross.q"]) == ["b.multihead_attn"]


def test_a_sequential_with_more_than_blocks_is_no_stack() -> None:
    layers = [nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(5, 8), *layers, nn.Linear(8, 2))
    assert names(roles(model)["block"]) == ["1", "2"]


# columns


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("columns", [Columns(0, 4), Columns(4, 8), Columns(1, 3, 3), Columns(2, 4, 2)])
def test_put_is_the_inverse_of_take(columns: Columns, dim: int) -> None:
    y = torch.randn(12, 12, 12)
    part = columns.take(y, dim)
    assert part.shape[dim] == columns.size
    assert torch.equal(columns.put(y, part, dim), y)
    new = torch.randn_like(part)
    whole = columns.put(y, new, dim)
    assert torch.equal(columns.take(whole, dim), new)
    assert (whole != y).sum() == (part != new).sum()


def test_put_is_differentiable_and_leaves_its_input_alone() -> None:
    columns = Columns(1, 3, 2)
    y = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    part = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    before = y.detach().clone()
    assert torch.autograd.gradcheck(columns.put, (y, part))
    assert torch.autograd.gradcheck(columns.take, (y,))
    assert torch.equal(y, before)


@pytest.mark.parametrize("columns", [Columns(2, 4), Columns(1, 2, 3)])
def test_a_slice_of_the_output_is_a_slice_of_the_weight(columns: Columns) -> None:
    layer, x = nn.Linear(5, 6), torch.randn(3, 5)
    sliced = nn.functional.linear(x, columns.take(layer.weight, 0), columns.take(layer.bias))
    torch.testing.assert_close(columns.take(layer(x)), sliced)


def _attended(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, dict[str, list[torch.Tensor]]]:
    """What scaled_dot_product_attention gets, per call, as (batch, time, features)."""
    seen: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}
    stock = nn.functional.scaled_dot_product_attention

    def spy(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object
    ) -> torch.Tensor:
        for role, x in zip("qkv", (query, key, value), strict=True):
            seen[role].append(x.transpose(1, 2).flatten(2))
        return stock(query, key, value, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    return build(name), seen


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("gpt2", "qkv"),
        ("gpt2_cross", "qkv"),
        ("timm_vit", "qkv"),
        ("phi3", "v"),
        ("gpt_neox", "v"),
        ("modernbert", "v"),
    ],
)
def test_the_slices_are_what_the_model_attends_with(name: str, exact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = _attended(name, monkeypatch)
    outputs: dict[int, torch.Tensor] = {}
    for module in {site.module for role in PROJECTIONS for site in roles(model).get(role, [])}:
        module.register_forward_hook(lambda m, _, y: outputs.__setitem__(id(m), y))
    with torch.no_grad():
        model(**inputs(name))
    cross = ("", "cross.") if name == "gpt2_cross" else ("",)
    for role in exact:
        order = [s for pair in zip(*(roles(model)[c + role] for c in cross), strict=True) for s in pair]
        for site, x in zip(order, seen[role], strict=True):
            y = outputs[id(site.module)]
            own = site.columns.take(y) if site.columns else y
            assert own.shape[-1] == site.out_features
            if x.shape[-1] != own.shape[-1]:  # grouped-query: the model repeats each key/value head
                x = x.unflatten(-1, (site.facts.kv_heads, -1, site.facts.head_dim))[..., 0, :].flatten(-2)
            torch.testing.assert_close(own, x)


@pytest.mark.parametrize("name", ["gpt_neox", "bloom"])
def test_the_query_of_a_head_interleaved_projection(name: str) -> None:
    model = build(name)
    site = roles(model)["q"][0]
    y = torch.randn(2, 7, 3 * HIDDEN)
    query = y.view(2, 7, HEADS, 3, HIDDEN // HEADS)[..., 0, :].flatten(-2)
    assert site.columns == Columns(0, 8, HEADS)
    assert torch.equal(site.columns.take(y), query)


def test_widths_of_grouped_query_packing() -> None:
    known = roles(build("phi3"))
    assert [known[role][0].columns for role in "qkv"] == [Columns(0, 32), Columns(32, 48), Columns(48, 64)]
    assert (known["gate"][0].columns, known["up"][0].columns) == (Columns(0, INNER), Columns(INNER, 2 * INNER))


def test_a_gate_is_the_half_that_is_activated() -> None:
    model = build("modernbert")
    mlp = model.model.layers[0].mlp
    gate, up, down = (roles(model)[role][0] for role in ("gate", "up", "down"))
    x = torch.randn(3, HIDDEN)
    y = gate.module(x)
    torch.testing.assert_close(mlp(x), down.module(mlp.act(gate.columns.take(y)) * up.columns.take(y)))


def falcon(out: int, heads: int, kv: int, kind: str = "FalconAttention") -> nn.Module:
    """Two blocks with a packed projection of `out` features in an attention module of class `kind`."""
    blocks = []
    for _ in range(2):
        attention = type(kind, (nn.Module,), {})()
        attention.num_heads, attention.num_kv_heads, attention.head_dim = heads, kv, 4
        attention.query_key_value, attention.dense = nn.Linear(heads * 4, out), nn.Linear(heads * 4, heads * 4)
        blocks.append(nn.ModuleDict({"self_attention": attention}))
    return nn.ModuleDict({"h": nn.ModuleList(blocks)})


def test_key_value_groups_are_interleaved_too() -> None:
    known = roles(falcon(32, heads=4, kv=2))
    assert [known[role][0].columns for role in "qkv"] == [Columns(0, 8, 2), Columns(8, 12, 2), Columns(12, 16, 2)]
    assert known["q"][0].facts == Facts(16, 4, 2, 4, True)


@pytest.mark.parametrize("model", [falcon(31, 4, 2), falcon(48, 4, 2), falcon(32, 4, 2, "CodeGenAttention")])
def test_a_packing_that_no_slices_describe_is_a_role_of_its_own(model: nn.Module) -> None:
    known = roles(model)
    assert not {"q", "k", "v"} & known.keys()
    assert names(sites(model, "attention")) == [
        f"h.{i}.self_attention.{name}" for i in range(2) for name in ("query_key_value", "dense")
    ]
    assert [s.role for s in sites(model, "all-linear")] == ["qkv", "o"] * 2


def test_a_packing_of_unknown_heads() -> None:
    model = falcon(48, 4, 4)
    for block in model["h"]:
        del block["self_attention"].num_heads
    assert not {"q", "k", "v"} & roles(model).keys()


def test_original_llama_names_and_swiglu() -> None:
    class Part(nn.Module):
        def __init__(self, *children: str) -> None:
            super().__init__()
            for child in children:
                self.add_module(child, nn.Linear(4, 4))

    layers = [
        nn.ModuleDict({"attention": Part("wq", "wk", "wv", "wo"), "feed_forward": Part("w1", "w2", "w3")}),
        nn.ModuleDict({"attn": Part("q", "k", "v", "proj"), "mlp": Part("w12", "w3")}),
        nn.ModuleDict({"attn": Part("q", "k", "v", "proj"), "mlp": Part("w1", "w2", "w3")}),
    ]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
    known = roles(model)
    assert names(known["gate"]) == ["layers.0.feed_forward.w1", "layers.1.mlp.w12"]
    assert names(known["down"]) == ["layers.0.feed_forward.w2", "layers.1.mlp.w3"]
    assert names(known["o"]) == ["layers.0.attention.wo", "layers.1.attn.proj", "layers.2.attn.proj"]


def tree(*leaves: str) -> nn.Module:
    """Two blocks `encoder.layer.N` of Linears at these dotted names, beside a pooler and a classifier."""
    model = nn.Module()
    for path in [f"vit.encoder.layer.{i}.{leaf}" for i in range(2) for leaf in leaves] + [
        "vit.pooler.dense",
        "classifier",
    ]:
        *parents, leaf = path.split(".")
        here = model
        for key in parents:
            if key not in here._modules:
                here.add_module(key, nn.ModuleList() if key == "layer" else nn.Module())
            here = here._modules[key]
        here.add_module(leaf, nn.Linear(4, 4))
    return model


def test_names_of_the_vision_transformer_before_transformers_5() -> None:
    attention = [f"attention.attention.{x}" for x in ("query", "key", "value")]
    known = roles(tree(*attention, "attention.output.dense", "intermediate.dense", "output.dense"))
    last = {role: found[-1].name.removeprefix("vit.encoder.layer.1.") for role, found in known.items()}
    assert last == {
        **dict(zip("qkv", attention, strict=True)), "o": "attention.output.dense", "attend": "attention.attention",
        "up": "intermediate.dense", "down": "output.dense", "block": "vit.encoder.layer.1", "head": "classifier",
    }  # fmt: skip


# torch.nn


def test_parts_of_multihead_attention() -> None:
    mha = nn.MultiheadAttention(12, 3, kdim=8, vdim=6)
    known = roles(nn.ModuleDict({"attention": mha}))
    sizes = {role: (s[0].part, s[0].in_features, s[0].out_features) for role, s in known.items()}
    assert sizes == {
        "q": ("q", 12, 12), "k": ("k", 8, 12), "v": ("v", 6, 12), "o": ("o", 12, 12), "attend": ("attend", 12, 12),
    }  # fmt: skip
    assert {s[0].module for s in known.values()} == {mha}
    assert known["q"][0].block == ""


def test_out_proj_of_multihead_attention_is_its_part() -> None:
    model = build("encoder")
    found = sites(model, "*.out_proj")
    assert [(s.name, s.role, s.part) for s in found] == [(f"encoder.layers.{i}.self_attn", "o", "o") for i in range(2)]
    assert [s.role for s in sites(model, "all-linear", layers=0)] == ["q", "k", "v", "o", "up", "down"]


def test_a_pooling_attention_is_no_site() -> None:
    model = build("encoder")
    model.head = type("AttentionPoolingHead", (nn.Module,), {})()
    model.head.attention = nn.MultiheadAttention(HIDDEN, HEADS)
    assert len(roles(model)["q"]) == 2
    assert names(roles(model)["head"]) == ["classifier"]
    (part,) = sites(model, "head.attention.out_proj")
    assert (part.name, part.role, part.part, part.out_features) == ("head.attention", None, "o", HIDDEN)


# features


def test_features_of_every_kind_of_site() -> None:
    gpt2, llama, t5 = roles(build("gpt2")), roles(build("llama")), roles(build("t5"))
    wide = [
        (gpt2[r][0].in_features, gpt2[r][0].out_features) for r in ("q", "o", "up", "down", "block", "norm", "attend")
    ]
    assert wide == [(32, 32), (32, 32), (32, 128), (128, 32), (32, 32), (32, 32), (32, 32)]
    assert (llama["k"][0].out_features, llama["norm"][0].in_features) == (16, 32)
    assert (t5["q"][0].out_features, t5["o"][0].in_features) == (48, 48)
    assert (gpt2["embed"][0].in_features, gpt2["embed"][0].out_features) == (100, 32)
    assert roles(build("clip"))["embed"][1].in_features == 3
    assert roles(build("qwen3"))["norm.qk"][0].out_features == 16
    assert roles(build("timm_vit"))["embed"][0].out_features == HIDDEN


def test_features_where_there_are_none() -> None:
    model = build("bert")
    model.bert.norm = type("EmptyNorm", (nn.Module,), {})()
    with pytest.raises(TargetError, match="EmptyNorm"):
        _ = sites(model, "bert.norm")[0].out_features
    assert sites(nn.ModuleDict({"n": nn.LayerNorm(6, elementwise_affine=False)}), "norm")[0].in_features == 6
    (whole,) = sites(model, "bert.encoder")
    with pytest.raises(TargetError, match=r"bert\.encoder \(BertEncoder\) has no in_features"):
        _ = whole.in_features


def test_bitsandbytes_layers_have_the_face_of_a_linear() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = build("llama")
    attention = model.model.layers[0].self_attn
    attention.k_proj = bnb.nn.Linear4bit(HIDDEN, 16, bias=False)
    attention.v_proj = bnb.nn.Linear8bitLt(HIDDEN, 16, bias=False)
    known = roles(model)
    assert (len(known["k"]), len(known["v"])) == (2, 2)
    assert (known["k"][0].out_features, known["v"][0].in_features) == (16, HIDDEN)


# selection


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("q", 2), ("q,v", 4), (["q", "v"], 4), ("attention", 8), ("ffn", 4), ("all-linear", 12), (" q , v ", 4),
        ("attention.query,ffn.down", 4), ("embedding.token", 1), ("gate?,up", 2), ("cross?,q", 2), ("*.nothing?,q", 2),
        ("query", 2), ("self.query", 2), ("bert.encoder.layer.1.attention.self.query", 1), ("layer.1.*.dense", 3),
        ("*.layer.[0-3].*query", 2), ("*.layer.[!0].*query", 1), ("re:.*\\.(query|value)", 4),
        ("re:bert\\..{0,22}\\.0\\.attention\\.self\\.[kq][a-z]{2,4}", 2), ("q,re:.*(value|key), ?", 2),
        (["re:.*key", "q"], 4), ("q,query,*.query", 2),
    ],
)  # fmt: skip
def test_the_grammar_of_targets(targets: str, count: int) -> None:
    if targets == "q,re:.*(value|key), ?":  # a regex takes the rest, comma and all
        with pytest.raises(TargetError, match=re.escape("re:.*(value|key), ?")):
            sites(build("bert"), targets)
    else:
        assert len(sites(build("bert"), targets)) == count


def test_sites_come_in_module_order_without_duplicates() -> None:
    model = build("bert")
    order = [name for name, _ in model.named_modules()]
    found = sites(model, "down,v,q,*.query,block")
    assert names(found) == sorted(names(found), key=order.index)
    assert len(found) == len({(s.name, s.part) for s in found}) == 8
    assert found.report == {"down": 2, "v": 2, "q": 2, "*.query": 2, "block": 2}
    assert {s.role for s in found} == {"down", "v", "q", "block"}
    assert [s.role for s in sites(build("gpt2"), "v,k,q", layers=0)] == ["q", "k", "v"]


def test_a_module_matched_by_its_name_only_has_no_role_but_a_place() -> None:
    (site,) = sites(build("gpt2"), "h.1.attn.c_attn")
    assert (site.role, site.columns, site.part, site.out_features) == (None, None, None, 96)
    assert (site.block, site.layer, site.layers, site.facts.heads) == ("transformer.h.1", 1, 2, HEADS)
    (attention,) = sites(build("llama"), "layers.0.self_attn")
    assert (attention.role, attention.part) == (None, None)


@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        ("last:1", [1]),
        ("first:1", [0]),
        ("0-1", [0, 1]),
        ("0,1", [0, 1]),
        (1, [1]),
        ([0], [0]),
        ("1", [1]),
        ("last:2", [0, 1]),
    ],
)
def test_layers(layers: str | int | list[int], kept: list[int]) -> None:
    found = sites(build("bert"), "q,norm", layers=layers)
    assert sorted({s.layer for s in found}) == kept
    assert found.report == {"q": len(kept), "norm": 2 * len(kept)}


def test_layers_count_within_each_stack() -> None:
    found = sites(build("t5"), "q", layers="last:1")
    assert names(found) == ["encoder.block.1.layer.0.SelfAttention.q", "decoder.block.2.layer.0.SelfAttention.q"]
    assert len(sites(build("t5"), "re:decoder.*SelfAttention.q", layers=2)) == 1
    assert len(sites(build("t5"), "q", layers=2, exclude="re:encoder.*")) == 1


def test_exclude() -> None:
    model = build("gpt2")
    assert [s.role for s in sites(model, "attention", exclude="k", layers=0)] == ["q", "v", "o"]
    assert [s.role for s in sites(model, "attention", exclude="*.c_attn")] == ["o", "o"]
    assert [s.layer for s in sites(model, "q,v", exclude="*.h.0.*")] == [1, 1]
    assert [s.role for s in sites(build("encoder"), "attention,up", exclude="self_attn")] == ["up", "up"]
    assert sites(model, "q,k", exclude="k").report == {"q": 2, "k": 0}


def test_siblings_are_in_the_same_block() -> None:
    model = build("bert")
    for down in (found := sites(model, "down", layers=1)):
        up = found.sibling(down, "ffn.up")
        assert up is not None
        assert up.name == "bert.encoder.layer.1.intermediate.dense"
        assert found.sibling(down, "gate") is None
    assert found.model is model
    assert Sites(found).sibling(found[0], "up") is None


def test_of_several_siblings_the_nearest() -> None:
    def expert() -> nn.Module:
        return nn.ModuleDict({"up_proj": nn.Linear(4, 8), "down_proj": nn.Linear(8, 4)})

    layers = [nn.ModuleDict({"experts": nn.ModuleList([expert(), expert()])}) for _ in range(2)]
    found = sites(nn.ModuleDict({"layers": nn.ModuleList(layers)}), "down")
    assert [found.sibling(s, "up").name for s in found] == [s.name.replace("down", "up") for s in found]


def test_find_gives_modules_by_name() -> None:
    model = build("roberta")
    assert find(model, "head") == find(model, "classifier") == {"classifier": model.classifier}
    assert list(find(model, ["re:classifier\\.(dense|out_proj)", "q"])) == [
        *(f"roberta.encoder.layer.{i}.attention.self.query" for i in range(2)),
        "classifier.dense", "classifier.out_proj",
    ]  # fmt: skip
    assert find(model, "nothing?") == {}
    assert find(build("encoder"), "layers.0.*.out_proj").keys() == {"encoder.layers.0.self_attn.out_proj"}
    with pytest.raises(TargetError, match="Nearest names: classifier"):
        find(model, "clasifier")


# traps


def test_head_does_not_catch_a_language_model_head() -> None:
    for name in ("gpt2", "llama", "t5", "bert_mlm", "whisper"):
        with pytest.raises(TargetError, match=r"No module matches 'head' in targets='head'"):
            sites(build(name), "head")
    assert list(find(build("llama"), "lm_head")) == ["lm_head"]


def test_heads_of_a_wrapped_model_and_of_one_whose_blocks_have_heads() -> None:
    outer = nn.ModuleDict({"model": build("timm_vit")})
    assert names(roles(outer)["head"]) == ["model.head"]
    outer["model"].blocks[0].head = nn.Linear(2, 2)
    assert names(roles(outer)["head"]) == ["model.head"]
    assert "head" not in roles(nn.ModuleDict({"net": outer}))


def test_output_of_attention_is_not_output_of_the_feed_forward() -> None:
    known = roles(build("bert"))
    assert all(".attention.output.dense" in name for name in names(known["o"]))
    assert not any(".attention." in name for name in names(known["down"]))
    assert {s.in_features for s in known["down"]} == {INNER}


def test_names_match_whole_components() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(12))})
    assert names(sites(model, "layers.1")) == ["layers.1"]
    assert names(sites(model, "layers.1.*")) == ["layers.1.0"]
    with pytest.raises(TargetError):
        sites(model, "ayers.1")
    with pytest.raises(TargetError):
        sites(model, "Layers.1")


def test_a_plain_module_works_by_name() -> None:
    model = build("mlp")
    assert roles(model) == {}
    for target, found in {
        "mlp": ["mlp"],
        "0": ["body.0"],
        "lora": ["lora"],
        "body.?": None,
        "body.[02]": ["body.0", "body.2"],
    }.items():
        if found is None:  # the last `?` makes a token optional, it is no wildcard
            assert sites(model, "out,body.?").report == {"out": 1, "body.?": 0}
        else:
            assert names(sites(model, target)) == found
    assert len(sites(model, "all-linear")) == 5
    assert {s.role for s in sites(model, "all-linear")} == {None}


def test_tied_embeddings_are_targeted_once() -> None:
    gpt2 = build("gpt2")
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    assert names(sites(gpt2, "embed")) == ["transformer.wte"]
    assert "lm_head" not in names(sites(gpt2, "all-linear"))


def test_all_linear_is_everything_in_blocks() -> None:
    deberta = sites(build("deberta"), "all-linear")
    assert len(deberta) == 16
    assert {s.role for s in deberta if "pos_" in s.name} == {None}
    assert not any("head" in s.name or "pooler" in s.name for s in deberta)
    assert len(sites(build("t5_gated"), "all-linear")) == 5 * 7 + 3 * 4
    assert len(sites(build("mixer"), "all-linear")) == 12


class Adapters(nn.ModuleDict):
    """The name that the container of adapters has."""


class Place(nn.Module):
    """A place made by an adapter."""

    is_host = True

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, HIDDEN)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "encoder", "mlp", "mixer", "timm_vit"])
def test_adapters_change_nothing(name: str) -> None:
    model = build(name)

    def answer() -> list[object]:
        found = [s for group in roles(model).values() for s in group] + sites(model, "all-linear,*")
        return [(s.name, s.role, s.columns, s.part, s.layer, s.facts) for s in found]

    before = answer()
    for module in [m for m in model.modules() if not isinstance(m, (nn.ModuleList, nn.Sequential))]:
        module.adapters = Adapters({"mlp": nn.Linear(2, 2), "q_proj": nn.LayerNorm(2), "0": nn.ModuleList([Place()])})
        module.attend = Place()
    assert answer() == before


def test_children_called_adapters_of_the_model_itself_are_its_own() -> None:
    model = nn.ModuleDict({"adapters": nn.ModuleDict({"x": nn.Linear(2, 2)})})
    assert names(sites(model, "adapters.x")) == ["adapters.x"]


# the user's own map and the structural fallback


def test_structure_does_not_guess_which_is_the_query() -> None:
    model = build("mixer")
    with pytest.raises(TargetError, match=r"Roles known for this model: o \(2\), attend \(2\), up \(2\), .*roles="):
        sites(model, "q")
    own = {"q": "*.ask", "attention.key": "*.find", "v": "*.tell"}
    found = sites(model, "attention", roles=own)
    assert [s.role for s in found] == ["q", "k", "v", "o"] * 2
    assert (found[0].facts, found[0].layer, found[0].layers) == (Facts(32, 4, 4, 8, None), 0, 2)


def blocks_of(*shapes: tuple[int, int], inner: bool = False) -> nn.Module:
    def layer() -> nn.Module:
        flat = nn.ModuleDict({f"p{i}": nn.Linear(*shape) for i, shape in enumerate(shapes)})
        return nn.ModuleDict({"x": flat}) if inner else flat

    return nn.ModuleDict({"steps": nn.ModuleList([layer(), layer()])})


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ([(4, 8), (8, 4)], {"up": "p0", "down": "p1"}),
        ([(4, 8), (4, 8), (8, 4)], {"down": "p2"}),
        ([(4, 12), (4, 4)], {"qkv": "p0", "o": "p1"}),
        ([(4, 4), (4, 2), (4, 2), (4, 4), (4, 8), (8, 4)], {"o": "p3", "up": "p4", "down": "p5"}),
        ([(4, 4), (4, 4)], {}),
        ([(4, 5), (4, 6), (4, 7)], {}),
        ([(4, 4)], {}),
    ],
)
def test_roles_from_shapes(shapes: list[tuple[int, int]], found: dict[str, str]) -> None:
    for inner in (False, True):
        known = roles(blocks_of(*shapes, inner=inner))
        assert len(known.pop("block")) == 2
        assert bool(known.pop("attend", [])) == (inner and "o" in found)
        assert {role: s[0].name.rpartition(".")[2] for role, s in known.items()} == found


def test_the_users_map_goes_before_the_tables() -> None:
    model = build("bert")
    swapped = {"q": "*.key", "k": "*.query"}
    assert {s.name.rpartition(".")[2] for s in sites(model, "q", roles=swapped)} == {"key"}
    assert {s.name.rpartition(".")[2] for s in sites(model, "k", roles=swapped)} == {"query"}
    assert names(sites(model, "head", roles={"head": "pooler"})) == ["bert.pooler"]
    assert [s.role for s in sites(model, "mix", roles={"mix": "*.intermediate"})] == ["mix", "mix"]
    (only,) = sites(model, "block", roles={"block": "encoder.layer.1"})
    assert (only.layer, only.layers) == (0, 1)


def test_the_users_map_on_packed_and_attending_modules() -> None:
    model = build("gpt2")
    found = sites(model, "q,k", roles={"q": "*.c_fc"}, layers=0)
    assert [(s.role, s.name) for s in found] == [
        ("k", "transformer.h.0.attn.c_attn"),
        ("q", "transformer.h.0.mlp.c_fc"),
    ]
    other = sites(model, "attend", roles={"attend": "*.mlp"})
    assert [(s.name, s.part) for s in other] == [(f"transformer.h.{i}.mlp", "attend") for i in range(2)]
    both = sites(build("bart"), "cross.attend,attend", roles={"cross.attend": "*.encoder_attn"})
    assert both.report == {"cross.attend": 3, "attend": 5}


# errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "nope"}, r"No module matches 'nope' in targets='nope'\. Roles known .*: q \(2\), k \(2\)"),
        ({"targets": "q,gate"}, r"No module matches 'gate' in targets='q,gate'"),
        ({"targets": "atention"}, r"Nearest names: attention"),
        ({"targets": "encoder.layer.0.attention.self.qeury"}, r"Nearest names: bert\.encoder\.layer.*\.self\.query"),
        ({"targets": "re:.*nope"}, r"No module matches 're:\.\*nope'"),
        ({"targets": "re:("}, r"'re:\(' is not a regular expression: missing \)"),
        ({"targets": ""}, r"targets='' is empty"),
        ({"targets": []}, r"targets=\[\] is empty"),
        ({"targets": 3}, r"targets=3 is not a string or a list of strings"),
        ({"targets": ["q", 3]}, r"is not a string or a list of strings"),
        ({"targets": "q", "exclude": "nope"}, r"No module matches 'nope' in exclude='nope'"),
        ({"targets": "q", "exclude": "q"}, r"exclude='q' and layers=None leave no site of targets='q': q \(2\)"),
        ({"targets": "embed", "layers": 0}, r"layers=0 leave no site of targets='embed': embed \(1\)"),
        ({"targets": "q", "layers": 2}, r"layers=2 asks for block 2, but the stack 'encoder' has 2, 0 to 1"),
        ({"targets": "q", "layers": "last:3"}, r"layers='last:3' asks for block -1"),
        ({"targets": "q", "layers": "first:3"}, r"asks for block 2"),
        ({"targets": "q", "layers": "0-7"}, r"asks for block 2"),
        ({"targets": "q", "layers": "top"}, r"layers='top' is not understood"),
        ({"targets": "q", "layers": -1}, r"layers=-1 is not understood. Write 'last:6'"),
        ({"targets": "q", "layers": True}, r"layers=True is not understood"),
        ({"targets": "q", "layers": ""}, r"layers='' is not understood"),
        ({"targets": "q", "roles": {"q": "*.quary"}}, r"No module matches roles\['q'\]='\*\.quary'\. .*q \(2\)"),
        ({"targets": "q", "roles": {"attention": "*.query"}}, r"roles\['attention'\]: 'attention' is a group of roles"),
        ({"targets": "q", "roles": {"q": 3}}, r"roles\['q'\]=3 is not a string"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        sites(build("bert"), **options)


def test_a_module_that_is_named_like_a_role_is_shown_in_the_error() -> None:
    model = nn.ModuleDict({"up": nn.Linear(2, 2)})
    with pytest.raises(TargetError, match=r"Roles known for this model: none\. Nearest names: re:up"):
        sites(model, "up")
    assert names(sites(model, "re:up")) == ["up"]


# the zoo itself


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_deterministic_and_runs(name: str) -> None:
    state = torch.get_rng_state()
    one, two = build(name), build(name)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    with torch.no_grad():
        one(**inputs(name))


TOTALS = {
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "roberta-base": 124_645_632,
    "gpt2-medium": 354_823_168,
    "t5-base": 222_903_552,
    "llama-7b": 6_738_415_616,
    "vit-b": 86_389_248,
}
NORMS = {
    "bert-base": 38_400,
    "bert-large": 100_352,
    "gpt2": 38_400,
    "vit-b": 38_400,
    "t5-base": 47_616,
    "llama-7b": 266_240,
}


@pytest.mark.parametrize("name", META)
def test_full_size_models_have_their_published_sizes(name: str) -> None:
    model = meta(name)
    known = roles(model)
    norms = sum(p.numel() for site in known["norm"] for p in site.module.parameters())
    assert norms == NORMS.get(name, norms)
    total = sum(p.numel() for p in model.parameters())
    assert total == TOTALS.get(name, total)
    assert len(known["q"]) == len(known["block"])


def test_reading_a_large_model_is_quick() -> None:
    def layer() -> nn.Module:
        parts = {name: nn.Linear(1, 1, device="meta") for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        return nn.ModuleDict({"self_attn": nn.ModuleDict(parts), "norm": nn.LayerNorm(1, device="meta")})

    model = nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in range(500))})
    start = time.perf_counter()
    assert len(sites(model, "all-linear")) == 2000
    assert time.perf_counter() - start < 5  # it takes 0.1 s; this only catches a walk for every module


def test_blocks_of_diffusers_show_self_and_cross_attention_and_both_halves_of_a_gated_layer() -> None:
    diffusers = pytest.importorskip("diffusers", reason="the UNet comes with the extra [diffusion]")
    shape = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
    }
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DConditionModel(**shape, **blocks, cross_attention_dim=16, norm_num_groups=8)
    found = roles(unet)
    layer = "mid_block.attentions.0.transformer_blocks.0"
    names = {role: [site.name for site in sites] for role, sites in found.items()}
    assert f"{layer}.attn1.to_q" in names["q"]
    assert f"{layer}.attn2.to_k" in names["cross.k"]
    assert f"{layer}.ff.net.2" in names["down"]
    up, gate = (next(s for s in found[role] if s.name == f"{layer}.ff.net.0.proj") for role in ("up", "gate"))
    assert (up.columns.start, up.columns.stop, gate.columns.start, gate.columns.stop) == (0, 128, 128, 256)
