"""Combinations of settings that often go wrong, and what to do instead; the bounds are this library's own.

for line in risks(LoRA(rank=256, alpha=512), lr=1e-3): print(line)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_peft.core.method import Method

RANK = 64
SCALE = 2.0
"""alpha / rank from which, with a rank of at least `RANK`, a rate above `RATE` is too much."""
RATE = 5e-4
SMALL = 0.5
"""alpha / rank below which a rank of more than `RANK` hardly learns."""
FULL_RATE = 1e-4
FEW = 1000
DROPOUT = 0.3


def risks(method: Method, lr: float | None = None, examples: int | None = None) -> list[str]:
    """What is risky about a method with these settings, at this learning rate, with so many examples; a line each"""
    parts = method.parts() or (method,)
    return [line for part in parts for line in (*of_scale(part, lr), *of_rate(part, lr), *of_data(part, examples))]


def scale_of(method: Method) -> tuple[int, float] | None:
    """(rank, alpha / rank, or alpha / sqrt(rank) with rslora); None where a method has no such scale."""
    rank, alpha = getattr(method, "rank", None), getattr(method, "alpha", None)
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1:
        return None
    return rank, alpha / (math.sqrt(rank) if getattr(method, "rslora", False) else rank)


def of_scale(method: Method, lr: float | None) -> Iterator[str]:
    """A high rank with a high alpha and learning rate; a high rank whose alpha stayed behind."""
    found = scale_of(method)
    if found is None or found[0] < RANK:
        return
    rank, scale = found
    if scale >= SCALE and lr is not None and lr >= RATE:
        yield (
            f"rank={rank} with a scale of {scale:g} (alpha={method.alpha:g}) and lr={lr:g}: "  # type: ignore[attr-defined]
            "steps grow with all three, and training may diverge. Take alpha=rank or less, or a third of the rate, or "
            "rank=16 first."
        )
    elif scale < SMALL and rank > RANK and not getattr(method, "rslora", False):
        yield (
            f"rank={rank} with a scale alpha / rank of {scale:g}: gradients shrink with the rank, so that it may be no "
            "better than a low one (rsLoRA, 2312.03732). Raise alpha, or use rslora=true where the method has it."
        )


def of_rate(method: Method, lr: float | None) -> Iterator[str]:
    """Rates of adapters for weights of the base, and dropout where the start is in the factors."""
    if lr is not None and method.info.storage == "model" and lr > FULL_RATE:
        yield (
            f"{method.info.name} trains every weight at lr={lr:g}, a rate for adapters: the base is soon forgotten. "
            "BERT's were 2e-5 to 5e-5 (1810.04805, appendix A.3)."
        )
    dropout = getattr(method, "dropout", 0.0) or 0.0
    if method.info.name == "pissa" and dropout > 0:
        yield f"pissa with dropout={dropout:g} drops parts of the base's own principal components; the paper has 0."
    elif dropout > DROPOUT:
        yield f"dropout={dropout:g} on the input of every adapter: above {DROPOUT:g} little is left to learn from."


def of_data(method: Method, examples: int | None) -> Iterator[str]:
    """Many parameters for few examples."""
    if examples is None or examples >= FEW:
        return
    rank = getattr(method, "rank", 0)
    if method.info.storage == "model":
        yield f"{method.info.name} with {examples} examples: every weight can fit them by heart. Watch the validation."
    elif isinstance(rank, int) and rank >= RANK:
        yield f"rank={rank} for {examples} examples: begin with 8, and raise it while the validation gains."
