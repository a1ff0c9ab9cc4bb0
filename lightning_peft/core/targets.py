"""Values that differ from site to site: a table of pattern -> value over a default, by the one selector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar, cast

from torch import Tensor, nn

from lightning_peft.core.architectures import is_convolution, is_linear
from lightning_peft.core.sites import Site, Sites, TargetError, sites

T = TypeVar("T")


def per_site(found: Sites, table: dict[str, T], default: T) -> list[T]:
    """The value for each site of `found`; a later pattern wins.

    One that meets none is an error, unless it ends in `?`.
    """
    values = [default] * len(found)
    for pattern, value in table.items():
        matched = {(site.name, site.role) for site in sites(found.model, pattern)}
        names = {name for name, role in matched if role is None}
        hits = [i for i, site in enumerate(found) if (site.name, site.role) in matched or site.name in names]
        if not hits and not pattern.endswith("?"):
            chosen = ", ".join(sorted({site.name for site in found})[:6])
            raise TargetError(
                f"{pattern!r} meets none of the chosen sites ({chosen}, ...). Use a pattern that does, or add it "
                f"to targets."
            )
        for index in hits:
            values[index] = value
    return values


Kind = Literal["linear", "embedding", "convolution"]


@dataclass(frozen=True)
class Shape:
    """A site as a matrix (d_out, d_in): an embedding on one-hot vectors, a convolution on the patches under it."""

    d_in: int
    d_out: int
    kind: Kind = "linear"


def matrix_shape(site: Site, method: str) -> Shape:
    """Of a projection, an embedding or a convolution; an error elsewhere."""
    module = site.module
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.sparse:
            raise TargetError(
                f"{site.name!r} is an Embedding with max_norm or sparse gradients, which {method} cannot follow. "
                "Exclude it."
            )
        return Shape(module.num_embeddings, module.embedding_dim, "embedding")
    if is_convolution(module):
        weight = cast(Tensor, module.weight)
        return Shape(weight[0].numel(), len(weight), "convolution")
    return Shape(*projection_widths(site, method))


def projection_widths(site: Site, method: str) -> tuple[int, int]:
    """d_in, d_out of a site where x (..., d_in) becomes y (..., d_out) by a matrix; an error elsewhere."""
    module = site.module
    linear = is_linear(module) and not isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd))
    if site.part not in ("q", "k", "v", "o") and not (linear and site.part is None):
        raise TargetError(
            f"{method} acts on projections, and {site.name!r} ({type(module).__name__}, role {site.role}) is none. "
            f"Choose "
            "targets such as 'q,v', 'ffn', 'all-linear', or names of Linear and Conv1D modules."
        )
    return site.in_features, site.out_features


def check_divides(site: Site, field: str, value: int, width: int) -> None:
    """Raise where `width` features of a site do not fall into whole parts; field: how the value was given."""
    if width % value:
        best = max(d for d in range(1, min(value, width) + 1) if width % d == 0)
        raise TargetError(
            f"{field}={value} does not divide the {width} features of {site.name!r} (role {site.role}). Choose a "
            f"divisor, such as {best}, or exclude the site."
        )
