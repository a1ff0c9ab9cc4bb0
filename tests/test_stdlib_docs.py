"""The embedded data set: docstrings of the standard library by chapter of its reference."""

import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from lightning_peft.tasks import StdlibDocs
from lightning_peft.tasks.data import Example
from lightning_peft.tasks.stdlib_docs import (
    CHAPTERS,
    IMPLEMENTATION,
    assign,
    build,
    files,
    first_paragraph,
    read,
    split,
)

REMOVED = (
    "aifc asynchat asyncore audioop binhex cgi cgitb chunk crypt distutils idlelib imghdr imp lib2to3 mailcap msilib"
    " nis nntplib ossaudiodev pipes smtpd sndhdr spwd sunau telnetlib test tkinter uu xdrlib"
)


@pytest.fixture(scope="module")
def docs():
    return StdlibDocs(tokenizer="bytes")


def test_sizes_are_what_the_docs_promise(docs):
    assert len(CHAPTERS) == docs.num_classes == 12
    assert sum(map(len, docs.splits.values())) >= 4000
    for name, share in {"train": 0.6, "val": 0.1, "test": 0.3}.items():
        counts = Counter(example.label for example in docs.splits[name])
        assert set(counts) == set(CHAPTERS)
        assert max(counts.values()) / sum(counts.values()) < 0.12
        assert sum(counts.values()) / sum(map(len, docs.splits.values())) == pytest.approx(share, abs=0.03)


def test_the_table_names_only_modules_of_every_python():
    modules = [module for names in CHAPTERS.values() for module in names.split()]
    assert len(modules) == len(set(modules))
    assert set(modules).isdisjoint(REMOVED.split())
    assert set(IMPLEMENTATION) <= set(modules)
    assert {module.partition(".")[0] for module in modules} <= sys.stdlib_module_names


def test_no_file_and_no_text_is_in_two_splits(docs):
    splits = list(docs.splits.values())
    for what in ("source", "text"):
        seen = [{getattr(example, what) for example in examples} for examples in splits]
        assert sum(map(len, seen)) == len(set.union(*seen))
    everything = [example.text for examples in splits for example in examples]
    assert len(everything) == len(set(everything))


def test_texts_are_clean_and_do_not_start_with_their_module(docs):
    for examples in docs.splits.values():
        for text, _, source in examples:
            assert text == " ".join(text.split())
            assert len(text.split()) >= 4
            assert ">>>" not in text
            assert not text.startswith((f"{Path(source).stem} --", f"{Path(source).stem} - ", f"{Path(source).stem}:"))


def test_the_build_is_deterministic_and_its_hash_is_exposed(docs):
    build.cache_clear()
    again = StdlibDocs(tokenizer="bytes")
    assert again.splits == docs.splits
    assert again.fingerprint == docs.fingerprint
    assert len(docs.fingerprint) == 64


def test_the_largest_file_goes_where_most_is_lacking():
    assert assign({"a": 60, "b": 30, "c": 10}) == {"a": "train", "b": "test", "c": "val"}
    rows = [
        Example(f"{file}{i}", "markup", file) for file, size in {"a": 6, "b": 3, "c": 1}.items() for i in range(size)
    ]
    assert {name: len(part) for name, part in split(rows).items()} == {"train": 6, "val": 1, "test": 3}


@pytest.mark.parametrize(
    ("docstring", "paragraph"),
    [
        ("Open  a\n   file for reading.\n\nMore.", "Open a file for reading."),
        ("copy -- make a copy of it", "make a copy of it"),
        ("Return the name.", ""),
        ("", ""),
        (">>> this is a doctest", ""),
    ],
)
def test_first_paragraph(docstring, paragraph):
    assert first_paragraph(docstring, "copy") == paragraph


def test_a_text_that_two_chapters_claim_is_left_out(tmp_path):
    for names in CHAPTERS.values():
        for module in names.split():
            file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text('"""The same text for everybody."""')
    (tmp_path / "xml.py").write_text('"""Only here, said twice."""\ndef f():\n    "Only here: said twice."')
    assert read(tmp_path) == [Example("Only here, said twice.", "markup", "xml.py")]


def test_missing_sources_are_an_error_with_a_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no source file for the module 'json'.*TextFile"):
        files("json", tmp_path)


def test_packages_are_read_whole_but_for_tests():
    root = Path(sysconfig.get_path("stdlib"))
    names = {path.relative_to(root).as_posix() for path in files("json", root)}
    assert {"json/decoder.py", "json/encoder.py"} <= names
    assert not any("test" in path.relative_to(root).parts for path in files("unittest", root))


def test_batches_are_at_most_48_tokens(docs):
    docs.setup("fit")
    batch = next(iter(docs.train_dataloader()))
    assert batch["input_ids"].shape[0] == 32
    assert batch["input_ids"].shape[1] <= 48
    assert batch["labels"].max() < 12
