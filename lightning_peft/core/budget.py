"""Whom a budget keeps: importance by sensitivity, its averages, and a schedule over the steps of a run (2303.10512)."""

from __future__ import annotations

import torch
from torch import Tensor


def budget(step: int, first: int, last: int, steps: int, warmup: int, final: int) -> int:
    """first until warmup w; last + (first - last) (1 - (t - w) / (T - w - final))^3; last from T - final"""
    if step <= warmup:
        return first
    if step >= steps - final:
        return last
    return int((first - last) * (1 - (step - warmup) / (steps - final - warmup)) ** 3 + last)


@torch.no_grad()
def smooth(
    mean: list[Tensor], spread: list[Tensor], weights: list[Tensor], gradients: list[Tensor], beta1: float, beta2: float
) -> None:
    """I = |w dL/dw|; mean <- b1 mean + (1 - b1) I; spread <- b2 spread + (1 - b2) |I - mean|"""
    importance = torch._foreach_abs(torch._foreach_mul(weights, gradients))
    torch._foreach_lerp_(mean, importance, 1 - beta1)
    torch._foreach_sub_(importance, mean)
    torch._foreach_lerp_(spread, torch._foreach_abs(importance), 1 - beta2)


def score(p: Tensor, l: Tensor, q: Tensor) -> Tensor:
    """Of each triplet, from the scores of its entries: s(l_k) + mean_j s(Q_kj) + mean_j s(P_jk)"""
    return l + q.mean(1) + p.mean(0)


def largest(scores: list[Tensor], count: int) -> list[Tensor]:
    """Masks of the `count` largest among all of them together."""
    flat = torch.cat(scores)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(count).indices] = True
    return list(kept.split([len(s) for s in scores]))


def in_steps(length: float, steps: float) -> int:
    """A share of the run (below 1) or a number of steps -> steps"""
    return int(length * steps if length < 1 else length)
