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


CHANGING = "lt_sft,diff_pruning,diff_pruning+resumed,selective,selective+resumed,fish,far,surgical"


@pytest.fixture(scope="module")
def of_changing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("changing")
    run(directory / "two", CHANGING, 2)
    run(directory / "one", CHANGING, 1)
    return directory


@pytest.mark.parametrize("name", CHANGING.split(","))
def test_what_changes_its_size_in_a_run_ends_where_one_process_does(name: str, of_changing: Path) -> None:
    first, second = (each["tensors"] for each in results(of_changing / "two", name, 2))
    (single,) = (each["tensors"] for each in results(of_changing / "one", name, 1))
    assert boring.largest_difference(first, second) == 0
    if name != "surgical":  # whose rates are of the gradients of single batches, which are smaller here
        assert boring.largest_difference(first, single) < 1e-6
    if index := [t for n, t in first.items() if n.endswith("entries.index")]:
        v = next(t for n, t in first.items() if n.endswith("entries.v"))
        assert 0 < len(index[0]) == len(v) < 2000  # of 20,000 and more
        assert v.any()
    else:
        base = boring.Boring().state_dict()
        assert any(not torch.equal(t, base[n]) for n, t in first.items() if "classifier" not in n)
