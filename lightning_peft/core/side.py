"""Side networks: a small network beside the frozen one, which reads its states and never sends a gradient into it.

The blocks of the base run without gradients and note what they return (`Tap`). The side network is made of the class
that the base is made of, from its configuration with all widths divided, or of torch's encoder layer, or of a plain
small block (`Plain`) where neither is there.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter, Route
from lightning_peft.core.sites import Site, Sites, TargetError

# keys of configurations: what is divided, and what counts layers
WIDTHS = (
    "hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "hidden_dim", "head_dim",
    "d_kv", "intermediate_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "rotary_dim",
)  # fmt: skip
DEPTHS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
)  # fmt: skip
# what a side network does without: skipped layers, and dropout of attention weights, (heads, time, time) of which
# backward would keep however narrow it is
ABSENT = (
    "layerdrop", "encoder_layerdrop", "decoder_layerdrop", "attention_probs_dropout_prob", "attention_dropout",
    "attn_pdrop",
)  # fmt: skip


def first_of(out: Any) -> Tensor:
    """The hidden states of what a block or a stack returns."""
    return out if isinstance(out, Tensor) else out["last_hidden_state"] if isinstance(out, Mapping) else out[0]


def with_first(out: Any, hidden: Tensor) -> Any:
    """The same with other hidden states."""
    if isinstance(out, Tensor):
        return hidden
    if isinstance(out, tuple):
        return (hidden, *out[1:])
    out["last_hidden_state"] = hidden
    return out


def given_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor of a call."""
    return args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))


class Tap(Adapter):
    """Runs a block without gradients and notes what goes in and what comes out, until it is taken."""

    apart = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what a forward noted that never reached its end: it has a graph, and cannot be copied."""
        return {**vars(self), "seen": None}

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = self.frozen(base, *args, **kwargs)
        self.seen = given_to(args, kwargs).detach(), first_of(out)
        return out

    def frozen(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the base gives, with no graph; the checkpointing of transformers has nothing to keep here."""
        checkpointed = vars(self.place).get("gradient_checkpointing") is True
        if checkpointed:
            self.place.gradient_checkpointing = False  # type: ignore[assignment]
        try:
            with torch.no_grad():
                return base(*args, **kwargs)
        finally:
            if checkpointed:
                self.place.gradient_checkpointing = True  # type: ignore[assignment]

    def take(self) -> tuple[Tensor, Tensor]:
        """What was noted, once."""
        seen, self.seen = self.seen, None
        if seen is None:
            raise RuntimeError(
                f"This {type(self.place).__name__} did not run in this forward, and a side network reads all blocks in "
                "their order. Switch off what skips layers (layerdrop=0)."
            )
        return seen


