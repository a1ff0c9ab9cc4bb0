"""Methods made of several, and several methods at once: UniPELT, S4, SPAFIT, MAM, lists of methods."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boring
import pytest
import torch
import zoo
from harness import differences, output, perturb, snapshot, train
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_peft import (
    MAM,
    S4,
    SPAFIT,
    BitFit,
    Compacter,
    DoRA,
    LNTuning,
    LoRA,
    ParallelAdapter,
    PrefixTuning,
    PromptTuning,
    UniPELT,
    load_adapter,
    save_adapter,
    with_rates,
)
from lightning_peft.core import state
from lightning_peft.core.attention import scaled_dot_product
from lightning_peft.core.fields import FieldError
from lightning_peft.core.files import AdapterFileError
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import TargetError
from lightning_peft.groups import LoRAPlus, optimizer_of, parameter_groups
from lightning_peft.methods.s4 import spindle
from lightning_peft.methods.unipelt import GatedPrefix
from lightning_peft.rates import Rates

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


def test_the_gates_of_unipelt_see_padding_in_masks_of_pairs_and_refuse_those_of_packed_texts() -> None:
    net, ids = ready(UniPELT(**SMALL), "bert"), torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]])
    mask = (ids != 0)[:, None, None].expand(-1, 1, 6, -1)
    torch.testing.assert_close(states(net, ids, mask), states(net, ids, mask[:, 0, 0].long()), atol=1e-12, rtol=1e-12)
    packed = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool().expand(2, 1, 6, 6)
    with pytest.raises(ValueError, match="says more than what is padding: which tokens are one text"):
        states(net, ids, packed)
    by_token, other = ready(UniPELT(**SMALL, gate="token"), "bert"), ids.clone()
    other[:, 4] = 20  # in the text beside
    torch.testing.assert_close(states(by_token, ids, packed), states(by_token, other, packed), atol=0, rtol=0)


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


# ------------------------------------------------------------------ S4
@pytest.mark.parametrize(
    ("blocks", "sizes"), {12: [2, 4, 4, 2], 24: [4, 8, 8, 4], 6: [1, 2, 2, 1], 3: [1, 1, 0, 1], 1: [1, 0, 0, 0]}.items()
)
def test_a_spindle(blocks: int, sizes: list[int]) -> None:
    assert spindle(blocks) == sizes


def by_block(net: nn.Module) -> dict[str, dict[str, int]]:
    """block -> method -> how many parameters it trains there."""
    found: dict[str, dict[str, int]] = {}
    for name, p in state.trainable(net).items():
        place, _, rest = name.partition(".adapters.")
        block = ".".join(place.split(".")[: next(i for i, part in enumerate(place.split(".")) if part.isdigit()) + 1])
        method = rest.partition(".")[0].removeprefix("s4_") if rest else "base"
        counts = found.setdefault(block, {})
        counts[method] = counts.get(method, 0) + p.numel()
    return found


@pytest.mark.parametrize("model", ["bert-base", "t5-base"])
def test_s4_spends_the_budget_evenly_and_not_more(model: str) -> None:
    net = zoo.meta(model)
    total = sum(p.numel() for p in net.parameters())
    blocks = by_block(S4(heads=None).apply(net))
    share = 0.005 * total / len(blocks)
    assert len(blocks) == (12 if model == "bert-base" else 24)
    for name, parts in blocks.items():
        decoder = name.startswith("decoder")
        units = {"pfeiffer": 2 * 768 + 1, "lora": 4 * 768, "prefix_tuning": 2 * 768 * (1 + decoder)}
        layer = int(name.rpartition(".")[2])
        wanted = [{"pfeiffer", "lora"}, {"pfeiffer", "prefix_tuning"}, {"pfeiffer", "prefix_tuning", "biases"},
                  {"prefix_tuning", "biases", "lora"}][(layer >= 2) + (layer >= 6) + (layer >= 10)]  # fmt: skip
        biases = {"bert-base": "base", "t5-base": "bitfit"}[model]
        assert set(parts) == {biases if part == "biases" else part for part in wanted}
        assert share - sum(units.get(part, 0) for part in parts) < sum(parts.values()) <= share


def test_groupings_of_s4_are_settings() -> None:
    net = S4(budget=0.1, groups=["lora", "bitfit"], sizes=[1, 1], heads=None).apply(zoo.build("gpt2"))
    assert {block: set(parts) for block, parts in by_block(net).items()} == {
        "transformer.h.0": {"lora"},
        "transformer.h.1": {"base"},
    }


def test_a_group_of_s4_that_is_left_alone_gives_its_share_to_the_others() -> None:
    net = zoo.build("gpt2")
    total = sum(p.numel() for p in net.parameters())
    blocks = by_block(S4(budget=0.1, groups=["none", "lora"], sizes=[1, 1], heads=None).apply(net))
    assert set(blocks) == {"transformer.h.1"}
    assert 0.1 * total - 4 * 32 < sum(blocks["transformer.h.1"].values()) <= 0.1 * total


class Pair(nn.Module):
    """A student, a teacher that was frozen, and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = zoo.build("bert"), zoo.build("bert").requires_grad_(False)
        self.more = nn.Linear(99, 99)


