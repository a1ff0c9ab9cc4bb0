"""Every error of the core and the methods: it says what was given, what is known, what to do, and nothing is lost."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from harness import differences, output, perturb, snapshot
from safetensors.torch import load_file, save_file
from settings import adapted, make
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    PEFT,
    REGISTRY,
    Adapter,
    BitFit,
    FullFineTuning,
    Houlsby,
    LinearProbe,
    LoRA,
    LoReFT,
    ParallelAdapter,
    PrefixTuning,
    PromptTuning,
    Site,
    load_adapter,
    save_adapter,
)
from lightning_peft.core import files, state
from lightning_peft.core.adapter import LabelError, NotMergeableError, Takeover, attach, detach
from lightning_peft.core.attention import UnsupportedSiteError, routed_attention
from lightning_peft.core.fields import FieldError
from lightning_peft.core.files import AdapterFileError
from lightning_peft.core.init import Draw
from lightning_peft.core.method import Method, NothingToTrainError, unload
from lightning_peft.core.sites import TargetError
from lightning_peft.methods.parallel import Parallel, Tap

Call = Callable[[], Any]


# ------------------------------------------------------------------ fields
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LoRA(rnak=8), "has no field 'rnak'. Did you mean 'rank'"),
        (lambda: LoRA(zzz=8), "has no field 'zzz'. Known: targets"),
        (lambda: LoRA(8), "positional"),
    ],
)
def test_unknown_fields(call: Call, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


class DictConfig(dict):
    """As OmegaConf's: looks like a dictionary and is none."""


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        (LoRA, {"rank": 0}, r"LoRA\(rank=0\): expected a number above 0"),
        (LoRA, {"rank": -1}, "expected a number above 0"),
        (LoRA, {"rank": 2.5}, r"LoRA\(rank=2.5\): expected int"),
        (LoRA, {"rank": True}, "expected int"),
        (LoRA, {"rank": "8"}, "expected int"),
        (LoRA, {"alpha": -1.0}, "expected 0 or more"),
        (LoRA, {"alpha": "1"}, "expected float"),
        (LoRA, {"alpha": True}, "expected float"),
        (LoRA, {"dropout": 2.0}, "expected a probability"),
        (LoRA, {"dropout": 1.0}, "expected a probability"),
        (LoRA, {"dropout": float("nan")}, "expected a probability"),
        (LoRA, {"init": "pissa"}, "expected one of 'kaiming', 'gaussian'"),
        (LoRA, {"bias": True}, "expected one of"),
        (LoRA, {"targets": 3}, "expected"),
        (LoRA, {"targets": ["q", 3]}, "expected"),
        (LoRA, {"layers": 1.5}, "expected"),
        (LoRA, {"label": 3}, "expected"),
        (LoRA, {"dtype": "int8"}, "expected one of 'float32'"),
        (LoRA, {"ranks": {"q": 0}}, "expected ranks above 0"),
        (LoRA, {"ranks": {"q": "8"}}, "expected"),
        (LoRA, {"ranks": DictConfig(q=8)}, "got a DictConfig; fields hold plain values"),
        (LoRA, {"targets": torch.ones(1)}, "got a Tensor"),
        (LoRA, {"ranks": {"q": torch.ones(1)}}, "got a dict"),
        (Houlsby, {"bottleneck": 0}, "above 0"),
        (Houlsby, {"activation": "swish"}, "expected one of 'gelu'"),
        (ParallelAdapter, {"bottleneck": -2}, "above 0"),
        (ParallelAdapter, {"scale": "4"}, "expected"),
        (PrefixTuning, {"length": 0}, "above 0"),
        (PrefixTuning, {"bottleneck": -1}, "0 or more"),
        (PrefixTuning, {"dropout": -0.1}, "probability"),
        (PromptTuning, {"length": 0}, "above 0"),
        (PromptTuning, {"vocabulary": 0}, "above 0"),
        (LoReFT, {"rank": 0}, "above 0"),
        (LoReFT, {"first": -1}, "0 or more"),
        (LoReFT, {"first": 0, "last": 0}, "edits no position"),
        (BitFit, {"create": None}, "expected bool"),
        (FullFineTuning, {"keep_base": 1}, "expected bool"),
    ],
)
def test_fields_that_make_no_sense(method: type[PEFT], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        method(**fields)


def test_tuples_are_lists_and_whole_numbers_are_numbers() -> None:
    assert LoRA(layers=(0, 1), alpha=8).alpha == 8
    net = zoo.build("bert")
    LoRA(layers=(1,), alpha=8, heads=None).apply(net)
    assert all("layer.1." in n for n in state.trainable(net))


# ------------------------------------------------------------------ methods and adapters
def test_a_name_that_is_registered_is_an_error() -> None:
    with pytest.raises(ValueError, match="A method named 'lora' is registered"):
        type("Other", (PEFT,), {"__doc__": "y = x", "__qualname__": "Other"}, name="lora", family="additive")
    assert REGISTRY["lora"] is LoRA


def test_what_a_method_or_an_adapter_must_define() -> None:
    with pytest.raises(NotImplementedError, match=r"defines neither adapter\(site\)"):
        Method.adapter(BitFit(), None)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="has no forward"):
        Adapter()(lambda x: x, torch.ones(1))
    with pytest.raises(NotImplementedError, match="has no rewritten forward"):
        Takeover(nn.Linear(1, 1)).rewritten()
    with pytest.raises(NotMergeableError, match="cannot be folded into a weight"):
        Adapter().delta(torch.ones(1, 1))


