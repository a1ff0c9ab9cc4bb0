"""The benchmarks of four bits run, small, and the figure that needs no quiet machine holds: the peak of quantising."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes comes with the extra [quant]")
pytest.importorskip("transformers", reason="the small Llama comes with the extra [hf]")


@pytest.mark.filterwarnings("ignore")
def test_qlora(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="the other side of the comparison")
    from benchmarks import qlora

    monkeypatch.setattr(qlora, "LAYERS", ((128, 16),))
    monkeypatch.setattr(qlora, "TIME", 8)
    rows = qlora.layers(2, torch.float32) + qlora.models(2, torch.float32, hidden=256)
    values = {row["what"]: row.get("median", row.get("value")) for row in rows}
    assert values["bits per parameter"] == pytest.approx(4.127, abs=1e-3)
    for what in ("128 x 16", "Llama 256", "Llama 256, checkpointed"):
        assert values[f"{what}: ours / frozen"] > 0
        assert values[f"{what}: outputs differ by"] < 1e-5
        assert values[f"{what}: kept, ours (MB)"] <= values[f"{what}: kept, peft (MB)"] + 0.1
    assert all(qlora.line(row) for row in rows)
    assert qlora.verdict(rows).startswith(("missed", "all"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says about a process")
@pytest.mark.parametrize("how", ["from the file", pytest.param("in place, bf16", marks=pytest.mark.slow)])
def test_the_peak_of_quantising(how: str, tmp_path: Path) -> None:
    from benchmarks import quantise_memory

    size = quantise_memory.write(tmp_path, 0.2, 1024)
    row = quantise_memory.measure(how, "auto", tmp_path, 0.2, 1024)
    assert row["final"] < 0.15 * size
    # freed weights below the allocator's mapping threshold stay with the process until their neighbours are free too
    assert row["above"] < (0.35 if "bf16" in how else 0.15) * size, quantise_memory.line(row)