def test_the_budget_of_s4_is_that_of_the_network_whose_blocks_it_groups(tmp_path: Path) -> None:
    pair, alone = Pair(), zoo.build("bert")
    S4(budget=0.3).apply(pair)
    perturb(pair, scale=0.3)
    assert not [name for name in state.trainable(pair) if not name.startswith("student.")]
    save_adapter(pair, tmp_path / "a")
    load_adapter(alone, tmp_path / "a")
    assert torch.equal(output(alone, "bert"), output(pair.student, "bert"))


def test_s4_counts_the_biases_of_the_base_only() -> None:
    lone, second = zoo.build("bert"), zoo.build("bert")
    UniPELT(**SMALL).apply(second)
    for net in (lone, second):
        S4(budget=0.3, groups=["bitfit,lora"], heads=None).apply(net)
    sizes = [{n: p.shape for n, p in state.trainable(net).items() if ".s4_" in n} for net in (lone, second)]
    assert sizes[0] == sizes[1]


def test_s4_knows_the_roles_that_it_is_given() -> None:
    net = S4(budget=0.4, groups=["lora"], roles={"q": "*.ask", "v": "*.tell"}).apply(zoo.build("mixer"))
    assert set(by_block(net)) == {"steps.0", "steps.1"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0.0}, "budget=0.0"),
        ({"groups": ["lora", "nope"]}, "'nope' is no method here. Known: adapter"),
        ({"groups": ["lora", "lora, lora"]}, "'lora, lora' names a method twice"),
        ({"sizes": [1, 2]}, "give a size"),
        ({"groups": ["lora", "none"], "sizes": [0, 2]}, "at least one group with blocks and methods"),
    ],
)
def test_s4_with_values_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        S4(**fields)


def test_s4_on_models_that_cannot_take_it() -> None:
    for method, model, message in (
        (S4(), "bert", "parameters for .* which needs .* at least. Raise the budget"),
        (S4(sizes=[1, 1, 1, 1]), "bert", "4 blocks in groups, and there are 2"),
        (S4(sizes=[1, 1, 0, 0], budget=0.3), "t5", "2 blocks in groups, and there are 3 in 'decoder'"),
        (S4(budget=0.4), "mixer", "puts lora into 'steps.0', where it finds no place: .*'up'.* are known"),
        (S4(), "mlp", "none are known"),
    ):
        with pytest.raises(TargetError, match=message):
            method.apply(zoo.build(model))


