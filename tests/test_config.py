"""conf/: generated from the registry, found wherever the package is installed, refused when it makes no sense."""

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Literal, Optional

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from lightning_peft import config as configs
from lightning_peft import launch, schema
from lightning_peft.checks import ConfigError, check, fits
from lightning_peft.composition import named
from lightning_peft.config import build, compose, conf_dir, options
from lightning_peft.core.method import REGISTRY

ROOT = Path(__file__).parents[1]
FILES = sorted(conf_dir().rglob("*.yaml"))
HERE = "run_dir=."


def composed(*overrides, **kwargs):
    return compose([HERE, *overrides], **kwargs)


def test_the_group_peft_is_the_registry():
    assert options("peft") == sorted(REGISTRY)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_files_are_what_the_generator_writes(name):
    assert (conf_dir() / "peft" / f"{name}.yaml").read_text("utf-8") == schema.yaml_text(REGISTRY[name])


def test_the_generator_writes_all_files(tmp_path):
    assert [path.stem for path in schema.write(tmp_path / "peft")] == options("peft")


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_an_entry_is_the_method_with_its_defaults(name):
    method = build(composed(f"peft={name}").peft)
    assert type(method) is REGISTRY[name]
    assert method.config() == REGISTRY[name]().config()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_says_what_it_is_and_shows_a_command(path):
    head = [line for line in path.read_text("utf-8").splitlines()[:8] if line.startswith("# ")]
    head = [line for line in head if not line.startswith("# @package")]
    assert len(head[0]) > 12
    command = next(line for line in head if line.startswith("# lightning-peft "))
    if path.parent.name != "conf" and "demo" not in command:
        used = re.findall(rf"{path.parent.name}=(\w+)", command)
        assert path.stem in used or path.parent.name in ("model", "data", "trainer"), command


@pytest.mark.parametrize("index", range(max(map(len, map(options, ("optimizer", "precision"))))))
def test_every_choice_composes(index):
    groups = ("optimizer", "scheduler", "strategy", "precision", "trainer", "logger")
    chosen = [f"{group}={options(group)[index % len(options(group))]}" for group in groups]
    assert composed(*chosen).optimizer._partial_ is True


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes(name):
    extra = ["data.path=pairs.jsonl"] if name in ("instructions", "qlora") else []
    assert (composed(f"experiment={name}", *extra).get("peft") is None) == (name == "in_context")


@pytest.mark.parametrize("name", options("data"))
def test_every_data_set_composes(name):
    missing = {"hf": ["data.name=ag_news"], "instructions": ["data.path=a.jsonl", "model=tiny_gpt2"]}
    extra = missing.get(name, ["model=tiny_vit"] if name == "digits" else [])
    assert composed(f"data={name}", *extra).task._target_


def test_a_list_of_methods_is_each_under_its_name():
    found = composed("peft=[lora,bitfit]", "peft.lora.rank=4").peft
    assert {name: node._target_.rpartition(".")[2] for name, node in found.items()} == {
        "lora": "LoRA",
        "bitfit": "BitFit",
    }
    assert (found.lora.rank, found.lora.alpha) == (4, 16.0)
    twice = composed("peft=[lora,lora]", "peft.lora_2.targets=k").peft
    assert [(node.label, node.targets) for node in twice.values()] == [(None, "q,v"), ("lora_2", "k")]
    assert composed("peft=[lora]").peft == composed("peft=lora").peft
    assert composed("peft='[lora, \"bitfit\"]'").peft == composed("peft=lora+bitfit").peft


def test_lists_and_single_methods_in_a_sweep():
    for sweep in ("lora,[lora,ia3]", "choice(lora,[lora,ia3])", "sort(lora,lora+ia3)"):
        single, several = launch.points(named([f"peft={sweep}"]))
        assert composed(*single).peft == composed("peft=lora").peft
        assert composed(*several).peft == composed("peft=[lora,ia3]").peft


