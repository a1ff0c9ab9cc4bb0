"""Inside attention: a place where adapters see query, key, value and mask, whatever library the layer comes from.

An adapter at an `attend` place is `forward(base, query, key, value, mask, **options)` with query (batch, heads, time,
head_dim), key and value (batch, kv_heads, source, head_dim), mask None, boolean (True = visible) or additive,
broadcast to (batch, heads, time, source); it returns what `base` returns: (output (batch, time, heads, head_dim),
weights or None).
"""

from __future__ import annotations

import copy
import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapter import Host, Takeover, through

IMPLEMENTATION = "lightning_peft"  # the name under which transformers finds the routed attention function


class UnsupportedSiteError(TypeError):
    """A place that exists in the model, but at which this kind of adapter cannot act."""


class Attend(Host):
    """The attention product of one layer."""

    def __init__(self, implementation: str | None = None) -> None:
        super().__init__()
        self.implementation = implementation  # transformers: the attention function that the layer used before
        self.config: Any = None


# ------------------------------------------------------------------ transformers: an attention function of our own
def _interface(module: nn.Module) -> Any:
    return getattr(sys.modules.get(type(module).__module__), "ALL_ATTENTION_FUNCTIONS", None)


def _eager(module: nn.Module) -> Callable[..., Any]:
    for cls in type(module).__mro__:
        if function := getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None):
            return function
    raise UnsupportedSiteError(f"{type(module).__name__} has no eager attention function; load the model with 'sdpa'.")


def _original(module: nn.Module, implementation: str) -> Callable[..., Any]:
    return _eager(module) if implementation == "eager" else _interface(module)[implementation]


def routed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in place of the layer's attention function: the same function, through the adapters."""
    host: Attend = module.attend  # type: ignore[assignment]
    base = functools.partial(_original(module, host.implementation or "eager"), module)
    if options.get("is_causal") is None:
        options["is_causal"] = getattr(module, "is_causal", True)
    return through(host, base, query, key, value, attention_mask, **options)


def _open_transformers(module: nn.Module) -> Attend:
    config: Any = module.config
    implementation = config._attn_implementation
    if implementation not in ("eager", "sdpa", None):
        raise UnsupportedSiteError(
            f"attn_implementation={implementation!r} hides its mask, so keys and values cannot be added there. "
            "Known to work: 'sdpa', 'eager'. Call model.set_attn_implementation('sdpa') first."
        )
    type(_interface(module)).register(IMPLEMENTATION, routed_attention)
    host = Attend(implementation or "eager")
    host.config = config
    routed = copy.copy(config)
    vars(routed)["_attn_implementation_internal"] = IMPLEMENTATION  # the setter would write through to sub-configs
    module.config = routed
    return host


# ------------------------------------------------------------------ torch.nn and timm: a forward written out
def scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    weights: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T / sqrt(head_dim) + mask) v, transposed to (batch, time, heads, head_dim)."""
    if not weights:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout).transpose(1, 2), None
    scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)
    probabilities = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
    return (probabilities @ value).transpose(1, 2), probabilities


class MultiheadForward(Takeover):
    """`nn.MultiheadAttention.forward` written out, with places q, k, v, attend, o; the fused kernel hides them all."""

    def rewritten(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        module, batched = self.module, query.dim() == 3
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint about attn_mask, and there is none: give the causal mask, too.")
        inputs = [self._batch_first(x, batched) for x in (query, key, value)]
        mask = merged_mask(inputs[0], key_padding_mask, attn_mask, module.num_heads)
        q, k, v = (
            self.through(name, functools.partial(F.linear, weight=w, bias=b), x).unflatten(-1, (module.num_heads, -1))
            for name, x, (w, b) in zip("qkv", inputs, (in_projection(module, n) for n in "qkv"), strict=True)
        )
        out, weights = self.through(
            "attend",
            scaled_dot_product,
            *(x.transpose(1, 2) for x in (q, k, v)),
            mask,
            dropout=module.dropout if module.training else 0.0,
            weights=need_weights,
            is_causal=False,  # the mask says it all
        )
        out = self.through("o", module.out_proj, out.flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return self._restore(out, batched), weights if batched or weights is None else weights[0]

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x[None]
        return x if self.module.batch_first else x.transpose(0, 1)

    def _restore(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x[0]
        return x if self.module.batch_first else x.transpose(0, 1)


def merged_mask(query: Tensor, padding: Tensor | None, mask: Tensor | None, heads: int) -> Tensor | None:
    """torch.nn's two masks (boolean True = hidden) as one additive mask, broadcast to (batch, heads, time, source)."""
    merged = None
    if mask is not None:
        mask = _additive(mask, query.dtype)
        merged = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, heads))
    if padding is not None:
        padding = _additive(padding if padding.dim() == 2 else padding[None], query.dtype)[:, None, None]
        merged = padding if merged is None else merged + padding
    return merged


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
    return mask.to(dtype)


