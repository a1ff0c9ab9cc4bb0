"""DVoRA: DoRA over the factors of VeRA. Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024.
https://arxiv.org/abs/2402.09353
"""

from __future__ import annotations

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.basis import Basis
from lightning_peft.core.targets import Shape
from lightning_peft.methods.dora import Decomposed
from lightning_peft.methods.vera import Scaled, VeRA


class DecomposedScaled(Decomposed, Scaled):
    """y = m / |W + D| * (W + D) x + b, D = (b' B d) A as in VeRA."""


class DVoRA(VeRA, name="dvora", family="reparametrisation", paper="2402.09353", mergeable=True):
    """y = m / |W + D| * (W + D) x, D = (b * B) (d * A), A and B frozen, random, and the same at all sites

    The magnitude m (d_out,) and the norms of rows are those of DoRA, the rest is VeRA. b starts at zero: the base at
    step 0. rank + 2 d_out parameters a site. Source: the section on DoRA with other variants of LoRA.

    detach_norm: no gradient through the norm, section 4.3.
    """

    detach_norm: bool = True

    def adapter_of(self, shape: Shape, basis: Basis) -> Adapter:
        """As VeRA's, with a magnitude."""
        adapter = DecomposedScaled(shape, self.rank, self.dropout, self.d_initial, basis)
        adapter.detached = self.detach_norm
        return adapter
