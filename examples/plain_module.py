"""A method on any nn.Module, without a Trainer: a network learns one function, adapters turn it into another.

    python examples/plain_module.py

Shows apply, the three sets, enable and disable, files, and merging into plain weights.
"""

from __future__ import annotations

import copy
import tempfile

import torch
from torch import Tensor, nn

from lightning_peft import LoRA, load_adapter, save_adapter
from lightning_peft.core import state


class Network(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 1) -> (batch, 1)
        return self.out(self.encoder(x))


def train(model: nn.Module, function: object, steps: int) -> float:
    """Least squares on random points; gives the last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        x = 3 * torch.rand(256, 1)
        loss = (model(x) - function(x)).pow(2).mean()  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main(steps: int = 600) -> dict[str, float]:
    torch.manual_seed(0)
    model = Network()
    results = {"sin x, all weights": train(model, torch.sin, steps)}
    base = copy.deepcopy(model)

    lora = LoRA(targets="encoder.2,out", rank=4, alpha=8.0)
    lora.apply(model)
    facts = state.describe(model)
    results["sin 2x, adapters only"] = train(model, lambda x: torch.sin(2 * x), steps)

    x = 3 * torch.rand(256, 1)
    with lora.enabled(model, False):
        results["change of the base"] = (model(x) - base(x)).abs().max().item()
    with tempfile.TemporaryDirectory() as folder:
        path = save_adapter(model, f"{folder}/sin2x")
        fresh = copy.deepcopy(base)
        load_adapter(fresh, path)
    results["file against memory"] = (fresh(x) - model(x)).abs().max().item()
    lora.unload(fresh)  # merged for good: a plain Network again
    results["merged against adapters"] = (fresh(x) - model(x)).abs().max().item()

    print(f"trains {facts['trainable']} of {facts['total']} parameters ({facts['percent']:.1f} %)")
    for name, value in results.items():
        print(f"{name:26} {value:.2e}")
    return results


if __name__ == "__main__":
    main()
