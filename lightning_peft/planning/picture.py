"""A picture of plans: a stacked bar for each, by what lives at the peak. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.planning.report import Plan
from lightning_peft.planning.sizes import CARDS, UNITS, need, unit
from lightning_peft.planning.tracker import LABELS

COLOURS = ("#4c78a8", "#9ecae9", "#54a24b", "#bab0ac", "#e45756", "#f58518", "#b279a2", "#eeca3b")


def draw(plans: Mapping[str, Plan], picture: Path, title: str = "") -> Path:
    """One bar a plan, and the cards that hold them, -> a picture in the format of the file's ending"""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"No {picture.name}: it needs matplotlib. Run: pip install 'lightning_peft[demo]'") from error
    with rc_context({"svg.hashsalt": "lightning_peft", "svg.fonttype": "none"}):
        figure = Figure(figsize=(3.6 + 1.2 * len(plans), 4.2), layout="constrained")
        axes = figure.add_subplot()
        bars(axes, plans)
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="outside right center", frameon=False)
        figure.suptitle(title, fontsize="medium")
        figure.savefig(picture, dpi=120, metadata={"Date": None} if picture.suffix == ".svg" else None)
    return picture


def bars(axes: Any, plans: Mapping[str, Plan]) -> None:
    """The bars, their totals, and a line for the smallest card of each."""
    most = max(plan.total for plan in plans.values())
    decimal, _, form = unit(most)
    scale = UNITS[decimal]
    bottom = dict.fromkeys(plans, 0.0)
    for label, colour in zip(LABELS, COLOURS, strict=True):
        heights = [plan.peak.get(label, 0) / scale for plan in plans.values()]
        if any(height > most / scale / 500 for height in heights):
            axes.bar(list(plans), heights, 0.62, bottom=list(bottom.values()), color=colour, label=label)
        bottom = {name: bottom[name] + height for name, height in zip(plans, heights, strict=True)}
    for name, plan in plans.items():
        card = next((f"\n{card} GB card" for card in CARDS if need(plan.total) <= card * 10**9), "\nno common card")
        note = card if plan.device == "cuda" else ""
        axes.annotate(f"{plan.total / scale:{form}}{note}", (name, plan.total / scale), ha="center", va="bottom")
    axes.set(ylabel=f"{decimal} at the peak", ylim=(0, 1.18 * most / scale))
    axes.spines[["top", "right"]].set_visible(False)
