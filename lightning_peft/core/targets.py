"""Values that differ from site to site: a table of pattern -> value over a default, by the one selector."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from lightning_peft.core.architectures import is_linear
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
