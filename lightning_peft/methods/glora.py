"""GLoRA: One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning. Chavan et al., 2023.
https://arxiv.org/abs/2306.07967
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.callback import PEFT
from lightning_peft.core import projection, state
from lightning_peft.core.adapter import Adapter, NotMergeableError
from lightning_peft.core.fields import FieldError, positive
from lightning_peft.core.init import Draw
from lightning_peft.core.quantised import is_quantised
from lightning_peft.core.sites import Site, Sites, TargetError
from lightning_peft.core.targets import per_site, projection_widths
from lightning_peft.methods.bitfit import has_bias

Matrix = Literal["lora", "vector", "constant", "none"]
Choice = tuple[str, ...]  # of A, B, C, D, E
KNOWN: dict[str, tuple[str, ...]] = {
    "a": ("lora", "vector", "constant", "none"),
    "b": ("lora", "vector", "constant", "none"),
    "c": ("lora", "vector", "none"),
    "d": ("vector", "constant", "none"),
    "e": ("vector", "constant", "none"),
}
WHOLE: Choice = ("lora", "lora", "lora", "vector", "vector")  # what a supernet keeps; the rest are parts of it


class Weighed(torch.autograd.Function):
    """(W * U_a V_a + U_b V_b) x + W c + t, rows x (n, d_in): the first and second part, c and t each may be None.

    The product with W has no smaller form; it is made again in the backward pass, not kept. As there is a matrix of
    its size anyway, all the rest goes into it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *parts: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, *parts)
        weight, shift, c = weight.to(x.dtype), parts[5], parts[4]
        if c is not None:
            shift = weight @ c if shift is None else torch.addmv(shift, weight, c)
        change = changed(weight, parts)
        return shift.expand(len(x), -1).clone() if change is None else F.linear(x, change, shift)  # type: ignore[union-attr]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, *parts = ctx.saved_tensors
        weight, (u_a, v_a, u_b, v_b, c, shift) = weight.to(x.dtype), parts
        change = changed(weight, parts) if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = [None if change is None else gradient @ change, None]
        dense = gradient.T @ x if u_a is not None or u_b is not None else None
        for u, v, outer in ((u_a, v_a, None if u_a is None or dense is None else weight * dense), (u_b, v_b, dense)):
            found += [None, None] if u is None or outer is None else [outer @ v.T, u.T @ outer]
        total = gradient.sum(0)
        return *found, None if c is None else weight.T @ total, None if shift is None else total


def changed(weight: Tensor, parts: Sequence[Tensor | None]) -> Tensor | None:
    """W * U_a V_a + U_b V_b (d_out, d_in)"""
    u_a, v_a, u_b, v_b = parts[:4]
    if u_a is None or v_a is None:
        return None if u_b is None or v_b is None else u_b @ v_b
    change = (u_a @ v_a).mul_(weight)
    return change if u_b is None or v_b is None else change.addmm_(u_b, v_b)


