"""The Power of Scale for Parameter-Efficient Prompt Tuning. Lester, Al-Rfou, Constant, EMNLP 2021.
https://arxiv.org/abs/2104.08691
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.embedding import (
    BlockTokens,
    CrossMask,
    EncoderTokens,
    StackTokens,
    StripTokens,
    Turn,
    VirtualTokens,
)
from lightning_peft.core.fields import positive
from lightning_peft.core.prompt import Prompt, Start, TaskPrompt
from lightning_peft.core.sites import Site, Sites, TargetError, roles
from lightning_peft.methods.prompt_start import START, Init, check_start, ids_of, sources


class PromptTuning(PEFT, name="prompt_tuning", family="soft prompt", paper="2104.08691", identity=False):
    """x' = [P; Emb(x)]

    P (length, d) is trained, the rest is frozen: length * d parameters. Masks, positions and token types are widened;
    what the model returns is cut back to the text, so that labels, losses and pooling need nothing. Packed texts (a
    block mask, or positions that begin anew) see the same P each in a causal model. An encoder-decoder gets P in its
    encoder, a vision transformer after its class token (there, states captured between the first and the last block
    include P). P lives behind the embedding's own scaling, where the model has one.

    init: "uniform" U(-0.5, 0.5), "normal" N(0, 1), "vocabulary": embeddings of the `vocabulary` first token ids (in
    most vocabularies the frequent ones), drawn without repeating one; "text": those of `text`, repeated or cut to the
    length; "labels": the mean embedding of each of `labels`, the rest as "vocabulary"; "prompt": that of `source`, an
    adapter directory of prompt tuning on the same base (SPoT, arXiv 2110.07904), or the mean of several, weighed by
    `weights`. Needs a high learning rate (0.01 to 0.3).

    text: a string, or token ids; labels: a string or token ids each; tokenizer: name or folder of the one of the
    strings; source: an adapter directory, or several; weights: of several sources. Source: section 2.
    """

    targets: str | list[str] | None = "embed"
    length: int = 20
    init: Init = "uniform"
    vocabulary: int = 5000
    text: str | list[int] | None = None
    labels: list[str] | list[list[int]] | None = None
    tokenizer: str | None = None
    source: str | list[str] | None = None
    weights: list[float] | None = None

    def check(self) -> None:
        positive(self, "length", "vocabulary")
        check_start(self)

    def portable(self) -> PromptTuning:
        """Without what P started from, which need not be there any more."""
        return dataclasses.replace(self, **START)  # type: ignore[arg-type]

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        encoders = [site for site in sites if not site.stack.endswith("decoder")]
        for site in encoders or sites:
            above = [Above(name, sites.model.get_submodule(name)) for name in prefixes(site.name)]
            owner = next((a for a in reversed(above) if embeds_ids(a.module, site.module)), None)
            encoder = encoder_of(sites.model, site)
            if owner is not None:
                yield from self._text(above, owner, site)
            elif isinstance(site.module, nn.Embedding) and encoder is not None:
                first: Any = encoder.module.layers[0].self_attn  # type: ignore[index, union-attr]
                prompt = self.prompt(first.embed_dim, site.module)
                yield self._here(encoder, site, EncoderTokens(first.batch_first, prompt))
                yield from self.turns(above, encoder, prompt)
            elif not isinstance(site.module, nn.Embedding):
                yield from self._vision(sites, site, above)
            else:
                raise TargetError(
                    f"{site.name!r} embeds tokens, but no module above it takes `inputs_embeds` and there is no "
                    "nn.TransformerEncoder: where the tokens go is unknown. Known: transformers text models, "
                    "nn.TransformerEncoder, vision transformers. Use prefix_tuning, which acts inside attention."
                )

    def prompt(self, width: int, table: nn.Module | None) -> Prompt:
        """What gives the rows; table: the embedding of a text model of this width."""
        return Prompt(self.length, width, self.start(width, table), table)

    def start(self, width: int, table: Any) -> Start:
        """How the rows begin."""
        kind = "rows" if self.init == "prompt" else self.init
        rows = sources(self, width) if self.init == "prompt" else None
        if table is not None and table.weight.shape[1] != width:
            table = None
        if kind in ("vocabulary", "text", "labels") and table is None:
            raise TargetError(f"{type(self).__name__}(init={kind!r}) needs a token embedding; use init='uniform' here.")
        ids = ids_of(self) if kind in ("text", "labels") else ()
        size = 0 if table is None else len(table.weight)
        if kind in ("vocabulary", "labels") and min(self.vocabulary, size) < self.length - len(ids):
            raise TargetError(
                f"{self.length} tokens cannot be drawn from {min(self.vocabulary, size)} rows; lower `length`."
            )
        if wrong := [i for row in ids for i in row if not 0 <= i < size]:
            raise TargetError(f"{kind}: the token id {wrong[0]} is not among the {size} rows of the embedding.")
        return Start(kind, self.vocabulary, ids, rows)

    def turns(self, above: list[Above], place: Above, prompt: Prompt) -> Iterator[tuple[Site, Adapter]]:
        """What tells a prompt of several tasks whose turn it is: around the outermost module that takes a batch."""
        outer = next((a for a in above if BATCH & set(inspect.signature(type(a.module).forward).parameters)), None)
        if isinstance(prompt, TaskPrompt) and outer is not None and outer.module is not place.module:
            yield Site(outer.name, outer.module, "model"), Turn(prompt)

    @staticmethod
    def _here(above: Above, site: Site, adapter: Adapter) -> tuple[Site, Adapter]:
        return dataclasses.replace(site, name=above.name, module=above.module), adapter

    def _text(self, above: list[Above], owner: Above, site: Site) -> Iterator[tuple[Site, Adapter]]:
        pair = next((a for a in above if {"encoder", "decoder"} <= set(a.module._modules)), None)
        table: Any = site.module
        prompt = self.prompt(table.weight.shape[1], table)
        in_encoder = pair is not None and owner.module is pair.module.encoder
        tokens = VirtualTokens(owner.module, prompt, strip=not in_encoder, causal=causal(owner.module))
        yield self._here(owner, site, tokens)
        yield from self.turns(above, owner, prompt)
        if pair is not None and in_encoder:
            decoder = f"{pair.name}.decoder".lstrip(".")
            yield Site(decoder, pair.module.decoder, "decoder"), CrossMask()  # type: ignore[arg-type]

    def _vision(self, sites: Sites, site: Site, above: list[Above]) -> Iterator[tuple[Site, Adapter]]:
        blocks = vision_blocks(sites.model, site)
        prompt = self.prompt(blocks[0].facts.hidden or 0, None)
        yield from around(blocks[0], blocks[-1], class_tokens(sites.model, blocks[0]), prompt)
        yield from self.turns(above, Above(blocks[0].name, blocks[0].module), prompt)


def around(first: Site, last: Site, index: int, prompt: Prompt) -> Iterator[tuple[Site, Adapter]]:
    """Virtual tokens into the block `first` and out of what `last` returns, which may be the same."""
    if first.module is last.module:
        yield first, BlockTokens(index, prompt)
    else:
        yield first, StackTokens(index, prompt)
        yield last, StripTokens(prompt.length, index)


def vision_blocks(model: nn.Module, site: Site) -> list[Site]:
    """The blocks behind an embedding of patches."""
    blocks = roles(model).get("block", [])
    blocks = nearest(site, blocks)
    if not blocks or blocks[0].facts.hidden is None:
        raise TargetError(
            f"The blocks behind {site.name!r} are unknown, so virtual tokens cannot be put in front of them."
        )
    return blocks


def nearest(site: Site, others: list[Site]) -> list[Site]:
    """Those that share the longest part of their dotted name with `site`: what belongs to the same tower."""
    lengths = [shared(site.name, other.name) for other in others]
    return [other for other, length in zip(others, lengths, strict=True) if length == max(lengths)]


def shared(a: str, b: str) -> int:
    """How many parts two dotted names have in common at their beginning."""
    return len(os.path.commonprefix([a.split("."), b.split(".")]))


def class_tokens(model: nn.Module, block: Site) -> int:
    """How many tokens come before the patches, in the tower of this block."""
    near = nearest(block, roles(model).get("embed", []))
    least = shared(block.name, near[0].name) if near else 0
    found = [(n, p) for n, p in model.named_parameters() if n.rpartition(".")[2] in CLASS]
    return sum(p.shape[1] if p.dim() == 3 else 1 for n, p in found if shared(block.name, n) >= least)


BATCH = {"input_ids", "inputs_embeds", "pixel_values"}
CLASS = {
    "cls_token",
    "class_token",
    "class_embedding",
    "reg_token",
    "register_tokens",
    "dist_token",
    "distillation_token",
}


@dataclasses.dataclass(frozen=True)
class Above:
    """A module on the way from the root down to a site."""

    name: str
    module: nn.Module


def prefixes(name: str) -> list[str]:
    """ "a.b.c" -> "", "a", "a.b"."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def embeds_ids(module: nn.Module, embedding: nn.Module) -> bool:
    """Whether this is the innermost kind of module that turns `input_ids` into embeddings and takes them ready-made."""
    get: Any = getattr(module, "get_input_embeddings", None)
    if get is None or "inputs_embeds" not in inspect.signature(type(module).forward).parameters:
        return False
    return get() is embedding


def encoder_of(model: nn.Module, site: Site) -> Above | None:
    """The nn.TransformerEncoder whose dotted name has most in common with that of `site`."""
    found = [Above(name, m) for name, m in model.named_modules() if isinstance(m, nn.TransformerEncoder)]
    return max(found, key=lambda a: shared(a.name, site.name), default=None)


def causal(module: nn.Module) -> bool:
    """Whether the blocks inside know that they look back only."""
    blocks = roles(module).get("block", [])
    return bool(blocks) and all(block.facts.causal is True for block in blocks)
