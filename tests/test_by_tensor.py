"""Which tensors of the base a method trains: biases, norms, cross-attention, layers, blocks, nodes."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from boring import Boring, trainer
from boring import data as batches
from harness import loss, output, perturb, tensors, train
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_peft import (
    FAR,
    LTSFT,
    BitFit,
    CrossAttention,
    LNTuning,
    LoRA,
    Surgical,
    TopLayers,
    load_adapter,
    save_adapter,
)
from lightning_peft.callback import LifeCycleError
from lightning_peft.core import state
from lightning_peft.core.calibration import CalibrationError
from lightning_peft.core.fields import FieldError
from lightning_peft.core.sites import TargetError
from lightning_peft.methods.surgical import Norms, Signal

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


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


# ------------------------------------------------------------------ surgical
@pytest.mark.parametrize(
    ("model", "fields", "blocks"),
    [
        ("bert", {}, ["bert.encoder.layer.0"]),
        ("bert", {"shift": "output"}, ["bert.encoder.layer.1"]),
        ("t5", {"shift": "feature"}, ["decoder.block.0"]),  # the third of five
        ("t5", {"shift": "output"}, ["decoder.block.2"]),
        ("gpt2", {"layers": [1]}, ["transformer.h.1"]),
    ],
)
def test_the_shift_says_which_block(model: str, fields: dict[str, Any], blocks: list[str]) -> None:
    net = Surgical(**fields, heads=None).apply(zoo.build(model))
    wanted = {name for name, _ in net.named_parameters() if name.startswith(tuple(f"{block}." for block in blocks))}
    assert trained(net) == wanted
    whole = Surgical(shift="all").apply(zoo.build(model))
    assert trained(whole) == {name for name, _ in whole.named_parameters()}


def test_relative_gradient_norms_and_signal_to_noise() -> None:
    weights = [torch.tensor([3.0, 4.0]), torch.zeros(2), torch.tensor([1.0, 0.0])]
    grads = [torch.tensor([[0.0, 1.0], [0.0, 3.0]]), torch.ones(2, 2), torch.tensor([[0.6, 0.8], [0.6, 0.8]])]

    def found(seen: Norms | Signal, each: list[torch.Tensor]) -> list[float]:
        for batch in zip(*each, strict=True):
            seen.add(batch)
        return seen.rates()

    assert found(Norms(weights), grads) == pytest.approx([0.4, 1.0, 1.0])  # 2 / 5 and 1; a tensor of zeros learns at lr
    assert found(Norms(weights[1:2]), grads[1:2]) == [1.0]
    ratios = [(2**2 / (2 + 1e-8) + 0) / 2, 1 / 1e-8, (0.36 + 0.64) / 2 / 1e-8]
    assert found(Signal(weights, 0.95), grads) == [float(r / max(ratios) >= 0.95) for r in ratios] == [0.0, 1.0, 0.0]
    assert found(Signal(weights, 0.4), grads) == [0.0, 1.0, 1.0]
    with pytest.raises(FieldError, match="2 batches at least"):
        Surgical(rate="snr", batches=1)


def test_signal_over_batches_as_they_come_is_that_of_all_at_once() -> None:
    each = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)) + 0.3
    seen = Signal([each[0]], 0.95)
    for g in each:
        seen.add([g])
    ratio = (each.double().mean(0) ** 2 / (each.double().var(0) + 1e-8)).mean()
    assert seen.ratio(seen.means[0], seen.squares[0], 5) == pytest.approx(float(ratio), rel=1e-5)
    assert Surgical(rate="rgn").rates([], []) == []  # batch norms alone


@pytest.mark.parametrize("rate", ["rgn", "snr"])
def test_each_tensor_learns_at_its_own_rate(rate: Any, tmp_path: Path) -> None:
    """One epoch in a Trainer is AdamW with a group a tensor; the scoring changes nothing else."""
    method = Surgical(shift="input", rate=rate, batches=2, heads=None)
    module, data = Boring(dropout=0.0), batches(shuffle=False)
    trainer(tmp_path, [method]).fit(module, data)
    rates = vars(method)["_rates"]
    assert set(rates) == {name for name, p in module.named_parameters() if p.requires_grad}
    assert max(rates.values()) == 1
    other = Boring(dropout=0.0)
    Surgical(shift="input", heads=None).apply(other)
    named = state.trainable(other)
    optimizer = torch.optim.AdamW([{"params": [p], "lr": 1e-2 * rates[name]} for name, p in named.items()])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    other.train()
    for index, batch in enumerate(data):
        optimizer.zero_grad()
        other.training_step(batch, index).backward()
        optimizer.step()
        scheduler.step()
    for name, p in named.items():
        if "key.bias" not in name:  # softmax does not see them, and Adam makes steps of their rounding
            torch.testing.assert_close(dict(module.named_parameters())[name], p, atol=1e-5, rtol=1e-5)


def test_rates_are_taken_anew_every_epoch_and_go_into_checkpoints(tmp_path: Path) -> None:
    method, module = Surgical(rate="rgn", batches=1), Boring(dropout=0.0)
    trainer(tmp_path, [method], max_epochs=2).fit(module, batches())
    entry = method.state_dict()
    assert entry["rated"] == 1
    again = Surgical(rate="rgn", batches=1)
    again.apply(Boring(dropout=0.0))
    again.load_state_dict({k: v for k, v in entry.items() if k != "rng"})
    assert vars(again)["_rates"] == entry["rates"]
    assert all(0 <= r <= 1 for r in entry["rates"].values())


def residual(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """Names of torchvision's residual networks."""
    layers = {"conv1": nn.Conv2d(3, 4, 3), "bn1": norm(4)}
    for number in range(1, 5):
        layers[f"layer{number}"] = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), norm(4))
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(4, 3)}
    return nn.Sequential(OrderedDict(layers | head))


