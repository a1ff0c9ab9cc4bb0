"""Several settings on one task: rows, seeds, errors, files, and the table."""

import csv
import json
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb_offline
from harness import reviews
from omegaconf import OmegaConf

import lightning_peft
from lightning_peft import cli, results, train
from lightning_peft.checks import ConfigError
from lightning_peft.comparing import compare
from lightning_peft.comparing.comparison import product, seeds_of, slug, word
from lightning_peft.comparing.meter import Meter
from lightning_peft.comparing.table import COLUMNS, Comparison, Row, Run, names
from lightning_peft.config import compose, plain

QUIET = ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "trainer.max_epochs=1", "logger=none"]
QUIET += ["trainer.limit_train_batches=3", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
TASK = ["model=tiny_bert", "data=csv", "data.path=reviews.csv", "data.batch_size=8", *QUIET]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Commands are run beside reviews with a text and a label."""
    folder = reviews(tmp_path_factory.mktemp("compare"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


ROWS = ["peft=lora peft.rank=2", "peft=lora peft.targets=nowhere", "peft=bitfit optimizer.lr=0.002"]


@pytest.fixture(scope="module")
def found(folder: Path) -> Comparison:
    """Three rows, one of which fails, with two seeds."""
    state = torch.random.get_rng_state()
    made = compare(TASK, rows=ROWS, seeds=2, directory=folder / "first run")
    torch.random.set_rng_state(state)
    return made


def test_every_row_has_every_seed_and_a_failed_one_loses_no_other(found: Comparison) -> None:
    assert [[run.seed for run in row.runs] for row in found.rows] == [[0, 1]] * 3
    good, bad, other = found.rows
    assert all(run.error is None and 0 <= run.value <= 1 for row in (good, other) for run in row.runs)  # type: ignore[operator]
    for run in bad.runs:
        assert run.value is None
        assert run.error is not None
        assert run.error.startswith("TargetError: No module matches 'nowhere'")
        assert "Traceback" in (Path(run.directory) / "error.txt").read_text()


def test_the_numbers_are_those_of_the_runs(found: Comparison) -> None:
    assert (found.metric, found.maximum) == ("test/accuracy", True)
    for row in (found.rows[0], found.rows[2]):
        for run in row.runs:
            said = json.loads((Path(run.directory) / "results.json").read_text())
            assert run.value == said["test"]["test/accuracy"]
            assert run.trained == said["counts"]["trainable"]
            assert run.stored_bytes == said["adapter"]["bytes"] > 0
            assert run.fit_s == said["seconds"]["fit"]
            assert run.step_ms is not None
            assert 0 < run.step_ms < 1000 * run.fit_s
            assert run.peak_bytes is not None
    values = [run.value for run in found.rows[0].runs]
    cells = next(c for c in found.table() if c["name"] == found.rows[0].name)
    assert cells["mean"] == statistics.fmean(values)  # type: ignore[type-var]
    assert cells["sd"] == statistics.stdev(values)  # type: ignore[type-var]


def test_a_row_is_what_train_does_with_its_words(found: Comparison) -> None:
    run = found.rows[2].runs[1]
    config = compose([*TASK, "peft=bitfit", "optimizer.lr=0.002", "seed=1", "run_dir=again", "trainer.devices=1"])
    assert train.run(config)["test"][found.metric] == run.value
    first, second = (Path(r.directory, "config.yaml").read_text() for r in found.rows[2].runs)
    assert "seed: 0" in first
    assert "seed: 1" in second
    assert "rank: 2" in Path(found.rows[0].runs[0].directory, "config.yaml").read_text()


def test_names_tell_rows_apart(found: Comparison) -> None:
    assert [row.name for row in found.rows] == [
        "lora peft.rank=2", "lora peft.targets=nowhere", "bitfit optimizer.lr=0.002",
    ]  # fmt: skip
    assert names([("peft=lora", "peft.rank=2", "a=1")]) == ["lora peft.rank=2"]
    assert names([("a=1",), ("a=1", "b=2")]) == ["as configured", "b=2"]
    assert slug("lora peft.layers=[0,1]") == "lora_peft.layers_0_1"
    assert slug("///") == "row"


def test_files(found: Comparison, folder: Path) -> None:
    home = folder / "first run"
    said = json.loads((home / "compare.json").read_text())
    assert said == json.loads(json.dumps(found.as_dict()))
    with (home / "compare.csv").open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(COLUMNS)
    assert float(table[0]["mean"]) == found.table()[0]["mean"]
    assert table[-1]["error"].startswith("TargetError")
    lines = (home / "compare.md").read_text().splitlines()
    assert lines[0].startswith("|  | test/accuracy | seeds | trained |")
    assert len(lines) == 2 + 3 + 1 + 1 + 2
    assert "failed: lora peft.targets=nowhere, seed 1: TargetError" in str(found)


def table_of(*values: list[float | None], maximum: bool = True) -> Comparison:
    made = Comparison("test/x", maximum, (0, 1), ())
    for number, row in enumerate(values):
        runs = [Run(i, "", v, error="E: |" if v is None else None) for i, v in enumerate(row)]
        made.rows.append(Row(f"r{number}", (), runs))
    return made


def test_the_best_row_is_the_first() -> None:
    assert [c["name"] for c in table_of([0.1, 0.2], [None, None], [0.3, None]).table()] == ["r2", "r0", "r1"]
    assert [c["name"] for c in table_of([0.1], [None], [0.3], maximum=False).table()] == ["r0", "r2", "r1"]


def test_one_seed_has_no_deviation_and_half_a_row_says_so() -> None:
    alone, half = table_of([0.5]), table_of([0.5, None])
    assert alone.table()[0]["sd"] is None
    assert "±" not in str(alone)
    assert "1 (1 failed)" in str(half)
    assert "E: \\|" not in str(half)
    assert "- r0, seed 1: E: |" in half.markdown()


def test_a_run_that_diverged_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = stub_of(0) | {"test": {"test/accuracy": math.nan}}
    monkeypatch.setattr("lightning_peft.comparing.runs.train", lambda config, callbacks: stub)
    assert compare(TASK, directory=tmp_path).rows[0].runs[0].error == (
        "ArithmeticError: test/accuracy is nan: the run diverged."
    )


def test_the_best_run_is_named() -> None:
    said = [table_of([0.1, 0.4], [0.3, None], maximum=maximum).foot() for maximum in (True, False)]
    assert said == [["best run: r0, seed 1, test/x 0.4000, "], ["best run: r0, seed 0, test/x 0.1000, "]]
    assert table_of([None]).foot() == []
    assert table_of([None]).as_dict()["best"] is None


# ------------------------------------------------------------------ again
def test_a_comparison_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    stop = [3]

    def train_one(config: Any, callbacks: Any) -> Any:
        where = Path(config.run_dir)
        if len(ran) == stop[0]:
            raise KeyboardInterrupt
        ran.append(f"{where.parent.name} {config.seed} {config.optimizer.lr}")
        where.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(plain(config)), where / "config.yaml")
        if config.optimizer.lr == 3:
            raise ValueError("no")
        return stub_of(config.seed)

    monkeypatch.setattr("lightning_peft.comparing.runs.train", train_one)
    said: list[str] = []
    rows = ["peft=lora", "peft=bitfit optimizer.lr=3"]
    with pytest.raises(KeyboardInterrupt):
        compare(TASK, rows=rows, seeds=2, directory=tmp_path / "x", say=said.append)
    assert said[-1] == f"interrupted; the same words with run_dir={tmp_path / 'x'} go on from here"
    assert len(ran) == 3
    stop[0] = 99
    made = compare(TASK, rows=rows, seeds=2, directory=tmp_path / "x", say=said.append)
    assert ran[3:] == ["1-bitfit_optimizer.lr_3 0 3", "1-bitfit_optimizer.lr_3 1 3"]  # what failed is run again
    assert [run.value for run in made.rows[0].runs] == [0.5, 0.6]
    assert "lora, seed 0, from before" in said
    compare([*TASK, "optimizer.lr=0.5"], rows=["peft=lora", "peft=ia3"], directory=tmp_path / "x")
    assert ran[5:] == ["0-lora 0 0.5", "1-ia3 0 0.5"]  # another run than the one that is there
    (tmp_path / "x" / "0-lora" / "seed-0" / "config.yaml").unlink()
    compare([*TASK, "optimizer.lr=0.5"], rows=["peft=lora", "peft=ia3"], directory=tmp_path / "x")
    assert ran[7:] == ["0-lora 0 0.5"]
    (tmp_path / "x" / "1-ia3" / "seed-0" / "run.json").write_text("[]")
    compare([*TASK, "optimizer.lr=0.5"], rows=["peft=lora", "peft=ia3"], directory=tmp_path / "x")
    assert ran[8:] == ["1-ia3 0 0.5"]
    (tmp_path / "x" / "0-lora" / "seed-0" / "error.txt").touch()  # of a try before the last
    compare([*TASK, "optimizer.lr=0.25"], rows=["peft=lora", "peft=ia3"], directory=tmp_path / "x")
    assert not (tmp_path / "x" / "0-lora" / "seed-0" / "error.txt").exists()


# ------------------------------------------------------------------ words
def test_choices_are_combined() -> None:
    points = list(product(["peft=lora,ia3", "seed=3", 'peft.layers="0-1",[1,2]']))
    assert points[0] == ("peft=lora", "seed=3", "peft.layers='0-1'") or points[0][2].strip("'\"").endswith("0-1")
    assert [len(points), points[-1][:2]] == [4, ("peft=ia3", "seed=3")]
    assert points[1][2] == "peft.layers=[1,2]"
    assert [p[0] for p in product(["peft.rank=range(1,4)"])] == ["peft.rank=1", "peft.rank=2", "peft.rank=3"]
    assert compose([*TASK, points[0][2], "run_dir=."]).peft.layers == "0-1"


def test_paths_with_anything_in_them(tmp_path: Path) -> None:
    where = tmp_path / "it's, a = (b)" / "c"
    assert compose([*TASK, f"run_dir={word(where)}"]).run_dir == str(where)


@pytest.mark.parametrize("seeds", [0, -1, [], [0, 0], ["a"], True, [-1], None, 2.5, [True], {}])
def test_seeds_that_are_none(seeds: Any) -> None:
    with pytest.raises(ConfigError, match="give how many"):
        seeds_of(seeds)


def test_seeds() -> None:
    assert seeds_of(3) == (0, 1, 2)
    assert seeds_of([4, 2]) == (4, 2)


@pytest.mark.parametrize(
    ("words", "rows", "said"),
    [
        (["peft=lora,nope"], (), "nope"),
        (["peft=lora", "peft=="], (), "no override"),
        (["peft.rank=interval(1,4)"], (), "name the values"),
        (["peft.rank=2,2"], (), "same"),
        ([], ["peft.rank=1", "monitor.name=val/f1 monitor.mode=max"], "different metrics"),
        (["trainer.devices=2"], (), "takes one device"),
    ],
)
def test_what_is_wrong_shows_before_anything_runs(words: list[str], rows: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        compare([*TASK, *words], rows=rows, directory=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_metric_that_the_test_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = {"test": {"test/loss": 1.0}}
    monkeypatch.setattr("lightning_peft.comparing.runs.train", lambda config, callbacks: stub)
    made = compare(TASK, directory=tmp_path)
    assert "The test has no test/accuracy. Known: test/loss." in made.errors()[0]
    assert (tmp_path / "0-as_configured").is_dir()


# ------------------------------------------------------------------ the meter
def test_the_meter_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name, value in (("reset_peak_memory_stats", None), ("max_memory_allocated", 123), ("synchronize", None)):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, value=value: calls.append(name) or value)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))
    meter = Meter()
    assert meter.step_ms is None
    meter.setup(trainer, None, "fit")  # type: ignore[arg-type]
    meter.setup(trainer, None, "test")  # type: ignore[arg-type]
    meter.on_train_batch_start(trainer, None)  # type: ignore[arg-type]
    meter.on_train_batch_end(trainer, None)  # type: ignore[arg-type]
    meter.on_fit_end(trainer, None)  # type: ignore[arg-type]
    assert calls == ["reset_peak_memory_stats", "synchronize", "synchronize", "max_memory_allocated"]
    assert meter.peak_bytes == 123
    meter.times = [9.0, 9.0, 1.0, 3.0, 2.0]
    assert meter.step_ms == 2000.0


# ------------------------------------------------------------------ the command
def test_the_command(folder: Path, capsys: Any) -> None:
    argv = ["compare", *TASK, "peft=lora,linear_probe", "run_dir=second", "seeds=[7]"]
    assert cli.main(argv) == 0
    said = capsys.readouterr()
    table = json.loads((folder / "second" / "compare.json").read_text())
    assert table["seeds"] == [7]
    assert {row["name"] for row in table["table"]} == {"lora", "linear_probe"}
    assert "test/accuracy" in said.out.splitlines()[0]
    assert "lora, seed 7" in said.err
    assert sorted(p.name for p in (folder / "second").iterdir() if p.is_dir()) == ["0-lora", "1-linear_probe"]


def test_if_everything_fails_the_command_does(folder: Path, capsys: Any) -> None:
    assert cli.main(["compare", *TASK, "peft.targets=nowhere", "--json", "run_dir=third", "seeds=1"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["table"][0]["failed"] == 1
    assert "Every run failed" in said.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["-m"], "rows already"), (["seed=3"], "seeds=3"), (["seeds=lots"], "how many"), (["seeds=[0"], "how many")],
)
def test_errors_of_the_command(argv: list[str], words: str, capsys: Any) -> None:
    assert cli.main(["compare", *TASK, *argv]) == 1
    assert words in capsys.readouterr().err


def test_a_table_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setattr("lightning_peft.comparing.runs.train", lambda config, callbacks: stub_of(config.seed))
    words = [*TASK[:-1], "logger=wandb", "logger.wandb.offline=true", "peft=lora,ia3"]
    compare(words, seeds=2, directory=tmp_path)
    (run,) = wandb_offline.read_all(tmp_path)
    (logged,) = [row["compare"] for row in run.history if "compare" in row]
    assert (logged["nrows"], logged["ncols"]) == (2, len(COLUMNS))
    assert sys.modules["wandb"].run is None


def stub_of(seed: int) -> dict[str, Any]:
    return {
        "test": {"test/accuracy": 0.5 + seed / 10}, "counts": {"trainable": 1, "total": 4}, "adapter": {"bytes": 9},
        "seconds": {"fit": 1.0},
    }  # fmt: skip


def test_it_is_public() -> None:
    assert lightning_peft.compare is compare
    assert callable(results.measured)
