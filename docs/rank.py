"""Draws docs/figures/rank.svg: the rank that each method's change of one weight can have, against what it trains.

    python docs/rank.py            # and prints the table

One weight of 256 x 256, every method that merges, each with the setting of SETTINGS that comes nearest to a budget of
4,096 parameters (where it has one); all that it trains moved by noise; the rank is that of the merged weight less the
weight in fp64, counting singular values above 1e-6 of the largest. The file is the same every time. A few seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_peft.methods  # noqa: F401  fills the registry
from lightning_peft import REGISTRY
from lightning_peft.core import state

PICTURE = Path(__file__).with_name("figures") / "rank.svg"
WIDTH, BUDGET = 256, 4096
SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 8},
    "boft": {"block_size": 8, "factors": 2},
    "c3a": {"block_size": 16},
    "delora": {"rank": 8},
    "dora": {"rank": 8},
    "dvora": {"rank": 256},
    "fourierft": {"count": 4096},
    "glora": {"rank": 4},
    "gralora": {"rank": 8, "blocks": 2},
    "hira": {"rank": 8},
    "hra": {"rank": 16},
    "ia3": {"targets": "proj", "inputs": "nothing?"},
    "krona": {"left": [32, 32]},
    "loha": {"rank": 4},
    "lokr": {"rank": 32, "factor": 4},
    "lora": {"rank": 8},
    "lora_fa": {"rank": 16},
    "miss": {"rank": 16},
    "mora": {"rank": 8},
    "multilora": {"rank": 2, "modules": 3},
    "nola": {"coefficients": 2048},
    "oft": {"block_size": 32},
    "olora": {"rank": 8},
    "pissa": {"rank": 8},
    "randlora": {"rank": 8},
    "road": {"variant": 4},
    "shira": {"rank": 8},
    "ssf": {},
    "tied_lora": {"rank": 8},
    "vb_lora": {"rank": 8, "vectors": 32, "length": 64},
    "vera": {"rank": 256},
    "waveft": {"count": 4096},
}
COLOURS = {True: "#1f7a4d", False: "#7b8794"}


class One(nn.Module):
    """One projection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(WIDTH, WIDTH)


def measured(name: str) -> tuple[int, int]:
    """Trained parameters, and the rank of the change."""
    net = One().double()
    before = net.proj.weight.detach().clone()
    fields = {"targets": "proj", "heads": None, **SETTINGS[name]}
    method = REGISTRY[name](**fields)
    method.apply(net)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in state.trainable(net).values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p.dtype))
    if state.get_applied(net).placements:
        method.merge(net)
    trained = sum(p.numel() for p in state.trainable(net).values())
    singular = torch.linalg.svdvals(net.proj.weight.detach() - before)
    return trained, int((singular > 1e-6 * singular[0]).sum())


def draw(points: dict[str, tuple[int, int]]) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "rank", "svg.fonttype": "none", "font.size": 9})
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(8, 0.19 * len(points) + 1.2))
    order = sorted(points, key=lambda name: (points[name][1], -points[name][0], name))
    titles = (f"trained parameters, of {WIDTH * WIDTH:,}", f"rank of the change, of {WIDTH}")
    for index, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        values = [points[name][index] for name in order]
        axes.hlines(order, 1, values, color="#e4e7eb", linewidth=3)
        axes.scatter(values, order, s=20, color=[COLOURS[points[name][1] == WIDTH] for name in order], zorder=3)
        axes.set(xscale="log", xlabel=title, xlim=(1, 2 * max(values)), ylim=(-1, len(order)))
    panels[0].axvline(BUDGET, color="#7b8794", linewidth=1, linestyle="--")
    figure.suptitle("What a change of one weight can be")
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    found = {name: measured(name) for name in SETTINGS if name in REGISTRY}
    print(f"{'method':<12}{'parameters':>12}{'rank':>6}")
    for name, (count, rank) in sorted(found.items(), key=lambda item: (-item[1][1], item[1][0])):
        print(f"{name:<12}{count:>12,}{rank:>6}")
    draw(found)
    print(PICTURE)
