"""Draws where methods act, one picture a place, and writes docs/places.md. Run by docs/generate.py.

Every registered method is listed at the place that its family and its default targets say; PLACE names the exceptions.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from figure import BASE, FONT, LINE, OURS, SOFT, arrow, box, label

import lightning_peft.methods  # noqa: F401  fills the registry
from lightning_peft.core.method import REGISTRY, Method

FIGURES = Path(__file__).with_name("figures")
STEPS = ["embed", "norm", "q k v", "attend", "o", "+", "norm", "up", "act", "down", "+", "norm", "head"]
WIDTHS = [58, 44, 50, 58, 34, 24, 44, 40, 40, 50, 24, 44, 50]
Y, H, GAP = 84, 40, 22
X = [20 + sum(WIDTHS[:i]) + GAP * i for i in range(len(STEPS) + 1)]
EMBED, NORM1, QKV, ATTEND, O, SUM1, NORM2, UP, ACT, DOWN, SUM2, LAST, HEAD = range(13)
PLACE = {
    "ia3": "vectors",
    "ssf": "vectors",
    "parallel": "beside",
    "adaptformer": "beside",
    "pfeiffer": "norms",
    "bapna": "blocks",
    "lst": "side",
    "attention_fusion": "side",
    "lets": "side",
    "output_adapter": "ends",
    "input_adapter": "ends",
    "invertible": "ends",
    "trainable_tokens": "ends",
    "longlora": "attention",
    "vpt": "input",
    "llama_adapter": "attention",
    "llama_adapter_v2": "attention",
}
FAMILIES = {
    "reparametrisation": "weights",
    "additive": "after",
    "representation": "blocks",
    "selective": "parameters",
    "baseline": "parameters",
    "hybrid": "several",
}
TITLES = {
    "weights": ("The weight of a projection", "y = (W + dW) x: dW has a structure; most of these merge"),
    "vectors": ("Gains and shifts", "y = l * W x + b: vectors on what a projection gives or reads"),
    "after": ("After a sublayer", "y = h + W_up phi(W_dn h) on the outputs of attention and of the feed-forward layer"),
    "norms": ("At a norm", "a bottleneck around the norm that closes a block"),
    "beside": ("Beside a sublayer", "y = f(u) + s D(u): both read the same input"),
    "attention": ("Inside attention", "keys and values of their own, or another mask, at the product itself"),
    "input": (
        "Before the first block",
        "virtual tokens in front of the text or behind the class token; of VPT in each block anew",
    ),
    "blocks": ("What a block returns", "h' = h + e(h), at chosen positions or everywhere"),
    "ends": ("The ends of a model", "behind the embedding and before the head"),
    "side": (
        "Beside the whole backbone",
        "a small network reads the states; nothing is propagated back through the blocks",
    ),
    "parameters": ("Parameters of the base", "some of them train in place, the others stay"),
    "several": ("Several places at once", "compositions of the methods above"),
}


def place(cls: type[Method]) -> str:
    """The place at which a method acts."""
    info = cls.info
    if info.name in PLACE:
        return PLACE[info.name]
    if info.family == "soft prompt":
        targets = next(f.default for f in dataclasses.fields(cls) if f.name == "targets")  # type: ignore[arg-type]
        return "attention" if "attend" in str(targets) else "input"
    return FAMILIES[info.family]


def ours(start: int, stop: int, y: float, text: list[str], h: float = 34) -> str:
    """A box of ours over the steps from `start` to `stop`."""
    return box(X[start], y, X[stop] + WIDTHS[stop] - X[start], h, text, OURS, 11)


def down_to(i: int, y: float) -> str:
    middle = X[i] + WIDTHS[i] / 2
    return arrow(middle, Y + H, middle, y)


def up_to(i: int, y: float) -> str:
    middle = X[i] + WIDTHS[i] / 2
    return arrow(middle, y, middle, Y + H + 1)


def after(i: int) -> str:
    """A small box of ours in the gap behind a step, on the way."""
    return box(X[i] + WIDTHS[i] + 3, Y - 4, GAP - 6, H + 8, [], OURS)


B = 158  # where boxes under the row begin
ADDED = {
    "weights": "".join(down_to(i, B) + ours(i, i, B, ["dW"]) for i in (QKV, O, UP, DOWN)),
    "vectors": "".join(after(i) for i in (QKV, ACT)) + label(X[QKV], B + 12, "l_k, l_v", 11) + label(X[ACT], B + 12, "l_ff", 11),
    "after": "".join(after(i) + label(X[i] + WIDTHS[i] - 14, B + 12, "adapter", 11) for i in (O, DOWN)),
    "norms": down_to(SUM2, B) + ours(DOWN, LAST, B, ["norm, D, norm again"]) + up_to(LAST, B),
    "beside": down_to(NORM2, B) + ours(NORM2, SUM2, B, ["s D(u)"]) + up_to(SUM2, B),
    "attention": ours(ATTEND, ATTEND, B, ["P_K, P_V"]) + up_to(ATTEND, B),
    "input": ours(EMBED, EMBED, B, ["P"]) + up_to(EMBED, B),
    "blocks": after(SUM2) + label(X[SUM2], B + 12, "edit", 11),
    "ends": after(EMBED) + after(LAST) + label(X[EMBED] + 40, B + 12, "adapter", 11) + label(X[LAST] + 20, B + 12, "adapter", 11),
    "side": down_to(EMBED, B) + down_to(SUM2, B) + ours(EMBED, HEAD, B, ["side network: small blocks, gates, up to the width of the head"]) + up_to(HEAD, B),
    "parameters": "",
    "several": ours(ATTEND, ATTEND, B, ["P_K, P_V"]) + up_to(ATTEND, B) + down_to(NORM2, B) + ours(NORM2, SUM2, B, ["s D(u)"]) + up_to(SUM2, B),
}  # fmt: skip
TRAINED = {"parameters": {NORM1, QKV, O, NORM2, UP, DOWN, LAST}}


def picture(name: str) -> str:
    """One SVG: a pre-norm block between embedding and head, and what a method adds in green."""
    title, what = TITLES[name]
    width, height = X[-1], 206
    out = [f'<rect width="{width}" height="{height}" fill="white"/>', label(20, 24, title, 15, True)]
    out.append(label(20, 44, what, 12))
    out.append(box(X[NORM1] - 8, Y - 20, X[SUM2] + WIDTHS[SUM2] - X[NORM1] + 16, H + 34, [], SOFT, dash=True))
    for i, step in enumerate(STEPS):
        fill = OURS if i in TRAINED.get(name, ()) else BASE
        out.append(box(X[i], Y, WIDTHS[i], H, [step], fill, 12))
        if i:
            out.append(arrow(X[i] - GAP, Y + H / 2, X[i] - 1, Y + H / 2))
    for start, stop in ((NORM1, SUM1), (NORM2, SUM2)):
        left, right = X[start] - GAP / 2, X[stop] + WIDTHS[stop] / 2
        path = f"M{left},{Y + H / 2} V{Y - 10} H{right} V{Y - 1}"
        out.append(f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.2"/>')
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker></defs>'
    )
    body = "".join([*out, ADDED[name]])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {FONT}>{head}{body}</svg>\n'.replace(
            "><", ">\n<"
        )
    )


def page() -> str:
    lines = ["# Where methods act", "", "Written by `docs/generate.py`; what a method adds is green.", ""]
    for name, (title, _) in TITLES.items():
        here = sorted((cls for cls in REGISTRY.values() if place(cls) == name), key=lambda cls: cls.info.name)
        links = ", ".join(f"[{cls.__name__}](methods.md#{cls.__name__.lower()})" for cls in here)
        lines += [f"## {title}", "", f"![{title}](figures/place_{name}.svg)", "", links or "None yet.", ""]
    return "\n".join(lines).rstrip() + "\n"


def write() -> None:
    if unknown := set(PLACE.values()) - set(TITLES):
        raise ValueError(f"PLACE names places that are not drawn: {sorted(unknown)}.")
    for name in TITLES:
        (FIGURES / f"place_{name}.svg").write_text(picture(name))
    Path(__file__).with_name("places.md").write_text(page())


if __name__ == "__main__":
    write()
