"""Parity with Hugging Face peft: the same adapter tensors on a copy of the same base give the same model, in fp64.

Where peft departs from the papers, or from what is useful, a test states the difference and what closes it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, T5ForConditionalGeneration

from lightning_peft import IA3, LNTuning, LoRA, PrefixTuning, PromptTuning
from lightning_peft.core import state
from lightning_peft.core.state import Placement
from tests.zoo import HIDDEN, VOCAB, build, inputs

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Position ids are not supported.*:UserWarning"),  # generate passes them
    pytest.mark.filterwarnings("ignore:Unsupported layer type.*:UserWarning"),  # norms, for LN-Tuning
    pytest.mark.filterwarnings("ignore:.*targeted layer of type Linear has no bias.*"),
]
LENGTH = 3
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
KINDS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    """The same tiny model twice, in fp64."""
    base = build(name).double()
    return base, copy.deepcopy(base)


def placements(model: nn.Module) -> list[Placement]:
    return state.get_applied(model).placements


def perturb(tensors: Iterable[Tensor], scale: float = 0.3, seed: int = 0) -> None:
    """Values far from any initialisation, so that each tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.data.add_(scale * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))


def adapted(method: Any, model: nn.Module) -> nn.Module:
    """`model` under `method`, in fp64 with perturbed adapters."""
    method.apply(model)
    for seed, placement in enumerate(placements(model)):
        perturb(placement.adapter.parameters(), seed=seed)
    return model


def wrapped(theirs: nn.Module, placement: Placement) -> Any:
    """peft's layer at the place of one of our adapters."""
    return theirs.get_submodule(f"base_model.model.{placement.site}")


def sites_of(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(p.site for p in placements(model)))


def score(logits: Tensor) -> Tensor:
    """A scalar that depends on every logit in another way."""
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()


def watch(*models: nn.Module) -> list[nn.Parameter]:
    """The input embeddings, made to take a gradient: what flows through all adapters to the input."""
    weights = [model.get_input_embeddings().weight for model in models]  # type: ignore[operator]
    return [weight.requires_grad_() for weight in weights]


def same_run(ours: nn.Module, theirs: nn.Module, batch: dict[str, Tensor]) -> None:
    """Equal logits, and equal gradients at the input; leaves the gradients of the adapters for the caller."""
    embeddings = watch(ours, theirs)
    mine, peers = ours(**batch).logits, theirs(**batch).logits
    torch.testing.assert_close(mine, peers, **CLOSE)
    score(mine).backward()
    score(peers).backward()
    torch.testing.assert_close(embeddings[0].grad, embeddings[1].grad, **CLOSE)


def same_state(ours: nn.Module, theirs: nn.Module) -> None:
    mine, peers = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == peers.keys()
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, peers[key], **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


# ------------------------------------------------------------------ LoRA
TARGETS = {
    "bert": "q,v,up",
    "gpt2": "c_attn,mlp.c_proj",  # whole Conv1D modules, as peft adapts them
    "llama": "all-linear",  # keys and values are narrower than queries
    "t5": "q,v,cross.q,cross.v,up",
}
LEAF = {"bert": "value", "gpt2": "mlp.c_proj", "llama": "v_proj", "t5": "wi"}
VARIANTS = ["plain", "rslora", "lora_bias", "patterns"]


