"""The Power of Scale for Parameter-Efficient Prompt Tuning. Lester, Al-Rfou, Constant, EMNLP 2021.
https://arxiv.org/abs/2104.08691
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.embedding import CrossMask, EncoderTokens, StackTokens, StripTokens, VirtualTokens
from lightning_peft.core.fields import positive
from lightning_peft.core.sites import Site, Sites, TargetError, roles


class PromptTuning(PEFT, name="prompt_tuning", family="soft prompt", paper="2104.08691", identity=False):
    """x' = [P; Emb(x)]

    P (length, d) is trained, the rest is frozen. Masks, positions and token types are widened; what the model returns
    is cut back to the text, so that labels, losses and pooling need nothing. An encoder-decoder gets P in its encoder,
    a vision transformer after its class token (there, states captured between the first and the last block include P).
    P lives behind the embedding's own scaling, where the model has one.

    init: "uniform" U(-0.5, 0.5), "normal" N(0, 1), or "vocabulary": rows of the embedding, drawn from the
    `vocabulary` first token ids (in most vocabularies the frequent ones). Needs a high learning rate (0.01 to 0.3).
    Source: section 2.
    """

    targets: str | list[str] | None = "embed"
    length: int = 20
    init: Literal["uniform", "normal", "vocabulary"] = "uniform"
    vocabulary: int = 5000

    def check(self) -> None:
        positive(self, "length", "vocabulary")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        encoders = [site for site in sites if not site.stack.endswith("decoder")]
        for site in encoders or sites:
            above = [Above(name, sites.model.get_submodule(name)) for name in prefixes(site.name)]
            owner = next((a for a in reversed(above) if embeds_ids(a.module, site.module)), None)
            encoder = next((a for a in modules_of(sites.model, nn.TransformerEncoder)), None)
            if owner is not None:
                yield from self._text(above, owner, site)
            elif isinstance(site.module, nn.Embedding) and encoder is not None:
                first: Any = encoder.module.layers[0].self_attn  # type: ignore[index, union-attr]
                yield self._here(encoder, site, EncoderTokens(first.batch_first, *self._tokens(first.embed_dim)))
            elif not isinstance(site.module, nn.Embedding):
                yield from self._vision(sites, site)
            else:
                raise TargetError(
                    f"{site.name!r} embeds tokens, but no module above it takes `inputs_embeds` and there is no "
                    "nn.TransformerEncoder: where the tokens go is unknown. Known: transformers text models, "
                    "nn.TransformerEncoder, vision transformers. Use prefix_tuning, which acts inside attention."
                )

    def _tokens(self, width: int, table: nn.Module | None = None) -> tuple[int, int, str, nn.Module | None, int]:
        if self.init == "vocabulary":
            if table is None:
                raise TargetError("PromptTuning(init='vocabulary') needs a token embedding; use init='uniform' here.")
            if (rows := min(self.vocabulary, len(table.weight))) < self.length:  # type: ignore[arg-type]
                raise TargetError(f"{self.length} tokens cannot be drawn from {rows} rows; lower `length`.")
        return self.length, width, self.init, table, self.vocabulary

    @staticmethod
    def _here(above: Above, site: Site, adapter: Adapter) -> tuple[Site, Adapter]:
        return dataclasses.replace(site, name=above.name, module=above.module), adapter

    def _text(self, above: list[Above], owner: Above, site: Site) -> Iterator[tuple[Site, Adapter]]:
        pair = next((a for a in above if {"encoder", "decoder"} <= set(a.module._modules)), None)
        table: Any = site.module
        tokens = self._tokens(table.weight.shape[1], table)
        in_encoder = pair is not None and owner.module is pair.module.encoder
        yield self._here(owner, site, VirtualTokens(owner.module, *tokens, strip=not in_encoder))
        if pair is not None and in_encoder:
            decoder = f"{pair.name}.decoder".lstrip(".")
            yield Site(decoder, pair.module.decoder, "decoder"), CrossMask()  # type: ignore[arg-type]

    def _vision(self, sites: Sites, site: Site) -> Iterator[tuple[Site, Adapter]]:
        blocks = roles(sites.model).get("block", [])
        tower = site.name.split(".")[0]
        blocks = [b for b in blocks if b.name.split(".")[0] == tower] or blocks
        if not blocks or blocks[0].facts.hidden is None:
            raise TargetError(
                f"The blocks behind {site.name!r} are unknown, so virtual tokens cannot be put in front of them."
            )
        index = sum(
            p.shape[1] if p.dim() == 3 else 1
            for n, p in sites.model.named_parameters()
            if n.rpartition(".")[2] in CLASS
        )
        yield blocks[0], StackTokens(index, *self._tokens(blocks[0].facts.hidden))
        yield blocks[-1], StripTokens(self.length, index)


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


def modules_of(model: nn.Module, kind: type[nn.Module]) -> list[Above]:
    return [Above(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