class Rung(Route):
    """Around a block of the side network: block(mu s + (1 - mu) h), h (..., w) and the gate mu () of this forward."""

    mixed: tuple[Tensor, Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.mixed is not None:
            (gate, h), self.mixed = self.mixed, None
            if args:
                args = (gate * args[0] + (1 - gate) * h, *args[1:])
            else:
                name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
                kwargs[name] = gate * kwargs[name] + (1 - gate) * h
        return self.base()(*args, **kwargs)


# ------------------------------------------------------------------ which blocks
def grouped(sites: Sites) -> dict[str, list[Site]]:
    """The chosen sites by stack; those that are no blocks are one."""
    stacks: dict[str, list[Site]] = {}
    for site in sites:
        stacks.setdefault(site.stack if site.role == "block" else "", []).append(site)
    return stacks


def every_block(sites: Sites, chosen: list[Site]) -> list[Site]:
    """All blocks of the stack; of sites that are no blocks those that were chosen."""
    if chosen[0].role != "block":
        return chosen
    return [s for s in sites.known if s.role == "block" and s.stack == chosen[0].stack]


def check_stack(model: nn.Module, blocks: list[Site]) -> None:
    """Raise where blocks differ in width or run more than once."""
    repeats = getattr(configuration(model, blocks[0]), "num_hidden_groups", None)
    if repeats is not None and blocks[0].role == "block":
        raise TargetError(f"The blocks at {blocks[0].name!r} are shared by several layers; a side network needs each.")
    widths = {site.out_features for site in blocks} if blocks[0].role != "block" else {0}
    if len(widths) > 1:
        raise TargetError(f"A side network needs states of one width, and {[b.name for b in blocks]} have {widths}.")


# ------------------------------------------------------------------ what the side network is made of
class Plain(nn.Module):
    """s + Attention(LN s), then s + W_dn gelu(W_up LN s): of width w; without attention where `heads` is None."""

    def __init__(self, width: int, inner: int, heads: int | None, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        if heads is not None:
            self.norm1 = nn.LayerNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, s: Tensor) -> Tensor:  # (batch, time, w) -> (batch, time, w)
        if self.heads is not None:
            q, k, v = self.qkv(self.norm1(s)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
            s = s + self.proj(a.transpose(1, 2).flatten(2))
        return s + self.down(F.gelu(self.up(self.norm2(s))))


class Tower(nn.Module):
    """Blocks one after the other, all called as the blocks of the base are, and a norm."""

    def __init__(self, blocks: list[nn.Module], width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)

    def forward(self, s: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # (..., w) -> (..., w)
        for block in self.blocks:
            s = first_of(block(s, *args, **kwargs))
        return self.norm(s)


class Nothing(nn.Module):
    """In place of an embedding: the states of the base hold it already."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return torch.zeros(())


def shrunk(config: Any, by: int, kept: list[int], depth: int) -> Any:
    """A configuration with all widths divided, and of the layers those that are kept."""
    small = copy.deepcopy(config)
    keys = {**vars(config), **dict.fromkeys(getattr(config, "attribute_map", {}))}
    old = {key: getattr(config, key, None) for key in keys}
    for key, value in old.items():
        if key in WIDTHS and type(value) is int and value > 0:
            setattr(small, key, max(1, value // by) if key != "rotary_dim" else max(2, value // by // 2 * 2))
        elif key in DEPTHS and type(value) is int:
            setattr(small, key, len(kept))
        elif key.endswith("token_id") and type(value) is int:
            setattr(small, key, 0)  # of the one token that there is
        elif key in ABSENT:
            setattr(small, key, 0.0)
        elif isinstance(value, list) and len(value) == depth:
            setattr(small, key, [value[i] for i in kept])
    small.vocab_size = 1  # there is nothing to embed
    return small


def stack_of_class(kind: type[nn.Module], config: Any, path: str) -> nn.Module:
    """A whole stack of transformers, its embeddings left out; `path` is where its blocks are."""
    with torch.random.fork_rng(devices=[]):
        stack = kind(config)
    blocks = {id(m) for block in stack.get_submodule(path).children() for m in block.modules()}
    for module in list(stack.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Embedding) and id(child) not in blocks:
                setattr(module, name, Nothing())
    return stack


def tower_of_class(kind: type[nn.Module], config: Any, count: int, width: int) -> Tower:
    """Blocks of a class of transformers."""
    numbered = len(inspect.signature(kind.__init__).parameters) > 2
    with torch.random.fork_rng(devices=[]):
        blocks = [kind(config, i) if numbered else kind(config) for i in range(count)]
        return Tower(blocks, width)


def tower_of_torch(like: Any, by: int, count: int) -> Tower:
    """Encoder layers of torch."""
    width = like.self_attn.embed_dim // by
    with torch.random.fork_rng(devices=[]):
        blocks = [
            type(like)(
                width, like.self_attn.num_heads, max(1, like.linear1.out_features // by), like.dropout.p,
                like.activation, like.norm1.eps, like.self_attn.batch_first, like.norm_first,
                like.linear1.bias is not None,
            ) for _ in range(count)
        ]  # fmt: skip
    for block in blocks:
        block.self_attn.dropout = 0.0
        block.activation_relu_or_gelu = 0  # no fused path, which the rungs would not be on
    return Tower(blocks, width)


def tower_of_plain(width: int, inner: int, heads: int | None, causal: bool, count: int) -> Tower:
    with torch.random.fork_rng(devices=[]):
        return Tower([Plain(width, inner, heads, causal) for _ in range(count)], width)


def owner_name(site: Site) -> str:
    """The module that holds the list of blocks which this one is in."""
    return ".".join(site.name.split(".")[:-2])


def recipe(model: nn.Module, block: Site, width: int, by: int, kept: list[int]) -> tuple[bool, Callable[[], nn.Module]]:
    """Whether the side network stands beside the whole stack, and what makes it; called again it makes another.

    Only a whole stack knows the masks, rotations, position biases and caches that its blocks are given.
    """
    owner, config = model.get_submodule(owner_name(block)), configuration(model, block)
    heads = block.facts.heads if block.role == "block" else None
    if heads is not None:
        check_heads(owner, block, width, heads)
    if config is not None and block.role == "block":
        small = shrunk(config, by, kept, block.layers or 0)
        if "inputs_embeds" in inspect.signature(type(owner).forward).parameters:
            return True, partial(stack_of_class, type(owner), small, block.name.split(".")[-2])
        return False, partial(tower_of_class, type(block.module), small, len(kept), width)
    if isinstance(block.module, nn.TransformerEncoderLayer):
        return False, partial(tower_of_torch, block.module, by, len(kept))
    inner = 4 * width if heads is None else max(1, _inner(block) // by)
    return False, partial(tower_of_plain, width, inner, heads, block.facts.causal is True, len(kept))


def configuration(model: nn.Module, block: Site) -> Any:
    """The configuration nearest above a block, where there is one."""
    parts = block.name.split(".")
    above = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) - 1, -1, -1)]
    return next((found for m in above if hasattr(found := getattr(m, "config", None), "to_dict")), None)


def check_heads(owner: nn.Module, block: Site, width: int, heads: int) -> None:
    """Raise where the heads, of which there are as many as in the base, do not divide the width."""
    rotated = any(name.endswith("inv_freq") for name, _ in owner.named_buffers())
    if width % heads or (rotated and width // heads % 2):
        raise TargetError(
            f"A side network of width {width} cannot have the {heads} heads of {block.name!r}, each of "
            f"{'an even' if rotated else 'a whole'} width. Choose another reduction."
        )


def _inner(block: Site) -> int:
    """The widest that a block gets."""
    return max((m.out_features for m in block.module.modules() if isinstance(m, nn.Linear)), default=4)


# ------------------------------------------------------------------ caches of transformers
def behind(cache: Any, start: int, count: int) -> Any:
    """The part of a KV cache that belongs to a side network: `count` layers from `start`, after those of the base.

    They are in one cache, so that what reorders, repeats or crops one does so with the other.
    """
    if hasattr(cache, "cross_attention_cache"):
        parts = cache.self_attention_cache, cache.cross_attention_cache
        return type(cache)(*(behind(part, start, count) for part in parts))
    if getattr(cache, "is_compileable", False) or not hasattr(cache, "layers"):
        raise ValueError(
            f"A side network keeps its keys in the model's cache, which here is a {type(cache).__name__}. Generate "
            "with the default dynamic cache, or with use_cache=False."
        )
    view = type(cache)()
    view.layers = list(cache.layers[start : start + count])
    return view


def keep(cache: Any, view: Any, start: int, count: int) -> None:
    """Put the layers of a view where `behind` finds them."""
    if hasattr(cache, "cross_attention_cache"):
        keep(cache.self_attention_cache, view.self_attention_cache, start, count)
        keep(cache.cross_attention_cache, view.cross_attention_cache, start, count)
    else:
        cache.layers = [*cache.layers[:start], *view.layers, *cache.layers[start + count :]]


def check_in_step(cache: Any, view: Any, now: int) -> None:
    """Raise where a cache holds positions that the side network has not seen."""
    if int(cache.get_seq_length()) != int(view.get_seq_length()) + now:
        raise ValueError(
            f"This cache holds {int(cache.get_seq_length()) - now} positions of the base and "
            f"{int(view.get_seq_length())} of the side network: it was filled while the method was off. Begin with an "
            "empty cache."
        )


def quiet(side: nn.Module) -> None:
    """Turn off in the side network what transformers turned on in all modules: checkpointing, recording of states."""
    for module in side.modules():
        if vars(module).get("gradient_checkpointing") is True:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "output_capturing_hook":
                del module._forward_hooks[key]
