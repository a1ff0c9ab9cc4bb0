"""Docstrings of the Python standard library, classified by the chapter of the Library Reference their module is in.

The texts are read from the interpreter's own sources with `ast`, so the data set needs no download and no licence; the
table below (chapter -> modules, after https://docs.python.org/3/library) is the only annotation. The modules are those
that every CPython 3.10-3.13 build has; small neighbouring chapters are joined and some modules are left out, to keep
the twelve classes of like size. The split is by source file: what is tested is whether a module never seen before is
recognised.
"""

import ast
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_peft.tasks.data import Example, Splits, TextData

CHAPTERS = {
    "concurrency": "concurrent multiprocessing queue sched subprocess threading",
    "data types": "bisect calendar collections collections.abc copy datetime enum graphlib heapq pprint reprlib types"
    " weakref zoneinfo",
    "development tools": "doctest pydoc typing unittest",
    "file formats": "bz2 configparser copyreg csv dbm gzip lzma netrc pickle plistlib shelve tarfile zipfile",
    "importing": "importlib modulefinder pkgutil runpy zipimport",
    "internet data": "base64 email json mailbox mimetypes quopri",
    "internet protocols": "ftplib http imaplib poplib smtplib urllib webbrowser wsgiref",
    "markup": "html xml",
    "networking": "asyncio selectors signal socket ssl",
    "numeric": "decimal fractions functools numbers operator random statistics",
    "operating system": "argparse ctypes curses getopt getpass io logging os platform",
    "runtime": "__future__ abc bdb code codeop contextlib dataclasses inspect pdb profile pstats site sysconfig timeit"
    " trace traceback tracemalloc warnings",
}
"""Chapter -> the public modules it stands for; a package stands for all its files."""

IMPLEMENTATION = {
    "collections.abc": ["_collections_abc"],
    "datetime": ["_pydatetime", "_strptime"],
    "decimal": ["_pydecimal"],
    "io": ["_pyio"],
    "profile": ["cProfile"],
    "weakref": ["_weakrefset"],
}
"""Public module -> the private files that hold its code in some version."""

WORDS = 4
"""A first paragraph of fewer words ("Return the name.") says nothing about its chapter."""

SHARES = {"train": 0.6, "val": 0.1, "test": 0.3}
"""A large test split, since what is measured on it has an interval of +-1.96 sqrt(p (1 - p) / n)."""


def files(module: str, root: Path) -> list[Path]:
    """The source files of a module: its own or, for a package, all below it, and those of `IMPLEMENTATION`."""
    found: list[Path] = []
    for name in [module, *IMPLEMENTATION.get(module, [])]:
        path = root.joinpath(*name.split("."))
        found += [path.with_suffix(".py")] if path.with_suffix(".py").is_file() else sorted(path.rglob("*.py"))
    if not found:
        raise FileNotFoundError(
            f"The standard library at {root} has no source file for the module {module!r}. This data set reads the"
            " interpreter's own .py files: use a Python that ships them, or another data set (TextFile, HFText)."
        )
    return [path for path in found if "test" not in path.relative_to(root).parts]


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a file: module, classes, functions and methods, in the order of `ast.walk`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def first_paragraph(docstring: str, module: str) -> str:
    """The first paragraph on one line, without the module's own name in front; "" if there is nothing to learn from."""
    text = " ".join(docstring.split("\n\n", 1)[0].split())
    text = re.sub(rf"^{re.escape(module)}(\.py)?\s*[-:]+\s*", "", text)
    return text if len(text.split()) >= WORDS and ">>>" not in text else ""


def read(root: Path) -> list[Example]:
    """All examples below `root`; a text is kept once, and not at all when two chapters claim it."""
    first: dict[str, Example] = {}
    chapters = defaultdict(set)
    for chapter, modules in CHAPTERS.items():
        for module in modules.split():
            for path in files(module, root):
                for docstring in docstrings(path):
                    text = first_paragraph(docstring, module)
                    key = re.sub(r"\W+", " ", text.casefold()).strip()
                    chapters[key].add(chapter)
                    first.setdefault(key, Example(text, chapter, path.relative_to(root).as_posix()))
    return [example for key, example in first.items() if key and len(chapters[key]) == 1]


def assign(sizes: dict[str, int]) -> dict[str, str]:
    """file -> split: the largest file first, each to the split that lacks most of its share."""
    lacking = {split: share * sum(sizes.values()) for split, share in SHARES.items()}
    where = {}
    for file in sorted(sizes, key=lambda file: (-sizes[file], file)):
        where[file] = max(lacking, key=lambda split: lacking[split])
        lacking[where[file]] -= sizes[file]
    return where


def split(examples: list[Example]) -> Splits:
    """`SHARES` of each chapter by whole files, deterministic."""
    parts: Splits = {name: [] for name in SHARES}
    for chapter in CHAPTERS:
        rows = [example for example in examples if example.label == chapter]
        where = assign(Counter(example.source for example in rows))
        for example in rows:
            parts[where[example.source]].append(example)
    return parts


@lru_cache
def build(root: Path | None = None) -> Splits:
    """The data set from the standard library at `root` (default: the running interpreter's)."""
    return split(read(root or Path(sysconfig.get_path("stdlib"))))


class StdlibDocs(TextData):
    """first paragraph of a docstring -> chapter of the Library Reference (12 classes, about 4,300 examples)

    `fingerprint` is the sha256 of the content. The other arguments are those of `TextData`.
    """

    def __init__(self, max_length: int = 48, **kwargs: Any) -> None:
        super().__init__(max_length=max_length, **kwargs)

    @override
    def load(self) -> Splits:
        return build()
