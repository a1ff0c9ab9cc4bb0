"""Bytes as people write and read them, and the cards that they have to fit on."""

from __future__ import annotations

import re

CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)
"""GB printed on common cards, taken as 10^9 bytes: what the leanest of a size have (T4, L4, L40S); others have up to
7 % more."""
CONTEXT = 600_000_000
"""Bytes a process takes on a card before its first tensor: the CUDA context with its loaded kernels (300 to 500 MB) and
the workspaces of cuBLAS (8 to 32 MB a stream). No plan sees them, for the allocator does not."""
FRAGMENTATION = 0.05
"""Share on top of the plan's total that the caching allocator holds without handing it out: blocks are rounded up (512
bytes, 2 MB, 20 MB), and free ones do not always have the size that is asked for next."""
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class PlanError(ValueError):
    """A plan that cannot be made of what was given."""


def parse(size: str | int) -> int:
    """ "24GiB", "80 GB", 24 * 2**30 -> bytes"""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", str(size), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise PlanError(f"{size!r} is no size of memory. Give a number and a unit, such as 24GiB or 80GB.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def need(total: int) -> int:
    """Bytes of a card that a plan of `total` bytes needs: total (1 + FRAGMENTATION) + CONTEXT"""
    return int(total * (1 + FRAGMENTATION)) + CONTEXT


def unit(total: int) -> tuple[str, str, str]:
    """The units to show numbers of this size in: decimal, binary, and the format of a number."""
    return ("GB", "GiB", ".2f") if total >= 10**9 else ("MB", "MiB", ".2f")


def show(count: int) -> str:
    """ "5.93 GB (5.52 GiB)" """
    decimal, binary, form = unit(count)
    return f"{count / UNITS[decimal]:{form}} {decimal} ({count / UNITS[binary.upper()]:{form}} {binary})"


def number(count: int) -> str:
    """6738415616 -> "6.74 B"; 4096 -> "4,096" """
    for limit, letter in ((10**9, "B"), (10**6, "M")):
        if count >= limit:
            return f"{count / limit:.2f} {letter}"
    return f"{count:,}"