class Generalized(Adapter):
    """y = (W + W * A + B) x + b + W C + D * b + E, each of A to E as `words` say."""

    reads_weight = True

    def __init__(self, widths: tuple[int, int], rank: int, words: Choice, biased: bool, supernet: bool) -> None:
        super().__init__()
        (self.d_in, self.d_out), self.rank = widths, rank
        self.words, self.biased, self.supernet = words, biased, supernet
        self.sampled: Choice | None = None
        for part, word in zip(KNOWN, WHOLE if supernet else words, strict=True):
            if part != "d" or biased:
                self.make(part, word)

    def make(self, part: str, word: str) -> None:
        high, wide = (self.d_in, 1) if part == "c" else (self.d_out, self.d_in)
        if word == "lora":
            self.register_parameter(f"{part}_down", nn.Parameter(torch.empty(self.rank, wide)))
            self.register_parameter(f"{part}_up", nn.Parameter(torch.empty(high, self.rank)))
        elif word != "none":
            self.register_parameter(part, nn.Parameter(torch.empty(high if word == "vector" else 1)))

    def reset(self, draw: Draw) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("_down"):
                draw.kaiming_uniform(parameter)
            else:
                draw.zeros(parameter)

    def choice(self) -> Choice:
        return self.possible(self.sampled if self.training and self.sampled is not None else self.words)

    def possible(self, words: Choice) -> Choice:
        """Without D where there is no bias."""
        return words if self.biased else (*words[:3], "none", words[4])

    def tensors(self, part: str, word: str) -> tuple[Tensor, ...]:
        """(V, U) for "lora", else (vector,) or (constant,): in a supernet the first column, or its first entry."""
        if word == "none":
            return ()
        if word == "lora":
            return getattr(self, f"{part}_down"), getattr(self, f"{part}_up")
        whole = getattr(self, f"{part}_up")[:, 0] if self.supernet and part in "abc" else getattr(self, part)
        return (whole if word == "vector" else whole[:1],)

    def part(self, name: str, like: Tensor) -> tuple[Tensor, ...]:
        word = dict(zip(KNOWN, self.choice(), strict=True))[name]
        return tuple(tensor.to(like) for tensor in self.tensors(name, word))

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = base(x)
        z = x.to(y.dtype)
        b0 = projection.base_bias(self.place) if self.biased else None
        b0 = None if b0 is None else b0.detach().reshape(-1).to(y.dtype)
        a, b, shift = self.part("a", y), self.part("b", y), self.shift(b0, y)
        out = y
        if len(a) == 1:
            out = out + a[0] * (y if b0 is None else y - b0)
        if len(b) == 1:
            out = out + b[0] * z.sum(-1, keepdim=True)
        elif b and len(a) < 2:
            out = out + F.linear(F.linear(z, b[0]), b[1])
        if len(a) == 2 or self.part("c", y):
            return self.weighed(z.reshape(-1, self.d_in), shift).add_(out.reshape(-1, self.d_out)).view(y.shape)
        return out if shift is None else out + shift

    def weighed(self, rows: Tensor, shift: Tensor | None) -> Tensor:
        """What needs the weight, (n, d_out); made from codes, the weight is made again for backward."""
        if torch.is_grad_enabled() and is_quantised(projection.owner_of(self.place)):
            return checkpoint(self.product, rows, shift, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
        return self.product(rows, shift)

    def product(self, rows: Tensor, shift: Tensor | None) -> Tensor:
        a, b = self.part("a", rows), self.part("b", rows)
        u_a, v_a = (a[1], a[0]) if len(a) == 2 else (None, None)
        u_b, v_b = (b[1], b[0]) if len(a) == len(b) == 2 else (None, None)
        weight = projection.base_weight(self.place)
        return Weighed.apply(rows, weight, u_a, v_a, u_b, v_b, self.prompt(rows), shift)  # type: ignore[no-any-return]

    def prompt(self, like: Tensor) -> Tensor | None:
        """C (d_in,)"""
        match self.part("c", like):
            case (v, u):
                return (u @ v)[:, 0]
            case (c,):
                return c
        return None

    def shift(self, b0: Tensor | None, like: Tensor) -> Tensor | None:
        """D * b + E (d_out,), or None where there is neither."""
        terms = list(self.part("e", like))
        if b0 is not None:
            terms += [d * b0 for d in self.part("d", like)]
        return sum(terms[1:], terms[0]).expand(self.d_out) if terms else None

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        sampled, self.sampled = self.sampled, None  # what is merged is the choice, not the last draw of training
        try:
            shift, c = self.shift(bias, weight), self.prompt(weight)
            parts = self.part("a", weight), self.part("b", weight)
        finally:
            self.sampled = sampled
        if bias is None and not (shift is None and c is None):
            raise NotMergeableError(
                "GLoRA's C and E are a bias, and this projection has no place for one. Leave them attached, or train "
                "GLoRA(c='none', e='none')."
            )
        new = weight
        for found, times in zip(parts, (weight, torch.ones_like(weight)), strict=True):
            if found:
                new = new + times * (found[1] @ found[0] if len(found) == 2 else found[0][:, None])
        for more in (shift, None if c is None else weight @ c):
            bias = bias if more is None else bias + more  # type: ignore[operator]
        return new, bias

    def size(self, words: Choice) -> int:
        """Trained numbers of this choice."""
        pairs = zip(KNOWN, self.possible(words), strict=True)
        return sum(tensor.numel() for part, word in pairs for tensor in self.tensors(part, word))

    def collapsed(self) -> dict[str, Tensor]:
        """Of a supernet that was searched, the chosen parts alone."""
        if not self.supernet or self.words == WHOLE:
            return super().collapsed()
        kept: dict[str, Tensor] = {}
        for part, word in zip(KNOWN, self.possible(self.words), strict=True):
            found = [tensor.detach() for tensor in self.tensors(part, word)]
            names = [f"{part}_down", f"{part}_up"] if len(found) == 2 else [part]
            kept |= {name: tensor.contiguous() for name, tensor in zip(names, found, strict=False)}
        return kept


class GLoRA(PEFT, name="glora", family="reparametrisation", paper="2306.07967", mergeable=True):
    """y = (W + W * A + B) x + b + W C + D * b + E

    A and B (d_out, d_in) are "lora" (U V, rank r), "vector" (d_out, the same for every input), "constant" or "none"; C
    (d_in) "lora", "vector" or "none"; D and E (d_out) "vector", "constant" or "none". V starts Kaiming-uniform, all
    else at zero: the base at step 0. r (d_in + d_out), d_out or 1 for A and B each, r (d_in + 1) or d_in for C, d_out
    or 1 for D and E each. Merging is exact.

    W and b are those of the projection at that moment. Without a bias there is no D, and C and E cannot be merged.
    choices: pattern or role -> the five words, as in "lora vector none constant none", for the sites it matches.
    supernet: keeps "lora lora lora vector vector" everywhere, of which the others are parts (a vector is the first
    column of U, a constant its first entry), and takes a random choice at each site and batch; then `search` finds one
    choice for each site, which is all that files hold. Under DDP this needs find_unused_parameters. chosen: the words
    of every site in their order; `search` writes it.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 4
    a: Matrix = "lora"
    b: Matrix = "lora"
    c: Literal["lora", "vector", "none"] = "lora"
    d: Literal["vector", "constant", "none"] = "constant"
    e: Literal["vector", "constant", "none"] = "constant"
    choices: dict[str, str] = dataclasses.field(default_factory=dict)
    supernet: bool = False
    chosen: list[str] = dataclasses.field(default_factory=list)

    def check(self) -> None:
        positive(self, "rank")
        for words in (*self.choices.values(), *self.chosen):
            read(words)
        if self.supernet and self.choices:
            raise FieldError("GLoRA(supernet=True) takes its choices at random; leave `choices` out.")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        default = " ".join(WHOLE) if self.supernet else " ".join((self.a, self.b, self.c, self.d, self.e))
        words = self.chosen or per_site(sites, self.choices, default)
        if len(words) != len(sites):
            raise TargetError(f"GLoRA(chosen=...) is for {len(words)} sites, and there are {len(sites)}. Search again.")
        for site, word in zip(sites, words, strict=True):
            widths = projection_widths(site, "GLoRA")
            yield site, Generalized(widths, self.rank, read(word), has_bias(site), self.supernet)

    def portable(self) -> PEFT:
        return dataclasses.replace(self, supernet=False) if self.supernet and self.chosen else self

    def sample(self, model: nn.Module, index: int) -> None:
        """Another choice at each site, a function of (seed, site, index) alone: equal on all ranks and on resuming."""
        for placement in state.get_applied(model, self.label or self.info.name).placements:
            source = random.Random(f"{self.seed}/{placement.site}/{placement.role}/{index}")
            placement.adapter.sampled = drawn(source)  # type: ignore[assignment]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.supernet and not self.chosen:
            self.sample(pl_module, trainer.fit_loop.total_batch_idx)


def read(words: str) -> Choice:
    choice = tuple(words.split())
    if len(choice) != len(KNOWN) or any(w not in known for w, known in zip(choice, KNOWN.values(), strict=True)):
        raise FieldError(
            f"GLoRA: {words!r} is no choice. Expected five words, of A and B each lora, vector, constant or none, of C "
            "lora, vector or none, of D and E each vector, constant or none."
        )
    return choice


def drawn(source: random.Random) -> Choice:
    return tuple(source.choice(known) for known in KNOWN.values())


def search(
    model: nn.Module,
    method: GLoRA,
    score: Callable[[nn.Module], float],
    *,
    population: int = 50,
    generations: int = 20,
    top: int = 10,
    crossover: int = 25,
    mutation: int = 25,
    probability: float = 0.2,
    limit: int | None = None,
    seed: int = 0,
) -> float:
    """The choice of parts with the highest `score(model)` that an evolution finds, set on the model -> its score.

    A population of random choices; then in each generation children of two of the `top` (each site from one of them)
    and mutants of one (each site drawn again with `probability`), of at most `limit` trained numbers.
    """
    adapters: list[Any] = [p.adapter for p in state.get_applied(model, method.label or method.info.name).placements]
    source = random.Random(seed)
    seen: dict[Genes, float] = {}
    best: list[Genes] = []
    children = (lambda: child(source, source.choice(best), source.choice(best))), crossover
    mutants = (lambda: mutant(source, source.choice(best), probability)), mutation
    first = (lambda: fresh(source, len(adapters))), population
    for makers in [(first,), *[(children, mutants)] * generations]:
        for make, count in makers:
            for genes in candidates(make, count, adapters, limit, seen):
                adopt(adapters, genes)
                seen[genes] = score(model)
        best = sorted(seen, key=lambda genes: -seen[genes])[:top]
    adopt(adapters, best[0])
    method.chosen = [" ".join(words) for words in best[0]]
    return seen[best[0]]


Genes = tuple[Choice, ...]  # one of each site


def fresh(source: random.Random, sites: int) -> Genes:
    return tuple(drawn(source) for _ in range(sites))


def child(source: random.Random, one: Genes, other: Genes) -> Genes:
    return tuple(source.choice(pair) for pair in zip(one, other, strict=True))


def mutant(source: random.Random, genes: Genes, probability: float) -> Genes:
    return tuple(drawn(source) if source.random() < probability else words for words in genes)


def candidates(
    make: Callable[[], Genes], count: int, adapters: list[Any], limit: int | None, seen: dict[Genes, float]
) -> list[Genes]:
    """Up to `count` new ones within the limit; a hundred tries each."""
    found: dict[Genes, None] = {}
    for _ in range(100 * count):
        genes = make()
        small = limit is None or sum(a.size(words) for a, words in zip(adapters, genes, strict=True)) <= limit
        if small and genes not in seen:
            found[genes] = None
        if len(found) == count:
            break
    if not found and not seen:
        raise ValueError(f"search(limit={limit}): none of {100 * count} random choices is that small. Raise the limit.")
    return list(found)


def adopt(adapters: list[Any], genes: Genes) -> None:
    for adapter, words in zip(adapters, genes, strict=True):
        adapter.words, adapter.sampled = words, None