ERRORS = {
    "peft.rank=abc": "peft.rank=abc.*abc.*Integer",
    "peft.rnak=3": "Did you mean 'rank'.*Known: targets,.*alpha",
    "peft=lorra": "Did you mean 'lora'.*Known: adalora, .*bitfit,.*prompt_tuning",
    "pfet=lora": "Did you mean 'peft'.*Known:.*optimizer",
    "peft.init=foo": "peft.init='foo'.*one of 'kaiming', 'gaussian'",
    "peft.targets=3": r"peft.targets=3.*str \| list\[str\] \| None",
    "peft.rank=-1": "rank=-1.*above 0",
    "peft.dropout=2": "dropout=2.*probability",
    "trainer.max_epoch=3": "Did you mean 'max_epochs'",
    "trainer.max_epochs=a": "trainer.max_epochs='a'.*int",
    "optimizer.lr=x": "optimizer.lr='x'.*float",
    "+optimizer.foo=1": "optimizer.foo.*no such argument. Known: params, lr",
    "scheduler.warmup=x": "scheduler.warmup='x'.*float",
    "optimizer._target_=torch.optim.Foo": "optimizer._target_='torch.optim.Foo'.*no class",
    "optimizer._target_=broken_on_import.Foo": "cannot be imported.*no way",
    "data=digits": "for image, this model for classification. Models for image: hf, small_vit, tiny_vit",
    "data=hf": "No value for data.name. Give data.name=...",
    "model=foo": "Known: hf, minilm",
    "peft=[": "'peft=\\[' is no override",
    "peft=[lora,bitfti]": r"In 'peft/lora\+bitfti'.*bitfti.*Did you mean 'bitfit'",
    "peft=[lora,,bitfit]": "names no method beside a separator",
    "peft=lora+": "names no method beside a separator",
    "peft=[]": "names no method.*For none: ~peft",
    "peft=[lora,[bitfit]]": "a list within a list",
    "+peft=[lora,bitfit]": "is chosen already",
    "peft=null": "To leave it out: ~peft",
    "experiment=mam peft=[lora,bitfit]": r"peft.length is no method.*peft.lora, peft.bitfit",
    "peft=[lora,bitfit] peft.rank=4": "Key 'rank'.*Known: lora, bitfit",
    "peft=[lora,bitfit] peft.lora.rnak=4": "Did you mean 'rank'.*Known: targets",
    "peft=[lora,bitfit] peft.lora.rank=-4": r"peft.lora: LoRA\(rank=-4\)",
    "peft=[lora,bitfit] peft.bitfit.label=lora": "two of them labelled 'lora'",
    "peft=[lora,bitfit] rates={bitfti:0.1}": "rates are those of methods.*Known: lora, bitfit, heads",
    "rates=0.1": "Write rates={lora: 0.001}",
    "rates={lora:fast}": "lora='fast' is no learning rate",
    "peft.rank": "'peft.rank' is no override",
    "peft.targets=q,v": r"peft.targets.*list.*\[q,v\].*--multirun",
    "~nope": "nope",
    "experiment=prompt_tuning peft=ia3": "In 'experiment/prompt_tuning'.*Key 'length' not in 'IA3'",
}


@pytest.mark.parametrize("override", ERRORS)
def test_what_is_wrong_shows_at_composition_with_the_choices(override, tmp_path, monkeypatch):
    (tmp_path / "broken_on_import.py").write_text("raise RuntimeError('no way')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=ERRORS[override]) as error:
        composed(*override.split())
    assert "\n" not in str(error.value)


def test_tables_of_a_method_take_new_keys():
    method = build(composed("peft.ranks={q: 3}", "peft.targets=[q,v]", "peft.layers=[0,1]").peft)
    assert (method.ranks, method.targets, method.layers) == ({"q": 3}, ["q", "v"], [0, 1])
    with pytest.raises(ConfigError, match="ranks"):
        composed("peft.ranks={q: many}")


def test_a_list_of_methods_in_a_file_is_that_of_a_command_line(tmp_path):
    words = ["peft=[lora,parallel]", "peft.parallel.heads=null", "peft.parallel.bottleneck=16"]
    assert composed("experiment=two_methods").peft == composed(*words).peft
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults: [override /peft: dora+ia3+dora]\npeft: {dora_2: {layers: 0}}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    found = composed("experiment=mine", "peft.ia3.heads=null", directory=tmp_path).peft
    assert [build(node).label for node in found.values()] == [None, None, "dora_2"]
    assert (found.dora_2.layers, found.ia3.heads) == (0, None)


def test_a_method_may_be_a_callback_of_any_name():
    node = composed("+peft@callbacks.second=parallel", "callbacks.second.heads=null").callbacks.second
    assert build(node).config() == REGISTRY["parallel"](heads=None).config()


def test_qlora_is_for_any_method():
    qlora = partial(composed, "experiment=qlora", "data.path=pairs.jsonl")
    method = build(qlora().peft).config()
    assert [method[key] for key in ("targets", "rank", "alpha", "dropout")] == ["all-linear", 64, 16.0, 0.1]
    assert qlora("peft.rank=16").peft.rank == 16
    for name in sorted(REGISTRY):
        assert build(qlora(f"peft={name}").peft).config() == REGISTRY[name]().config()


def test_a_run_without_a_method():
    assert "peft" not in composed("~peft")


def test_the_users_directory_is_found_first(tmp_path):
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "adamw.yaml").write_text("_target_: torch.optim.SGD\n_partial_: true\nlr: 7.0\n")
    config = composed(directory=tmp_path)
    assert (config.optimizer.lr, config.peft.rank) == (7.0, 8)


