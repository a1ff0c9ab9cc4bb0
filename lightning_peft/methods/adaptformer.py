"""AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition. Chen et al., NeurIPS 2022.
https://arxiv.org/abs/2205.13535
"""

from __future__ import annotations

from lightning_peft.methods.parallel import ParallelAdapter


class AdaptFormer(ParallelAdapter, name="adaptformer", family="additive", paper="2205.13535"):
    """f(LN(x)) + s (W_up relu(W_dn LN(x) + b_dn) + b_up), f the feed-forward layer

    The parallel adapter with the paper's settings: 64 wide, s = 0.1, Kaiming down and zero up, so the base at step 0.
    LN is the block's own norm, as in the paper's equations; the authors' code reads x itself: input="residual".
    L (2md + m + d) parameters. Source: section 3.2, equations 3 to 5.
    """

    scale: float | None = 0.1
