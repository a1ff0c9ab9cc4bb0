"""Two gloo processes on the CPU: the same result as one process on the same batches; the base is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import boring
import pytest
import torch

TESTS = Path(__file__).parent


def run(directory: Path, how: str, processes: int) -> list[dict[str, Any]]:
    """Of the last of the comma-separated runs; those before lie beside it."""
    directory.mkdir(exist_ok=True)
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "ddp_run.py"), str(directory), how, str(processes)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return results(directory, how.split(",")[-1], processes)


def results(directory: Path, how: str, processes: int) -> list[dict[str, Any]]:
    return [torch.load(directory / how / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("single"), "callback", 1)[0]


@pytest.mark.parametrize("how", ["callback", "registered", pytest.param("strategy", marks=pytest.mark.slow)])
def test_two_processes_end_where_one_does(how: str, single: dict[str, Any], tmp_path: Path) -> None:
    first, second = run(tmp_path, how, 2)
    assert boring.largest_difference(first["tensors"], second["tensors"]) == 0
    assert boring.largest_difference(first["tensors"], single["tensors"]) < 1e-6
    assert first["ignored"] == first["frozen"]
    trained = sum(t.numel() for name, t in first["tensors"].items() if name not in first["frozen"])
    assert (
        first["broadcast"] == first["reduced"] == trained == 611
    )  # of 24,131: the base is neither broadcast nor reduced
    saved = torch.load(tmp_path / how / "end.ckpt", weights_only=True)
    assert set(saved["state_dict"]).isdisjoint(first["frozen"])
    assert len(saved["callbacks"]["lightning_peft.lora"]["rng"]["now"]) == 2


def test_a_base_that_differs_between_ranks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="holds another base than rank 0.*word_embeddings"):
        run(tmp_path, "unequal", 2)


SHARING = "vera,randlora,fourierft,vb_lora,tied_lora,nola,lora_fa,shira,delora,eva,corda,lora_ga,adamix,compacter,sparse_adapter"


@pytest.fixture(scope="module")
def of_methods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("methods")
    run(directory, SHARING, 2)
    return directory


@pytest.mark.parametrize("name", SHARING.split(","))
def test_what_sites_share_and_what_is_taken_from_data_is_equal_on_all_ranks(name: str, of_methods: Path) -> None:
    first, second = results(of_methods, name, 2)
    assert boring.largest_difference(first["tensors"], second["tensors"]) == 0
    assert first["broadcast"] == first["reduced"] > 0  # constants of adapters, too, are left alone


CHOOSING = "selective,fish,lt_sft,diff_pruning"


@pytest.fixture(scope="module")
def of_choices(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    one, two = (tmp_path_factory.mktemp(f"choices{n}") for n in (1, 2))
    run(one, CHOOSING, 1), run(two, CHOOSING, 2)
    return one, two


@pytest.mark.parametrize("name", CHOOSING.split(","))
def test_entries_are_chosen_by_the_data_of_all_ranks_in_any_number(name: str, of_choices: tuple[Path, Path]) -> None:
    one, two = of_choices
    single = results(one, name, 1)[0]["tensors"]
    first, second = (result["tensors"] for result in results(two, name, 2))
    assert boring.largest_difference(first, second) == 0
    index = next(name for name in first if name.endswith("entries.index"))
    assert len(first[index]) > 0
    assert torch.equal(first[index], single[index])
    assert boring.largest_difference(first, single) < 1e-6