def in_projection(module: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the projection q, k or v of an `nn.MultiheadAttention`, as views of its parameters."""
    index, width = "qkv".index(name), module.embed_dim
    rows = slice(index * width, (index + 1) * width)
    packed = module.in_proj_weight
    weight = getattr(module, f"{name}_proj_weight") if packed is None else packed[rows]
    return weight, None if module.in_proj_bias is None else module.in_proj_bias[rows]


class TimmForward(Takeover):
    """timm's `Attention.forward` (packed qkv, optional norms of q, k and output) written out, with the place attend."""

    CHILDREN = frozenset({"qkv", "proj", "q_norm", "k_norm", "norm", "attn_drop", "proj_drop"})

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Whether this is that layer and not a relative of it (windowed, with position bias, scaled otherwise)."""
        children = {name for name, child in module.named_children() if not isinstance(child, Host)}
        if not {"qkv", "proj"} <= children <= cls.CHILDREN or next(module.parameters(recurse=False), None) is not None:
            return False
        width = module.qkv.out_features // 3 // getattr(module, "num_heads", 1)
        return math.isclose(getattr(module, "scale", width**-0.5), width**-0.5)

    def rewritten(self, x: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:  # (batch, time, d)
        module = self.module
        q, k, v = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = _through_child(module, "q_norm", q), _through_child(module, "k_norm", k)
        drop = module._modules.get("attn_drop")
        dropout = drop.p if drop is not None and module.training else 0.0
        out, _weights = self.through("attend", scaled_dot_product, q, k, v, attn_mask, dropout=dropout, is_causal=False)
        out = module.proj(_through_child(module, "norm", out.flatten(2)))
        return _through_child(module, "proj_drop", out)


def _through_child(module: nn.Module, name: str, x: Tensor) -> Tensor:
    child = module._modules.get(name)
    return x if child is None else child(x)


# ------------------------------------------------------------------ opening and closing
def takeover_of(module: nn.Module) -> type[Takeover] | None:
    """The written-out forward that shows the attention product of this module; None where transformers shows it."""
    if isinstance(module, nn.MultiheadAttention):
        if module.bias_k is not None or module.add_zero_attn:
            raise UnsupportedSiteError(
                "nn.MultiheadAttention with add_bias_kv or add_zero_attn appends keys of its own; adapters inside "
                "it are "
                "not defined. Exclude this module with exclude=..."
            )
        return MultiheadForward
    if TimmForward.fits(module):
        return TimmForward
    if _interface(module) is not None and hasattr(module, "config"):
        return None
    raise UnsupportedSiteError(
        f"{type(module).__name__} computes attention in a way that cannot be opened. Known: transformers models "
        f"that use "
        "the attention interface (not BLOOM, DeBERTa, GPT-J, GPT-Neo), nn.MultiheadAttention, timm's Attention. "
        "Use another "
        "method there."
    )


def open_attend(module: nn.Module) -> Attend:
    if takeover_of(module) is None:
        return _open_transformers(module)
    return Attend()


def close_attend(module: nn.Module, host: Attend) -> None:
    if host.config is not None:
        module.config = host.config


# ------------------------------------------------------------------ masks
def widen_mask(
    mask: Tensor | None, extra: int, query: Tensor, key: Tensor, *, is_causal: bool, position_bias: Tensor | None = None
) -> Tensor | None:
    """The mask for `extra` always-visible keys in front of `key`.

    A causal mask that was left out is written out first.
    """
    time, source = query.shape[2], key.shape[2]
    if mask is None:
        if not is_causal or time == 1:
            return None
        mask = torch.ones(time, source, dtype=torch.bool, device=key.device).tril()[None, None]
    mask = mask[..., :source]
    return F.pad(mask, (extra, 0), value=True if mask.dtype == torch.bool else 0.0)
