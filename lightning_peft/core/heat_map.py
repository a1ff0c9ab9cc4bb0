"""Scores as a picture, one row a layer and one column a module, and as a table. Plain text, the same every time."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

Table = tuple[list[str], list[str], dict[tuple[str, str], float]]  # rows, columns, (row, column) -> value
CELL, LEFT, TOP = 34, 190, 150


def table(items: Iterable[tuple[str, str, float, int]]) -> Table:
    """(block or "", name of the module and tensor, sum of its scores, their number) -> the mean of each cell"""
    totals: dict[tuple[str, str], tuple[float, int]] = {}
    for block, name, total, count in items:
        row, column = (block, name.removeprefix(f"{block}.")) if block else ("outside of blocks", name)
        before = totals.get((row, column), (0.0, 0))
        totals[row, column] = before[0] + total, before[1] + count
    rows, columns = list(dict.fromkeys(r for r, _ in totals)), list(dict.fromkeys(c for _, c in totals))
    return rows, columns, {key: total / max(count, 1) for key, (total, count) in totals.items()}


def csv(found: Table) -> str:
    """A line for each layer, empty where it has no such module."""
    rows, columns, values = found
    lines = [["layer", *columns]]
    lines += [[r, *(f"{values[r, c]:.6g}" if (r, c) in values else "" for c in columns)] for r in rows]
    return "".join(",".join(f'"{cell}"' if "," in cell else cell for cell in line) + "\n" for line in lines)


def svg(found: Table, title: str) -> str:
    """From white, the least of all, to dark, the most; by rank, since scores range over many powers of ten."""
    rows, columns, values = found
    order = {v: i for i, v in enumerate(sorted(set(values.values())))}
    out = [f'<text x="10" y="20" font-size="14" font-weight="bold">{escape(title)}</text>']
    for j, column in enumerate(columns):
        x = LEFT + CELL * j + CELL / 2
        out.append(f'<text transform="translate({x},{TOP - 6}) rotate(-50)" font-size="10">{escape(column)}</text>')
    for i, row in enumerate(rows):
        y = TOP + CELL * i
        out.append(f'<text x="{LEFT - 8}" y="{y + 21}" font-size="11" text-anchor="end">{escape(row)}</text>')
        for j, column in enumerate(columns):
            if (row, column) in values:
                shade = order[values[row, column]] / max(len(order) - 1, 1)
                colour = ",".join(str(round(255 - shade * (255 - dark))) for dark in (13, 59, 102))
                tip = f"<title>{escape(row)} {escape(column)}: {values[row, column]:.4g}</title>"
                place = f'x="{LEFT + CELL * j}" y="{y}" width="{CELL - 2}" height="{CELL - 2}"'
                out.append(f'<rect {place} fill="rgb({colour})" stroke="#ccc">{tip}</rect>')
    width, height = LEFT + CELL * len(columns) + 180, TOP + CELL * len(rows) + 20
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="DejaVu Sans, sans-serif">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *out, "</svg>"]) + "\n"