def test_attach_and_detach() -> None:
    module = nn.Linear(2, 2)
    before = snapshot(module)
    attach(module, "a", Adapter())
    with pytest.raises(LabelError, match=r"label='a' is taken on this Linear; known: \['a'\]"):
        attach(module, "a", Adapter())
    with pytest.raises(LabelError, match=r"No adapter labelled 'b' on this Linear; known: \['a'\]"):
        detach(module, "b")
    assert "a" in module.adapters
    assert len(module.adapters) == 1
    detach(module, "a")
    with pytest.raises(LabelError, match=r"known: \[\]"):
        detach(module, "a")
    assert differences(before, snapshot(module)) == []
    for label in ("", "a.b", 3, None):
        with pytest.raises(LabelError, match="cannot name an adapter"):
            attach(module, label, Adapter())  # type: ignore[arg-type]


@pytest.mark.parametrize("label", [None, "nobody"])
def test_a_label_that_names_no_method(label: str | None) -> None:
    net = zoo.build("bert")
    with pytest.raises(LabelError, match=r"names no method on this BertForSequenceClassification; known: \[\]"):
        state.get_applied(net, label)
    LoRA(label="a").apply(net)
    assert state.get_applied(net).label == "a"
    IA3(label="b").apply(net)
    with pytest.raises(LabelError, match=r"known: \['a', 'b'\]"):
        state.get_applied(net, label)


def test_nothing_to_train_names_the_roles() -> None:
    with pytest.raises(NothingToTrainError, match="targets=None, heads=None. Roles known here: attend, block"):
        LinearProbe(heads=None).apply(zoo.build("bert"))


def test_removing_without_the_originals_names_the_way_out() -> None:
    net = zoo.build("mlp")
    FullFineTuning(keep_base=False).apply(net)
    perturb(net)
    expected = output(net, "mlp")
    with pytest.raises(LabelError, match=r"keep_base=False.*unload"):
        FullFineTuning().remove(net)
    assert list(state.applied_to(net)) == ["full"]
    with pytest.raises(LabelError, match=r"keep_base=False.*cannot be switched"):
        FullFineTuning().enabled(net, False)
    assert torch.equal(output(net, "mlp"), expected)
    unload(net, "full")
    assert torch.equal(output(net, "mlp"), expected)
    assert state.applied_to(net) == {}


# ------------------------------------------------------------------ targets
@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        ("bert", lambda: LoRA(ranks={"k": 4}), "'k' meets none of the chosen sites"),
        ("bert", lambda: LoRA(ranks={"nope": 4}), "nope"),
        ("bert", lambda: LoRA(alphas={"k": 4.0}), "'k' meets none"),
        ("bert", lambda: IA3(targets="k,v", inputs="q"), "'q' meets none"),
        ("bert", lambda: LoReFT(rank=33), "rank=33.*the hidden width is 32"),
        ("mlp", lambda: LoReFT(targets="body"), "and 'body' .role None. is in none"),
        ("mlp", lambda: LoReFT(roles={"block": "body"}), "the hidden width is unknown"),
        ("mlp", lambda: ParallelAdapter(targets="mlp"), "needs the feed-forward layer around 'mlp'"),
        ("mlp", lambda: PrefixTuning(targets="mlp"), "numbers of heads at 'mlp' are unknown"),
        ("vit", lambda: PromptTuning(init="vocabulary"), "needs a token embedding"),
        ("bert", lambda: PromptTuning(init="vocabulary", length=30, vocabulary=20), "30 tokens cannot be drawn from 20 rows"),
        ("bert", lambda: PromptTuning(init="vocabulary", length=101), "101 tokens cannot be drawn from 100 rows"),
        ("mlp", lambda: PromptTuning(targets="mlp"), "blocks behind 'mlp' are unknown"),
        ("bert", lambda: PromptTuning(targets="*.position_embeddings"), "no module above it takes `inputs_embeds`"),
    ],
)  # fmt: skip
def test_targets_at_which_a_method_cannot_act(model: str, method: Callable[[], PEFT], message: str) -> None:
    net = zoo.build(model)
    before = snapshot(net)
    with pytest.raises(TargetError, match=message):
        method().apply(net)
    assert differences(before, snapshot(net)) == []


