"""Scores as a picture, one row a layer and one column a module, and as a table. Plain text, the same every time."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from lightning_peft.core.method import common

Table = tuple[list[str], list[str], dict[tuple[str, str], float]]  # rows, columns, (row, column) -> value
CELL, LETTER = 36, 6.4  # px: of a cell, of a letter at size 11
OUTSIDE = "outside of blocks"
DARK = (13, 59, 102)
NAMESPACE = "http://www.w3.org/2000/svg"


def table(items: Iterable[tuple[str, str, float, int]]) -> Table:
    """(block or "", name of the module and tensor, sum of its scores, their number) -> the mean of each cell"""
    totals: dict[tuple[str, str], tuple[float, int]] = {}
    for block, name, total, count in items:
        row, column = (block, name.removeprefix(f"{block}.")) if block else (OUTSIDE, name)
        before = totals.get((row, column), (0.0, 0))
        totals[row, column] = before[0] + total, before[1] + count
    rows, columns = list(dict.fromkeys(r for r, _ in totals)), list(dict.fromkeys(c for _, c in totals))
    return rows, columns, {key: total / max(count, 1) for key, (total, count) in totals.items()}


def write(directory: Path, label: str, score: str, scores: Table, chosen: Table) -> str:
    """Both as tables, and together as a picture, which is what it returns."""
    picture = svg(scores, f"{label}: {score}", chosen)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{label}-scores.svg").write_text(picture)
    (directory / f"{label}-scores.csv").write_text(csv(scores))
    (directory / f"{label}-chosen.csv").write_text(csv(chosen))
    return picture


def csv(found: Table) -> str:
    """A line for each layer, empty where it has no such module."""
    rows, columns, values = found
    lines = [["layer", *columns]]
    lines += [[r, *(f"{values[r, c]:.6g}" if (r, c) in values else "" for c in columns)] for r in rows]
    return "".join(",".join(f'"{cell}"' if "," in cell else cell for cell in line) + "\n" for line in lines)


def svg(found: Table, title: str, chosen: Table) -> str:
    """Shades from white, the least score, to dark, the most, by rank: scores range over many powers of ten.

    chosen: what share of a cell's entries trains, which is written into it in percent.
    """
    rows, columns, values = found
    shades = {v: i for i, v in enumerate(sorted(set(values.values())))}
    full = [*(r for r in rows if r != OUTSIDE), *(c for r, c in values if r == OUTSIDE)]
    within = common([name.rpartition(".")[0] for name in full])
    shared = len(within) + bool(within)
    named = {r: r if r == OUTSIDE else r[shared:] for r in rows}
    above = {c: c[shared:] if (OUTSIDE, c) in values else c for c in columns}
    left = 24 + round(LETTER * max(map(len, named.values())))
    slanted = round(LETTER * max(map(len, above.values())))
    top = 66 + round(slanted * 0.77)  # sin 50 degrees
    width, height = left + CELL * len(columns) + max(round(slanted * 0.65), 260), top + CELL * len(rows) + 20
    out = [
        f'<svg xmlns="{NAMESPACE}" viewBox="0 0 {width} {height}" font-family="DejaVu Sans, sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(10, 22, title, 'font-size="14" font-weight="bold"'),
        text(10, 42, "shade: mean score, by rank; number: % of the entries that train", 'font-size="11"'),
    ]
    for j, column in enumerate(columns):
        turn = f'font-size="11" transform="translate({left + CELL * j + CELL / 2},{top - 6}) rotate(-50)"'
        out.append(text(0, 0, above[column], turn))
    for i, row in enumerate(rows):
        y = top + CELL * i
        out.append(text(left - 8, y + 22, named[row], 'font-size="11" text-anchor="end"'))
        for j, column in enumerate(columns):
            if (row, column) in values:
                value, share = values[row, column], chosen[2][row, column]
                shade = shades[value] / max(len(shades) - 1, 1)
                tip = f"{row} {column}: {value:.4g}, {share:.4%} train"
                out += cell(left + CELL * j, y, shade, percent(share), tip)
    return "\n".join([*out, "</svg>"]) + "\n"


def cell(x: float, y: float, shade: float, label: str, tip: str) -> list[str]:
    colour = ",".join(str(round(255 - shade * (255 - dark))) for dark in DARK)
    place = f'x="{x}" y="{y}" width="{CELL - 2}" height="{CELL - 2}"'
    ink = f'font-size="10" text-anchor="middle" pointer-events="none" fill="{"white" if shade > 0.5 else "black"}"'
    return [
        f'<rect {place} fill="rgb({colour})" stroke="#ccc"><title>{escape(tip)}</title></rect>',
        text(x + CELL / 2 - 1, y + 21, label, ink),
    ]


def text(x: float, y: float, words: str, style: str) -> str:
    return f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>'


def percent(share: float) -> str:
    """In four letters at most: nothing for none."""
    value = 100 * share
    return "" if not value else "<.01" if value < 0.01 else f"{value:.2f}" if value < 10 else f"{value:.0f}"
