"""Many prompts: which are alike, what to start from (SPoT, arXiv 2110.07904), and several of them in one batch.

ranked = retrieve("runs/target/early", ["runs/mnli", "runs/boolq", "runs/squad"], k=2)
PromptTuning(length=100, **blend(ranked))                                # or from the best: source=ranked[0][0]
logits = ensemble(model, ["runs/one", "runs/two", "runs/three"], **batch)  # (prompts, batch, ...)
labels = vote(logits)                                                    # or logits.mean(0).argmax(-1)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import state
from lightning_peft.core.embedding import Tokens
from lightning_peft.methods.prompt_start import read_prompt

Given = Tensor | str | Path  # a prompt (length, d), or the adapter directory that it is in
Kind = Literal["mean", "pairs"]


def prompt_in(given: Given) -> Tensor:
    """(length, d)"""
    return given if isinstance(given, Tensor) else read_prompt(given)


def similarity(a: Given, b: Given, kind: Kind = "mean") -> float:
    """The cosine of the means over the tokens, or with "pairs" the mean of the cosines of all pairs of tokens.

    SPoT takes the prompt of a task after few steps as the task's embedding. Source: section 3.2.
    """
    one, two = prompt_in(a).float(), prompt_in(b).float()
    if one.shape[1] != two.shape[1]:
        raise ValueError(f"Prompts of widths {one.shape[1]} and {two.shape[1]} are of different bases.")
    if kind == "mean":
        return F.cosine_similarity(one.mean(0), two.mean(0), 0).item()
    return (F.normalize(one, dim=1) @ F.normalize(two, dim=1).T).mean().item()


def retrieve(
    target: Given, sources: Sequence[str | Path], k: int | None = None, kind: Kind = "mean"
) -> list[tuple[str, float]]:
    """The k sources that are most alike, best first, with their similarities: train from each, keep the best."""
    ranked = sorted(((str(path), similarity(target, path, kind)) for path in sources), key=lambda pair: -pair[1])
    return ranked[:k]


def blend(ranked: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Fields of a prompt method that start from the mean of these prompts, weighed by their similarities."""
    if not ranked or min(weight for _, weight in ranked) <= 0:
        raise ValueError(f"Similarities above 0 are needed as weights; got {list(ranked)}. Leave the others out.")
    return {"init": "prompt", "source": [path for path, _ in ranked], "weights": [weight for _, weight in ranked]}


@contextlib.contextmanager
def instead(model: nn.Module, prompts: Sequence[Given], label: str | None = None) -> Iterator[None]:
    """Inside, a batch of n times B examples gets the first of n prompts for its first B examples, and so on."""
    places = [x.adapter for x in state.get_applied(model, label).placements if isinstance(x.adapter, Tokens)]
    rows = torch.stack([prompt_in(prompt) for prompt in prompts])
    if not places or any(tuple(rows.shape[1:]) != (p.length, p.prompt.width) for p in places):
        wanted = [(p.length, p.prompt.width) for p in places]
        raise ValueError(f"Prompts of {tuple(rows.shape[1:])} in place of those of {wanted or 'no prompt method'}.")
    try:
        for place in places:
            place.given = rows.to(next(place.parameters()).device)
        yield
    finally:
        for place in places:
            place.given = None


def ensemble(model: nn.Module, prompts: Sequence[Given], label: str | None = None, **batch: Any) -> Tensor:
    """Logits (n, batch, ...) of every example under each of n prompts, by one forward of n times the batch.

    label: the prompt tuning on the model whose place they take. Source: Lester et al. 2021, section 7.
    """
    n = len(prompts)
    wide = {k: v.repeat(n, *[1] * (v.dim() - 1)) if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}
    with instead(model, prompts, label):
        out = model(**wide)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits.unflatten(0, (n, -1))


def vote(logits: Tensor) -> Tensor:
    """(n, batch, classes) -> (batch,): the class that most prompts choose; of equals, the one of the higher mean."""
    classes = logits.shape[-1]
    votes = F.one_hot(logits.argmax(-1), classes).sum(0).double()
    return (votes + logits.double().log_softmax(-1).mean(0).softmax(-1) / 2).argmax(-1)
