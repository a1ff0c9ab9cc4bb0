"""What a mask saves: bytes of gradients and AdamW's moments after a step, of a file, and the time of a step.

python -m benchmarks.selective_memory                 # BERT-base with random weights; about a minute on a CPU
python -m benchmarks.selective_memory --layers 24 --width 1024 --steps 1                # as large as BERT-large
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lightning_peft import FullFineTuning, SelectiveTuning, save_adapter
from lightning_peft.core.method import Method

METHODS: dict[str, Callable[[], Method]] = {
    "full": lambda: FullFineTuning(heads=None),
    "mask of 5 %": lambda: SelectiveTuning(score="random", budget=0.05, heads=None),
    "mask of 0.5 %": lambda: SelectiveTuning(score="random", budget=0.005, heads=None),
}


def measure(make: Callable[[], Method], layers: int = 12, width: int = 768, steps: int = 4) -> dict[str, float]:
    """MB (10^6 bytes) and seconds of one method."""
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=max(width // 64, 1),
    )
    model = BertModel(config).train()
    make().apply(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    x, times = torch.randint(1000, 9000, (4, 64)), []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        model(x).last_hidden_state.square().mean().backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    moments = (t for held in optimizer.state.values() for t in held.values() if isinstance(t, Tensor) and t.dim())
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder) / "a")
        file = sum(path.stat().st_size for path in (Path(folder) / "a").iterdir())
    found = {"gradients": gradients(model), "moments": sum(t.nbytes for t in moments), "file": file}
    return {name: size / 1e6 for name, size in found.items()} | {"seconds": min(times)}


def gradients(model: nn.Module) -> int:
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in {"layers": 12, "width": 768, "steps": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    size = vars(parser.parse_args())
    print(f"{'':14}{'gradients MB':>14}{'moments MB':>14}{'file MB':>10}{'s a step':>10}")
    for name, make in METHODS.items():
        row = measure(make, **size)
        cells = (
            f"{row['gradients']:14.2f}",
            f"{row['moments']:14.2f}",
            f"{row['file']:10.2f}",
            f"{row['seconds']:10.3f}",
        )
        print(f"{name:14}" + "".join(cells))