def test_a_parallel_adapter_beside_anything_but_a_feed_forward_layer() -> None:
    net = zoo.build("bert")
    with pytest.raises(TargetError, match="needs the feed-forward layer"):
        ParallelAdapter(targets="q").apply(net)


def test_a_down_projection_alone_says_what_is_missing() -> None:
    net = zoo.build("llama")
    ParallelAdapter(bottleneck=2).apply(net)
    with pytest.raises(RuntimeError, match="ran without its up projection"):
        net.model.layers[0].mlp.down_proj(torch.ones(1, zoo.INNER))
    site = SimpleNamespace(out_features=4)
    with pytest.raises(RuntimeError, match="ran without its up projection"):
        Parallel(Tap(), site, 2, "relu", "zero", 1.0)(lambda h: h, torch.ones(1, 4))  # type: ignore[arg-type]


# ------------------------------------------------------------------ inside attention
@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
@pytest.mark.parametrize("method", [LoRA(targets="q"), PrefixTuning()])
def test_torch_attention_with_keys_of_its_own(options: dict[str, bool], method: PEFT) -> None:
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, **options)})
    before = snapshot(net)
    with pytest.raises(UnsupportedSiteError, match="appends keys of its own"):
        method.apply(net)
    assert differences(before, snapshot(net)) == []


def test_an_attention_implementation_that_hides_its_mask() -> None:
    net = zoo.build("llama")
    net.config._attn_implementation_internal = "flash_attention_2"
    before = snapshot(net)
    with pytest.raises(UnsupportedSiteError, match=r"hides its mask.*set_attn_implementation\('sdpa'\)"):
        PrefixTuning().apply(net)
    assert differences(before, snapshot(net)) == []


def test_an_eager_attention_that_cannot_be_found() -> None:
    net = zoo.build("llama")
    net.set_attn_implementation("eager")
    PrefixTuning(length=2).apply(net)
    layer = net.model.layers[0].self_attn
    stranger = type("Stranger", (nn.Module,), {"__module__": "nowhere"})()
    stranger.attend = layer.attend
    with pytest.raises(UnsupportedSiteError, match="has no eager attention function"):
        routed_attention(stranger, *[torch.ones(1, 4, 2, 8)] * 3)


def test_virtual_tokens_need_a_plain_mask_and_room() -> None:
    net, _ = adapted("prompt_tuning", "llama")
    ids = zoo.inputs("llama")["input_ids"]
    with pytest.raises(ValueError, match=r"shape \(batch, time\); got \(2, 1, 7, 9\)"):
        net(input_ids=ids, attention_mask=torch.ones(2, 1, 7, 9))
    with pytest.raises(ValueError, match="got dict"):
        net(input_ids=ids, attention_mask={"full_attention": None})
    for model, limit in (("bert", 64), ("gpt2", 64), ("roberta", 63)):
        net = zoo.build(model)
        PromptTuning(length=60).apply(net)
        net(input_ids=torch.full((1, limit - 60), 5))
        with pytest.raises(ValueError, match=f"{limit + 1} positions .* with {limit} learned"):
            net(input_ids=torch.full((1, limit - 59), 5))
    net = zoo.build("llama")  # rotary positions know no end
    PromptTuning(length=60).apply(net)
    net(input_ids=torch.full((1, 10), 5))


# ------------------------------------------------------------------ merging
class Gain(Adapter):
    """y = g base(x)"""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:
        return self.g * base(x)

    def delta(self, weight: Tensor) -> Tensor:
        return (self.g.to(weight) - 1) * weight


