"""SAID and DID: Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning.
Aghajanyan, Gupta, Zettlemoyer, ACL 2021. https://arxiv.org/abs/2012.13255
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core import projection, state
from lightning_peft.core.adapter import Adapter, NotMergeableError, Takeover, inside
from lightning_peft.core.basis import Basis
from lightning_peft.core.fields import positive
from lightning_peft.core.init import Draw
from lightning_peft.core.method import head_modules
from lightning_peft.core.quantised import is_quantised
from lightning_peft.core.sites import Site, Sites, TargetError


def hadamard(x: Tensor) -> Tensor:
    """H x, x (2^k,): the Walsh-Hadamard transform without a factor, so that H H x = n x."""
    n, size = x.numel(), 1
    while size < n:
        low, high = x.view(-1, 2, size).unbind(1)
        x = torch.stack([low + high, low - high], 1)
        size *= 2
    return x.reshape(n)


class Fastfood(Basis):
    """P v = (H G Pi H B v)[:D] / (|G| sqrt(D)): B signs, Pi a permutation, G normal, all from the seed and the index.

    v is filled up with zeros to n, the power of two from D on; where it is longer than n its first n numbers are used.
    """

    signs: Tensor
    order: Tensor
    gauss: Tensor

    def __init__(self, seed: int, index: int, shape: torch.Size) -> None:
        digest = hashlib.sha256(f"{seed}/{index}/{tuple(shape)}".encode()).digest()
        self.shape, self.count = shape, shape.numel()
        n = 1 << max(self.count - 1, 0).bit_length()
        super().__init__(int.from_bytes(digest[:4], "little"), gauss=((n,), standard_normal))
        self.register_buffer("signs", torch.empty(n, dtype=torch.int8), persistent=False)
        self.register_buffer("order", torch.empty(n, dtype=torch.int32), persistent=False)

    @torch.no_grad()
    def fill(self) -> None:
        if self.filled or self.mark.is_meta:
            return
        draw, n = Draw(self.seed, "order"), len(self.order)
        self.order.copy_(draw.integers(n, n))
        self.signs.copy_(torch.randint(0, 2, (n,), generator=draw.generator) * 2 - 1)
        super().fill()

    def forward(self, v: Tensor) -> Tensor:  # (d,) -> the tensor's shape
        exact = torch.promote_types(v.dtype, torch.float32)
        n, gauss = len(self.order), self.gauss.to(exact)
        z = F.pad(v[:n].to(exact), (0, max(n - len(v), 0)))
        z = hadamard(z * self.signs).index_select(0, self.order)
        z = hadamard(z * gauss)[: self.count]
        return (z / (gauss.norm() * math.sqrt(self.count))).view(self.shape)


def standard_normal(draw: Draw, tensor: Tensor) -> None:
    draw.normal(tensor, std=1.0)


class Subspace(nn.Module):
    """What all sites share: v (d - m,), and one gain a tensor (m,) or none."""

    def __init__(self, dimension: int, gains: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.empty(dimension - gains))
        self.gains = nn.Parameter(torch.empty(gains)) if gains else None

    def change(self, fastfood: Fastfood, index: int) -> Tensor:
        change = fastfood(self.v)
        return change if self.gains is None else self.gains[index] * change


class Moved(Adapter):
    """theta = theta_0 + lambda P v for every parameter of one module, while the module runs."""

    additive = True
    folds_norms = True

    def __init__(self, space: Subspace, tensors: dict[str, tuple[int, Fastfood]]) -> None:
        super().__init__()
        self.space = space
        self.names = {name: index for name, (index, _) in tensors.items()}
        self.projections = nn.ModuleList(fastfood for _, fastfood in tensors.values())

    def reset(self, draw: Draw) -> None:
        draw.zeros(self.space.v)
        if self.space.gains is not None:
            draw.ones(self.space.gains)
        for fastfood in self.projections:
            fastfood.fill()  # type: ignore[operator]

    def changes(self) -> dict[str, Tensor]:
        pairs = zip(self.names.items(), self.projections, strict=True)
        return {name: self.space.change(fastfood, index) for (name, index), fastfood in pairs}  # type: ignore[arg-type]

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        changes = self.changes()
        if is_quantised(self.place):
            return beside(base, args[0], changes, flipped(self.place))
        plain = self.plain(base)
        if plain is base:
            with self.moved(changes):
                return base(*args, **kwargs)
        y = base(*args, **kwargs)  # others scale or turn what is inside of them: the subspace is added after that
        with self.moved(changes):
            moved = plain(*args, **kwargs)
        return y + (moved - plain(*args, **kwargs))

    def plain(self, base: Callable[..., Any]) -> Callable[..., Any]:
        """The module without adapters, if those in `base` do more than add to it."""
        if set(self.names) - {"weight", "bias"} or all(adapter.additive for adapter in inside(self)):
            return base
        while isinstance(base, partial) and isinstance(base.func, Adapter):
            base = base.args[0]
        return base.base() if isinstance(base, Takeover) else base

    @contextmanager
    def moved(self, changes: dict[str, Tensor]) -> Iterator[None]:
        before: list[tuple[nn.Module, str, Any]] = []
        try:
            for name, change in changes.items():
                owner, leaf = self.owner(name)
                theta = getattr(owner, leaf)
                before.append((owner, leaf, vars(owner).get(leaf)))
                vars(owner)[leaf] = theta + change.to(theta.dtype)  # in front of the parameter of that name
            yield
        finally:
            for owner, leaf, old in reversed(before):
                if old is None:
                    del vars(owner)[leaf]
                else:
                    vars(owner)[leaf] = old

    def owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return (self.place.get_submodule(path) if path else self.place), leaf

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if others := set(self.names) - {"weight", "bias"}:
            raise NotMergeableError(
                f"The subspace moves {', '.join(sorted(others))} of a {type(self.place).__name__}, which merging does "
                "not reach. Leave it attached, or exclude that module before training."
            )
        changes = {name: change.to(weight) for name, change in self.changes().items()}
        if "bias" in changes and bias is not None:
            bias = bias + changes["bias"]
        if "weight" not in changes:
            return weight, bias
        change = changes["weight"].T if flipped(self.place) else changes["weight"]
        return weight + change.reshape(weight.shape), bias


def flipped(place: nn.Module) -> bool:
    """Whether the weight is kept as (d_in, d_out), as transformers' Conv1D and embeddings do."""
    weight = place.weight
    return isinstance(weight, Tensor) and projection.views(place)[0].stride() != weight.stride()


