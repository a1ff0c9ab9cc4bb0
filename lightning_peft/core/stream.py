"""The residual stream: which norm a block or a stack ends in, and changes of what goes into a block or comes out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_peft.core.sites import Site, Sites

CLOSING = re.compile(r"output_layer_norm|full_layer_layer_norm|final_layer_norm")  # DistilBERT, ALBERT, BART
AFTER = re.compile(r"post_(?:feedforward|ffn?|mlp)\w*")  # of what a feed-forward layer gives (Gemma 2)
NOT_FINAL = re.compile(r".*embed.*|pre_.*|LayerNorm")  # of embeddings (BLOOM, BART), of patches (CLIP), of distances


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def closing_norm(sites: Sites, block: Site) -> Site | None:
    """The norm whose output a post-norm block returns; None for a block that returns the residual stream itself.

    torch.nn's layers say it (`norm_first`). Else it is the norm beside the down projection in a module without the up
    projection (BERT and its relatives), or one of a name in CLOSING where no norm follows the last block.
    """
    norms = [s for s in sites.known if s.role == "norm" and s.block == block.name]
    first = getattr(block.module, "norm_first", None)
    if isinstance(first, bool):
        return None if first or not norms else norms[-1]
    up, down = sites.sibling(block, "up"), sites.sibling(block, "down")
    if up is not None and down is not None and _parent(down.name) not in (block.name, _parent(up.name)):
        beside = [s for s in norms if _parent(s.name) == _parent(down.name)]
        if beside:
            return beside[-1]
    named = [s for s in norms if CLOSING.fullmatch(s.name.rpartition(".")[2])]
    return named[-1] if named and final_norm(sites, block) is None else None


def norms_before(sites: Sites, block: Site) -> list[Site]:
    """Norms of a pre-norm block, of which the last to run before the feed-forward layer reads the residual stream.

    None in a post-norm block, where a layer reads the stream itself.
    """
    if closing_norm(sites, block) is not None:
        return []
    norms = [s for s in sites.known if s.role == "norm" and s.block == block.name]
    return [s for s in norms if not AFTER.fullmatch(s.name.rpartition(".")[2])]


def final_norm(sites: Sites, block: Site) -> Site | None:
    """The norm after the last block of the stack that `block` is in: the nearest on the way up to the root."""
    above, name = [], _parent(block.name)
    while name:
        above.append(name)
        name = _parent(name)
    above.append("")
    outside = [s for s in sites.known if s.role == "norm" and not s.block and _parent(s.name) in above]
    found = [s for s in outside if not NOT_FINAL.fullmatch(s.name.rpartition(".")[2])]
    return min(found, key=lambda s: above.index(_parent(s.name)), default=None)


def edit_input(
    change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with its hidden states (the first, whatever it is called) changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = _first_name(kwargs)
    return args, {**kwargs, name: change(kwargs[name])}


def read_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a block."""
    return args[0] if args else kwargs[_first_name(kwargs)]


def _first_name(kwargs: dict[str, Any]) -> str:
    return "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))


def edit_output(change: Callable[[Tensor], Tensor], out: Any) -> Any:
    """What a block returned, with its hidden states (the first of several) changed."""
    if isinstance(out, Tensor):
        return change(out)
    if isinstance(out, Mapping):
        first = next(iter(out))
        return type(out)(**{**out, first: change(out[first])})  # type: ignore[call-arg]
    return type(out)((change(out[0]), *out[1:]))


def runs_again(sites: Sites) -> bool:
    """Whether the model runs its blocks several times (ALBERT), so that none is the first or the last."""
    configs = [getattr(module, "config", None) for module in sites.model.modules()]
    counts = [(getattr(c, "num_hidden_groups", 0), getattr(c, "num_hidden_layers", 0)) for c in configs]
    return any(0 < groups < layers for groups, layers in counts)
