"""Life in a Trainer: where the model is built, what trains, what a checkpoint holds, exact resume, errors."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import boring
import lightning.pytorch as pl
import pytest
import torch
import zoo
from lightning.pytorch.callbacks import ModelCheckpoint
from settings import CHANGES_BASE, ON_CODES, RAISES, make
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import (
    FAR,
    IA3,
    SPAFIT,
    BitFit,
    FullFineTuning,
    LinearProbe,
    LNTuning,
    LoRA,
    LoReFT,
    NF4Precision,
    PEFTSingleDeviceStrategy,
    PrefixTuning,
    SelectiveTuning,
    Surgical,
    TopLayers,
    load_adapter,
    load_checkpoint,
    save_adapter,
)
from lightning_peft.callback import PEFT, LifeCycleError, check_strategy
from lightning_peft.checkpoint import CheckpointError
from lightning_peft.core import state
from lightning_peft.core.adapter import LabelError
from lightning_peft.core.method import REGISTRY, NothingToTrainError, outside_frozen_networks
from lightning_peft.core.sites import sites

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]
BUILT = ("init", "setup", "configure_model", "meta")


def fit(
    directory: Path, module: pl.LightningModule, *callbacks: pl.Callback, ckpt: Any = None, **options: Any
) -> pl.Trainer:
    trainer = boring.trainer(directory, list(callbacks), **options)
    trainer.fit(module, boring.data(), boring.data(6, shuffle=False), ckpt_path=ckpt)
    return trainer


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


@pytest.mark.parametrize("where", BUILT)
def test_only_the_adapters_and_the_head_move_wherever_the_model_is_built(where: str, tmp_path: Path) -> None:
    reference = boring.tensors(boring.Boring())
    module = boring.Boring(where)
    fit(tmp_path, module, LoRA(rank=2))
    after = boring.tensors(module)
    moved = {name for name, tensor in reference.items() if not torch.equal(tensor, after[name])}
    assert moved == {"net.classifier.weight", "net.classifier.bias"}
    assert {name.split(".adapters.")[1] for name in set(after) - set(reference)} == {"lora.a", "lora.b"}
    assert all((after[name] != 0).any() for name in set(after) - set(reference))
    assert {n for n, p in module.named_parameters() if p.requires_grad} == set(state.trainable(module))
    assert "configure_model" not in vars(module)


@pytest.mark.parametrize("where", BUILT)
def test_validate_fit_test_predict_and_a_second_fit_inject_once(where: str, tmp_path: Path) -> None:
    module, lora = boring.Boring(where), LoRA(rank=2)
    trainer = boring.trainer(tmp_path, [lora])
    loader = boring.data(6, shuffle=False)
    trainer.validate(module, loader, verbose=False)
    count = len(state.saved(module))
    trainer.fit(module, boring.data(), loader)
    first = boring.tensors(module)
    trainer.test(module, loader, verbose=False)
    assert len(trainer.predict(module, loader)) == 2
    again = boring.trainer(tmp_path, [lora])
    again.fit(module, boring.data(), loader)
    assert len(state.saved(module)) == count == 10
    assert boring.largest_difference(first, boring.tensors(module)) > 0
    pickle.dumps(module)
    pickle.dumps(lora)


@pytest.mark.parametrize("step", [3, 5, 8, 11])
@pytest.mark.parametrize("where", ["init", "configure_model"])
def test_resume_in_mid_epoch_and_at_its_end_is_bit_equal(where: str, step: int, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    straight = boring.Boring(where)
    fit(tmp_path, straight, LoRA(rank=2, dropout=0.2), saver, max_epochs=2)
    torch.manual_seed(99)  # another process has other random numbers
    resumed = boring.Boring(where)
    ckpt = tmp_path / f"step={step}.ckpt"
    trainer = fit(tmp_path, resumed, LoRA(rank=2, dropout=0.2), max_epochs=2, ckpt=str(ckpt))
    assert trainer.global_step == 16
    assert boring.largest_difference(boring.tensors(straight), boring.tensors(resumed)) == 0
    assert straight.losses[-len(resumed.losses) :] == resumed.losses


def test_resume_at_the_end_of_an_epoch_and_with_accumulation(tmp_path: Path) -> None:
    straight, options = boring.Boring(), {"max_epochs": 3, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(tmp_path, straight, LoRA(rank=2, dropout=0.2), saver, **options)
    torch.manual_seed(99)
    resumed = boring.Boring()
    fit(tmp_path, resumed, LoRA(rank=2, dropout=0.2), ckpt=str(tmp_path / "epoch=0.ckpt"), **options)
    assert boring.largest_difference(boring.tensors(straight), boring.tensors(resumed)) == 0


def test_last_and_best_need_no_change(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True, monitor="val_loss")
    fit(tmp_path, boring.Boring(), LoRA(rank=2), saver)
    trainer = boring.trainer(
        tmp_path, [LoRA(rank=2), ModelCheckpoint(tmp_path, save_last=True, monitor="val_loss")], max_epochs=2
    )
    module = boring.Boring()
    trainer.fit(module, boring.data(), boring.data(6, shuffle=False), ckpt_path="last")
    assert trainer.global_step == 16
    trainer.test(module, boring.data(6, shuffle=False), ckpt_path="best", verbose=False)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_holds_no_frozen_tensor_and_loads_without_pickle(weights_only: bool, tmp_path: Path) -> None:
    module = boring.Boring()
    trainer = fit(tmp_path, module, LoRA(rank=2))
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)  # after the run, as users do
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(state.saved(module)) == set(state.trainable(module))
    if not weights_only:
        names = saved["optimizer_states"][0]["param_groups"][0]["params"]
        assert set(names) == set(state.trainable(module))
        assert saved["callbacks"]["lightning_peft.lora"]["config"]["rank"] == 2


def test_changed_buffers_are_kept(tmp_path: Path) -> None:
    class Normed(boring.Boring):
        def build(self) -> None:
            super().build()
            self.net.bert.pooler.activation = nn.Sequential(nn.BatchNorm1d(32), nn.Tanh())

    module = Normed()
    trainer = fit(tmp_path, module, LoRA(rank=2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {k.rpartition(".")[2] for k in kept if "activation" in k} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    save_adapter(module, tmp_path / "adapter")
    fresh = Normed()
    load_adapter(fresh, tmp_path / "adapter")
    assert boring.largest_difference(boring.tensors(module), boring.tensors(fresh)) == 0


def test_several_methods_at_once_and_their_audit(tmp_path: Path) -> None:
    module = boring.Boring()
    trainer = fit(
        tmp_path, module, LoRA(rank=2), BitFit(), LoRA(rank=1, targets="k", label="second"), PrefixTuning(length=2)
    )
    assert list(state.applied_to(module)) == ["lora", "bitfit", "second", "prefix_tuning"]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = boring.Boring()
    callbacks = [LoRA(rank=2), BitFit(), LoRA(rank=1, targets="k", label="second"), PrefixTuning(length=2)]
    fit(tmp_path, resumed, *callbacks, ckpt=str(tmp_path / "a.ckpt"), max_epochs=1)
    assert boring.largest_difference(boring.tensors(module), boring.tensors(resumed)) == 0


def test_a_method_named_twice_is_an_error(tmp_path: Path) -> None:
    for second in (LoRA(rank=4), LoRA(rank=2)):
        with pytest.raises(LabelError, match="is taken.*label of its own"):
            fit(tmp_path, boring.Boring(), LoRA(rank=2), second)


def test_the_strategy_alone_is_enough_and_brings_the_method_once(tmp_path: Path) -> None:
    with_callback, with_strategy = boring.Boring(), boring.Boring()
    torch.manual_seed(0)
    fit(tmp_path, with_callback, LoRA(rank=2))
    torch.manual_seed(0)
    lora = LoRA(rank=2)
    trainer = fit(tmp_path, with_strategy, strategy=PEFTSingleDeviceStrategy(method=lora))
    assert boring.largest_difference(boring.tensors(with_callback), boring.tensors(with_strategy)) == 0
    trainer.fit(with_strategy, boring.data(), boring.data(6, shuffle=False))
    assert trainer.callbacks.count(lora) == 1
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert set(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]) == set(state.trainable(with_strategy))


def test_a_checkpoint_moves_between_callback_and_strategy(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    straight = boring.Boring()
    fit(tmp_path, straight, LoRA(rank=2), saver, max_epochs=1)
    resumed = boring.Boring()
    fit(tmp_path, resumed, LoRA(rank=2), strategy="peft_single_device", ckpt=str(tmp_path / "step=3.ckpt"))
    assert boring.largest_difference(boring.tensors(straight), boring.tensors(resumed)) == 0


def test_a_strategy_refuses_what_is_no_method() -> None:
    with pytest.raises(LifeCycleError, match="no PEFT method"):
        PEFTSingleDeviceStrategy(method="lora")


def test_turning_peft_on_reshuffles_nobodys_data(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    class Watched(boring.Boring):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch[0][:, 0].tolist())
            return super().training_step(batch, batch_idx)

    orders = []
    for callbacks in ([], [LoRA(rank=2)], [FullFineTuning()]):
        seen.clear()
        module = Watched(dropout=0.0)
        torch.manual_seed(7)
        fit(tmp_path, module, *callbacks, max_epochs=2)
        orders.append(copy.deepcopy(seen))
    assert orders[0] == orders[1] == orders[2]


def test_full_fine_tuning_is_what_lightning_does_without_us(tmp_path: Path) -> None:
    plain, ours = boring.Boring(), boring.Boring()
    for module, callbacks in ((plain, []), (ours, [FullFineTuning()])):
        torch.manual_seed(3)
        fit(tmp_path, module, *callbacks)
    assert boring.largest_difference(boring.tensors(plain), boring.tensors(ours)) == 0


def test_linear_probe_moves_the_head_only(tmp_path: Path) -> None:
    module = boring.Boring()
    fit(tmp_path, module, LinearProbe())
    assert set(state.trainable(module)) == {"net.classifier.weight", "net.classifier.bias"}


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_adapters_stay_fp32_masters(precision: str, tmp_path: Path) -> None:
    module = boring.Boring()
    fit(tmp_path, module, LoRA(rank=2), precision=precision)
    kinds = {name: p.dtype for name, p in module.named_parameters()}
    assert all(dtype == torch.float32 for name, dtype in kinds.items() if ".adapters." in name)
    base = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert kinds["net.bert.encoder.layer.0.attention.self.query.weight"] == base


def test_gradient_checkpointing_with_loreft_and_two_forwards(tmp_path: Path) -> None:
    gradients = []
    for checkpointed in (False, True):
        module = boring.Boring(dropout=0.0)
        LoReFT(first=1, last=1).apply(module)
        if checkpointed:
            module.net.gradient_checkpointing_enable({"use_reentrant": False})
        x = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
        masks = torch.ones_like(x), torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
        sum(module.net(input_ids=x, attention_mask=m).logits.pow(2).sum() for m in masks).backward()
        gradients.append({n: p.grad for n, p in state.trainable(module).items()})
    assert boring.largest_difference(*gradients) < 1e-7


def test_a_checkpoint_loads_without_a_trainer(tmp_path: Path) -> None:
    module = boring.Boring()
    trainer = fit(tmp_path, module, LoRA(rank=2), BitFit())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    fresh = load_checkpoint(boring.Boring(), tmp_path / "a.ckpt")
    assert boring.largest_difference(boring.tensors(module), boring.tensors(fresh)) == 0
    with pytest.raises(CheckpointError, match="does not say which methods"):
        load_checkpoint(boring.Boring(), tmp_path / "weights.ckpt")
    fresh = load_checkpoint(boring.Boring(), tmp_path / "weights.ckpt", [LoRA(rank=2), BitFit()])
    assert boring.largest_difference(boring.tensors(module), boring.tensors(fresh)) == 0


def test_a_method_beside_a_frozen_one_that_was_loaded_resumes_exactly(tmp_path: Path) -> None:
    first = boring.Boring()
    fit(tmp_path, first, LoRA(rank=2, label="old", heads=None))
    save_adapter(first, tmp_path / "old", "old")
    results = []
    for ckpt in (None, tmp_path / "step=3.ckpt"):
        module = boring.Boring()
        load_adapter(module, tmp_path / "old")
        old = boring.tensors(module)
        torch.manual_seed(0 if ckpt is None else 99)
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        fit(tmp_path, module, IA3(), saver, ckpt=ckpt and str(ckpt))
        results.append(boring.tensors(module))
        assert all(torch.equal(results[-1][name], tensor) for name, tensor in old.items() if ".old." in name)
    assert boring.largest_difference(*results) == 0


# ------------------------------------------------------------------ what must not pass silently
def test_another_rank_another_method_another_base(tmp_path: Path) -> None:
    trainer = fit(tmp_path, boring.Boring(), LoRA(rank=2))
    path = str(tmp_path / "a.ckpt")
    trainer.save_checkpoint(path)
    with pytest.raises(CheckpointError, match="in the checkpoint and"):
        fit(tmp_path, boring.Boring(), LoRA(rank=4), ckpt=path)
    with pytest.raises(CheckpointError, match="does not fit"):
        fit(tmp_path, boring.Boring(), LoRA(rank=2, targets="k"), ckpt=path)
    with pytest.raises(CheckpointError, match="was made with 'lora'"):
        fit(tmp_path, boring.Boring(), FullFineTuning(label="lora", keep_base=False), ckpt=mislabelled(path))
    other = boring.Boring()
    with torch.no_grad():
        other.net.bert.encoder.layer[0].attention.self.query.weight.mul_(2)
    with pytest.raises(CheckpointError, match="another base"):
        fit(tmp_path, other, LoRA(rank=2), ckpt=path)


def mislabelled(path: str) -> str:
    """A checkpoint with all tensors of the model, but the callback state of LoRA."""
    saved = torch.load(path, weights_only=True)
    saved["state_dict"] = boring.tensors(boring.Boring())
    torch.save(saved, path + ".all")
    return path + ".all"


def test_the_optimizers_parameters_must_be_the_saved_ones(tmp_path: Path) -> None:
    trainer = fit(tmp_path, boring.Boring(), LoRA(rank=2))
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    saved["optimizer_states"][0]["param_groups"][0]["params"][0] = "elsewhere"
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match="Only in the checkpoint: elsewhere"):
        fit(tmp_path, boring.Boring(), LoRA(rank=2), ckpt=str(path), max_epochs=2)


def test_an_optimizer_that_misses_the_adapters_is_found(tmp_path: Path) -> None:
    class Early(boring.Boring):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.classifier.parameters(), lr=0.1)

    with pytest.raises(LifeCycleError, match="in no optimizer"):
        fit(tmp_path, Early(), LoRA(rank=2))


@pytest.mark.parametrize(("what", "flag"), [("belong to no method", True), ("have no requires_grad", False)])
def test_requires_grad_that_somebody_else_turned_is_found(what: str, flag: bool, tmp_path: Path) -> None:
    class Meddling(boring.Boring):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            name = "net.bert.pooler.dense.weight" if flag else "net.classifier.weight"
            self.get_parameter(name).requires_grad_(flag)
            return optimizer

    with pytest.raises(LifeCycleError, match=what):
        fit(tmp_path, Meddling(), LoRA(rank=2))


def test_a_model_left_on_the_meta_device_is_an_error(tmp_path: Path) -> None:
    class Unfinished(boring.Boring):
        def configure_model(self) -> None:
            with torch.device("meta"):
                self.build()

    with pytest.raises((LifeCycleError, NotImplementedError)) as raised:
        fit(tmp_path, Unfinished("nowhere"), LoRA(rank=2))
    error: BaseException | None = raised.value
    while error is not None and not isinstance(error, LifeCycleError):
        error = error.__context__  # Lightning's own clean-up fails on meta tensors too, on top of ours
    assert "meta device" in str(error)


def test_nothing_to_train_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NothingToTrainError, match="finds nothing to train"):
        fit(tmp_path, boring.Boring(), LinearProbe(heads=None))
    module = boring.Boring()
    lora = LoRA(rank=2)
    lora.apply(module, trainable=False)
    with pytest.raises(NothingToTrainError, match="train no parameter"):
        fit(tmp_path, module, lora)


def test_a_strategy_that_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LifeCycleError, match="PEFTStrategyMixin"):
        check_strategy(pl.strategies.ModelParallelStrategy())


def test_a_failed_run_leaves_the_module_usable(tmp_path: Path) -> None:
    class Failing(boring.Boring):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise ArithmeticError("on purpose")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(ArithmeticError, match="on purpose"):
        fit(tmp_path, module, LoRA(rank=2))
    assert "configure_model" not in vars(module)
    pickle.dumps(module.net)


def test_parameters_without_a_gradient_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Partial(boring.Boring):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net.bert(batch[0]).last_hidden_state.sum() * 1e-3

    fit(tmp_path, Partial(), LoRA(rank=2))
    assert "got no gradient in the first backward" in caplog.text
    assert "classifier" in caplog.text


def test_the_line_at_fit_start_says_what_trains(tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, boring.Boring(), LoRA(rank=2))
    said = caplog.text + capsys.readouterr().err
    assert "PEFT: lora at 4 sites | trainable 611 of 24,131" in said
    assert "lora   lora    q 2, v 2       512     0     99" in said


def test_fast_dev_run(tmp_path: Path) -> None:
    fit(tmp_path, boring.Boring(), LoRA(rank=2), fast_dev_run=True)


# ------------------------------------------------------------------ every method of the registry
OURS = [name for name, cls in REGISTRY.items() if cls.__module__.startswith("lightning_peft.methods.")]
METHODS = [name for name in OURS if (name, "bert") not in RAISES]  # cross-attention is none of BERT's


def needed(name: str) -> dict[str, Any]:
    """What a method needs of a Trainer."""
    return {"plugins": [NF4Precision(compute_dtype="float32")]} if name in ON_CODES else {}


def module_for(name: str) -> boring.Boring:
    """One that says where its logits are, for a method that looks at them; one that looks at images."""
    return boring.Says() if method_for(name).adds_loss else boring.Boring(kind="vit" if name == "vpt" else "bert")


def method_for(name: str) -> PEFT:
    return make(name, "bert", **({"pseudo": [boring.PSEUDO]} if name == "p_tuning" else {}))


KINDS = {"vpt": "images", "p_tuning": "template"}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_resumes_in_mid_epoch_bit_for_bit(name: str, tmp_path: Path) -> None:
    straight, resumed = module_for(name), module_for(name)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    kind = KINDS.get(name, "text")
    data = boring.data(12, kind=kind), boring.data(6, shuffle=False, kind=kind)
    boring.trainer(tmp_path, [method_for(name), saver], **needed(name)).fit(straight, *data)
    torch.manual_seed(99)
    trainer = boring.trainer(tmp_path, [method_for(name)], **needed(name))
    ckpt = str(tmp_path / "step=2.ckpt")
    trainer.fit(resumed, boring.data(12, kind=kind), boring.data(6, shuffle=False, kind=kind), ckpt_path=ckpt)
    assert boring.largest_difference(boring.tensors(straight), boring.tensors(resumed)) == 0
    kept = set(torch.load(ckpt, weights_only=True)["state_dict"])
    sites = {x.site for x in state.get_applied(resumed).placements} if name in CHANGES_BASE else set()
    others = {n for n, _ in resumed.named_buffers() if n in kept} | {f"{site}.weight" for site in sites}
    assert kept == set(state.trainable(resumed)) | others


@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_a_fast_dev_run(name: str, tmp_path: Path) -> None:
    kind = KINDS.get(name, "text")
    data = boring.data(kind=kind), boring.data(6, shuffle=False, kind=kind)
    boring.trainer(tmp_path, [method_for(name)], fast_dev_run=True, **needed(name)).fit(module_for(name), *data)


# ------------------------------------------------------------------ beside what else a Trainer does
def test_other_settings_than_those_of_the_checkpoint_are_an_error(tmp_path: Path) -> None:
    module = boring.Boring()
    trainer = fit(tmp_path, module, LoRA(rank=2))
    path = str(tmp_path / "a.ckpt")
    trainer.save_checkpoint(path)
    with pytest.raises(CheckpointError, match="alpha: 16.0 there, 1000.0 here"):
        fit(tmp_path, boring.Boring(), LoRA(rank=2, alpha=1000.0), ckpt=path)
    fresh = boring.Boring()
    before = boring.tensors(fresh)
    with pytest.raises(CheckpointError, match="alpha"):
        load_checkpoint(fresh, path, [LoRA(rank=2, alpha=5.0)])
    with pytest.raises(CheckpointError, match="rank: 2 there, 4 here"):
        load_checkpoint(fresh, path, [LoRA(rank=4)])
    assert boring.largest_difference(before, boring.tensors(fresh)) == 0
    saved = torch.load(path, weights_only=True)
    saved["callbacks"]["lightning_peft.lora"]["method"] = "of_mine"
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match="Import the module that defines the method"):
        load_checkpoint(fresh, path)


class Pair(boring.Boring):
    """A student that learns, and a teacher that was frozen."""

    def build(self) -> None:
        super().build()
        self.teacher = zoo.build("bert").train().requires_grad_(False)


def test_a_frozen_teacher_is_left_alone(tmp_path: Path) -> None:
    module = Pair()
    before = boring.tensors(module.teacher)
    fit(tmp_path, module, LoRA(rank=2))
    assert boring.largest_difference(before, boring.tensors(module.teacher)) == 0
    assert {name.partition(".")[0] for name in state.trainable(module)} == {"net"}


def test_what_has_no_parameters_is_not_called_frozen() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False))
    assert [site.name for site in outside_frozen_networks(net, sites(net, "*"))] == ["0", "1", "2"]


@pytest.mark.parametrize("method", [SelectiveTuning(heads=None), LoRA(targets="*.dense,classifier", heads=None)])
def test_an_encoder_that_was_frozen_below_a_head_is_no_teacher(method: PEFT) -> None:
    net = zoo.build("bert")
    net.get_submodule("bert").requires_grad_(False)
    method.apply(net)
    placements = state.get_applied(net, method.name_on_model).placements
    assert {x.site.partition(".")[0] for x in placements} == {"bert", "classifier"}


def test_a_frozen_teacher_keeps_what_selective_methods_train_elsewhere() -> None:
    everywhere = [BitFit(), BitFit(layers=[0]), BitFit(targets="q"), LNTuning(), FullFineTuning(), FAR()]
    for method in [*everywhere, TopLayers(k=1), Surgical(shift="output"), SPAFIT(frozen=0, biased=1)]:
        module = Pair()
        method.apply(module)
        assert {name.partition(".")[0] for name in state.trainable(module)} == {"net"}, method


def test_a_model_frozen_as_a_whole_is_adapted_all_the_same(tmp_path: Path) -> None:
    module = boring.Boring().requires_grad_(False)
    fit(tmp_path, module, LoRA(rank=2))
    assert len(state.trainable(module)) == 10


def test_exclude_holds_for_heads_too() -> None:
    module = boring.Boring()
    LoRA(rank=2, exclude="classifier").apply(module)
    assert not any("classifier" in name for name in state.trainable(module))


def test_a_module_that_builds_anew_in_setup(tmp_path: Path) -> None:
    class Anew(boring.Boring):
        def setup(self, stage: str) -> None:
            vars(self)["_modules"].pop("net", None)
            self.build()

    module, saver = Anew("nowhere"), ModelCheckpoint(tmp_path, save_last=True)
    trainer = fit(tmp_path, module, LoRA(rank=2), saver)
    trained = boring.tensors(module)
    trainer.test(module, boring.data(6, shuffle=False), ckpt_path="last", verbose=False, weights_only=True)
    assert boring.largest_difference(trained, boring.tensors(module)) == 0
    fit(tmp_path, module, LoRA(rank=2))
    assert len(state.trainable(module)) == 10


@pytest.mark.parametrize("how", ["merge", "switch"])
def test_training_what_is_merged_or_off_is_an_error(how: str, tmp_path: Path) -> None:
    module, lora = boring.Boring(), LoRA(rank=2)
    lora.apply(module)
    _ = lora.merge(module) if how == "merge" else lora.enabled(module, False)
    with pytest.raises(LifeCycleError, match="merged or switched off"):
        fit(tmp_path, module, lora)


def test_a_loaded_adapter_trains_on(tmp_path: Path) -> None:
    module = boring.Boring()
    fit(tmp_path, module, LoRA(rank=2))
    save_adapter(module, tmp_path / "a")
    fresh = boring.Boring()
    load_adapter(fresh, tmp_path / "a")
    before = boring.tensors(fresh)
    fit(tmp_path, fresh, LoRA(rank=2))
    assert boring.largest_difference(before, boring.tensors(fresh)) > 0
    with pytest.raises(LifeCycleError, match="rank: 2 on the model, 4 now"):
        fit(tmp_path, fresh, LoRA(rank=4))


def test_what_somebody_unfreezes_later_is_in_the_checkpoint(tmp_path: Path) -> None:
    class Unfreezing(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            weight = pl_module.net.bert.pooler.dense.weight
            if not weight.requires_grad:
                trainer.optimizers[0].add_param_group({"params": [weight.requires_grad_(True)]})

    module = boring.Boring(optimizer="sgd")
    trainer = fit(tmp_path, module, LoRA(rank=2), Unfreezing())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert "net.bert.pooler.dense.weight" in torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]


def test_an_average_of_the_whole_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LifeCycleError, match="copies the whole model"):
        fit(tmp_path, boring.Boring(), LoRA(rank=2), pl.callbacks.WeightAveraging())


def test_a_module_with_a_state_dict_of_its_own(tmp_path: Path) -> None:
    class Own(boring.Boring):
        def state_dict(self) -> Any:  # type: ignore[override]
            return {**super().state_dict(), "extra": torch.ones(1)}

        def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:  # type: ignore[override]
            self.seen = state_dict.pop("extra")
            return super().load_state_dict(state_dict, strict)

    module = Own()
    trainer = fit(tmp_path, module, LoRA(rank=2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = Own()
    fit(tmp_path, resumed, LoRA(rank=2), ckpt=str(tmp_path / "a.ckpt"))
    assert resumed.seen.item() == 1


def test_a_module_that_is_not_built_says_so() -> None:
    with pytest.raises(NothingToTrainError, match="not built yet"):
        LoRA().apply(boring.Boring("configure_model"))


def test_a_method_from_before_that_trains_along_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = boring.Boring()
    fit(tmp_path, module, LoRA(rank=2))
    fit(tmp_path, module, BitFit())
    assert "'lora' trains too" in caplog.text


def test_generators_of_the_loader_come_back(tmp_path: Path) -> None:
    def loader() -> Any:
        generator = torch.Generator().manual_seed(11)
        return DataLoader(boring.data().dataset, batch_size=3, shuffle=True, generator=generator)

    results = []
    for ckpt in (None, str(tmp_path / "step=11.ckpt")):
        module = boring.Boring()
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        boring.trainer(tmp_path, [LoRA(rank=2), saver], max_epochs=2).fit(
            module, loader(), boring.data(6, shuffle=False), ckpt_path=ckpt
        )
        results.append(boring.tensors(module))
    assert boring.largest_difference(*results) == 0


def test_resume_in_mid_epoch_with_loader_workers(tmp_path: Path) -> None:
    def loader() -> Any:
        return DataLoader(boring.data().dataset, batch_size=3, shuffle=True, num_workers=2)

    results = []
    for ckpt in (None, str(tmp_path / "step=11.ckpt")):
        module = boring.Boring()
        torch.manual_seed(3 if ckpt is None else 99)
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        boring.trainer(tmp_path, [LoRA(rank=2, dropout=0.2), saver], max_epochs=2).fit(
            module, loader(), boring.data(6, shuffle=False), ckpt_path=ckpt
        )
        results.append(boring.tensors(module))
    assert boring.largest_difference(*results) == 0


def test_files_of_a_compiled_network_fit_the_plain_one(tmp_path: Path) -> None:
    class Compiled(boring.Boring):
        def build(self) -> None:
            super().build()
            self.net = torch.compile(self.net, backend="eager")

    module = Compiled()
    LoRA(rank=2).apply(module)
    load_adapter(boring.Boring(), save_adapter(module, tmp_path / "a"))


class AfterValidation(pl.Callback):
    """Saves as ModelCheckpoint does that follows a metric of validation."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{trainer.current_epoch}.ckpt")


def test_resumed_from_the_validation_after_an_epoch_to_the_bit(tmp_path: Path) -> None:
    ends = []
    for ckpt in (None, tmp_path / "0.ckpt"):
        torch.manual_seed(3 if ckpt is None else 4)
        module = boring.Boring()
        fit(tmp_path, module, LoRA(rank=2), *([AfterValidation()] if ckpt is None else []), ckpt=ckpt, max_epochs=2)
        ends.append(boring.tensors(module))
    assert boring.largest_difference(*ends) == 0