def lora_fields(variant: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of our LoRA, fields of peft's."""
    leaf = LEAF[name]
    return {
        "plain": ({}, {}),
        "rslora": ({"rslora": True}, {"use_rslora": True}),
        "lora_bias": ({"lora_bias": True}, {"lora_bias": True}),
        "patterns": (
            {"ranks": {leaf: 2}, "alphas": {leaf: 7.0}},
            {"rank_pattern": {leaf: 2}, "alpha_pattern": {leaf: 7}},
        ),
    }[variant]


def lora_twins(name: str, fields: dict[str, Any], peers: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Our LoRA and peft's, of rank 4 and alpha 10, with the same tensors."""
    ours, theirs = twins(name)
    adapted(LoRA(targets=TARGETS[name], rank=4, alpha=10.0, heads=None, dtype="base", **fields), ours)
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=sites_of(ours), fan_in_fan_out=name == "gpt2", **peers)
    theirs = peft.get_peft_model(theirs, config).eval()
    for placement in placements(ours):
        for mine, other in lora_pairs(placement, theirs):
            other.data.copy_(mine)
    return ours, theirs


def lora_pairs(placement: Placement, theirs: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    adapter, layer = placement.adapter, wrapped(theirs, placement)
    yield adapter.a, layer.lora_A["default"].weight
    yield adapter.b, layer.lora_B["default"].weight
    if adapter.c is not None:
        yield adapter.c, layer.lora_B["default"].bias


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", TARGETS)
def test_lora(name: str, variant: str) -> None:
    ours, theirs = lora_twins(name, *lora_fields(variant, name))
    same_run(ours, theirs, inputs(name))
    for placement in placements(ours):
        for mine, other in lora_pairs(placement, theirs):
            torch.testing.assert_close(mine.grad, other.grad, **CLOSE)
    count = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


MERGED = [(name, v) for name in TARGETS for v in VARIANTS if v != "lora_bias" or name in ("bert", "gpt2")]


@pytest.mark.parametrize(("name", "variant"), MERGED)
def test_lora_merged(name: str, variant: str) -> None:
    ours, theirs = lora_twins(name, *lora_fields(variant, name))
    logits = theirs(**inputs(name)).logits
    plain = LoRA().unload(ours, "lora")
    same_state(plain, theirs.merge_and_unload())
    torch.testing.assert_close(plain(**inputs(name)).logits, logits, rtol=1e-6, atol=1e-6)


def test_lora_float32() -> None:
    ours, theirs = (model.float() for model in lora_twins("llama", {}, {}))
    for placement in placements(ours):
        placement.adapter.cast_(torch.float32)
    torch.testing.assert_close(ours(**inputs("llama")).logits, theirs(**inputs("llama")).logits, rtol=1e-6, atol=1e-6)


def test_lora_bfloat16() -> None:
    """Adapters in fp32 on a half-precision base: merged weights alike to the bit, outputs to the rounding of bf16."""
    ours, theirs = build("llama").bfloat16(), build("llama").bfloat16()
    adapted(LoRA(rank=4, heads=None), ours)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=16, target_modules=sites_of(ours))).eval()
    for placement in placements(ours):
        for mine, other in lora_pairs(placement, theirs):
            assert mine.dtype == other.dtype == torch.float32
            other.data.copy_(mine)
    logits = [model(**inputs("llama")).logits for model in (ours, theirs)]
    torch.testing.assert_close(*logits, rtol=0, atol=float(2e-2 * logits[1].detach().abs().max()))
    mine, peers = LoRA().unload(ours, "lora").state_dict(), theirs.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, peers[key]) for key, tensor in mine.items())


def test_lora_dropout_draws_the_same_masks() -> None:
    ours, theirs = lora_twins("bert", {"dropout": 0.5}, {"lora_dropout": 0.5})
    out = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        out.append(model.train()(**inputs("bert")).logits)
    torch.testing.assert_close(*out, **CLOSE)
    assert not torch.equal(out[0], ours.eval()(**inputs("bert")).logits)


@pytest.mark.parametrize(("mine", "peers"), [("all", "all"), ("adapted", "lora_only")])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_lora_trains_the_same_biases(name: str, mine: str, peers: str) -> None:
    ours, theirs = lora_twins(name, {"bias": mine}, {"bias": peers})
    same_run(ours, theirs, inputs(name))
    found = biases(ours, "")
    expected = biases(theirs, "base_model.model.")
    assert found.keys() == expected.keys()
    for key, bias in found.items():
        torch.testing.assert_close(bias.grad, expected[key].grad, **CLOSE)