# ------------------------------------------------------------------ SPAFIT, lists of methods
def test_spafit_leaves_low_blocks_without_a_graph() -> None:
    net = SPAFIT(frozen=1, biased=1, rank=2, heads=None).apply(zoo.build("gpt2"))
    assert all(".h.1." in name for name in state.trainable(net))
    reached = []
    net.transformer.h[0].register_forward_hook(lambda *io: reached.append(io[2]))  # type: ignore[union-attr, index]
    net(**zoo.inputs("gpt2"))
    assert not reached[0].requires_grad
    with pytest.raises(FieldError, match="biased counts"):
        SPAFIT(frozen=3, biased=2)
    with pytest.raises(TargetError, match=r"layers='9-' asks for block 9, but the model has 2"):
        SPAFIT(frozen=0).apply(zoo.build("gpt2"))


LISTS: dict[str, tuple[str, list[Any]]] = {
    "nested": ("llama", [LoRA(targets="q,v", rank=2), BitFit(targets="q")]),
    "disjoint layers": ("gpt2", [DoRA(targets="q,v", rank=2, layers=[0]), BitFit(layers=[1])]),
    "compact": ("bert", [Compacter(bottleneck=8), LNTuning(heads=None)]),
    "base and beside": ("bert", [LoRA(rank=2, bias="adapted"), BitFit(targets="q,up", heads=None)]),
    "three": ("t5", [LoRA(rank=2), PrefixTuning(length=2), ParallelAdapter(bottleneck=4)]),
}


@pytest.mark.parametrize("case", LISTS)
def test_methods_of_a_list_train_together_and_leave_one_by_one(case: str, tmp_path: Path) -> None:
    model, methods = LISTS[case]
    net = zoo.build(model)
    output(net, model)
    before = snapshot(net)
    alone = [set(state.trainable(method.apply(zoo.build(model)))) for method in methods]
    for method in methods:
        method.apply(net)
    assert set(state.trainable(net)) == set().union(*alone)
    train(net, model)
    expected, fresh = output(net, model), zoo.build(model)
    for method in methods:
        save_adapter(net, tmp_path / method.info.name, label=method.info.name)
        load_adapter(fresh, tmp_path / method.info.name)
    torch.testing.assert_close(output(fresh, model), expected, atol=1e-6, rtol=1e-6)
    methods[0].remove(net)
    assert set(state.trainable(net)) == set().union(*alone[1:])
    for method in methods[1:]:
        method.remove(net)
    assert differences(before, snapshot(net)) == []


def test_mam_is_its_parts_one_after_the_other() -> None:
    whole = MAM(length=3, bottleneck=6, scale=2.0, heads=None).apply(zoo.build("bert"))
    parts = zoo.build("bert")
    PrefixTuning(length=3, heads=None).apply(parts)
    ParallelAdapter(bottleneck=6, scale=2.0, heads=None).apply(parts)
    for net in (whole, parts):
        perturb(net)
    assert torch.equal(output(whole, "bert"), output(parts, "bert"))


class Inside(nn.Module):
    """A model one level down."""

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__()
        self.more = nn.Parameter(torch.zeros(1))
        self.add_module(name, net)


