"""The house rules that a machine can check: who imports whom, what the import costs, what the registry promises."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import zoo

import lightning_peft
import lightning_peft.methods
from lightning_peft.core.method import REGISTRY

ROOT = Path(lightning_peft.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LAYERS = {  # a file may import from its own layer's number and below
    "core": 0,
    "checkpoint": 1,
    "resume": 1,
    "extra_loss": 1,
    "kernels": 1,
    "groups": 1,
    "rates": 2,
    "precision": 2,
    "quantised_files": 3,
    "callback": 2,
    "methods": 3,
    "strategies": 3,
    "tracking": 4,
    "tasks": 4,
}
HIGHEST = 9
FORBIDDEN_IN_CORE = {
    "lightning",
    "hydra",
    "omegaconf",
    "wandb",
    "bitsandbytes",
    "transformers",
    "torchmetrics",
    "numpy",
}


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def layer(dotted: str) -> int:
    parts = dotted.split(".")
    return LAYERS.get(parts[1], HIGHEST) if len(parts) > 1 else -1  # the package itself: its version only


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    if path == ROOT / "__init__.py":
        return
    own = layer("lightning_peft." + path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."))
    for name in imports(path):
        if name.startswith("lightning_peft."):
            assert layer(name) <= own or name == "lightning_peft.methods", (
                f"{path.name} imports {name}, which is above it"
            )


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "core"], ids=lambda p: p.name)
def test_core_knows_torch_only(path: Path) -> None:
    assert not {name.partition(".")[0] for name in imports(path)} & FORBIDDEN_IN_CORE


def test_no_method_knows_an_architecture() -> None:
    for path in (ROOT / "methods").glob("*.py"):
        assert "architectures" not in {name.rpartition(".")[2] for name in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_user_input_is_never_checked_by_assert(path: Path) -> None:
    assert not [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 40, f"{path.name}: {node.name} has {length} lines"


def test_every_public_name_is_there() -> None:
    for name in lightning_peft.__all__:
        assert getattr(lightning_peft, name) is not None
    assert set(lightning_peft.__all__) <= set(dir(lightning_peft))
    with pytest.raises(AttributeError, match="no attribute 'LoRa'.*Known: LoRA"):
        _ = lightning_peft.LoRa


def test_every_method_is_public_and_says_what_it_is() -> None:
    for name, cls in REGISTRY.items():
        if not cls.__module__.startswith("lightning_peft."):
            continue
        assert getattr(lightning_peft, cls.__name__) is cls
        assert cls.__name__ in lightning_peft.methods.__all__
        assert cls.info.equation, name
        assert cls.info.equation != (cls.__base__.__doc__ or "").partition("\n")[0], (
            f"{name} has no docstring of its own"
        )


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, lightning_peft; print([m for m in ('torch', 'lightning', 'hydra', 'wandb', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert out.stdout.strip() == "[]"


def test_a_method_loads_lightning_and_little_more() -> None:
    code = (
        "import sys, lightning.pytorch; before = set(sys.modules); from lightning_peft import LoRA; "
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before} - {'lightning_peft', 'lightning'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert set(ast.literal_eval(out.stdout)) <= {"safetensors", "torch"}


def test_the_recipe_of_the_contributing_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (ROOT.parent / "CONTRIBUTING.md").read_text()
    (tmp_path / "recipe_of_the_guide.py").write_text(guide.partition("```python\n")[2].partition("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    try:
        recipe = importlib.import_module("recipe_of_the_guide")
        net = zoo.build("bert")
        recipe.ShiftTuning().apply(net)
        assert {n.split(".adapters.")[1] for n, p in net.named_parameters() if ".adapters." in n} == {"shift.b"}
    finally:
        REGISTRY.pop("shift", None)


def test_every_package_is_in_the_wheel() -> None:
    """setuptools is told by name; tomllib is younger than the oldest Python here."""
    listed = set(
        re.findall(r'^  "(lightning_peft[\w.]*)",$', (ROOT.parent / "pyproject.toml").read_text(), re.MULTILINE)
    )
    code = {"lightning_peft" + ".".join(["", *p.parent.relative_to(ROOT).parts]) for p in ROOT.rglob("*.py")}
    groups = ROOT.parent / "conf"
    conf = {".".join(["lightning_peft", "conf", *p.parent.relative_to(groups).parts]) for p in groups.rglob("*.yaml")}
    assert code | conf == listed