def test_no_configs_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "PLACES", (tmp_path,))
    with pytest.raises(ConfigError, match="Install lightning-peft again"):
        conf_dir()


def test_build_gives_the_constructors_own_error():
    with pytest.raises(ValueError, match="label_smoothing|num_classes=1"):
        build({"_target_": "lightning_peft.tasks.TextClassification", "num_classes": 1}, model=None)
    with pytest.raises(ConfigError, match="callable"):
        build({"_target_": 3})


def test_kinds_are_optional():
    check(OmegaConf.create({"kind": "sound", "peft": None}), {})


@pytest.mark.parametrize(
    ("hint", "value", "good"),
    [
        (int, 3, True),
        (int, True, False),
        (float, 3, True),
        (Optional[int], None, True),  # noqa: UP045
        (int | str, 1.5, False),
        (Literal["a", "b"], "c", False),
        (list[int], [1], True),
        (list[int], 1, False),
        (Path, "x", False),
        (dict[str, int], {"a": 1}, True),
    ],
)
def test_values_against_annotations(hint, value, good):
    assert fits(value, hint) is good


def test_schemas_are_in_the_config_store():
    schema.register()
    assert {name.removesuffix(".yaml") for name in ConfigStore.instance().list(schema.GROUP)} == set(REGISTRY)


@pytest.mark.parametrize(
    ("hint", "wanted"),
    [
        (Literal["a", "b"], str),
        (Literal["a", 1], object),
        (int | None, Optional[int]),  # noqa: UP045
        (str | list[str] | None, object),
        (list[int], list[int]),
        (dict[str, float], dict[str, float]),
    ],
)
def test_types_for_omegaconf(hint, wanted):
    found = schema.config_type(hint)
    assert found == wanted or (wanted is object and "Any" in str(found))


@pytest.mark.slow
def test_the_wheel_ships_conf(tmp_path):
    for name in ("lightning_peft", "conf"):  # a build leaves files beside the sources
        shutil.copytree(ROOT / name, tmp_path / "source" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    source = str(tmp_path / "source")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), source]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        shipped = {name for name in wheel.namelist() if name.startswith("lightning_peft/conf/")}
        wheel.extractall(tmp_path / "site")
    assert shipped == {f"lightning_peft/conf/{path.relative_to(conf_dir()).as_posix()}" for path in FILES}
    code = "import lightning_peft.config as c; print(c.conf_dir()); print(c.compose(['run_dir=.']).peft.rank)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(tmp_path / "site" / "lightning_peft" / "conf"), "8"]


COMPOSITIONS = (Path(__file__).parents[1] / "docs" / "compositions.md").read_text("utf-8")


@pytest.mark.parametrize("line", re.findall("^lightning-peft (?:train|plan|compare) (.*)$", COMPOSITIONS, re.MULTILINE))
def test_the_commands_of_the_page_on_compositions(line):
    words = [word for word in shlex.split(line) if word not in ("--multirun", "--row")]
    rows = [word.split(" ") for word in words if " peft" in word] or [[w for w in words if not w.startswith("seeds=")]]
    for row in rows:
        for point in launch.points(named(row)):
            composed(*point)


def test_the_file_of_the_page_on_compositions(tmp_path):
    [text] = re.findall("```yaml\n(.*?)```", COMPOSITIONS, re.DOTALL)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "both.yaml").write_text(text.partition("\n")[2])
    config = composed("experiment=both", directory=tmp_path)
    assert (config.peft.dora.layers, config.peft.bitfit.heads, config.rates.bitfit) == ("first:3", None, 0.005)


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_the_program_of_the_page_on_compositions(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    [code] = re.findall("```python\n(.*?)```", COMPOSITIONS, re.DOTALL)
    exec(compile(code, "compositions.md", "exec"), {"__name__": "page"})
    assert {path.parent.name for path in tmp_path.rglob("adapter.json")} == {"dora", "bitfit"}
