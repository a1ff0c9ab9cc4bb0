"""The command line, from words to a run directory and back to an answer; all on tiny models."""

import io
import json
import logging
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import reviews
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf

from lightning_peft import catalogue, cli, curve, demo, launch, predict, results, tracking, train
from lightning_peft.checks import ConfigError
from lightning_peft.core.files import read_config
from lightning_peft.core.method import REGISTRY
from lightning_peft.tasks import PooledClassifier

FILES = ["config.yaml", "train.log", "metrics.csv", "learning_curve.png", "results.json"]
QUIET = ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Reviews with a text and a label, and pairs of a prompt and an answer."""
    folder = reviews(tmp_path_factory.mktemp("cli"))
    pairs = [{"prompt": f"{n} + 1", "answer": str(n + 1)} for n in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    """Commands are run in the folder of the data."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LIGHTNING_PEFT_TRACE", raising=False)


TEXT = ["train", "model=tiny_bert", "data=csv", "data.path=reviews.csv", *QUIET]


@pytest.fixture(scope="module")
def finished(folder):
    """A run directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        learned = ["peft.targets=all-linear", "optimizer.lr=0.01", "trainer.max_epochs=6", "data.batch_size=8"]
        assert cli.main([*TEXT, *learned, "hydra.run.dir=run"]) == 0
    return folder / "run"


# ------------------------------------------------------------------ train
def test_a_run_directory_has_everything(finished):
    assert all((finished / name).stat().st_size for name in FILES)
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert read_config(finished / "adapter")["config"] == {"targets": "all-linear"}
    assert (finished / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert {"train/loss", "val/accuracy", "test/f1"} <= set(curve.read(finished / "metrics.csv"))


def test_the_log_holds_what_was_said(finished):
    log = (finished / "train.log").read_text()
    assert "PEFT: lora at" in log
    assert "data: sha256" in log


def test_the_config_is_plain_and_resolved(finished):
    text = (finished / "config.yaml").read_text()
    assert "${" not in text
    assert OmegaConf.load(finished / "config.yaml").peft.targets == "all-linear"


def test_results(finished):
    found = json.loads((finished / "results.json").read_text())
    low, high = found["test_interval"]
    assert low <= found["test"]["test/accuracy"] <= high + 1e-9
    assert found["test"]["test/accuracy"] > found["majority"]
    assert found["classes"] == ["bad", "good"]
    assert found["adapter"]["bytes"] == sum(path.stat().st_size for path in (finished / "adapter").iterdir())
    assert found["counts"]["trainable"] < found["counts"]["total"]
    assert {"python", "torch", "lightning", "lightning_peft"} <= set(found["versions"])


def test_nothing_is_left_open(finished):
    assert not [
        h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler) and "run" in h.baseFilename
    ]


def test_a_run_goes_on_from_a_checkpoint(finished):
    more = [
        "peft.targets=all-linear",
        "ckpt_path=run/checkpoints/last.ckpt",
        "trainer.max_epochs=7",
        "data.batch_size=8",
    ]
    assert cli.main([*TEXT, *more, "hydra.run.dir=more"]) == 0
    steps = [max(step for step, _ in curve.read(path / "metrics.csv")["val/loss"]) for path in (finished, Path("more"))]
    assert steps[1] * 6 == pytest.approx(steps[0] * 7, abs=7)


def test_wandb():
    pytest.importorskip("wandb")
    overrides = ["logger=wandb", "logger.wandb.offline=true", "trainer.max_epochs=1", "hydra.run.dir=tracked"]
    assert cli.main([*TEXT, *overrides]) == 0
    assert list(Path("tracked/wandb").glob("offline-run-*/run-*.wandb"))
    assert Path("tracked/metrics.csv").is_file()
    assert sys.modules["wandb"].run is None


def test_a_language_model(capsys):
    overrides = [
        "experiment=instructions",
        "data.path=pairs.jsonl",
        "trainer=debug",
        "task.max_new_tokens=3",
        *QUIET[:1],
    ]
    assert cli.main(["train", *overrides, "hydra.run.dir=words"]) == 0
    assert (Path("words") / "adapter" / "adapter.json").is_file()
    assert not Path("words/learning_curve.png").exists()  # debug runs log nothing
    capsys.readouterr()
    assert cli.main(["predict", "--run", "words", "3 + 1"]) == 0
    assert capsys.readouterr().err == ""


def test_the_row_that_trains_nothing(capsys):
    words = [*TEXT, "experiment=in_context", "model=tiny_gpt2", "data.batch_size=6", "hydra.run.dir=untrained"]
    assert cli.main([*words, "in_context.shots=2", "in_context.calibrate=true"]) == 0
    found = json.loads(Path("untrained/results.json").read_text())
    assert found["counts"]["trainable"] == 0 < found["counts"]["total"]
    assert 0 <= found["test"]["test/accuracy"] <= 1
    assert len(found["task"]["examples"]) == 2
    assert not Path("untrained/checkpoints").exists()
    capsys.readouterr()
    for more, message in (
        (["peft=lora"], "InContext trains nothing: leave peft=null"),
        (["data=instructions", "data.path=pairs.jsonl"], "on texts with classes and no more"),
    ):
        assert cli.main([*words, *more]) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["plan", *words[1:]]) == 1
    assert "no data" in capsys.readouterr().err


def test_images(capsys):
    pytest.importorskip("sklearn")
    assert (
        cli.main(["train", "model=tiny_vit", "data=digits", "trainer=debug", *QUIET[:1], "hydra.run.dir=digits"]) == 0
    )
    assert json.loads(Path("digits/results.json").read_text())["test_examples"] > 100
    capsys.readouterr()
    assert cli.main(["predict", "--run", "digits", "a seven"]) == 1
    assert "predict reads sentences" in capsys.readouterr().err


def test_two_methods_and_none():
    two = ["experiment=two_methods", "trainer.max_epochs=1", "logger=none", "keep=last"]
    assert cli.main([*TEXT, *two, "hydra.run.dir=two"]) == 0
    assert {path.parent.name for path in Path("two/adapter").rglob("adapter.json")} == {"lora", "parallel"}
    assert cli.main(["predict", "--run", "two", "a thing"]) == 0
    assert cli.main([*TEXT, "~peft", "trainer=debug", "hydra.run.dir=whole"]) == 0
    counts = json.loads(Path("whole/results.json").read_text())["counts"]
    assert counts["trainable"] == counts["total"]


def test_a_sweep(capsys):
    sweep = ["--multirun", "peft=bitfit,[lora,bitfit]", "trainer.max_epochs=1", "hydra.sweep.dir=sweep"]
    assert cli.main([*TEXT, *sweep]) == 0
    assert read_config("sweep/0/adapter")["method"] == "bitfit"
    assert [read_config(f"sweep/1/adapter/{name}")["method"] for name in ("lora", "bitfit")] == ["lora", "bitfit"]
    assert all((Path("sweep") / job / name).is_file() for job in "01" for name in FILES)


@pytest.mark.parametrize("sweep", ["peft=lora,lorra", "peft.rank=1,2,x", "peft=["])
def test_a_sweep_is_checked_before_its_first_job(sweep, capsys):
    assert cli.main([*TEXT, "--multirun", sweep, "hydra.sweep.dir=unchecked"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not Path("unchecked").exists()


def test_the_points_of_a_sweep():
    found = launch.points(["a=1", "b=2,3", "c=range(0,9)", "d=interval(0,1)"])
    assert list(found) == [["a=1", "b=2", "c=0"], ["a=1", "b=3", "c=0"], ["a=1", "b=2", "c=8"]]


def test_a_sweep_refuses_child_processes(capsys):
    two = ["strategy=ddp", "trainer.devices=2", "--multirun", "seed=0,1", "hydra.sweep.dir=ddp"]
    assert cli.main([*TEXT, *two]) == 1
    assert "submitit_local" in capsys.readouterr().err


def test_a_failing_job_of_a_sweep_leaves_no_logger_open(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(CSVLogger, "finalize", lambda self, status: ended.append(status))
    monkeypatch.setattr(tracking, "finish", ended.append)
    sweep = ["--multirun", "data.path=reviews.csv,nope.csv", "trainer=debug", "hydra.sweep.dir=broken"]
    assert cli.main([*TEXT, *sweep]) == 1
    assert "nope.csv" in capsys.readouterr().err
    assert ended == ["success", 0, "failed", 1]
    assert Path("broken/0/results.json").is_file()


def test_printing_the_config_runs_nothing(capsys):
    assert cli.main([*TEXT, "--cfg", "job", "-p", "peft"]) == 0
    assert "rank: 8" in capsys.readouterr().out
    assert not Path("outputs").exists()


def test_the_users_configs_are_found_first(tmp_path, capsys):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "lora.yaml").write_text("defaults: [/schema/peft/lora@_here_, _self_]\nrank: 3\n")
    for option in ("--config-dir", "--config-path"):
        assert cli.main(["train", option, str(tmp_path), "--cfg", "job", "--resolve", "-p", "peft"]) == 0
        assert "rank: 3" in capsys.readouterr().out


def test_what_the_children_of_ddp_are_started_with(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    monkeypatch.setattr(launch, "commands", lambda: {"train": lambda config: seen.append(list(sys.argv))})
    assert cli.main(["train", "model=tiny_bert", "hydra.run.dir=children"]) == 0
    assert seen == [["lightning-peft", "train", "model=tiny_bert", "hydra.run.dir=children"]]
    assert sys.argv == ["lightning-peft"]


@pytest.mark.slow
def test_two_processes(folder):
    import os
    import subprocess

    two = ["strategy=ddp", "trainer.devices=2", "trainer.max_epochs=1", "hydra.run.dir=processes"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "lightning_peft", *TEXT, *two]
    subprocess.run(command, check=True, cwd=folder, env=environment)
    assert all((folder / "processes" / name).is_file() for name in FILES)


# ------------------------------------------------------------------ predict
def test_predict(finished, capsys, monkeypatch):
    assert cli.main(["predict", "--run", str(finished), "lovely thing 7", "horrid thing 8"]) == 0
    out = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[2]) for line in out] == [("good", "lovely thing 7"), ("bad", "horrid thing 8")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("lovely thing 7\n\n"))
    assert cli.main(["predict", "--run", str(finished)]) == 0
    assert capsys.readouterr().out.splitlines() == ["\t".join(out[0])]


def test_predict_invites_to_type(finished, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("lovely thing\n"))
    assert cli.main(["predict", "--run", str(finished)]) == 0
    assert "Ctrl-D" in capsys.readouterr().err


def test_the_adapter_that_is_loaded_answers_as_the_one_that_was_tested(finished):
    accuracy = json.loads((finished / "results.json").read_text())["test"]["test/accuracy"]
    run = predict.load_run(finished)
    run.data.setup("test")
    examples = run.data.splits["test"]
    answers = run.answer([example.text for example in examples])
    right = sum(label == example.label for (label, _), example in zip(answers, examples, strict=True))
    assert right / len(examples) == pytest.approx(accuracy)


def test_an_unfinished_run(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    assert cli.main(["predict", "--run", str(tmp_path / "run"), "x"]) == 1
    assert "no finished run: it has no adapter" in capsys.readouterr().err


def test_batches_of_lines():
    assert list(predict.batches(["a\n", " \n", "b", "c"], 2)) == [["a", "b"], ["c"]]


# ------------------------------------------------------------------ methods
def test_methods(capsys):
    assert cli.main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in REGISTRY)
    assert "y = W x + (alpha / rank) B A x" in out
    assert cli.main(["methods", "--markdown", "--model", "tiny_bert"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(REGISTRY) + 2
    assert "`lora`" in "".join(rows)
    assert "[2106.09685](https://arxiv.org/abs/2106.09685)" in "".join(rows)


def test_counts_on_a_model_known_by_its_config_alone(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    transformers.BertConfig(**small, vocab_size=50).save_pretrained(tmp_path)
    model = catalogue.model_named(str(tmp_path))
    assert next(model.parameters()).is_meta
    assert catalogue.count(REGISTRY["lora"], model).startswith("2,048 ")
    assert catalogue.count(REGISTRY["linear_probe"], model) == "-"
    assert isinstance(catalogue.model_named("tiny_llama"), torch.nn.Module)


def test_an_unknown_model(tmp_path, capsys):
    assert cli.main(["methods", "--model", str(tmp_path)]) == 1
    assert "Unrecognized model" in capsys.readouterr().err


# ------------------------------------------------------------------ the demo
def test_demo(capsys):
    small = [
        "model=tiny_bert",
        "data=csv",
        "data.path=reviews.csv",
        "trainer.max_epochs=1",
        *QUIET,
        "hydra.run.dir=demo",
    ]
    assert cli.main(["demo", *small]) == 0
    out = capsys.readouterr().out
    assert all(words in out for words in ("linear probe", "LoRA", "95 %", "macro-F1", "majority", "predict --run"))
    numbers = json.loads(Path("demo/demo.json").read_text())
    assert 0 < numbers["probe"]["test/accuracy"] <= 1
    assert demo.method_name(OmegaConf.create({"peft": None})) == "no method"


def test_the_probe_is_at_its_minimum():
    torch.manual_seed(0)
    inputs, labels = torch.randn(50, 4), torch.randint(0, 3, (50,))
    weight, bias = (p.requires_grad_() for p in demo.logistic_regression(inputs, labels, 0.01, 3))
    loss = torch.nn.functional.cross_entropy(inputs @ weight.T + bias, labels) + 0.01 * weight.square().sum()
    assert all(g.abs().max() < 1e-3 for g in torch.autograd.grad(loss, (weight, bias)))


class Lookup(torch.nn.Embedding):
    """ids (batch, time) -> (batch, time, width)"""

    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids)


@pytest.mark.parametrize("ckpt_path", [None, "last.ckpt"])
def test_the_head_starts_at_the_probe(ckpt_path):
    torch.manual_seed(0)
    ids, labels = torch.arange(8).unsqueeze(1), torch.arange(8) % 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    data = SimpleNamespace(train_dataloader=lambda: [batch], val_dataloader=lambda: [batch])
    model = PooledClassifier(Lookup(8, 16), 16, 2)
    before = model.head.weight.clone()
    trainer = SimpleNamespace(ckpt_path=ckpt_path, datamodule=data)
    demo.ProbedHead().on_fit_start(trainer, SimpleNamespace(model=model))
    assert model.training
    if ckpt_path:
        assert torch.equal(model.head.weight, before)
    else:
        assert torch.equal(model.eval()(ids, attention_mask=torch.ones_like(ids)).argmax(1), labels)


def test_the_probe_needs_pooled_features():
    with pytest.raises(ConfigError, match="model.pooling=mean"):
        demo.pooled(torch.nn.Linear(2, 2))


def test_only_the_first_process_reports(monkeypatch):
    monkeypatch.setattr(demo, "run", lambda config: {})
    assert demo.compare(OmegaConf.create({})) == {}


# ------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 0, ""),
        (["--help"], 0, ""),
        (["--version"], 0, ""),
        (["train", "--help"], 0, ""),
        (["methods", "--help"], 0, ""),
        (["tarin"], 2, "Known: train, predict, methods, demo"),
        (["train", "--foo"], 2, "--foo"),
        (["train", "--cfg", "foo"], 2, "invalid choice"),
        (["predict"], 2, "--run"),
        (["train", "peft=lorra"], 1, "Did you mean 'lora'"),
        (["train", "peft.rank=abc"], 1, "Integer"),
        (["train", "keep=worst", "model=tiny_bert", "hydra.run.dir=worst"], 1, "keep='worst'.*best, last"),
        (["train", "--config-dir", "nope"], 1, "no directory"),
        (["train", "data=csv", "model=tiny_bert", "data.path=nope.csv", "hydra.run.dir=nope", *QUIET], 1, "nope.csv"),
        (["predict", "--run", "nowhere", "x"], 1, "config.yaml, results.json, adapter"),
    ],
)
def test_exit_codes(argv, code, words, capsys):
    import re

    assert cli.main(argv) == code
    out, err = capsys.readouterr()
    assert re.search(words, err)
    assert code != 1 or (len(err.splitlines()) == 1 and "Traceback" not in err)
    assert code != 0 or (out and not err)


def test_help_lists_the_choices(capsys):
    cli.main(["train", "--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in REGISTRY)
    assert "precision" in out


def test_trace(monkeypatch):
    monkeypatch.setenv("LIGHTNING_PEFT_TRACE", "1")
    with pytest.raises(ConfigError):
        cli.main(["train", "peft=lorra"])


def test_an_error_of_a_method_is_one_line(tmp_path, capsys):
    """W_up of a LoRA starts at zero, so that GraSP has nothing to tell its entries apart by."""
    words = ["peft=sparse_adapter", "peft.over=lora", "peft.score=grasp", "model=tiny_bert", "trainer=debug"]
    assert cli.main(["train", *words, f"hydra.run.dir={tmp_path}"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lightning-peft: score='grasp' gives 4 tensors (b) nothing but zeros")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(argv):
        raise KeyError("bug")

    monkeypatch.setitem(cli.COMMANDS, "train", (broken, ""))
    with pytest.raises(KeyError):
        cli.main(["train"])


def test_a_reader_that_has_had_enough(monkeypatch):
    def piped(argv):
        raise BrokenPipeError

    monkeypatch.setitem(cli.COMMANDS, "methods", (piped, ""))
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert cli.main(["methods"]) == 0
    sys.stdout.close()


def test_hydra_settings_are_as_before(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with launch.hydra_arguments(["a=1"]):
        assert sys.argv[1:] == ["a=1"]
    import os

    assert os.environ["HYDRA_FULL_ERROR"] == "0"


# ------------------------------------------------------------------ pieces
def test_no_picture_without_matplotlib(finished, tmp_path, monkeypatch, caplog):
    shutil.copy(finished / "metrics.csv", tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level("INFO", "lightning_peft"):
        train.draw_curve(tmp_path, "val/accuracy")
    assert "No learning_curve.png: it needs matplotlib. Run: pip install" in caplog.text


def test_a_picture_of_losses_alone(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss,val/loss,test/loss\n0,0,2.0,,\n0,1,,1.0,\n1,2,,,0.9\n")
    assert curve.draw(tmp_path / "metrics.csv", tmp_path / "a.png", "val/loss").stat().st_size > 1000


def test_wilson_interval():
    low, high = results.wilson(0.5, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert math.isclose(results.wilson(1.0, 50)[1], 1.0)