def beside(base: Callable[..., Any], x: Tensor, changes: dict[str, Tensor], turned: bool) -> Tensor:
    """Of a weight in codes: y = W_0 x + b_0 + (lambda P v) x"""
    y = base(x)
    change = changes["weight"].T if turned else changes["weight"]
    bias = changes.get("bias")
    return y + F.linear(x.to(y.dtype), change.to(y.dtype), None if bias is None else bias.to(y.dtype))


class SAID(PEFT, name="said", family="reparametrisation", paper="2012.13255", mergeable=True):
    """theta_i = theta_i0 + lambda_i P_i v, v shared by all tensors

    v (dimension - m,) starts at zero and lambda (m,), one for each of the m tensors, at one: the base at step 0.
    `dimension` parameters in all. P_i is a Fastfood transform drawn from the seed, the tensor's index among the chosen
    ones and its shape; it is kept in no file, which holds its first numbers for comparison, and takes 9 bytes for each
    number of the tensor, up to the next power of two, in memory. A tensor with fewer numbers than v sees the first of
    them, as in the released code.

    targets: modules whose own parameters all move; "*" for every one, without the heads that train by themselves. A
    tied weight moves as one.
    """

    targets: str | list[str] | None = "*"
    dimension: int = 20000

    def check(self) -> None:
        positive(self, "dimension")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        chosen = list(whole_modules(sites, head_modules(sites.model, self)))
        parameters = {id(p): p for _, named in chosen for p in named.values()}
        gains = len(parameters) if isinstance(self, SAID) and not isinstance(self, DID) else 0
        if self.dimension <= gains:
            raise TargetError(
                f"{type(self).__name__}(dimension={self.dimension}) leaves nothing beside a number for each of {gains} "
                "tensors. Raise it, or choose fewer modules."
            )
        space = Subspace(self.dimension, gains)
        numbers = {key: index for index, key in enumerate(parameters)}
        fastfoods = {key: Fastfood(self.seed, numbers[key], p.shape) for key, p in parameters.items()}
        for site, named in chosen:
            yield site, Moved(space, {name: (numbers[id(p)], fastfoods[id(p)]) for name, p in named.items()})


class DID(SAID, name="did", family="reparametrisation", paper="2012.13255", mergeable=True):
    """theta_i = theta_i0 + P_i v, v shared by all tensors

    v (dimension,) starts at zero: the base at step 0. `dimension` parameters in all; P_i as in SAID.
    """


def whole_modules(sites: Sites, heads: dict[str, nn.Module]) -> Iterator[tuple[Site, dict[str, nn.Parameter]]]:
    """Each module once, with its parameters; nn.MultiheadAttention with those of its output projection."""
    seen = {id(m) for head in heads.values() for m in head.modules()}
    attentions = [m for m in sites.model.modules() if isinstance(m, nn.MultiheadAttention)]
    seen |= {id(m.out_proj) for m in attentions}
    for site in sites:
        module = site.module
        if site.part is not None or site.columns is not None or id(module) in seen:
            continue
        seen.add(id(module))
        inside = isinstance(module, nn.MultiheadAttention)
        named = {n: p for n, p in module.named_parameters(recurse=inside) if ".adapters." not in f".{n}"}
        coded = [name for name in named if state.is_codes(module, name)]
        for name in coded:  # known by its shape
            whole = state.asked_about(module, name, named.pop(name))
            named = {"weight": whole, **named}
        if named:
            yield site, named
