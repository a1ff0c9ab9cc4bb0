"""Optional packages: imported where they are used, with an error that names the extra to install."""

from importlib import import_module
from types import ModuleType

EXTRAS = {"transformers": "hf", "datasets": "hf", "tokenizers": "hf", "sklearn": "demo"}
"""top-level package -> extra of `lightning_peft` that brings it"""


def optional(module: str, why: str) -> ModuleType:
    """Import `module`; ImportError with the command that installs it, if it is not there."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        extra = EXTRAS[module.partition(".")[0]]
        raise ImportError(
            f"{why} needs {error.name!r}, which is not installed. Run: pip install 'lightning_peft[{extra}]'"
        ) from error