@pytest.mark.parametrize(("model", "targets"), [("bert", "norm"), ("llama", "norm")])
def test_what_has_no_weight_to_fold_into(model: str, targets: str) -> None:
    class Gains(PEFT, name="toy_gains", family="additive", mergeable=True):
        """y = g W x"""

        def adapter(self, site: Site) -> Adapter:
            return Gain()

    del REGISTRY["toy_gains"]
    net = zoo.build(model)
    method = Gains(targets=targets, heads=None)
    method.apply(net)
    perturb(net, 0.3)
    before, out = snapshot(net), output(net, model)
    assert not torch.equal(out, output(zoo.build(model), model))
    with pytest.raises(NotMergeableError, match="has no floating-point weight"):
        method.merge(net)
    assert differences(before, snapshot(net)) == []


def test_a_made_bias_has_no_place_to_go() -> None:
    net, bitfit = adapted("bitfit", "mlp")
    with pytest.raises(NotMergeableError, match=r"BitFit\(create=False\)"):
        bitfit.merge(net)
    net = zoo.build("mlp")
    bitfit = BitFit(create=False)
    bitfit.apply(net)
    bitfit.merge(net)
    bitfit.unmerge(net)


def test_a_bias_of_lora_has_no_place_to_go() -> None:
    net = zoo.build("llama")
    lora = LoRA(lora_bias=True)
    lora.apply(net)
    before = snapshot(net)
    with pytest.raises((NotMergeableError, FieldError), match="without a bias cannot be merged"):
        lora.merge(net)
    assert differences(before, snapshot(net)) == []


# ------------------------------------------------------------------ files
@pytest.fixture
def saved(tmp_path: Path) -> Path:
    net, _ = adapted("lora", "mlp")
    perturb(net)
    return save_adapter(net, tmp_path / "adapter")


def rewrite(directory: Path, **entries: Any) -> None:
    file = directory / "adapter.json"
    config = {**json.loads(file.read_text()), **entries}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def drop(directory: Path, *changes: Callable[[dict[str, Tensor]], Any]) -> None:
    content = load_file(directory / "adapter.safetensors")
    for change in changes:
        change(content)
    save_file(content, directory / "adapter.safetensors")


A = "adapter/mlp//a"
SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda d: (d / "adapter.json").unlink(), "holds no adapter.json"),
    "no weights": (lambda d: (d / "adapter.safetensors").unlink(), "holds no adapter.safetensors"),
    "no JSON": (lambda d: (d / "adapter.json").write_text("{"), "is not JSON"),
    "binary": (lambda d: (d / "adapter.json").write_bytes(b"\xff\xfe\x00"), "is not JSON"),
    "a list": (lambda d: (d / "adapter.json").write_text("[]"), "lacks one of schema"),
    "no fingerprint": (lambda d: rewrite(d, fingerprint=...), "lacks one of schema"),
    "future schema": (lambda d: rewrite(d, schema=2), "schema 2; this version of lightning_peft reads schema 1. Update"),
    "unknown method": (lambda d: rewrite(d, method="dora9"), "made with the method 'dora9'; known: adalora, "),
    "unknown field": (lambda d: rewrite(d, config={"rnak": 3}), "does not fit 'lora': LoRA has no field 'rnak'"),
    "bad field": (lambda d: rewrite(d, config={"rank": -3}), "does not fit 'lora'.*above 0"),
    "no dictionary": (lambda d: rewrite(d, config=[1]), "have the wrong type"),
    "cut short": (lambda d: os.truncate(d / "adapter.safetensors", 300), "cut short or damaged"),
    "empty": (lambda d: (d / "adapter.safetensors").write_bytes(b""), "cut short or damaged"),
    "missing": (lambda d: drop(d, lambda c: c.pop(A)), "Missing in the file.*mlp//a"),
    "extra": (lambda d: drop(d, lambda c: c.update({"adapter/body/x/a": torch.ones(1)})), "Unknown to the model.*body/x"),
    "shape": (lambda d: drop(d, lambda c: c.update({A: torch.ones(2, 2)})), r"is \(2, 2\), the model needs \(3, 16\)"),
    "another base": (lambda d: rewrite(d, fingerprint="0" * 32), "another base: fingerprint 000"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(SPOILED))
def test_a_spoiled_file_changes_nothing(kind: str, saved: Path) -> None:
    spoil, message = SPOILED[kind]
    spoil(saved)
    net = zoo.build("mlp")
    IA3(targets="mlp", heads="out").apply(net)
    perturb(net)
    before = snapshot(net)
    with pytest.raises(AdapterFileError, match=f"(?s){message}"):
        load_adapter(net, saved)
    assert [key for key in differences(before, snapshot(net)) if not key.endswith(f": {state.ATTRIBUTE}")] == []
    assert list(state.applied_to(net)) == ["ia3"]


