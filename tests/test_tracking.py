"""What an offline W&B run holds, read back from its file; and that nothing of W&B stays behind in the process."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import wandb
import wandb_offline
import zoo
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import BitFit, LoRA, load_adapter
from lightning_peft.core import state
from lightning_peft.tracking import POINTS, RunLogger, Tracking, finish, finished_runs, logged_in, plain, wandb_logger

pytestmark = pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode:UserWarning")


class Model(pl.LightningModule):
    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.net, self.fail = zoo.build("bert"), fail

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.fail and batch_idx == 1:
            raise ArithmeticError("on purpose")
        loss = self.net(input_ids=batch[0], labels=batch[1]).loss
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.net(input_ids=batch[0], labels=batch[1]).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no settings, nothing written outside of the test's directory."""
    isolate(monkeypatch, tmp_path)
    yield
    finish()


def isolate(patch: pytest.MonkeyPatch, directory: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    for name in ("CACHE", "DATA", "CONFIG"):
        patch.setenv(f"WANDB_{name}_DIR", str(directory / name))
    patch.setenv("WANDB_SILENT", "true")
    patch.setenv("NETRC", str(directory / "netrc"))


def loader() -> DataLoader:
    tokens = torch.randint(3, zoo.VOCAB, (8, 6), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(tokens, torch.arange(8) % zoo.CLASSES), batch_size=4)


def trainer(directory: Path, logger: Any, *callbacks: pl.Callback, epochs: int = 2) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=directory, logger=logger, callbacks=list(callbacks), max_epochs=epochs, log_every_n_steps=1,
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def fit(directory: Path, logger: Any, *callbacks: pl.Callback, fail: bool = False, epochs: int = 2) -> Model:
    model = Model(fail)
    trainer(directory, logger, *callbacks, epochs=epochs).fit(model, loader(), loader())
    return model


def only(directory: Path) -> wandb_offline.OfflineRun:
    (run,) = wandb_offline.read_all(directory)
    return run


def adapter_of(run: wandb_offline.OfflineRun) -> wandb_offline.Artifact:
    (artifact,) = [artifact for artifact in run.artifacts if artifact.type == "adapter"]
    return artifact


# ------------------------------------------------------------------ what is in a run
@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Model, dict[str, str], dict[str, str]]]:
    """One run for all tests that only read: its directory, the trained module, the environment before and after."""
    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, directory)
        before = dict(os.environ)
        optimizer = {"lr": 0.1, "betas": [0.9, "${seed}"]}
        config = OmegaConf.create({"seed": 3, "optimizer": optimizer, "long": "x" * 70_000})
        logger = wandb_logger("a-project", directory, group="sweep-1", tags=["tiny", "bert"])
        model = fit(directory, logger, LoRA(targets="q,v", rank=2), Tracking(config))
        finish()
        yield directory, model, before, dict(os.environ)


def test_the_config_is_nested_and_plain(tracked: Any) -> None:
    run = only(tracked[0])
    assert (run.project, run.group, run.tags) == ("a-project", "sweep-1", ["tiny", "bert"])
    assert run.config["optimizer"] == {"lr": 0.1, "betas": [0.9, 3]}
    assert run.config["seed"] == 3
    assert run.config["long"] == "x" * 70_000  # three blocks of the file


def test_the_method_with_its_fields_is_in_the_config(tracked: Any) -> None:
    method = only(tracked[0]).config["methods"]["lora"]
    assert (method["method"], method["rank"], method["targets"], method["heads"]) == ("lora", 2, "q,v", "auto")
    assert method["fingerprint"] == state.get_applied(tracked[1]).fingerprint


def test_counts_are_in_the_summary(tracked: Any) -> None:
    run, counts = only(tracked[0]), state.describe(tracked[1])
    assert counts["sites"] == 4
    assert {name: run.summary[f"peft/{name}"] for name in counts} == pytest.approx(counts)


def test_metrics_are_in_the_history(tracked: Any) -> None:
    run = only(tracked[0])
    training = [(row["trainer/global_step"], row["train/loss"]) for row in run.history if "train/loss" in row]
    validation = [(row["trainer/global_step"], row["val/loss"]) for row in run.history if "val/loss" in row]
    assert [step for step, _ in training] == [0, 1, 2, 3]
    assert [step for step, _ in validation] == [1, 3]
    assert run.summary["val/loss"] == validation[-1][1] < validation[0][1]
    assert run.exit_code == 0