def test_files_of_a_list_find_their_places_at_any_depth(tmp_path: Path) -> None:
    methods = [
        MAM(length=3, bottleneck=6),
        BitFit(targets="all-linear", heads=None),
        PromptTuning(length=2, heads=None),
    ]
    net = zoo.build("bert")
    deep = Inside(Inside(net, "model"), "net")
    for method in methods:
        method.apply(deep)
    perturb(deep)
    for name in ("mam", "bitfit", "prompt_tuning"):
        save_adapter(deep, tmp_path / name, label=name)
    for wrap in (lambda m: m, lambda m: Inside(m, "other"), lambda m: Inside(Inside(m, "bert"), "net")):
        fresh = zoo.build("bert")
        for name in ("mam", "bitfit", "prompt_tuning"):
            load_adapter(wrap(fresh), tmp_path / name)
        torch.testing.assert_close(output(fresh, "bert"), output(net, "bert"), atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------ learning rates
def rates_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """name -> rate and weight decay; each parameter is in one group."""
    named = {id(p): name for name, p in net.named_parameters()}
    found = [(named[id(p)], (g["lr"], g["weight_decay"])) for g in optimizer.param_groups for p in g["params"]]
    assert len(found) == len(dict(found)) == len(state.trainable(net))
    return dict(found)


@pytest.mark.parametrize("ratio", [1, 16])
def test_methods_of_a_list_may_have_rates_of_their_own(ratio: int) -> None:
    net = zoo.build("bert")
    LoRA(rank=2).apply(net)
    BitFit().apply(net)
    make = partial(torch.optim.AdamW, lr=0.5, weight_decay=0.1)
    plus = make if ratio == 1 else LoRAPlus(make, ratio)
    plain = rates_of(net, optimizer_of(net, plus))
    found = rates_of(net, optimizer_of(net, Rates(plus, {"lora": 0.25, "heads": 2.0})))
    for name, (rate, decay) in found.items():
        wanted = {"a": 0.25, "b": 0.25 * ratio}.get(name.rpartition(".")[2], 2.0 if "classifier" in name else 0.5)
        assert (rate, decay) == (wanted, plain[name][1]), name


def test_rates_that_nothing_or_two_methods_have() -> None:
    net = zoo.build("bert")
    BitFit(heads=None).apply(net)
    LNTuning(heads=None).apply(net)
    optimizer = torch.optim.SGD(state.trainable(net).values(), lr=0.5)
    with pytest.raises(ValueError, match="'lora' trains nothing in this Bert.*Known: bitfit, ln_tuning"):
        with_rates(optimizer, net, {"lora": 0.1})
    with pytest.raises(ValueError, match="bitfit and ln_tuning train a parameter together"):
        with_rates(optimizer, net, {"bitfit": 0.1, "ln_tuning": 0.2})
    with pytest.raises(ValueError, match="LBFGS has one rate"):
        with_rates(torch.optim.LBFGS([p for p in net.parameters() if p.requires_grad]), net, {"bitfit": 0.1})
    with pytest.raises(ValueError, match="bitfit=-1 is no learning rate"):
        Rates(torch.optim.SGD, {"bitfit": -1})
    assert {group["lr"] for group in with_rates(optimizer, net, {"bitfit": 0.1}).param_groups} == {0.1, 0.5}


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed")
def test_a_run_with_rates_goes_on_in_mid_epoch_to_the_bit(tmp_path: Path) -> None:
    class Rated(boring.Boring):
        def configure_optimizers(self) -> Any:
            return with_rates(torch.optim.AdamW(parameter_groups(self), lr=0.01), self, {"bitfit": 0.05, "heads": 0.0})

    def fit(folder: str, path: Path | None = None) -> boring.Boring:
        torch.manual_seed(0)
        keep = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        module = Rated()
        boring.trainer(tmp_path, [LoRA(rank=2), BitFit(), keep]).fit(module, boring.data(), ckpt_path=path)
        return module

    through = fit("a")
    again = state.saved(fit("b", tmp_path / "a" / "step=3.ckpt"))
    assert all(torch.equal(again[name], tensor) for name, tensor in state.saved(through).items())
    assert torch.equal(through.net.classifier.weight, boring.Boring().net.classifier.weight)


def test_a_file_of_one_layer_does_not_load_at_another(tmp_path: Path) -> None:
    net, deeper = zoo.build("bert"), zoo.build("bert")
    LoRA(targets="q", layers="last:1", heads=None).apply(net)
    save_adapter(net, tmp_path / "last")
    layers: Any = deeper.get_submodule("bert.encoder.layer")
    layers.append(copy.deepcopy(layers[-1]))
    with pytest.raises(AdapterFileError, match="does not fit"):
        load_adapter(deeper, tmp_path / "last", check_base=False)
