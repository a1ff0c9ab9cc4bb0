"""Values that differ from site to site: a table of pattern -> value over a default, by the one selector."""

from __future__ import annotations

from typing import TypeVar

from lightning_peft.core.sites import Sites, TargetError, sites

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