def test_the_learning_curve_is_a_table_with_a_plot(tracked: Any) -> None:
    run = only(tracked[0])
    (file,) = tracked[0].glob("wandb/offline-run-*/files/media/table/*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["metric", "step", "value"]
    names = ("train/loss", "val/loss")
    logged = [[name, row["trainer/global_step"], row[name]] for row in run.history for name in names if name in row]
    assert sorted(table["data"]) == sorted(logged)
    assert len(logged) == 6
    assert run.config["_wandb"]["visualize"]["learning_curve"]["panel_config"]["panelDefId"] == "wandb/line/v0"


def test_the_adapter_is_one_artifact_of_two_files(tracked: Any) -> None:
    directory, model = tracked[:2]
    artifact = adapter_of(only(directory))
    assert artifact.paths == ["adapter.json", "adapter.safetensors"]
    assert artifact.metadata["methods"]["lora"]["fingerprint"] == state.get_applied(model).fingerprint
    assert artifact.metadata["counts"]["trainable"] == state.describe(model)["trainable"]
    (saved,) = directory.glob("wandb/adapter-*")
    fresh = Model()
    load_adapter(fresh, saved)
    x = zoo.inputs("bert")
    assert torch.equal(fresh.net.eval()(**x).logits, model.net.eval()(**x).logits)


def test_the_environment_is_as_before(tracked: Any) -> None:
    assert tracked[3] == tracked[2]


def test_two_methods_are_two_directories_of_one_artifact(tmp_path: Path) -> None:
    fit(tmp_path, wandb_logger(save_dir=tmp_path), LoRA(rank=2), BitFit(heads=None), Tracking(), epochs=1)
    finish()
    run = only(tmp_path)
    files = [f"{label}/{file}" for label in ("bitfit", "lora") for file in ("adapter.json", "adapter.safetensors")]
    assert adapter_of(run).paths == files
    assert [entry["method"] for _, entry in sorted(run.config["methods"].items())] == ["bitfit", "lora"]


def test_without_a_method_the_rest_is_logged(tmp_path: Path) -> None:
    fit(tmp_path, wandb_logger(save_dir=tmp_path), Tracking({"seed": 1}), epochs=1)
    finish()
    run = only(tmp_path)
    assert (run.config["seed"], run.config["methods"]) == (1, {})
    assert [artifact.type for artifact in run.artifacts] == ["run_table"]


def test_an_adapter_with_nan_does_not_cost_the_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Diverged(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            next(iter(state.trainable(pl_module).values())).data.fill_(torch.nan)

    fit(tmp_path, wandb_logger(save_dir=tmp_path), LoRA(rank=2), Diverged(), Tracking(), epochs=1)
    finish()
    run = only(tmp_path)
    assert "no adapter artifact" in caplog.text
    assert "NaN" in caplog.text
    assert run.exit_code == 0
    assert [artifact.type for artifact in run.artifacts] == ["run_table"]


def test_peak_memory_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reset: list[Any] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    model, run, tracking = Model(), trainer(tmp_path, wandb_logger(save_dir=tmp_path)), Tracking()
    monkeypatch.setattr(type(run.strategy), "root_device", torch.device("cuda", 0))
    tracking.on_fit_start(run, model)
    tracking.on_fit_end(run, model)
    finish()
    assert reset == [torch.device("cuda", 0)]
    assert only(tmp_path).summary["peft/peak_memory_bytes"] == 123


# ------------------------------------------------------------------ loggers
def test_no_wandb_logger_no_wandb(tmp_path: Path) -> None:
    fit(tmp_path, CSVLogger(tmp_path), LoRA(rank=2), Tracking({"seed": 1}), epochs=1)
    assert wandb.run is None
    assert not (tmp_path / "wandb").exists()


def test_beside_another_logger(tmp_path: Path) -> None:
    fit(tmp_path, [CSVLogger(tmp_path), wandb_logger(save_dir=tmp_path)], LoRA(rank=2), Tracking(), epochs=1)
    finish()
    assert adapter_of(only(tmp_path)).type == "adapter"
    assert list(tmp_path.rglob("metrics.csv"))


def test_lightnings_own_wandb_logger(tmp_path: Path) -> None:
    fit(tmp_path, WandbLogger(save_dir=tmp_path, mode="offline"), LoRA(rank=2), Tracking(), epochs=1)
    finish()
    assert [artifact.type for artifact in only(tmp_path).artifacts] == ["adapter"]  # W&B draws the history itself


def test_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    fit(tmp_path, wandb_logger(save_dir=tmp_path), LoRA(rank=2), Tracking({"seed": 1}), epochs=1)
    finish()
    assert not (tmp_path / "wandb").exists()


def test_two_wandb_loggers_are_refused(tmp_path: Path) -> None:
    loggers = [wandb_logger(save_dir=tmp_path), wandb_logger(save_dir=tmp_path)]
    with pytest.raises(ValueError, match="2 W&B loggers.*Leave one"):
        fit(tmp_path, loggers, LoRA(rank=2), Tracking())


def test_a_long_curve_is_thinned_evenly_and_keeps_its_start(tmp_path: Path) -> None:
    logger = wandb_logger(save_dir=tmp_path, mode="disabled")
    for step in range(3 * POINTS):
        logger.log_metrics({"loss": 1.0}, step)
    assert isinstance(logger, RunLogger)
    steps = [step for step, _ in logger.curve["loss"]]
    assert POINTS // 2 <= len(steps) <= POINTS
    assert steps == sorted(steps)
    assert steps[0] == 0


def test_a_metric_without_a_step_is_logged_but_no_point_of_the_curve(tmp_path: Path) -> None:
    logger = wandb_logger(save_dir=tmp_path)
    logger.log_metrics({"loss": 1.0})
    finish()
    assert only(tmp_path).summary["loss"] == 1.0
    assert logger.curve == {}  # type: ignore[attr-defined]


def test_the_logger_pickles_with_its_curve(tmp_path: Path) -> None:
    logger = wandb_logger(save_dir=tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    assert pickle.loads(pickle.dumps(logger)).curve == {"loss": [(0, 1.0)]}


# ------------------------------------------------------------------ runs begin and end
def test_two_runs_in_one_process_are_two_runs(tmp_path: Path) -> None:
    for rank in (1, 2):  # nothing is finished in between
        fit(tmp_path, wandb_logger(f"p{rank}", tmp_path), LoRA(rank=rank), Tracking({"n": rank}), epochs=rank)
    finish()
    runs = sorted(wandb_offline.read_all(tmp_path), key=lambda run: run.project)
    assert [run.project for run in runs] == ["p1", "p2"]
    assert [run.config["n"] for run in runs] == [run.config["methods"]["lora"]["rank"] for run in runs] == [1, 2]
    assert [sum("train/loss" in row for row in run.history) for run in runs] == [2, 4]
    assert [run.exit_code for run in runs] == [0, 0]


def test_loggers_made_ahead_are_two_runs_too(tmp_path: Path) -> None:
    first, second = wandb_logger("p1", tmp_path), wandb_logger("p2", tmp_path)
    first.log_metrics({"a": 1.0}, 0)
    second.log_metrics({"b": 1.0}, 0)
    finish()
    assert sorted(run.project for run in wandb_offline.read_all(tmp_path)) == ["p1", "p2"]


def test_a_run_that_the_user_opened_can_be_given(tmp_path: Path) -> None:
    run = wandb.init(project="mine", dir=tmp_path, mode="offline")
    fit(tmp_path, wandb_logger(save_dir=tmp_path, experiment=run), LoRA(rank=2), Tracking(), epochs=1)
    finish()
    assert only(tmp_path).project == "mine"
    assert adapter_of(only(tmp_path)).paths == ["adapter.json", "adapter.safetensors"]


def test_an_exception_in_training_ends_the_run_as_failed(tmp_path: Path) -> None:
    before = dict(os.environ)
    with pytest.raises(ArithmeticError, match="on purpose"):
        fit(tmp_path, wandb_logger(save_dir=tmp_path), LoRA(rank=2), Tracking({"n": 1}), fail=True)
    run = only(tmp_path)
    assert run.exit_code == 1
    assert run.config["n"] == 1
    assert sum("train/loss" in row for row in run.history) == 1
    assert dict(os.environ) == before


def test_a_failing_trainer_leaves_the_run_of_another_open(tmp_path: Path) -> None:
    old, new = wandb_logger("old", tmp_path), wandb_logger("new", tmp_path)
    old.log_metrics({"a": 1.0}, 0)
    new.log_metrics({"a": 1.0}, 0)
    old.finalize("failed")
    wandb_logger(save_dir=tmp_path).finalize("failed")  # never opened
    assert wandb.run is new.experiment


@pytest.mark.parametrize(("error", "code"), [(None, 0), (KeyError("x"), 1), (SystemExit(0), 0), (SystemExit(3), 1)])
def test_finished_runs(tmp_path: Path, error: BaseException | None, code: int) -> None:
    before = dict(os.environ)

    def block() -> None:
        with finished_runs():
            wandb_logger(save_dir=tmp_path).log_metrics({"a": 1.0}, 0)
            if error is not None:
                raise error

    if error is None:
        block()
    else:
        with pytest.raises(type(error)):
            block()
    assert only(tmp_path).exit_code == code
    assert wandb.run is None
    assert dict(os.environ) == before


def test_finish_in_a_finally_and_with_a_code(tmp_path: Path) -> None:
    def run(directory: Path, code: int | None) -> None:
        try:
            wandb_logger(save_dir=directory).log_metrics({"a": 1.0}, 0)
            raise KeyError
        finally:
            finish(code)

    for index, code in enumerate((None, 7)):
        with pytest.raises(KeyError):
            run(tmp_path / str(index), code)
        assert only(tmp_path / str(index)).exit_code == (code or 1)
    finish()  # nothing is open: nothing happens


def test_neither_the_import_nor_finish_imports_wandb() -> None:
    code = "import sys, lightning_peft.tracking as t; t.finish(); t.Tracking({}); sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------ where a run goes
def test_without_wandb_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning_peft\[wandb\]'"):
        wandb_logger()
    finish()


def test_offline_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert mode(wandb_logger(save_dir=tmp_path)) == "offline"
    (line,) = [record.message for record in caplog.records if "offline" in record.message]
    assert str(tmp_path / "wandb") in line
    assert "no API key" in line


def mode(logger: WandbLogger) -> str | None:
    """What `wandb.init` would be given; nothing is opened."""
    return logger._wandb_init.get("mode")


def test_a_key_means_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert logged_in()
    assert mode(wandb_logger()) is None  # W&B's own default: online
    assert mode(wandb_logger(offline=True)) == "offline"
    assert mode(wandb_logger(offline=False)) == "online"


def test_the_mode_of_the_environment_is_left_to_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode(wandb_logger()) is None


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("netrc", "machine api.wandb.ai login user password secret\n", True),
        ("netrc", "machine example.org login user password secret\n", False),
        ("netrc", "machine", False),
        ("CONFIG/settings", "[default]\napi_key = secret\n", True),
        ("CONFIG/settings", "[default]\nmode = online\n", False),
        ("CONFIG/settings", "no section\n", False),
    ],
)
def test_where_a_login_is_looked_for(tmp_path: Path, file: str, text: str, found: bool) -> None:
    assert not logged_in()
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert logged_in() is found


def test_a_login_at_another_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "CONFIG").mkdir()
    (tmp_path / "CONFIG" / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password secret\n")
    assert logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")
    assert not logged_in()


def test_plain() -> None:
    config = OmegaConf.create({"a": 1, "b": {"c": ["${a}", None]}})
    value = {"config": config, "inner": [config.b], 3: Path("x"), "t": (1, True), "dtype": torch.bfloat16}
    assert plain(value) == {
        "config": {"a": 1, "b": {"c": [1, None]}},
        "inner": [{"c": [1, None]}],
        "3": "x",
        "t": [1, True],
        "dtype": "torch.bfloat16",
    }
    json.dumps(plain(value))


def test_the_reader_refuses_another_file(tmp_path: Path) -> None:
    (tmp_path / "run-1.wandb").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="Not a W&B run file"):
        wandb_offline.read(tmp_path)
