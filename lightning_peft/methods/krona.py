"""KronA: Parameter Efficient Tuning with Kronecker Adapter. Edalati et al., ENLSP 2023.
https://arxiv.org/abs/2212.10650
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError, not_negative
from lightning_peft.core.init import Draw
from lightning_peft.core.kronecker import Kronecker, channels, factorise
from lightning_peft.core.sites import Site, TargetError
from lightning_peft.core.targets import Shape, matrix_shape


class KroneckerPair(Kronecker):
    """y = base(x) + s (A kron B) x: A (o1, i1) and B (o2, i2) in full."""

    def __init__(self, shape: Shape, left: tuple[int, int], scale: float) -> None:
        super().__init__(shape, left, scale)
        self.a = nn.Parameter(torch.empty(self.o1, self.i1))
        self.b = nn.Parameter(torch.empty(self.o2, self.i2))

    def reset(self, draw: Draw) -> None:
        draw.kaiming_uniform(self.a)
        draw.zeros(self.b)

    def factors(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.a, (self.b,)


def left_shape(name: str, d_out: int, d_in: int, given: list[int] | None) -> tuple[int, int]:
    """(o1, i1): as given, or near the square roots, the smaller divisor of d_out and the larger of d_in."""
    if given is None:
        return factorise(d_out)[0], factorise(d_in)[1]
    o1, i1 = given
    if d_out % o1 or d_in % i1:
        raise TargetError(
            f"left={given!r} does not divide {name!r}, which has {d_out} outputs and {d_in} inputs. Give (o1, i1) with "
            "o1 a divisor of the first and i1 of the second, leave it out, or exclude the site."
        )
    return o1, i1


def check_left(method: PEFT, left: list[int] | None) -> None:
    if left is not None and (len(left) != 2 or min(left) < 1):
        raise FieldError(f"{type(method).__name__}(left={left!r}): expected two numbers above 0, the shape of A.")


class KronA(PEFT, name="krona", family="reparametrisation", paper="2212.10650", mergeable=True, batched=True):
    """y = W x + s (A kron B) x

    A (o1, i1) starts Kaiming-uniform, B (o2, i2) at zero, o1 o2 = d_out and i1 i2 = d_in: the base at step 0.
    o1 i1 + o2 i2 parameters a site, and a change of rank up to rank(A) rank(B). The product is never built:
    (A kron B) x = vec_row(A X B^T), X (i1, i2) the rows of x.

    left: (o1, i1); without it, divisors near the square roots, so that 768 -> 768 has A (24, 32) and B (32, 24).
    """

    targets: str | list[str] | None = "q,v"
    scale: float = 16.0
    left: list[int] | None = None

    def check(self) -> None:
        not_negative(self, "scale")
        check_left(self, self.left)

    def adapter(self, site: Site) -> Adapter:
        shape = matrix_shape(site, "KronA")
        return KroneckerPair(
            shape, left_shape(site.name, shape.d_out, channels(site, shape, "KronA"), self.left), self.scale
        )
