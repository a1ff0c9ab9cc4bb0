"""SAID and DID: Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning.
Aghajanyan, Gupta, Zettlemoyer, ACL 2021. https://arxiv.org/abs/2012.13255
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.basis import Basis
from lightning_peft.core.fields import positive
from lightning_peft.core.init import Draw
from lightning_peft.core.method import head_modules
from lightning_peft.core.moved import Moved, whole_modules
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


class Projected(Moved):
    """theta = theta_0 + lambda P v for every parameter of one module, while the module runs."""

    def __init__(self, space: Subspace, tensors: dict[str, tuple[int, Fastfood]]) -> None:
        super().__init__({name: index for name, (index, _) in tensors.items()})
        self.space = space
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
            yield site, Projected(space, {name: (numbers[id(p)], fastfoods[id(p)]) for name, p in named.items()})


class DID(SAID, name="did", family="reparametrisation", paper="2012.13255", mergeable=True):
    """theta_i = theta_i0 + P_i v, v shared by all tensors

    v (dimension,) starts at zero: the base at step 0. `dimension` parameters in all; P_i as in SAID.
    """
