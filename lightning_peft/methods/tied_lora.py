"""Tied-LoRA: Enhancing Parameter Efficiency of LoRA with Weight Tying. Renduchintala et al., NAACL 2024.
https://arxiv.org/abs/2311.09578
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import BothSides, LowRank
from lightning_peft.core.sites import Site, Sites
from lightning_peft.core.targets import Shape, projection_widths

PACKED = ("q", "k", "v")  # one projection in the paper: they share A and u


class Held(nn.Module):
    """A tensor that several adapters share; drawn once for all of them, saved once."""

    tensor: Tensor

    def __init__(self, name: str, shape: tuple[int, ...], law: Callable[[Draw, Tensor], None], trained: bool) -> None:
        super().__init__()
        self.name, self.law = name, law
        if trained:
            self.tensor = nn.Parameter(torch.empty(shape))
        else:
            self.register_buffer("tensor", torch.empty(shape))

    def fill(self, seed: int) -> None:
        """The same numbers whichever adapter asks."""
        self.law(Draw(seed, f"tied_lora/{self.name}"), self.tensor)


class Tied(LowRank):
    """y = base(x) + v * B (u * A drop(x)): A (rank, d_in), B (d_out, rank), u (rank,), v (d_out,)."""

    def __init__(self, shape: Shape, dropout: float, seed: int, parts: dict[str, Held]) -> None:
        super().__init__(shape, len(parts["u"].tensor), 1.0, dropout)
        self.seed = seed
        for name, part in parts.items():
            self.add_module(name, part)

    def make(self, shape: Shape, rank: int) -> None:
        """Everything is given."""

    def reset(self, draw: Draw) -> None:
        for part in self.parts:
            part.fill(self.seed)

    @property
    def parts(self) -> list[Held]:
        return [cast(Held, self._modules[name]) for name in ("a", "b", "u", "v")]

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b, u, v = (part.tensor for part in self.parts)
        return a, BothSides.apply(v, b, u)


class TiedLoRA(PEFT, name="tied_lora", family="reparametrisation", paper="2311.09578", mergeable=True):
    """y = W x + v * B (u * A x), A and B the same in all layers

    q, k and v of a layer are one projection, as in the paper: they share A (rank, d_in) and u (rank,), each has its own
    rows B (d_out, rank) and v (d_out,). Otherwise there is one pair A, B for the sites of one role and shape. A is
    Kaiming-uniform; B starts at zero and u, v at one: the base at step 0. A frozen B is random, and v starts at zero.
    rank (d_in + d_out) parameters in all, and rank + d_out a site.

    train_a, train_b, train_u, train_v: what trains; all is TL6, without u and v it is TL5. tied: False gives each site
    an A and a B of its own. What is frozen is saved with the adapter.
    """

    targets: str | list[str] | None = "q,k,v"
    rank: int = 8
    dropout: float = 0.0
    train_a: bool = True
    train_b: bool = True
    train_u: bool = True
    train_v: bool = True
    tied: bool = True

    def check(self) -> None:
        positive(self, "rank")
        probability(self, "dropout")
        if not self.train_b and not self.train_v:
            raise FieldError(
                "TiedLoRA(train_b=False, train_v=False): a frozen random B needs v at zero to begin as the base, and a "
                "v at zero has to train. Train one of the two."
            )

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        held: dict[str, Held] = {}
        for index, site in enumerate(sites):
            shape = Shape(*projection_widths(site, "Tied-LoRA"))
            parts = self.parts_at(site, index, shape)
            yield (
                site,
                Tied(shape, self.dropout, self.seed, {n: held.setdefault(p.name, p) for n, p in parts.items()}),
            )

    def parts_at(self, site: Site, index: int, shape: Shape) -> dict[str, Held]:
        """A, B, u, v for a site; those of one name are one."""
        role = site.role or ""
        family = "qkv" if role in PACKED else role
        block = site.block or site.name.rpartition(".")[0]  # where no blocks are known, what holds q, k and v
        layer = f"{index}" if role not in PACKED else f"{block}/{shape.d_in}"
        own = "" if self.tied else layer
        up = Draw.zeros if self.train_b else Draw.kaiming_uniform
        last = Draw.ones if self.train_b else Draw.zeros
        return {
            "a": Held(f"a/{own}/{family}/{shape.d_in}", (self.rank, shape.d_in), Draw.kaiming_uniform, self.train_a),
            "b": Held(f"b/{own}/{role}/{shape}", (shape.d_out, self.rank), up, self.train_b),
            "u": Held(f"u/{layer}/{family}", (self.rank,), Draw.ones, self.train_u),
            "v": Held(f"v/{index}", (shape.d_out,), last, self.train_v),
        }