def test_another_base_can_be_asked_for(saved: Path) -> None:
    net = zoo.build("mlp")
    net.mlp.weight.data.mul_(2)
    with pytest.raises(AdapterFileError, match="another base"):
        load_adapter(net, saved)
    load_adapter(net, saved, check_base=False)
    assert state.active(net) == ["lora"]


def test_a_model_of_another_kind(saved: Path) -> None:
    net = zoo.build("bert")
    before = snapshot(net)
    with pytest.raises(TargetError):
        load_adapter(net, saved)
    assert differences(before, snapshot(net)) == []


def test_a_label_that_is_taken_is_not_overwritten(saved: Path) -> None:
    net, method = adapted("lora", "mlp")
    before = snapshot(net)
    with pytest.raises(LabelError, match="is taken"):
        load_adapter(net, saved)
    with pytest.raises(LabelError, match="cannot name"):
        load_adapter(net, saved, label="a.b")
    assert differences(before, snapshot(net)) == []
    with pytest.raises(AdapterFileError, match="Switch 'lora' off first"):
        load_adapter(net, saved, label="other")  # its head has other values
    assert differences(before, snapshot(net)) == []
    method.enabled(net, False)
    load_adapter(net, saved, label="other")
    assert list(state.applied_to(net)) == ["lora", "other"]


def test_saving_onto_a_file_or_while_merged(tmp_path: Path) -> None:
    net, lora = adapted("lora", "mlp")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterFileError, match="is a file; an adapter is a directory"):
        save_adapter(net, tmp_path / "file")
    lora.merge(net)
    with pytest.raises(AdapterFileError, match="(?i)merged.*unmerge"):
        save_adapter(net, tmp_path / "a")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "mine"}


