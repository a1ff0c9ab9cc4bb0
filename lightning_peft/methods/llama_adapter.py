"""LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention. Zhang et al., ICLR 2024.
https://arxiv.org/abs/2303.16199
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import positive
from lightning_peft.core.init import Draw
from lightning_peft.core.projection import project
from lightning_peft.core.sites import Site, Sites, TargetError
from lightning_peft.methods.prefix_tuning import heads

Gate = Literal["head", "layer"]


class ZeroInitAttention(Adapter):
    """Att(q, K, V) + tanh(g) Att(q, W_k P, W_v P): P (length, d), g one number a head or one in all."""

    def __init__(
        self, key: Site, value: Site, norm: Site | None, kv_heads: int, length: int, gates: int, tanh: bool
    ) -> None:
        super().__init__()
        self.key: Any
        self.value: Any
        self.norm: Any
        vars(self).update(key=key, value=value, norm=norm)  # not registered: they are the base's own
        self.kv_heads = kv_heads
        self.whole = norm is not None and norm.out_features == key.out_features  # all heads at once
        self.tanh = tanh
        self.prompt = nn.Parameter(torch.empty(length, key.in_features))
        self.gate = nn.Parameter(torch.empty(gates))

    def reset(self, draw: Draw) -> None:
        draw.normal(self.prompt, std=1.0)
        draw.zeros(self.gate)

    def forward(self, base: Callable[..., Any], query: Tensor, *args: Any, **options: Any) -> Any:
        out, weights = base(query, *args, **options)  # (batch, time, heads, head_dim)
        gate = (torch.tanh(self.gate) if self.tanh else self.gate).to(out.dtype)[:, None]
        return out + gate * self.seen(query, options.get("scaling")).transpose(1, 2).to(out.dtype), weights

    def seen(self, query: Tensor, scale: float | None) -> Tensor:  # (batch, heads, time, head_dim) -> the same
        """A softmax of its own over the prompt: no mask, no positions on its keys, nothing in the KV cache."""
        prompt = self.prompt.to(query.dtype)
        key, value = project(self.key, prompt), project(self.value, prompt)
        if self.whole:
            key = self.norm.module(key)
        key, value = (x.unflatten(-1, (self.kv_heads, -1)) for x in (key, value))
        if self.norm is not None and not self.whole:
            key = self.norm.module(key)
        repeats = query.shape[1] // self.kv_heads
        key, value = (
            x.to(query.dtype).transpose(0, 1).repeat_interleave(repeats, 0).expand(len(query), -1, -1, -1)
            for x in (key, value)
        )
        return F.scaled_dot_product_attention(query, key, value, scale=scale)


class LlamaAdapter(PEFT, name="llama_adapter", family="additive", paper="2303.16199", overhead="tokens"):
    """Att(q, K, V) + tanh(g) Att(q, W_k P, W_v P)

    Each attention layer gets a prompt P (length, d), N(0, 1), which goes through its frozen key and value projections,
    without the norm in front of them and without positions, into a second softmax that every query sees whole. g is
    one number a head and starts at 0: the base at step 0. K_p and V_p are computed in every forward and stay out of
    the KV cache. layers: "last:30" is the paper's choice for 32 layers; below the first such layer nothing is kept for
    the backward pass. L (length d + heads) parameters. Layers that normalise their keys normalise W_k P too (not in
    the paper).
    gate="layer", tanh=False: one gate a layer, as it is, which is peft's ADAPTION_PROMPT. Source: section 3.
    """

    targets: str | list[str] | None = "attend"
    length: int = 10
    gate: Gate = "head"
    tanh: bool = True

    def check(self) -> None:
        positive(self, "length")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        for site in sites:
            yield site, zero_init(sites, site, self.length, self.gate, self.tanh)


def zero_init(sites: Sites, site: Site, length: int, gate: Gate, tanh: bool) -> ZeroInitAttention:
    """The adapter at an `attend` site, with the key and value projections that the layer uses."""
    cross = "cross." if site.role == "cross.attend" else ""
    key, value = (sites.sibling(site, cross + role) for role in "kv")
    kv_heads, head_dim, _ = heads(site)
    if key is None or value is None or key.out_features != kv_heads * head_dim:
        raise TargetError(
            f"The prompt of {site.name!r} goes through its key and value projections, and those are not known as two "
            f"projections to {kv_heads * head_dim} features. Exclude it with exclude={site.name!r}, or name them with "
            "roles={'k': ..., 'v': ...}."
        )
    norms = (s for s in sites.known if s.role == "norm.qk" and s.name.startswith(f"{site.name}."))
    norm = next((s for s in norms if s.name.rpartition(".")[2].startswith("k")), None)
    return ZeroInitAttention(key, value, norm, kv_heads, length, site.facts.heads if gate == "head" else 1, tanh)  # type: ignore[arg-type]
