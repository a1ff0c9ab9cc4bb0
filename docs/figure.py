"""Draws docs/figures/architecture.svg: what the README shows. Run by docs/generate.py; plain text, the same every time."""

from __future__ import annotations

from pathlib import Path

INK, LINE, BASE, OURS, SOFT = "#1f2933", "#7b8794", "#e4e7eb", "#cde7d8", "#f5f7fa"
FONT = 'font-family="DejaVu Sans, Helvetica, Arial, sans-serif"'


def box(
    x: float, y: float, w: float, h: float, lines: list[str], fill: str = BASE, size: int = 13, dash: bool = False
) -> str:
    dashed = ' stroke-dasharray="5 4"' if dash else ""
    top = y + h / 2 - (len(lines) - 1) * (size + 4) / 2 + size / 3
    text = "".join(
        f'<text x="{x + w / 2}" y="{top + i * (size + 4):.1f}" text-anchor="middle" font-size="{size}" fill="{INK}">{line}</text>'
        for i, line in enumerate(lines)
    )
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="7" fill="{fill}" stroke="{LINE}"{dashed}/>{text}'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{LINE}" stroke-width="1.6" marker-end="url(#head)"/>'


def label(x: float, y: float, text: str, size: int = 14, bold: bool = False, anchor: str = "start") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{INK}" text-anchor="{anchor}"{weight}>{text}</text>'


def life_cycle() -> str:
    steps = [
        (["build the model", "__init__, setup,", "configure_model"], BASE),
        (["inject and freeze", "LoRA(rank=8)", "at the roles q, v"], OURS),
        (["restore weights", "adapters only,", "keys checked"], OURS),
        (["move, wrap", "strategy,", "precision"], BASE),
        (["optimizers", "see what trains,", "nothing else"], BASE),
        (["audit", "chosen = trainable", "= in the optimizer"], OURS),
        (["train", "checkpoints hold", "no frozen tensor"], BASE),
    ]
    out, width = [label(20, 30, "1  In a Trainer: callbacks=[LoRA(rank=8)]", 15, True)], 132
    for i, (lines, fill) in enumerate(steps):
        x = 20 + i * (width + 18)
        out.append(box(x, 46, width, 74, lines, fill, 12))
        if i:
            out.append(arrow(x - 18, 83, x - 2, 83))
    return "".join(out)


def around() -> str:
    out = [label(20, 166, "2  In a model: adapters around modules, names kept", 15, True)]
    out.append(box(20, 182, 500, 196, [], SOFT))
    out.append(label(36, 204, "layers.0.self_attn.q_proj", 12, True))
    out.append(label(36, 222, "class, parameters and keys of the base unchanged", 11))
    out.append(box(60, 238, 440, 122, [], OURS, dash=True))
    out.append(label(74, 258, "adapters.second", 12))
    out.append(box(90, 270, 380, 78, [], OURS, dash=True))
    out.append(label(104, 290, "adapters.lora: y = base(x) + s B A x", 12))
    out.append(box(180, 300, 200, 36, ["base: W x + b"], BASE, 13))
    return "".join(out)


def house() -> str:
    out = [label(560, 166, "3  In the code: imports run one way", 15, True)]
    rows = [
        ("core", "places, adapters, state, files: torch and safetensors only", BASE),
        ("callback, checkpoint, resume", "the life cycle, once for all methods", OURS),
        ("methods", "one short file each: equation, fields, registration", OURS),
        ("strategies, tasks, tracking", "what a run needs beside a method", BASE),
        ("schema, train, cli, conf/", "Hydra and the command line, made from the registry", BASE),
    ]
    for i, (name, what, fill) in enumerate(rows):
        y = 182 + i * 40
        out.append(box(560, y, 490, 34, [], fill))
        out.append(label(572, y + 22, name, 12, True) + label(1040, y + 22, what, 11, anchor="end"))
        if i:
            out.append(arrow(550, y + 17, 550, y - 20))
    return "".join(out)


def draw() -> str:
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker></defs>'
    )
    body = life_cycle() + around() + house()
    frame = '<rect width="1070" height="396" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1070 396" {FONT}>{head}{frame}{body}</svg>\n'.replace(
        "><", ">\n<"
    )


if __name__ == "__main__":
    Path(__file__).with_name("figures").joinpath("architecture.svg").write_text(draw())