def biases(model: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    named = ((n.removeprefix(prefix).replace(".base_layer", ""), p) for n, p in model.named_parameters())
    return {name: p for name, p in named if name.endswith("bias") and p.requires_grad}


def test_lora_on_slices_of_a_packed_projection() -> None:
    """Ours adapts q and v of GPT-2's c_attn, peft all of it: its A is ours stacked, its B ours in two blocks."""
    ours, theirs = twins("gpt2")
    adapted(LoRA(targets="q,v", rank=4, alpha=8.0, heads=None, dtype="base"), ours)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)  # the same alpha / r
    theirs = peft.get_peft_model(theirs, config).eval()
    by_site = {site: [p for p in placements(ours) if p.site == site] for site in sites_of(ours)}
    for q, v in by_site.values():
        layer = wrapped(theirs, q)
        layer.lora_A["default"].weight.data.copy_(torch.cat([q.adapter.a, v.adapter.a]))
        layer.lora_B["default"].weight.data.zero_()
        layer.lora_B["default"].weight.data[:HIDDEN, :4] = q.adapter.b
        layer.lora_B["default"].weight.data[2 * HIDDEN :, 4:] = v.adapter.b
    same_run(ours, theirs, inputs("gpt2"))
    for q, v in by_site.values():
        a, b = (wrapped(theirs, q).get_submodule(f"lora_{x}.default").weight.grad for x in "AB")
        torch.testing.assert_close(torch.cat([q.adapter.a.grad, v.adapter.a.grad]), a, **CLOSE)
        torch.testing.assert_close(q.adapter.b.grad, b[:HIDDEN, :4], **CLOSE)
        torch.testing.assert_close(v.adapter.b.grad, b[2 * HIDDEN :, 4:], **CLOSE)
    same_state(LoRA().unload(ours, "lora"), theirs.merge_and_unload())


# ------------------------------------------------------------------ (IA)^3
def ia3_twins(name: str) -> tuple[nn.Module, nn.Module]:
    ours, theirs = twins(name)
    adapted(IA3(heads=None, dtype="base"), ours)
    config = peft.IA3Config(
        target_modules=sites_of(ours),
        feedforward_modules=[p.site for p in placements(ours) if p.role == "down"],
        fan_in_fan_out=name == "gpt2",
    )
    theirs = peft.get_peft_model(theirs, config).eval()
    for placement in placements(ours):
        ia3_view(theirs, placement).copy_(placement.adapter.l)
    return ours, theirs


def ia3_view(theirs: nn.Module, placement: Placement, grad: bool = False) -> Tensor:
    """The part of peft's vector that stands for ours; of a packed c_attn the third for k or v."""
    vector = wrapped(theirs, placement).ia3_l["default"]
    values = (vector.grad if grad else vector.data).view(-1)
    width = len(placement.adapter.l)
    start = 0 if len(values) == width else width * "qkv".index(str(placement.role))
    return values[start : start + width]


@pytest.mark.parametrize("name", [*KINDS, "qwen3", "t5_gated"])
def test_ia3(name: str) -> None:
    ours, theirs = ia3_twins(name)
    same_run(ours, theirs, inputs(name))
    for placement in placements(ours):
        torch.testing.assert_close(placement.adapter.l.grad, ia3_view(theirs, placement, grad=True), **CLOSE)


@pytest.mark.parametrize("name", [*KINDS, "qwen3", "t5_gated"])
def test_ia3_merged(name: str) -> None:
    ours, theirs = ia3_twins(name)
    same_state(IA3().unload(ours, "ia3"), theirs.merge_and_unload())


def test_ia3_default_targets_of_peft_are_not_the_papers() -> None:
    """BERT: the input of attention.output.dense too. OPT, BART, Qwen: queries for one of k, v. GPT-2: queries too."""
    assert by_default("llama") == set(sites_of(IA3(heads=None).apply(build("llama"))))
    assert by_default("t5") == set(sites_of(IA3(heads=None).apply(build("t5"))))
    extra = {f"bert.encoder.layer.{i}.attention.output.dense" for i in range(2)}
    assert by_default("bert") == extra | set(sites_of(IA3(heads=None).apply(build("bert"))))
    for name, given in {"opt": "qk", "bart": "qv", "qwen2": "qv", "qwen3": "qv"}.items():
        attention = {n.rpartition(".")[2] for n in by_default(name) if "attn" in n}
        assert attention == {f"{letter}_proj" for letter in given}
        ours = {n.rpartition(".")[2] for n in sites_of(IA3(heads=None).apply(build(name))) if "attn" in n}
        assert ours == {"k_proj", "v_proj"}
    gpt2 = peft.get_peft_model(build("gpt2"), peft.IA3Config(fan_in_fan_out=True))
    assert gpt2.base_model.model.transformer.h[0].attn.c_attn.ia3_l["default"].numel() == 3 * HIDDEN


def by_default(name: str) -> set[str]:
    """Where peft puts (IA)^3 when it is not told."""
    theirs = peft.get_peft_model(build(name), peft.IA3Config())
    return {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "ia3_l")}