@pytest.mark.parametrize(
    ("fields", "stages"),
    [({}, {1}), ({"shift": "feature"}, {3}), ({"shift": "output"}, {4}), ({"layers": "2-3"}, {3, 4})],
)
def test_blocks_of_a_residual_network_are_its_stages(fields: dict[str, Any], stages: set[int]) -> None:
    net = Surgical(**fields).apply(residual())
    assert {name.partition(".")[0] for name in trained(net)} == {f"layer{n}" for n in stages} | {"fc"}
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4] * 4, depths=[1] * 4, layer_type="basic")
    other = Surgical(**fields, heads=None).apply(transformers.ResNetForImageClassification(config))
    assert {name.split(".")[3] for name in trained(other)} == {str(n - 1) for n in stages}


class Images(Boring):
    """Classification of images by a network with batch norms."""

    def build(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.net = residual()
        nn.init.constant_(self.net.bn1.weight, 1e-5)  # its gradient is large beside it

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def test_batch_norms_have_no_rate_and_no_say_in_the_others(tmp_path: Path) -> None:
    method, module = Surgical(shift="all", rate="rgn", batches=2), Images()
    before = tensors(module)
    trainer(tmp_path, [method]).fit(module, batches(kind="images"))
    rates, normed = vars(method)["_rates"], {n for n in before if "bn1" in n or ".1." in n}
    assert max(rates.values()) == 1
    for name, p in module.named_parameters():
        assert (rates[name] == 0) == (name in normed), name
        assert name not in normed or torch.equal(p, before[name]), name


@pytest.mark.parametrize("fields", [{"rate": "rgn"}, {"rate": "snr", "shift": "all", "fresh": False, "threshold": 0.2}])
@pytest.mark.parametrize("step", [3, 8, 11])  # in an epoch, with its last batch, in the next one
def test_resumed_with_the_rates_of_an_uninterrupted_run(fields: dict[str, Any], step: int, tmp_path: Path) -> None:
    def fit(directory: Path, ckpt: Path | None = None) -> tuple[Surgical, Boring]:
        torch.manual_seed(9)
        method, module = Surgical(**fields, batches=2), Boring()
        saver = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer(directory, [method, saver], max_epochs=2).fit(
            module, batches(), batches(6, shuffle=False), ckpt_path=ckpt
        )
        return method, module

    (one, straight), (other, resumed) = fit(tmp_path / "a"), fit(tmp_path / "b", tmp_path / "a" / f"step={step}.ckpt")
    if step == 11:  # and once more
        other, resumed = fit(tmp_path / "c", tmp_path / "b" / "step=14.ckpt")
    assert vars(one)["_rated"] == vars(other)["_rated"] == 1
    assert vars(one)["_rates"] == vars(other)["_rates"]
    assert not set(vars(one)["_rates"].values()) <= {0.0}
    first, second = tensors(straight), tensors(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("value", "text"), [(None, "gave no loss"), (float("nan"), "infinite gradients")])
def test_rates_need_gradients(value: float | None, text: str, tmp_path: Path) -> None:
    class Silent(Boring):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if value is None else super().training_step(batch, batch_idx) * value

    with pytest.raises(CalibrationError, match=text):
        trainer(tmp_path, [Surgical(rate="rgn")]).fit(Silent(), batches())
    with pytest.raises(CalibrationError, match="the data have one"):
        trainer(tmp_path, [Surgical(rate="snr")]).fit(Boring(), batches(n=3))
    by_hand = Boring()
    by_hand.automatic_optimization = False
    with pytest.raises(LifeCycleError, match="Surgical looks at what training_step returns.*Leave rate='same'"):
        trainer(tmp_path, [Surgical(rate="rgn")]).fit(by_hand, batches())


# ------------------------------------------------------------------ FAR
NODES = {  # where the nodes of a layer are: (parameter, axis)
    "bert": [("intermediate.dense.weight", 0), ("intermediate.dense.bias", 0), ("1.output.dense.weight", 1)],
    "gpt2": [("c_fc.weight", 1), ("c_fc.bias", 0), ("mlp.c_proj.weight", 0)],
    "llama": [("gate_proj.weight", 0), ("up_proj.weight", 0), ("down_proj.weight", 1)],
    "phi3": [("gate_up_proj.weight", 0), ("down_proj.weight", 1)],
}


def lines(net: nn.Module, model: str) -> list[torch.Tensor]:
    """(nodes, ...) for each parameter of the last feed-forward layer; packed gate and up are two."""
    found = []
    for end, dim in NODES[model]:
        p = [p for name, p in net.named_parameters() if name.endswith(end)][-1].detach().movedim(dim, 0)
        found += list(p.chunk(2)) if "gate_up" in end else [p]
    return [p.flatten(1) if p.dim() > 1 else p[:, None] for p in found]


def test_a_second_run_is_rated_by_its_own_gradients(tmp_path: Path) -> None:
    method, module = Surgical(rate="rgn", batches=1), Boring(dropout=0.0)
    trainer(tmp_path, [method], max_epochs=1).fit(module, batches())
    before = dict(vars(method)["_rates"])
    trainer(tmp_path, [method], max_epochs=1).fit(module, batches())
    assert before != vars(method)["_rates"]


def test_rates_are_not_for_the_method_beside_it(tmp_path: Path) -> None:
    method, module = Surgical(rate="rgn", batches=1), Boring(dropout=0.0)
    trainer(tmp_path, [LoRA(rank=2, targets="q"), method], max_epochs=1).fit(module, batches())
    assert vars(method)["_rates"]
    assert not [name for name in vars(method)["_rates"] if ".adapters." in name]


@pytest.mark.parametrize("model", NODES)
def test_far_keeps_the_nodes_that_moved_most_and_puts_the_others_back(model: str) -> None:
    method, base = FAR(keep=0.25, heads=None), zoo.build(model)
    net = method.apply(zoo.build(model))
    perturb(net)
    moved = torch.cat(lines(net, model), 1).double() - torch.cat(lines(base, model), 1).double()
    count = len(moved) // 4
    wanted = sorted(moved.abs().sum(1).topk(count).indices.tolist())
    method.choose(net)
    assert list(method.learners.values())[-1] == wanted
    rest = [i for i in range(len(moved)) if i not in wanted]
    train(net, model)  # AdamW with weight decay
    for now, before in zip(lines(net, model), lines(base, model), strict=True):
        assert torch.equal(now[rest], before[rest])
        assert not (now[wanted] == before[wanted]).all(1).any()
    counts = sum(p.shape[1] for p in lines(net, model))
    assert state.describe(net)["trainable"] == 2 * count * counts


def test_far_in_a_fit_and_in_a_file(tmp_path: Path) -> None:
    method, module = FAR(keep=0.5, prime=2), Boring(dropout=0.0)
    base = zoo.build("bert")
    trainer(tmp_path, [method]).fit(module, batches())
    nodes = list(method.learners.values())[-1]
    assert len(nodes) == 32
    rest = [i for i in range(64) if i not in nodes]
    for now, before in zip(lines(module.net, "bert"), lines(base, "bert"), strict=True):
        assert torch.equal(now[rest], before[rest])
        assert not torch.equal(now[nodes], before[nodes])
    save_adapter(module.net, tmp_path / "far")
    fresh = zoo.build("bert")
    assert load_adapter(fresh, tmp_path / "far").learners == method.learners  # type: ignore[attr-defined]
    assert torch.equal(output(fresh, "bert"), output(module.net.eval(), "bert"))
    again = FAR(keep=0.5, prime=2)
    other = Boring(dropout=0.0)
    trainer(tmp_path, [again], fast_dev_run=True).fit(other, batches())
    again.go_on(method.config())
    assert [int(mask.sum()) for _, mask in state.masked(other)] == [int(mask.sum()) for _, mask in state.masked(module)]
    with pytest.raises(FieldError, match="keep=2"):
        FAR(keep=2.0)


def test_far_goes_on_from_a_checkpoint_with_the_learners_it_had(tmp_path: Path) -> None:
    method, module = FAR(keep=0.5, prime=2), Boring(dropout=0.0)
    first = trainer(tmp_path, [method], max_steps=4, max_epochs=-1)
    first.fit(module, batches(shuffle=False))
    first.save_checkpoint(tmp_path / "half.ckpt")
    again, other = FAR(keep=0.5, prime=2), Boring(dropout=0.0)
    trainer(tmp_path, [again], max_steps=6, max_epochs=-1).fit(
        other, batches(shuffle=False), ckpt_path=tmp_path / "half.ckpt"
    )
    assert again.learners == method.learners
    rest = [i for i in range(64) if i not in list(again.learners.values())[-1]]
    for now, before in zip(lines(other.net, "bert"), lines(zoo.build("bert"), "bert"), strict=True):
        assert torch.equal(now[rest], before[rest])


def test_far_leaves_what_a_method_beside_it_trains(tmp_path: Path) -> None:
    def fit(ckpt: Path | None = None) -> Boring:
        torch.manual_seed(9)
        methods, module = [BitFit(heads=None), FAR(keep=0.5, prime=2, heads=None)], Boring()
        directory = tmp_path / ("one" if ckpt is None else "two")
        saver = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer(directory, [*methods, saver]).fit(module, batches(), ckpt_path=ckpt)
        return module

    straight = fit()
    assert not (lines(straight.net, "bert")[1] == lines(zoo.build("bert"), "bert")[1]).any()  # of all biases
    first, second = tensors(straight), tensors(fit(tmp_path / "one" / "step=5.ckpt"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_far_primes_anew_on_another_model(tmp_path: Path) -> None:
    method = FAR(keep=0.5, prime=2)
    trainer(tmp_path, [method], max_steps=4).fit(Boring(dropout=0.0), batches())
    first = method.learners
    other = Boring(dropout=0.0)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-1.5)
    trainer(tmp_path, [method], max_steps=1).fit(other, batches())
    assert first
    assert method.learners == {}  # the priming of two steps is not over


def test_far_trains_learners_that_were_given(tmp_path: Path) -> None:
    nodes = {"encoder.0": [1, 2]}
    method, module = FAR(learners=dict(nodes)), Boring(dropout=0.0)
    trainer(tmp_path, [method], max_steps=1).fit(module, batches())
    assert method.learners == nodes
    assert sum(int(mask.sum()) for _, mask in state.masked(module)) == 2 * (2 * 32 + 1)


@pytest.mark.parametrize("method", [FAR(prime=9), LTSFT(priming=9)])
def test_a_priming_without_an_end_is_said(method: Any, tmp_path: Path, caplog: Any) -> None:
    trainer(tmp_path, [method], max_steps=2).fit(Boring(dropout=0.0), batches())
    assert "the run ends after 2 steps, and nothing is chosen" in caplog.text
    endless = trainer(tmp_path, [FAR(prime=0.5)], max_steps=-1, max_epochs=-1)
    with pytest.raises(LifeCycleError, match="share of a run without an end"):
        endless.fit(Boring(dropout=0.0), batches())


@pytest.mark.parametrize("learners", [{"nonsense": [1]}, {"encoder.0": [0, 64]}, {"encoder.0": [-1]}])
def test_learners_that_the_model_does_not_have_are_an_error(learners: dict[str, list[int]]) -> None:
    with pytest.raises(TargetError, match="no layer of this model.*Known, with their widths: {'encoder.0': 64"):
        FAR(learners=learners).apply(zoo.build("bert"))
