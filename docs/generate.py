"""Writes what the docs take from the code: the table in README.md, docs/methods.md, docs/choosing.md,
docs/places.md, conf/peft/*.yaml, figures.

    python docs/generate.py

A table keeps its footer (command, versions, date) as long as its rows stay the same, so that running this twice, or on
another day, changes nothing. Needs transformers for the counts on BERT-base, which is built without memory.
"""

from __future__ import annotations

import datetime
import inspect
import re
from pathlib import Path

import figure
import places
import torch
import transformers

import lightning_peft
from lightning_peft import catalogue, schema
from lightning_peft.core.method import REGISTRY, Method

ROOT = Path(__file__).parents[1]
START, END = "<!-- methods: start, written by docs/generate.py -->", "<!-- methods: end -->"
COMMAND = "python docs/generate.py"


def bert_base() -> torch.nn.Module:
    with torch.device("meta"):
        return transformers.BertModel(transformers.BertConfig())


def methods_table() -> str:
    """The registry with counts on BERT-base (no head), as `lightning-peft methods --markdown` prints it."""
    return catalogue.markdown(catalogue.rows(bert_base())).replace("| trainable |", "| trains on BERT-base |", 1)


def footer() -> str:
    today = datetime.date.today().isoformat()
    versions = f"lightning_peft {lightning_peft.__version__}, torch {torch.__version__.split('+')[0]}"
    return (
        f"*`{COMMAND}`, {versions}, transformers {transformers.__version__}, {today}; each method with its defaults.*"
    )


def with_table(text: str, table: str) -> str:
    """The text with the rows between the markers replaced, and the footer too if they changed."""
    before, _, rest = text.partition(START)
    old, _, after = rest.partition(END)
    kept = re.search(r"^\*`.*\*$", old, re.MULTILINE)
    foot = kept.group(0) if kept and table in old else footer()
    return f"{before}{START}\n{table}\n\n{foot}\n{END}{after}"


def choosing_table() -> str:
    """What every method declares of its costs, and what its defaults train on BERT-base."""
    table = catalogue.markdown(catalogue.rows(bert_base(), catalogue.properties))
    return table.replace("| trainable |", "| trains on BERT-base |", 1)


def page() -> str:
    head = [
        "# Methods",
        "",
        "Written by `docs/generate.py` from the registry. Fields that every method has:",
        "",
        *fields(Method, own=False),
        "",
    ]
    classes = sorted(REGISTRY.values(), key=lambda cls: (cls.info.family, cls.info.name))
    return "\n".join([*head, *(line for cls in classes for line in section(cls))]).rstrip() + "\n"


def section(cls: type[Method]) -> list[str]:
    info = cls.info
    paper = f" · [{info.paper}](https://arxiv.org/abs/{info.paper})" if info.paper else ""
    facts = f"{info.family} · mergeable: {'yes' if info.mergeable else 'no'} · the base at step 0: "
    body = (inspect.getdoc(cls) or "").partition("\n")[2].strip()
    return [
        f"## {cls.__name__}",
        "",
        f"`{info.equation}`",
        "",
        f"{facts}{'yes' if info.identity else 'no'}{paper} · [source](../{source(cls)})",
        "",
        *(body.splitlines() or []),
        "",
        *fields(cls, own=True),
        "",
        "```",
        schema.example(cls),
        "```",
        "",
    ]


def source(cls: type[Method]) -> str:
    return Path(inspect.getfile(cls)).resolve().relative_to(ROOT).as_posix()


def fields(cls: type[Method], own: bool) -> list[str]:
    """A table of fields: all, or those that the class adds or whose default it changes."""
    common = {f.name: schema.default(f) for f in schema.method_fields(Method)}
    rows = [f for f in schema.method_fields(cls) if not own or common.get(f.name, f) != schema.default(f)]
    if not rows:
        return ["No fields of its own."]
    said = schema.comments(cls)
    lines = [
        f"| `{f.name}` | `{str(f.type).replace(' | ', ' or ')}` | `{schema.default(f)!r}` | {in_cell(said.get(f.name, ''))} |"
        for f in rows
    ]
    return ["| field | type | default | |", "|---|---|---|---|", *lines]


def in_cell(text: str) -> str:
    """Text for a cell of a table, which a norm's bars would otherwise cut in two."""
    return text.replace("|", r"\|")


def main() -> None:
    (ROOT / "docs" / "figures").mkdir(exist_ok=True)
    (ROOT / "docs" / "figures" / "architecture.svg").write_text(figure.draw())
    (ROOT / "docs" / "methods.md").write_text(page())
    places.write()
    choosing = ROOT / "docs" / "choosing.md"
    choosing.write_text(with_table(choosing.read_text(), choosing_table()))
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), methods_table()))
    list(schema.write(ROOT / "conf" / "peft"))


if __name__ == "__main__":
    main()
