"""The residual stream: which norm a block or a stack ends in, and changes of what goes into a block or comes out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_peft.core.sites import Site, Sites

CLOSING = re.compile(r"output_layer_norm|full_layer_layer_norm|final_layer_norm")  # DistilBERT, ALBERT, BART
AFTER = re.compile(r"post_(?:feedforward|ffn?|mlp)\w*")  # of what a feed-forward layer gives (Gemma 2)
ATTENDED = re.compile(r"post_(?:self_)?att(?:entio)?n\w*")  # of what attention gives, or before the feed-forward layer
NOT_FINAL = re.compile(r".*embed.*|pre_.*")  # of embeddings (BLOOM, BART), of patches (CLIP)
SPEECH = ("Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "UniSpeechSat", "Data2VecAudio")
# where names tell nothing or the wrong thing: class of the block -> the end of the norm's name, "" for a pre-norm block
CLOSES = {
    "XLNetLayer": "ff.layer_norm",
    "BigBirdPegasusEncoderLayer": "",
    "BigBirdPegasusDecoderLayer": "",
    **dict.fromkeys((f"{name}EncoderLayer" for name in SPEECH), "final_layer_norm"),
}


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def closing_norm(sites: Sites, block: Site) -> Site | None:
    """The norm whose output a post-norm block returns; None for a block that returns the residual stream itself.

    torch.nn's layers say it (`norm_first`). Else it is the norm beside the down projection in a module without the up
    projection (BERT and its relatives), or one of a name in CLOSING where no norm follows the last block.
    """
    norms = _norms(sites, block)
    first = getattr(block.module, "norm_first", None)
    if isinstance(first, bool):
        return None if first or not norms else norms[-1]
    known = _known(sites, block)
    if known or type(block.module).__name__ in CLOSES:
        return known
    named = [s for s in norms if CLOSING.fullmatch(s.name.rpartition(".")[2])]
    return named[-1] if named and final_norm(sites, block) is None else None


def _norms(sites: Sites, block: Site) -> list[Site]:
    return [s for s in sites.known if s.role == "norm" and s.block == block.name]


def _known(sites: Sites, block: Site) -> Site | None:
    """The closing norm by the class of the block, or by its place beside the down projection."""
    norms, end = _norms(sites, block), CLOSES.get(type(block.module).__name__)
    if end is not None:
        return next((s for s in norms if s.name == f"{block.name}.{end}"), None)
    up, down = sites.sibling(block, "up"), sites.sibling(block, "down")
    if up is None or down is None or _parent(down.name) in (block.name, _parent(up.name)):
        return None
    return next((s for s in reversed(norms) if _parent(s.name) == _parent(down.name)), None)


def norms_before(sites: Sites, block: Site) -> list[Site]:
    """Norms of a pre-norm block, of which the last to run before the feed-forward layer reads the residual stream.

    None in a post-norm block, nor where norms are of what the layers give (OLMo 2): there they read the stream itself.
    """
    if closing_norm(sites, block) is not None:
        return []
    found = [s for s in _norms(sites, block) if not AFTER.fullmatch(s.name.rpartition(".")[2])]
    return [] if all(ATTENDED.fullmatch(s.name.rpartition(".")[2]) for s in found) else found


def final_norm(sites: Sites, block: Site) -> Site | None:
    """The norm after the last block of the stack that `block` is in: the nearest on the way up to the root."""
    if _known(sites, block) is not None:
        return None  # what else there is belongs to the embeddings (DeBERTa, wav2vec 2.0)
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