def test_a_write_that_went_wrong_keeps_the_earlier_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, method = adapted("lora", "mlp")
    old = {p.name: p.read_bytes() for p in saved.iterdir()}
    true_save, true_replace = files.save_file, os.replace

    def halved(tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        true_save({k: t / 2 + 1 for k, t in tensors.items()}, *args, **kwargs)

    monkeypatch.setattr(files, "save_file", halved)
    with pytest.raises(AdapterFileError, match="differs from what was written"):
        save_adapter(net, saved)
    monkeypatch.setattr(files, "save_file", true_save)

    def fails(source: Path, target: Path) -> None:
        if Path(target) == saved and "old" not in str(source):
            raise OSError("disk full")
        true_replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(net, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == old
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_trainable_adapters_from_a_file_go_on_training(saved: Path) -> None:
    net = zoo.build("mlp")
    load_adapter(net, saved, trainable=True)
    assert state.trainable(net)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == set(state.trainable(net))


# ------------------------------------------------------------------ what else nothing else runs
@pytest.mark.parametrize("init", ["normal", "bert", "zero"])
def test_houlsby_starts_near_the_base(init: str) -> None:
    base, net = zoo.build("bert"), zoo.build("bert")
    Houlsby(bottleneck=4, init=init, norms=True).apply(net)  # type: ignore[arg-type]
    assert "bert.encoder.layer.0.output.LayerNorm.weight" in state.trainable(net)
    gap = (output(net, "bert") - output(base, "bert")).abs().max()
    assert gap == 0 if init == "zero" else 0 < gap < 1e-2
    down = state.get_applied(net).placements[0].adapter.down
    assert down.abs().max() <= {"normal": 0.02, "bert": 0.2, "zero": 32**-0.5}[init]


def test_initialisers_fill_what_they_say() -> None:
    draw = Draw(0, "x")
    t = torch.empty(4, 8)
    draw.ones(t)
    assert (t == 1).all()
    draw.orthonormal_rows(t)
    torch.testing.assert_close(t @ t.T, torch.eye(4))
    draw.normal(t, std=0.0, mean=3.0)
    assert (t == 3).all()
    draw.uniform(t, bound=0.1)
    assert t.abs().max() <= 0.1
    assert len(set(draw.integers(10, 10).tolist())) == 10
    meta = torch.empty(3, device="meta")
    draw.zeros(meta)


def test_prefixes_in_timms_attention() -> None:
    base, net = zoo.build("timm_vit").double(), zoo.build("timm_vit").double()
    PrefixTuning(length=3, dtype="float64", heads=None).apply(net)
    perturb(net, 0.5)
    attention, x = net.blocks[0].attn, torch.randn(2, 5, zoo.HIDDEN, dtype=torch.float64)
    (pk, pv) = state.get_applied(net).placements[0].adapter.kv
    q, k, v = base.blocks[0].attn.qkv(x).unflatten(-1, (3, zoo.HEADS, -1)).unbind(2)
    k, v = (torch.cat([p.expand(2, -1, -1, -1), y], 1) for p, y in ((pk, k), (pv, v)))
    weights = (torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    expected = base.blocks[0].attn.proj(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))
    torch.testing.assert_close(attention(x), expected, atol=1e-12, rtol=1e-12)


def test_the_base_of_clip_and_opt_with_prefixes_runs_in_both_towers() -> None:
    for model in ("clip", "opt"):
        net = zoo.build(model)
        PrefixTuning(length=2, heads=None).apply(net)
        before = net(**zoo.inputs(model))
        perturb(net, 0.5)
        after = net(**zoo.inputs(model))
        for key in ("text_embeds", "image_embeds") if model == "clip" else ("logits",):
            assert not torch.allclose(before[key], after[key], atol=1e-4)


def test_loreft_without_a_mask_anywhere() -> None:
    """A model whose blocks see no mask: every token is real."""
    net = zoo.build("timm_vit")
    LoReFT(rank=2, first=1, last=1, identity=False, heads=None).apply(net)
    x = torch.randn(2, 5, zoo.HIDDEN)
    out, plain = net.blocks[0](x), zoo.build("timm_vit").blocks[0](x)
    assert ((out - plain).abs().amax(-1) > 1e-5).tolist() == [[True, False, False, False, True]] * 2


def test_a_boolean_or_an_additive_padding_mask_for_loreft() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    net = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    LoReFT(rank=2, first=1, last=1).apply(net)
    x, hidden = torch.randn(2, 5, 32), torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    additive = torch.zeros(2, 5).masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(
        net[0](x, src_key_padding_mask=hidden), net[0](x, src_key_padding_mask=additive), atol=1e-6, rtol=1e-6
    )


def test_two_methods_and_loreft_behind_a_prompt() -> None:
    """Virtual tokens in front are no tokens of the prompt that LoReFT counts."""
    net = zoo.build("llama")
    PromptTuning(length=3, heads=None).apply(net)
    LoReFT(rank=2, first=1, last=1, heads=None).apply(net)
    call = zoo.inputs("llama")
    alone = {k: v[1:, :5] for k, v in call.items()}
    torch.testing.assert_close(net(**call).logits[1:, :5], net(**alone).logits, atol=1e-5, rtol=1e-5)


def test_state_of_a_model_without_methods() -> None:
    net = zoo.build("bert")
    assert state.saved(net) == {}
    assert state.trainable(net) == {}
    assert state.active(net) == []
    assert state.describe(net)["trainable"] == 0
    assert state.registry_of(copy.deepcopy(net)) is None
    assert hf.BertModel is not None


def test_describe_counts() -> None:
    net, _ = adapted("lora", "bert", heads=None, targets="q")
    facts = state.describe(net)
    base = sum(p.numel() for p in zoo.build("bert").parameters())
    assert facts == {
        "sites": 2, "trainable": 2 * 3 * 64, "total": base + 384, "base": base, "percent": 100 * 384 / (base + 384),
        "bytes": 4 * 384,
    }  # fmt: skip
    assert "lora" in state.table(net)


def test_make_names_what_is_missing() -> None:
    with pytest.raises(KeyError, match="has no entry"):
        make("nothing", "bert")


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_a_copy_knows_its_own_methods_from_any_part(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    net = zoo.build("bert")
    LoRA(targets="q", heads=None).apply(net)
    IA3(targets="v", inputs="down?", heads=None).apply(net.bert)
    twin = duplicate(net)
    for model in (net, twin):
        assert set(state.applied_to(model)) == set(state.applied_to(model.bert.encoder.layer[0])) == {"lora", "ia3"}
        own = {id(m) for m in model.modules()}
        for applied in state.applied_to(model).values():
            assert {id(p.adapter) for p in applied.placements} <= own
    state.get_applied(twin, "lora").method.remove(twin)
    assert set(state.applied_to(twin)) == {"ia3"}
    assert set(state.applied_to(net)) == {"lora", "ia3"}
