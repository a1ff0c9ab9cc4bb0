"""Cross-Attention is All You Need: Adapting Pretrained Transformers for Machine Translation.
Gheini, Ren, May, EMNLP 2021. https://arxiv.org/abs/2104.08771
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from lightning_peft.callback import PEFT
from lightning_peft.core.sites import Site, Sites, TargetError, roles, sites


class CrossAttention(PEFT, name="cross_attention", family="selective", paper="2104.08771", mergeable=True):
    """train W_q, W_k, W_v, W_o and the norm of the decoder's attention to the encoder

    All of it trains in place: L (4 (d^2 + d) + 2d) parameters with biases, so the base at step 0.
    embeddings: of the new side, as in the paper's transfer to a language: tokens, positions and their norm of the
    "encoder" (a new source) or of the "decoder" (a new target, with the output projection); "none" trains none. A table
    that both sides share trains once, for both. Source: section 3.
    """

    unused = ("targets",)

    embeddings: Literal["none", "encoder", "decoder"] = "none"

    def asked(self, model: nn.Module) -> Iterator[Site]:
        known = roles(model)
        if not any(role.startswith("cross.") for role in known):
            raise TargetError(
                f"This {type(model).__name__} has no cross-attention, which only a decoder that reads an encoder has. "
                f"Roles known here: {', '.join(sorted(known)) or 'none'}. Use a method for these, such as LNTuning."
            )
        narrowed: dict[str, Any] = {"layers": self.layers, "exclude": self.exclude, "roles": self.roles}
        found = sites(model, "cross?,cross.attend?", **narrowed)
        yield from found
        for block in {site.block: site for site in found}.values():
            yield norm_of(found, block)
        if self.embeddings != "none":
            yield from embedded(model, found, self.embeddings)

    def select(self, name: str, parameter: nn.Parameter) -> bool:
        return True


def norm_of(found: Sites, cross: Site) -> Site:
    """The norm beside the cross-attention of a block: inside of it, named after it, alone with it, or torch's second.

    cross: a site of the cross-attention.
    """
    norms = [site for site in found.known if site.role == "norm" and site.block == cross.block]
    holder = cross.name if cross.part else cross.name.rpartition(".")[0]
    path = holder.removeprefix(f"{cross.block}.").split(".")
    above = [".".join([cross.block, *path[:depth]]) for depth in range(len(path), 0, -1)]
    near = [n for name in above for n in norms if n.name.startswith(f"{name}.") or n.name == f"{name}_layer_norm"]
    near += [n for n in norms if "cross" in n.name.rpartition(".")[2] or n.name == f"{cross.block}.norm2"]
    if not near:
        raise TargetError(
            f"The norm of the cross-attention {holder!r} is not recognised. Norms of its block: "
            f"{', '.join(n.name for n in norms) or 'none'}. Name what is to train with LNTuning(targets=...) beside it."
        )
    return near[0]


def embedded(model: Any, found: Sites, side: str) -> Iterator[Site]:
    """Embeddings of a stack, tokens, positions and their norm; of the decoder the output projection, too."""
    blocks = [site for site in found.known if site.role == "block" and site.stack.endswith(side)]
    roots = {site.name.rpartition(".")[0].rpartition(".")[0] for site in blocks}
    inside = [name for name, _ in model.named_modules() if any(name.startswith(f"{root}.") for root in roots)]
    names = [name for name in inside if "embed" in name.rpartition(".")[2]]
    if not names:
        raise TargetError(
            f"CrossAttention(embeddings={side!r}): no embeddings are found beside the blocks of the {side} of this "
            f"{type(model).__name__}. Use embeddings='none', and train them with FullFineTuning on the side."
        )
    for name in names:
        yield Site(name, model.get_submodule(name), None)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if side == "decoder" and output is not None:
        yield Site(next(name for name, module in model.named_modules() if module is output), output, None)