def test_ia3_unmerge_of_peft_divides() -> None:
    """A vector with a zero in it cannot be divided out again; ours writes a snapshot back."""
    ours, theirs = ia3_twins("llama")
    layer = wrapped(theirs, placements(ours)[0])
    for placement in placements(ours):
        placement.adapter.l.data[0] = 0
        ia3_view(theirs, placement)[0] = 0
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    IA3().merge(ours, "ia3")
    IA3().unmerge(ours, "ia3")
    assert all(torch.equal(tensor, before[key]) for key, tensor in ours.state_dict().items())
    weight = layer.get_base_layer().weight.clone()
    layer.merge()
    with pytest.warns(UserWarning, match="can be inaccurate"):
        layer.unmerge()
    assert not torch.allclose(layer.get_base_layer().weight, weight)


# ------------------------------------------------------------------ LN-Tuning
@pytest.mark.parametrize("name", KINDS)
def test_ln_tuning(name: str) -> None:
    ours, theirs = twins(name)
    LNTuning(heads=None).apply(ours)
    trained = {id(s.parameter): s.module for s in state.get_applied(ours).selected}
    names = [n for n, m in ours.named_modules() if any(m is module for module in trained.values())]
    theirs = peft.get_peft_model(theirs, peft.LNTuningConfig(target_modules=names)).eval()
    pairs = [
        (mine, getattr(theirs.get_submodule(f"base_model.model.{n}").ln_tuning_layers["default"], attribute))
        for n in names
        for attribute, mine in ours.get_submodule(n).named_parameters()
    ]
    perturb(mine for mine, _ in pairs)
    for mine, other in pairs:
        other.data.copy_(mine)
    same_run(ours, theirs, inputs(name))
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, **CLOSE)
    assert len(pairs) == len(trained)
    same_state(LNTuning().unload(ours, "ln_tuning"), theirs.merge_and_unload())


# ------------------------------------------------------------------ prompt tuning
def prompt_twins(ours: nn.Module, kind: str, **fields: Any) -> tuple[nn.Module, nn.Module]:
    theirs = copy.deepcopy(ours)
    adapted(PromptTuning(length=LENGTH, heads=None, dtype="base"), ours)
    config = peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=LENGTH, **fields)
    theirs = peft.get_peft_model(theirs, config).double().eval()
    prompt_of(theirs).data[:LENGTH] = tokens_of(ours)
    return ours, theirs


def tokens_of(model: nn.Module) -> nn.Parameter:
    return next(p.adapter.tokens for p in placements(model) if hasattr(p.adapter, "tokens"))


def prompt_of(model: nn.Module) -> nn.Parameter:
    return model.prompt_encoder["default"].embedding.weight  # type: ignore[union-attr, index, return-value]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompt_tuning_of_a_causal_model(name: str) -> None:
    """peft returns logits for the virtual tokens too."""
    ours, theirs = prompt_twins(build(name).double(), "CAUSAL_LM")
    embeddings = watch(ours, theirs)
    mine, peers = ours(**inputs(name)).logits, theirs(**inputs(name)).logits
    assert peers.shape[1] == mine.shape[1] + LENGTH
    torch.testing.assert_close(mine, peers[:, LENGTH:], **CLOSE)
    score(mine).backward()
    score(peers[:, LENGTH:]).backward()
    torch.testing.assert_close(tokens_of(ours).grad, prompt_of(theirs).grad, **CLOSE)
    torch.testing.assert_close(embeddings[0].grad, embeddings[1].grad, **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompt_tuning_generates_the_same(name: str) -> None:
    ours, theirs = prompt_twins(build(name).double(), "CAUSAL_LM")
    batch = {"input_ids": torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    mine = ours.generate(**batch, **options)  # type: ignore[operator]
    assert torch.equal(mine, theirs.generate(**batch, **options))  # type: ignore[operator]


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_prompt_tuning_of_an_encoder(name: str) -> None:
    ours, theirs = prompt_twins(build(name).get_submodule(name).double(), "FEATURE_EXTRACTION")
    batch = inputs(name)
    mine, peers = (model(**batch).last_hidden_state for model in (ours, theirs))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(mine[real], peers[:, LENGTH:][real], **CLOSE)
    score(mine[real]).backward()
    score(peers[:, LENGTH:][real]).backward()
    torch.testing.assert_close(tokens_of(ours).grad, prompt_of(theirs).grad, **CLOSE)


def test_prompt_tuning_of_an_encoder_decoder() -> None:
    ours, theirs = prompt_twins(build("t5").double(), "SEQ_2_SEQ_LM", num_transformer_submodules=1)
    same_run(ours, theirs, inputs("t5"))
    torch.testing.assert_close(tokens_of(ours).grad, prompt_of(theirs).grad, **CLOSE)


def test_prompt_tuning_of_peft_has_dead_rows_in_an_encoder_decoder() -> None:
    """Its default gives the decoder a prompt of its own, which nothing reads."""
    ours, theirs = prompt_twins(build("t5").double(), "SEQ_2_SEQ_LM")
    assert len(prompt_of(theirs)) == 2 * len(tokens_of(ours))
    same_run(ours, theirs, inputs("t5"))
    torch.testing.assert_close(tokens_of(ours).grad, prompt_of(theirs).grad[:LENGTH], **CLOSE)
    assert not prompt_of(theirs).grad[LENGTH:].any()


def test_prompt_tuning_of_peft_pools_a_virtual_token() -> None:
    """BERT's pooler reads position 0: the first virtual token in peft, [CLS] in ours."""
    ours, theirs = prompt_twins(build("bert").double(), "SEQ_CLS")
    batch = inputs("bert")
    mine, peers = ours(**batch).logits, theirs(**batch, output_hidden_states=True)
    head = [ours.bert.pooler, ours.classifier]
    assert not torch.allclose(mine, peers.logits)
    torch.testing.assert_close(nn.Sequential(*head)(peers.hidden_states[-1]), peers.logits, **CLOSE)
    torch.testing.assert_close(nn.Sequential(*head)(peers.hidden_states[-1][:, LENGTH:]), mine, **CLOSE)


def test_prompt_tuning_of_peft_counts_the_first_token() -> None:
    """The last virtual token predicts token 0 in peft's loss; ours is over the tokens that the base's loss is over."""
    ours, theirs = prompt_twins(build("llama").double(), "CAUSAL_LM")
    batch = {"input_ids": inputs("llama")["input_ids"][:1]}
    labels = batch["input_ids"]
    mine, peers = (model(**batch, labels=labels).loss for model in (ours, theirs))
    logits = theirs(**batch).logits[0].float()  # as the library's loss does
    torch.testing.assert_close(peers, F.cross_entropy(logits[LENGTH - 1 : -1], labels[0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(mine, F.cross_entropy(logits[LENGTH:-1], labels[0, 1:]), rtol=1e-6, atol=0)


# ------------------------------------------------------------------ prefix tuning
def prefix_twins(ours: nn.Module, name: str, bottleneck: int = 0, **fields: Any) -> tuple[nn.Module, nn.Module]:
    theirs = copy.deepcopy(ours)
    exclude = "encoder.*" if name == "t5" else None
    method = PrefixTuning(
        targets="attend", exclude=exclude, length=LENGTH, bottleneck=bottleneck, heads=None, dtype="base"
    )
    projection = {"prefix_projection": True, "encoder_hidden_size": bottleneck} if bottleneck else {}
    config = peft.PrefixTuningConfig(task_type=KINDS[name], num_virtual_tokens=LENGTH, **projection, **fields)
    return adapted(method, ours), peft.get_peft_model(theirs, config).double().eval()


def flat(tensors: list[Tensor]) -> Tensor:
    """Our (2, length, kv_heads, head_dim) of each layer as peft's (length, 2 layers kv_heads head_dim)."""
    return torch.stack(tensors).permute(2, 0, 1, 3, 4).flatten(1)


def prefixes(model: nn.Module, grad: bool = False) -> Tensor:
    kv = [p.adapter.kv for p in placements(model)]
    return flat([x.grad if grad else x.detach() for x in kv])


def shifted(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with its positions moved by the length of the prefix, which peft does and ours does not."""
    return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None] + LENGTH}


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_prefix_tuning(name: str) -> None:
    ours, theirs = prefix_twins(build(name).double(), name)
    prompt_of(theirs).data.copy_(prefixes(ours))
    embeddings = watch(ours, theirs)
    mine, peers = ours(**shifted(inputs(name))).logits, theirs(**inputs(name)).logits
    torch.testing.assert_close(mine, peers, **CLOSE)
    score(mine).backward()
    score(peers).backward()
    torch.testing.assert_close(prefixes(ours, grad=True), prompt_of(theirs).grad, **CLOSE)
    torch.testing.assert_close(embeddings[0].grad, embeddings[1].grad, **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_prefix_tuning_of_peft_shifts_positions(name: str) -> None:
    """Ours leaves the text where it was: the same as a cache that holds the prefix, with the positions of the text."""
    ours, base = twins(name)
    batch = inputs(name)
    prefix_twins(ours, name)
    cache = DynamicCache([cached(p.adapter.kv.detach(), len(batch["input_ids"])) for p in placements(ours)])
    mask = F.pad(batch["attention_mask"], (LENGTH, 0), value=1)
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    unshifted = base(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, past_key_values=cache)
    mine = ours(**batch).logits
    torch.testing.assert_close(mine, unshifted.logits, **CLOSE)
    assert not torch.allclose(mine, ours(**shifted(batch)).logits)


def cached(kv: Tensor, batch: int) -> tuple[Tensor, ...]:  # (2, length, heads, d) -> two of (batch, heads, length, d)
    return tuple(x.transpose(0, 1).expand(batch, -1, -1, -1) for x in kv)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_prefix_tuning_through_an_mlp(name: str) -> None:
    ours, theirs = prefix_twins(build(name).double(), name, bottleneck=5)
    encoder = theirs.prompt_encoder["default"]
    adapters = [p.adapter for p in placements(ours)]
    trunk = adapters[0].trunk
    pairs = [(trunk.embedding, encoder.embedding.weight), (trunk.weight, encoder.transform[0].weight)]
    pairs += [(trunk.bias, encoder.transform[0].bias)]
    for mine, other in pairs:
        other.data.copy_(mine)
    last = encoder.transform[2]
    last.weight.data.copy_(torch.cat([a.weight for a in adapters]))
    last.bias.data.copy_(torch.cat([a.bias for a in adapters]))
    mine, peers = ours(**shifted(inputs(name))).logits, theirs(**inputs(name)).logits
    torch.testing.assert_close(mine, peers, **CLOSE)
    score(mine).backward()
    score(peers).backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, **CLOSE)
    torch.testing.assert_close(torch.cat([a.weight.grad for a in adapters]), last.weight.grad, **CLOSE)
    torch.testing.assert_close(torch.cat([a.bias.grad for a in adapters]), last.bias.grad, **CLOSE)


def test_prefix_tuning_of_peft_in_an_encoder_decoder() -> None:
    """peft gives a prefix to the decoder's self-attention only, and T5's relative position bias acts on it.

    Without that bias the two agree, once peft's layers are sorted: layer i of n reads slot 2i mod n of the parameter.
    """
    ours, theirs = t5_prefix_twins(layers=3)
    slots = [0, 2, 1]
    by_layer = torch.stack([p.adapter.kv.detach() for p in placements(ours)])
    prompt_of(theirs).data.copy_(flat(list(by_layer[slots])))
    batch = inputs("t5")
    assert not torch.allclose(ours(**batch).logits, theirs(**batch).logits)
    for model in (ours, theirs.get_base_model()):  # type: ignore[operator]
        model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.zero_()
    same_run(ours, theirs, batch)
    gradients = [placements(ours)[slot].adapter.kv.grad for slot in slots]
    torch.testing.assert_close(flat(gradients), prompt_of(theirs).grad, **CLOSE)
    assert len(placements(PrefixTuning(heads=None).apply(build("t5")))) == 2 + 3 + 3  # encoder, decoder, cross


def test_prefix_tuning_of_peft_has_dead_slots_in_an_encoder_decoder() -> None:
    """With an even number n of layers, 2i mod n leaves out every other slot: half of peft's prefixes are never read."""
    _, theirs = t5_prefix_twins(layers=4)
    score(theirs(**inputs("t5")).logits).backward()
    read = [bool(slot.any()) for slot in prompt_of(theirs).grad.view(LENGTH, 4, -1).unbind(1)]
    assert read == [True, False, True, False]


def t5_prefix_twins(layers: int) -> tuple[nn.Module, nn.Module]:
    config = build("t5").config
    config.num_decoder_layers = layers
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).double().eval()
    return prefix_twins(model, "t5", num_layers=layers, token_dim=48, num_attention_heads=4)
